"""The iterative Newton method: inverses by products of matrices, and the predictors it is compared with.

Fu, Chen, Jia, Sharan: Transformers Learn to Achieve Second-Order Convergence Rates for In-Context Linear
Regression, NeurIPS 2024, arXiv 2310.17086. The iteration is Schulz's, ZAMM 13 (1933), 57-59.
"""

from optex.solvers.newton_schulz.in_context import (
    gradient_descent_predictor,
    iterative_newton_predictor,
    online_gradient_descent_predictor,
    similarity_of_errors,
)
from optex.solvers.newton_schulz.inverse import newton_schulz_inverse

__all__ = [
    "gradient_descent_predictor",
    "iterative_newton_predictor",
    "newton_schulz_inverse",
    "online_gradient_descent_predictor",
    "similarity_of_errors",
]
