"""The family's step rules, each a ``torch.optim.Optimizer``, one paper a file."""

from optex.optimizers.accelerated import NAG, HeavyBall, TripleMomentum
from optex.optimizers.adagrad_norm import AdaGradNorm
from optex.optimizers.adahessian import AdaHessian, hutchinson_diagonal
from optex.optimizers.gns import (
    GNS,
    Curvature,
    DenseCurvature,
    Metric,
    NoCurvature,
    ProductCurvature,
    RankOneCurvature,
    WindowCurvature,
    power_fisher,
    power_gauss_newton,
)
from optex.optimizers.mezo import BlockStreamer, MeZO, Traffic, language_model_blocks
from optex.optimizers.mfac import MFAC
from optex.optimizers.mkor import MKOR
from optex.optimizers.policy import HARPG, NIGT
from optex.optimizers.scale import SCALE, scale_param_groups
from optex.optimizers.step_rule import StepRule

__all__ = [
    "AdaGradNorm",
    "AdaHessian",
    "BlockStreamer",
    "Curvature",
    "DenseCurvature",
    "GNS",
    "HARPG",
    "HeavyBall",
    "MFAC",
    "MKOR",
    "MeZO",
    "Metric",
    "NAG",
    "NIGT",
    "NoCurvature",
    "ProductCurvature",
    "RankOneCurvature",
    "SCALE",
    "StepRule",
    "Traffic",
    "TripleMomentum",
    "WindowCurvature",
    "hutchinson_diagonal",
    "language_model_blocks",
    "power_fisher",
    "power_gauss_newton",
    "scale_param_groups",
]
