"""Weights of a fields-of-experts denoiser, learned on digit images: a bilevel problem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn

from optex.checks import check_integer
from optex.sources import InexactBilevelSource, SmoothBilevel
from optex.sources.inexact_bilevel import solve_lower
from optex.studies.problems.interface import Problem, seeded_generator
from optex.studies.problems.tabular import scikit_learn_arrays

__all__ = ["Denoise", "denoising", "digit_pairs"]

_SMOOTHING: Final = 0.05  # ν in |t| ≈ sqrt(t² + ν²) - ν, in grey levels from 0 to 1
_NOISE: Final = 0.2
_START: Final = math.log(0.02)
_SIDE: Final = 8
_UNROLLED: Final = 100


@final
class Denoise(Problem):
    """Learn how strongly a denoiser penalises the response of each of eight filters, d = 8.

    The lower level denoises the images y, the upper level compares the result with the images without noise,
    x*:

        h(x, θ) = ½ ‖x - y‖² + Σ_k exp(θ_k) Σ_p φ((F_k x)_p),    φ(t) = sqrt(t² + ν²) - ν
        g(x) = ½ ‖x - x*‖² / n

    F_k are the 3 × 3 cosine filters without the constant one, applied inside the image; y = x* + 0.2 N(0, I). h
    is smooth, and strongly convex in x with μ = 1. Gradients come from ``InexactBilevelSource``.

    Args:
        seed: of the start, θ_k = log 0.02 + N(0, ½²).
        images: n, from 1 to 1,000: the first so many of the training images.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.

    Source: the setting of Salehi et al., arXiv 2308.10098, on scikit-learn's digits.
    """

    name = "denoise"

    def __init__(self, seed: int = 0, images: int = 40) -> None:
        super().__init__(seed)
        check_integer("Denoise", "images", images, least=1, most=1000)
        clean, noisy = digit_pairs(images)
        self.log_weights: nn.Parameter = nn.Parameter(torch.empty(len(cosine_filters()), dtype=torch.float64))
        self.levels: SmoothBilevel = denoising(clean, noisy)
        self.reset()

    def forward(self, batch: None) -> Tensor:
        """The loss after 100 accelerated steps on the lower level, which autograd can differentiate.

        It is for evaluators that differentiate by themselves; ``source`` and ``evaluate`` solve the lower level
        to a given accuracy.
        """
        filters, weights = cosine_filters().flatten(0, 1), self.log_weights.exp()
        strengths = weights.repeat_interleave(len(filters) // len(weights))  # [8 · 36]
        lipschitz = 1 + (weights * _squared_norms()).sum() / _SMOOTHING
        momentum = (lipschitz.sqrt() - 1) / (lipschitz.sqrt() + 1)
        x = previous = self.levels.start
        for _ in range(_UNROLLED):
            z = x + momentum * (x - previous)
            responses = z @ filters.mT
            slopes = strengths * responses / (responses.square() + _SMOOTHING**2).sqrt()
            previous, x = x, z - (z - self.levels.start + slopes @ filters) / lipschitz
        return self.levels.upper(x)

    def batches(self) -> Iterator[None]:
        return repeat(None)

    def evaluate(self) -> float:
        solved = solve_lower(self.levels, [self.log_weights], self.levels.start, 1e-5)
        return float(self.levels.upper(solved.x))

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        self.log_weights.normal_(_START, 0.5, generator=generator)

    def source(self) -> InexactBilevelSource:
        return InexactBilevelSource(self.levels, [self.log_weights])

    @property
    def deterministic(self) -> bool:
        return True


@lru_cache(maxsize=1)
def cosine_filters() -> Tensor:  # [8, 36, 64] float64
    """The 3 × 3 discrete cosine filters of unit norm, without the constant one, as matrices on 8 × 8 images."""
    index = torch.arange(3, dtype=torch.float64)
    waves = torch.stack([torch.cos(math.pi * (index + 0.5) * k / 3) for k in range(3)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    kernels = torch.einsum("ai,bj->abij", waves, waves).reshape(9, 1, 3, 3)[1:]
    images = torch.eye(_SIDE**2, dtype=torch.float64).reshape(-1, 1, _SIDE, _SIDE)
    return torch.nn.functional.conv2d(images, kernels).flatten(2).permute(1, 2, 0).contiguous()


def digit_pairs(images: int, *, held_out: bool = False) -> tuple[Tensor, Tensor]:  # [n, 64] twice; float64
    """Digit images with grey levels from 0 to 1, and the same images with noise.

    Args:
        images: n.
        held_out: whether to take the last images instead of the first, with other noise.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    inputs, _ = scikit_learn_arrays("load_digits", Denoise.name)
    rows = np.random.default_rng(0).permutation(len(inputs))
    rows = rows[-images:] if held_out else rows[:images]
    clean = torch.tensor(inputs[rows] / 16.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1 if held_out else 0)
    return clean, clean + _NOISE * torch.randn(clean.shape, generator=generator, dtype=torch.float64)


def denoising(
    clean: Tensor,  # [n, 64]
    noisy: Tensor,  # [n, 64]
) -> SmoothBilevel:
    """The two levels for these images; θ [8] are the logarithms of the weights."""
    return SmoothBilevel(
        lower=_Lower(noisy),
        upper=_Upper(clean),
        start=noisy,
        strong_convexity=1.0,
        lower_lipschitz=_Lipschitz(),
        upper_lipschitz=1 / len(clean),
    )


class _Lower:
    """h; a class, so that it can be sent to other processes."""

    def __init__(self, noisy: Tensor) -> None:
        self.noisy = noisy

    def __call__(self, x: Tensor, log_weights: Tensor) -> Tensor:  # []
        filters = cosine_filters()
        responses = x @ filters.flatten(0, 1).mT  # [n, 8 · 36]
        penalties = ((responses.square() + _SMOOTHING**2).sqrt() - _SMOOTHING).sum(0)
        of_filters = penalties.reshape(len(filters), -1).sum(1)
        return (x - self.noisy).square().sum() / 2 + log_weights.exp() @ of_filters


class _Upper:
    """g."""

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean

    def __call__(self, x: Tensor) -> Tensor:  # []
        return (x - self.clean).square().sum() / (2 * len(self.clean))


class _Lipschitz:
    """1 + Σ_k exp(θ_k) ‖F_k‖² / ν, since φ'' ≤ 1 / ν."""

    def __call__(self, log_weights: Tensor) -> float:
        return 1.0 + float(log_weights.exp() @ _squared_norms()) / _SMOOTHING


@lru_cache(maxsize=1)
def _squared_norms() -> Tensor:  # [8]
    return torch.linalg.matrix_norm(cosine_filters(), 2).square()
