"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.dcdm import DCDMLoss, DirectionNetwork, RitzVectors, dcdm, ritz_vectors
from optex.solvers.outcome import Status, outcome

__all__ = [
    "SOLVERS",
    "DCDMLoss",
    "DirectionNetwork",
    "RitzVectors",
    "Status",
    "dcdm",
    "outcome",
    "ritz_vectors",
]

# What `optex list` says of each.
SOLVERS: dict[str, str] = {
    "dcdm": "conjugate gradients along directions that a network proposes (Kaneda et al., ICML 2023)",
}
