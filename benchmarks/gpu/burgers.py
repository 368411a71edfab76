"""A physics-informed network: Burgers' equation, whose residual needs derivatives by the network's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import grad

from optex.studies.problems import Problem
from optex.studies.problems.interface import seeded_generator
from optex.studies.problems.networks import initialise

VISCOSITY = 0.01 / math.pi


class Burgers(Problem):
    """u_t + u u_x = ν u_xx on [0, 1] × [-1, 1], u(0, x) = -sin πx, u(t, ±1) = 0, by a tanh network.

    A batch is points drawn at random: inside, at the beginning, at the two ends. The loss is the sum of the
    mean squares of the equation's residual and of what is missing at the beginning and the ends; the objective
    is that on a grid.

    Derivatives by t and x are torch.func's, so that gradients can be taken in one vmap and by backward().

    Args:
        seed: of the start and of the points.
        width, depth: of the network's hidden layers.
        batch_size: points inside; a quarter of that at the beginning and at the ends.

    Source: Raissi, Perdikaris, Karniadakis, *Physics-informed neural networks*, 2019, section 3.1.1.
    """

    name = "burgers"

    def __init__(self, seed: int = 0, width: int = 32, depth: int = 4, batch_size: int = 256) -> None:
        super().__init__(seed)
        self.batch_size = batch_size
        layers: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.Tanh()]
        with torch.random.fork_rng(devices=[]):  # layers draw an initialisation that is replaced below
            self.network = nn.Sequential(*layers, nn.Linear(width, 1))
        self.reset()

    def forward(
        self,
        batch: tuple[Tensor, Tensor, Tensor],  # [n, 2] inside, [m] at the beginning, [m] at the ends: times
    ) -> Tensor:
        inside, beginning, times = batch
        residual = self._residual(inside)
        start = self.network(torch.stack([torch.zeros_like(beginning), beginning], 1))[:, 0]
        missing = start + torch.sin(math.pi * beginning)
        ends = [self.network(torch.stack([times, torch.full_like(times, end)], 1)) for end in (-1.0, 1.0)]
        return residual.square().mean() + missing.square().mean() + sum(u.square().mean() for u in ends)

    def _residual(self, points: Tensor) -> Tensor:  # [n, 2] -> [n]
        # A point's output is of that point alone: the gradient of their sum has each one's derivatives.
        def first(at: Tensor) -> Tensor:  # [n, 2]
            return grad(lambda places: self.network(places).sum())(at)

        u, (u_t, u_x) = self.network(points)[:, 0], first(points).T
        u_xx = grad(lambda at: first(at)[:, 1].sum())(points)[:, 1]
        return u_t + u * u_x - VISCOSITY * u_xx

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = seeded_generator(self.seed, "batches")
        like, edge = next(self.parameters()), max(self.batch_size // 4, 1)
        while True:
            inside = torch.rand(self.batch_size, 2, generator=generator)
            beginning, times = torch.rand(2, edge, generator=generator)
            inside[:, 1] = 2 * inside[:, 1] - 1
            yield inside.to(like), (2 * beginning - 1).to(like), times.to(like)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss on a grid."""
        like = next(self.parameters())
        times, places = torch.linspace(0, 1, 21), torch.linspace(-1, 1, 41)
        return float(self(tuple(v.to(like) for v in (torch.cartesian_prod(times, places), places, times))))

    def reset(self) -> None:
        initialise(self.network, seeded_generator(self.seed, "start"))
