"""Sources: what a gradient is, and what is known of it."""

from optex.sources.closure import ClosureSource
from optex.sources.consensus import ConsensusSource
from optex.sources.inexact_bilevel import InexactBilevelSource, LowerLevelError, SmoothBilevel
from optex.sources.interface import GradientSource
from optex.sources.objective import AccumulatingSource, LossModule, ObjectiveSource, backpropagate
from optex.sources.penalty_bilevel import PenaltyHypergradient
from optex.sources.per_sample import PerSampleSource
from optex.sources.sketched import (
    GaussianMechanism,
    Leakage,
    Sketch,
    SketchedSource,
    SketchState,
    leakage_attack,
    sketched_hook,
)
from optex.sources.spsa import SPSASource

__all__ = [
    "AccumulatingSource",
    "ClosureSource",
    "ConsensusSource",
    "GaussianMechanism",
    "GradientSource",
    "InexactBilevelSource",
    "Leakage",
    "LossModule",
    "LowerLevelError",
    "ObjectiveSource",
    "PenaltyHypergradient",
    "PerSampleSource",
    "SPSASource",
    "Sketch",
    "SketchState",
    "SketchedSource",
    "SmoothBilevel",
    "backpropagate",
    "leakage_attack",
    "sketched_hook",
]
