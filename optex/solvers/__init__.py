"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.outcome import Status, outcome

__all__ = ["SOLVERS", "Status", "outcome"]

# What `optex list` says of each.
SOLVERS: dict[str, str] = {}
