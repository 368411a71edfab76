"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.dcdm import DCDMLoss, DirectionNetwork, RitzVectors, dcdm, ritz_vectors
from optex.solvers.equality import equality_method, minimize_equality
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
    "minimize_equality",
    "optimal_omega",
    "outcome",
    "ritz_vectors",
    "sor",
    "sparse_ot",
    "ssor_pcg",
]
