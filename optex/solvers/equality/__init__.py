"""AdaSketch-Newton: equality constraints by inexact Newton steps on an exact augmented Lagrangian.

Hong, Na, Mahoney, Kolar: *Constrained Optimization via Exact Augmented Lagrangian and Randomized Iterative
Sketching*, ICML 2023, arXiv 2305.18379.
"""

from optex.solvers.equality.function import minimize_equality
from optex.solvers.equality.scipy_form import equality_method

__all__ = ["equality_method", "minimize_equality"]
