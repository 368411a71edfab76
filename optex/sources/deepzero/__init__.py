"""DeepZero: coordinate-wise gradients from losses alone (Chen et al., ICLR 2024, arXiv 2310.02025)."""

from optex.sources.deepzero.grasp import zo_grasp_ratios
from optex.sources.deepzero.mask import DynamicMask
from optex.sources.deepzero.passes import BlockLoss
from optex.sources.deepzero.source import CoordinateSource

__all__ = ["BlockLoss", "CoordinateSource", "DynamicMask", "zo_grasp_ratios"]
