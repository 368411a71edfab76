"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.equality import equality_method, minimize_equality
from optex.solvers.outcome import Status, outcome

__all__ = ["SOLVERS", "Status", "equality_method", "minimize_equality", "outcome"]

# What `optex list` says of each.
SOLVERS: dict[str, str] = {
    "minimize_equality": "AdaSketch-Newton: f(x) with c(x) = 0, by inexact Newton steps (arXiv 2305.18379)",
}
