"""Gradient-normalized smoothness: second-order steps regularised by the gradient's norm over γ.

Semenov, Jaggi, Doikov: *Gradient-Normalized Smoothness for Optimization with Approximate Hessians*, ICLR 2026,
arXiv 2506.13710.
"""

from optex.optimizers.gns.curvature import (
    Curvature,
    DenseCurvature,
    NoCurvature,
    RankOneCurvature,
    WindowCurvature,
    power_fisher,
    power_gauss_newton,
)
from optex.optimizers.gns.derivatives import gauss_newton_product, hessian_product
from optex.optimizers.gns.metric import Metric
from optex.optimizers.gns.optimizer import GNS
from optex.optimizers.gns.products import ProductCurvature
from optex.optimizers.gns.search import SearchSettings, StepSearch, Trial

__all__ = [
    "GNS",
    "Curvature",
    "DenseCurvature",
    "Metric",
    "NoCurvature",
    "ProductCurvature",
    "RankOneCurvature",
    "SearchSettings",
    "StepSearch",
    "Trial",
    "WindowCurvature",
    "gauss_newton_product",
    "hessian_product",
    "power_fisher",
    "power_gauss_newton",
]
