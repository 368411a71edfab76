"""Sources: what a gradient is, and what is known of it."""

from optex.sources.closure import ClosureSource
from optex.sources.consensus import ConsensusSource
from optex.sources.deepzero import BlockLoss, CoordinateSource, DynamicMask, zo_grasp_ratios
from optex.sources.inexact_bilevel import InexactBilevelSource, LowerLevelError, SmoothBilevel
from optex.sources.interface import GradientSource
from optex.sources.objective import AccumulatingSource, LossModule, ObjectiveSource, backpropagate
from optex.sources.penalty_bilevel import PenaltyHypergradient
from optex.sources.per_sample import PerSampleSource
from optex.sources.policy import (
    Environment,
    Episodes,
    GaussianPolicy,
    GymnasiumEnvironment,
    LinearQuadratic,
    SoftmaxPolicy,
    TrajectorySource,
)
from optex.sources.scalebio import LayerSampler, MinimaxPenaltySource, SourceWeights
from optex.sources.semi_dual import SemiDualSource
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
    "BlockLoss",
    "ClosureSource",
    "ConsensusSource",
    "CoordinateSource",
    "DynamicMask",
    "Environment",
    "Episodes",
    "GaussianMechanism",
    "GaussianPolicy",
    "GradientSource",
    "GymnasiumEnvironment",
    "InexactBilevelSource",
    "LayerSampler",
    "Leakage",
    "LinearQuadratic",
    "LossModule",
    "LowerLevelError",
    "MinimaxPenaltySource",
    "ObjectiveSource",
    "PenaltyHypergradient",
    "PerSampleSource",
    "SPSASource",
    "SemiDualSource",
    "Sketch",
    "SketchState",
    "SketchedSource",
    "SmoothBilevel",
    "SoftmaxPolicy",
    "SourceWeights",
    "TrajectorySource",
    "backpropagate",
    "leakage_attack",
    "sketched_hook",
    "zo_grasp_ratios",
]
