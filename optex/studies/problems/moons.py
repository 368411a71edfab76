"""Two half moons told apart by a small network, one coordinate at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, repeat
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from optex.sources import BlockLoss, CoordinateSource, GradientSource
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["TwoMoons", "two_moons"]

_TRAIN: Final = 200
_HELD_OUT: Final = 1000
_SCATTER: Final = 0.2
_WIDTH: Final = 16


def two_moons(count: int, scatter: float, seed: int) -> tuple[Tensor, Tensor]:  # [count, 2] float32, [count]
    """Points of two interleaved half circles, alternately of the one and the other, with normal scatter.

    Args:
        count: of points.
        scatter: standard deviation of each coordinate about the half circle.
        seed: of the points.

    >>> points, labels = two_moons(4, 0.0, seed=0)
    >>> points.square().sum(1)[labels == 0], labels
    (tensor([1., 1.]), tensor([0, 1, 0, 1]))
    """
    generator = np.random.default_rng(seed)
    angles, labels = generator.uniform(0, math.pi, count), np.arange(count) % 2
    upper = np.stack([np.cos(angles), np.sin(angles)], 1)
    lower = np.stack([1 - np.cos(angles), 0.5 - np.sin(angles)], 1)
    points = np.where(labels[:, None] == 0, upper, lower) + scatter * generator.standard_normal((count, 2))
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


@final
class TwoMoons(Problem):
    """A 2-16-16-2 tanh network on two half moons, d = 354, with gradients by :class:`~optex.CoordinateSource`.

    There are 200 points to train on, all in every batch, and 1,000 held out, the same points for every seed.

    Args:
        seed: of the start, uniform in ±1/√fan-in as for ``torch.nn.Linear``.
    """

    name = "two-moons"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.inputs: Tensor  # [200, 2]
        self.labels: Tensor  # [200]
        inputs, labels = two_moons(_TRAIN, _SCATTER, seed=0)
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        sizes = [2, _WIDTH, _WIDTH, 2]
        first, second, last = (nn.utils.skip_init(nn.Linear, a, b) for a, b in pairwise(sizes))
        blocks = [nn.Sequential(first, nn.Tanh()), nn.Sequential(second, nn.Tanh()), last]
        self.objective: BlockLoss = BlockLoss(blocks, self._cross_entropy, self._points)
        self.reset()

    def forward(self, batch: None) -> Tensor:
        return self.objective(batch)

    def _points(self, batch: None) -> Tensor:  # [200, 2]
        return self.inputs

    def _cross_entropy(
        self,
        scores: Tensor,  # [200, 2]
        batch: None,
    ) -> Tensor:  # []
        return functional.cross_entropy(scores, self.labels)

    def source(self) -> GradientSource:
        """Differences of losses, a coordinate at a time; the objective is never differentiated."""
        return CoordinateSource(self.objective, self.parameters(), vectorized=True, deterministic=True)

    def batches(self) -> Iterator[None]:
        return repeat(None)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self(None))

    @torch.no_grad()
    def test_error(self) -> float:
        """Share of the held-out points that the network gets wrong."""
        inputs, labels = (part.to(self.inputs.device) for part in two_moons(_HELD_OUT, _SCATTER, seed=1))
        wrong = self.objective.blocks(inputs.to(self.inputs.dtype)).argmax(1) != labels
        return float(wrong.double().mean())

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        for layer in self.objective.modules():
            if not isinstance(layer, nn.Linear):
                continue
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)

    @property
    def deterministic(self) -> bool:
        return True
