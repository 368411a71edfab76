"""Sources: what a gradient is, and what is known of it."""

from optex.sources.closure import ClosureSource
from optex.sources.consensus import ConsensusSource
from optex.sources.inexact_bilevel import InexactBilevelSource, LowerLevelError, SmoothBilevel
from optex.sources.interface import GradientSource
from optex.sources.objective import AccumulatingSource, LossModule, ObjectiveSource, backpropagate
from optex.sources.penalty_bilevel import PenaltyHypergradient
from optex.sources.per_sample import PerSampleSource
from optex.sources.semi_dual import SemiDualSource
from optex.sources.spsa import SPSASource

__all__ = [
    "AccumulatingSource",
    "ClosureSource",
    "ConsensusSource",
    "GradientSource",
    "InexactBilevelSource",
    "LossModule",
    "LowerLevelError",
    "ObjectiveSource",
    "PenaltyHypergradient",
    "PerSampleSource",
    "SPSASource",
    "SemiDualSource",
    "SmoothBilevel",
    "backpropagate",
]
