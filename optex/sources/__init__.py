"""Sources: what a gradient is, and what is known of it."""

from optex.sources.closure import ClosureSource
from optex.sources.interface import GradientSource
from optex.sources.objective import AccumulatingSource, ObjectiveSource
from optex.sources.penalty_bilevel import PenaltyHypergradient

__all__ = ["AccumulatingSource", "ClosureSource", "GradientSource", "ObjectiveSource", "PenaltyHypergradient"]
