"""Rounds whose time beyond gradients, memory and traffic benchmarks/overhead.py measures."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from traffic import STATES, Setting, memory_rows, round_work, total

import optex

__all__ = ["METHODS", "Bowl", "make_optimizer", "measure_point"]

ITEM: Final = 4  # bytes of a float32
RATES: Final = {"sgd": 0.02, "momentum": 0.01, "adam": 0.001}  # small: rounds are kept whole
BASES: Final = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}
METHODS: Final[dict[str, Callable[[], optex.Estimator]]] = {
    "separable": optex.SeparableEstimator,
    "curl-free": optex.CurlFreeEstimator,
    "hold-last": optex.HoldLast,
    "default": optex.CommitteeEstimator,
}


class Bowl(optex.GradientSource):
    """½ Σ c_i θ_i² / d, its gradient written down: what is measured is all that is not the gradient."""

    deterministic = True

    def __init__(self, theta: Tensor) -> None:
        self._theta = theta
        self._curvatures = torch.linspace(0.5, 1.5, len(theta))

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        point = self._theta.detach()
        self._theta.grad = point * self._curvatures
        return point @ self._theta.grad / (2 * len(point)), None


def make_optimizer(
    method: str, optimizer: str, theta: Tensor, parallelism: int, history: int, stride: int
) -> optex.OptEx:
    """OptEx around the base optimizer; ``stride`` is its bound."""
    base = BASES[optimizer]([theta], lr=RATES[optimizer])
    if method == "optex-paper":
        return optex.OptEx.from_paper(base, parallelism, history, deterministic=True)
    return optex.OptEx(
        base,
        parallelism=parallelism,
        stride=stride,
        history_size=history,
        estimator=METHODS[method](),
        deterministic=True,
    )
