"""A linear policy for a linear system with quadratic costs: its expected return is known exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, final

import torch
from scipy.optimize import fminbound
from torch import Tensor, nn

from optex.checks import check_integer
from optex.sources import GaussianPolicy, GradientSource, LinearQuadratic, TrajectorySource
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["LinearQuadraticPolicy"]

_DEVIATION: Final = 0.5
_DISCOUNT: Final = 0.99


@final
class LinearQuadraticPolicy(Problem):
    """Minus the discounted return of actions ~ N(k s + c, 0.25) in s' = 0.9 s + 0.5 a + 0.1 n, over 20 steps.

    The problem's source is a :class:`~optex.TrajectorySource`, with draws of its own. The loss of a batch is
    the cost of the batch's own trajectories; autograd differentiates it along them, which gives a gradient of
    the same objective with less noise, for methods that may know the system. The objective itself is exact.

    Args:
        seed: of the start, k and c uniform in ±0.3, and of the draws.
        trajectories: how many a gradient uses, at least 2.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "lq-policy"

    def __init__(self, seed: int = 0, trajectories: int = 50) -> None:
        super().__init__(seed)
        self.trajectories: int = check_integer("LinearQuadraticPolicy", "trajectories", trajectories, least=2)
        self.system: LinearQuadratic = LinearQuadratic()
        with torch.random.fork_rng(devices=[]):  # layers draw a start of their own, which reset() replaces
            self.policy: GaussianPolicy = GaussianPolicy(
                1, 1, hidden=(), deviation=_DEVIATION, dtype=torch.float64
            )
        self.reset()

    @property
    def _affine(self) -> tuple[Tensor, Tensor]:  # gain [1, 1], offset [1]
        layer = self.policy.mean[0]
        assert isinstance(layer, nn.Linear)
        return layer.weight, layer.bias

    def forward(
        self,
        batch: Tensor,  # [trajectories, 2 · horizon + 1], standard normal
    ) -> Tensor:
        system, (gain, offset) = self.system, self._affine
        A, B, Q, R = (m.reshape(()) for m in (system.A, system.B, system.Q, system.R))
        states = system.start * batch[:, 0]
        noise, chosen = batch[:, 1:].split(system.horizon, 1)
        total = torch.zeros_like(states)
        for t in range(system.horizon):
            actions = gain.reshape(()) * states + offset.reshape(()) + _DEVIATION * chosen[:, t]
            total = total + _DISCOUNT**t * (Q * states**2 + R * actions**2)
            states = A * states + B * actions + system.noise * noise[:, t]
        return total.mean()

    def source(self) -> GradientSource:
        return TrajectorySource(self.policy, self.system, self.trajectories, _DISCOUNT, baseline=True)

    @property
    def minimum(self) -> float:
        def value(k: float) -> float:  # noise and costs are symmetric about 0, and so the best offset is 0
            gain = torch.full((1, 1), k, dtype=torch.float64)
            return -float(self.system.expected_return(gain, 0 * gain[0], _DEVIATION, _DISCOUNT))

        # As a function of k the return is smooth and has one maximum, whose value is found to rounding.
        return float(fminbound(value, -1.8, 0.0, xtol=1e-9, full_output=True)[1])

    def batches(self) -> Iterator[Tensor]:
        generator = seeded_generator(self.seed, "batches")
        while True:
            yield torch.randn(
                self.trajectories, 2 * self.system.horizon + 1, generator=generator, dtype=torch.float64
            )

    @torch.no_grad()
    def evaluate(self) -> float:
        return -float(self.system.expected_return(*self._affine, _DEVIATION, _DISCOUNT))

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        for parameter in self._affine:
            parameter.uniform_(-0.3, 0.3, generator=generator)
