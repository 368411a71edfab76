"""Sources: what a gradient is, and what is known of it."""

from optex.sources.closure import ClosureSource
from optex.sources.inexact_bilevel import InexactBilevelSource, LowerLevelError, SmoothBilevel
from optex.sources.interface import GradientSource
from optex.sources.objective import AccumulatingSource, ObjectiveSource

__all__ = [
    "AccumulatingSource",
    "ClosureSource",
    "GradientSource",
    "InexactBilevelSource",
    "LowerLevelError",
    "ObjectiveSource",
    "SmoothBilevel",
]
