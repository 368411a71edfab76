"""The family's batch sizes: rules that set how many samples a gradient gets."""

from optex.batching.adadagrad import (
    AugmentedInnerProductTest,
    BatchSizeController,
    BatchSizeTest,
    CoordinateTest,
    InnerProductTest,
    NormTest,
)
from optex.batching.adaptive_batches import AdaptiveBatches
from optex.batching.statistics import GradientMoments, GradientStatistics, variance_of_mean

__all__ = [
    "AdaptiveBatches",
    "AugmentedInnerProductTest",
    "BatchSizeController",
    "BatchSizeTest",
    "CoordinateTest",
    "GradientMoments",
    "GradientStatistics",
    "InnerProductTest",
    "NormTest",
    "variance_of_mean",
]
