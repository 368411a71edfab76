"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.newton_schulz import (
    gradient_descent_predictor,
    iterative_newton_predictor,
    newton_schulz_inverse,
    online_gradient_descent_predictor,
    similarity_of_errors,
)
from optex.solvers.outcome import Status, outcome

__all__ = [
    "SOLVERS",
    "Status",
    "gradient_descent_predictor",
    "iterative_newton_predictor",
    "newton_schulz_inverse",
    "online_gradient_descent_predictor",
    "outcome",
    "similarity_of_errors",
]

# What `optex list` says of each.
SOLVERS: dict[str, str] = {
    "newton-schulz": "inverses by products of matrices (arXiv 2310.17086)",
}
