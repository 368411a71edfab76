"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.outcome import Status, outcome
from optex.solvers.transport import SparseOTLoss, sparse_ot

__all__ = ["SOLVERS", "SparseOTLoss", "Status", "outcome", "sparse_ot"]

# What `optex list` says of each.
SOLVERS: dict[str, str] = {
    "sparse_ot": "optimal transport with at most k nonzeros a column; SparseOTLoss",
}
