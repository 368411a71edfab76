"""A winding canyon with a rippled floor, optimised by function values alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, final

import torch
from torch import Tensor, nn

from optex.checks import check_integer
from optex.sources import ConsensusSource, GradientSource
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["Canyon", "canyon"]

_START: Final = 8.0
_ALPHA: Final = 2.0
_SIGMA: Final = 0.7


def canyon(
    points: Tensor,  # [..., 2]
) -> Tensor:  # [...]
    """The landscape of the source's figure: a curved canyon, ripples, a wall across; the minimum, 0, is at 0.

        V = Y - (2/16 (X - 1) (X - 4)² + 2),   B = -X - 1.6 Y
        E = 25 (1 - exp(-1.4 V² exp(-0.002 X⁴))) + 0.4 X² + 0.2 Y² + 1.1625 (2 - cos ¾πX - cos ¾πY)
            + 4 exp(1 - 2 V⁴) max(sign(B) (1 - exp(-9 B²)), 0)

    Source: Riedl, Klock, Geldhauser, Fornasier, arXiv 2306.09778, and the authors' code.

    >>> import torch
    >>> canyon(torch.zeros(2)), canyon(torch.tensor([[8.0, 8.0]])).round()
    (tensor(0.), tensor([39.]))
    """
    x, y = points[..., 0], points[..., 1]
    off = y - (0.125 * (x - 1) * (x - 4) ** 2 + 2)
    beyond = (-x - 1.6 * y).clamp_min(0)
    walls = 25 * (1 - torch.exp(-1.4 * off**2 * torch.exp(-0.002 * x**4)))
    slope = 0.4 * x**2 + 0.2 * y**2
    ripples = 1.1625 * (2 - torch.cos(0.75 * math.pi * x) - torch.cos(0.75 * math.pi * y))
    barrier = 4 * torch.exp(1 - 2 * off**4) * (1 - torch.exp(-9 * beyond**2))
    return walls + slope + ripples + barrier


@final
class Canyon(Problem):
    """The soft minimum of the canyon around θ, from samples: gradients without derivatives.

    The loss of a batch is ``-log(mean exp(-α E(θ + σ ε))) / α`` over its vectors ε ~ N(0, I), with α = 2 and
    σ = 0.7. The problem's source is a :class:`~optex.ConsensusSource`, which estimates the gradient of the same
    function from values alone, with draws of its own. The objective is E itself.

    Args:
        seed: of the start, uniform in (8 ± 0.5)², and of the draws.
        samples: vectors ε a gradient, at least 2.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "canyon"

    def __init__(self, seed: int = 0, samples: int = 200) -> None:
        super().__init__(seed)
        self.samples: int = check_integer("Canyon", "samples", samples, least=2)
        self.theta: nn.Parameter = nn.Parameter(torch.empty(2, dtype=torch.float64))
        self.reset()

    def forward(
        self,
        batch: Tensor,  # [samples, 2]
    ) -> Tensor:
        energies = canyon(self.theta + _SIGMA * batch)
        return (math.log(len(batch)) - torch.logsumexp(-_ALPHA * energies, 0)) / _ALPHA

    def source(self) -> GradientSource:
        return ConsensusSource(
            _at_points, [self.theta], samples=self.samples, alpha=_ALPHA, sigma=_SIGMA, vectorized=True
        )

    @property
    def minimum(self) -> float:
        return 0.0

    def batches(self) -> Iterator[Tensor]:
        generator = seeded_generator(self.seed, "batches")
        while True:
            yield torch.randn(self.samples, 2, generator=generator, dtype=self.theta.dtype)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(canyon(self.theta))

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        self.theta.uniform_(_START - 0.5, _START + 0.5, generator=generator)


def _at_points(
    points: Tensor,  # [N, 2]
    batch: object,
) -> Tensor:  # [N]
    del batch  # the source has draws of its own
    return canyon(points)
