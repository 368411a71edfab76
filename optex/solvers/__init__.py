"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.dcdm import DCDMLoss, DirectionNetwork, RitzVectors, dcdm, ritz_vectors
from optex.solvers.equality import equality_method, minimize_equality
from optex.solvers.outcome import Status, outcome
from optex.solvers.relaxation import BanditTuner, optimal_omega, sor, ssor_pcg

__all__ = [
    "BanditTuner",
    "DCDMLoss",
    "DirectionNetwork",
    "RitzVectors",
    "SOLVERS",
    "Status",
    "dcdm",
    "equality_method",
    "minimize_equality",
    "optimal_omega",
    "outcome",
    "ritz_vectors",
    "sor",
    "ssor_pcg",
]
