"""Hypergradients of a bilevel problem from inexact solves, with a bound of their error.

Salehi, Mukherjee, Roberts, Ehrhardt: *An adaptively inexact first-order method for bilevel optimization with
application to hyperparameter learning*, arXiv 2308.10098. The method that chooses the accuracies is
``optex.maid``; here they are given.
"""

from optex.sources.inexact_bilevel.implicit import Hypergradient, hypergradient
from optex.sources.inexact_bilevel.levels import LowerLevelError, SmoothBilevel
from optex.sources.inexact_bilevel.lower import LowerSolution, solve_lower
from optex.sources.inexact_bilevel.source import InexactBilevelSource

__all__ = [
    "Hypergradient",
    "InexactBilevelSource",
    "LowerLevelError",
    "LowerSolution",
    "SmoothBilevel",
    "hypergradient",
    "solve_lower",
]
