"""Estimators: predict the gradient at a new iterate from the history."""

from optex.estimators.committee import CommitteeEstimator, CommitteePosterior
from optex.estimators.curl_free import CurlFreeEstimator, CurlFreePosterior
from optex.estimators.history import GradientHistory
from optex.estimators.hold_last import HoldLast
from optex.estimators.interface import Estimator, Posterior
from optex.estimators.separable import SeparableEstimator, SeparablePosterior

__all__ = [
    "CommitteeEstimator",
    "CommitteePosterior",
    "CurlFreeEstimator",
    "CurlFreePosterior",
    "Estimator",
    "GradientHistory",
    "HoldLast",
    "Posterior",
    "SeparableEstimator",
    "SeparablePosterior",
]
