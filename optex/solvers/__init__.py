"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.dcdm import DCDMLoss, DirectionNetwork, RitzVectors, dcdm, ritz_vectors
from optex.solvers.equality import equality_method, minimize_equality
from optex.solvers.newton_schulz import (
    gradient_descent_predictor,
    iterative_newton_predictor,
    newton_schulz_inverse,
    online_gradient_descent_predictor,
    similarity_of_errors,
)
from optex.solvers.outcome import Status, outcome
from optex.solvers.relaxation import BanditTuner, optimal_omega, sor, ssor_pcg
from optex.solvers.transport import SparseOTLoss, sparse_ot

__all__ = [
    "BanditTuner",
    "DCDMLoss",
    "DirectionNetwork",
    "RitzVectors",
    "SOLVERS",
    "SparseOTLoss",
    "Status",
    "dcdm",
    "equality_method",
    "gradient_descent_predictor",
    "iterative_newton_predictor",
    "minimize_equality",
    "newton_schulz_inverse",
    "online_gradient_descent_predictor",
    "optimal_omega",
    "outcome",
    "ritz_vectors",
    "similarity_of_errors",
    "sor",
    "sparse_ot",
    "ssor_pcg",
]

# What `optex list` says of each.
SOLVERS: dict[str, str] = {
    "bandit-tuner": "learns a setting from what runs cost (arXiv 2310.02246)",
    "dcdm": "conjugate gradients along directions that a network proposes (ICML 2023)",
    "minimize-equality": "f(x) with c(x) = 0, by inexact Newton steps (arXiv 2305.18379)",
    "newton-schulz": "inverses by products of matrices (arXiv 2310.17086)",
    "sor": "successive over-relaxation (Young; arXiv 2310.02246)",
    "sparse-ot": "optimal transport with at most k nonzeros a column (ICLR 2023)",
    "ssor-pcg": "CG preconditioned by symmetric relaxation (arXiv 2310.02246)",
}
