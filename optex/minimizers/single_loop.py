"""The single loop of penalty bilevel optimization: one step of each variable at a time, with momentum.

Kwon, Kwon, Wright, Nowak: *On Penalty Methods for Nonconvex Bilevel Optimization and First-Order Stochastic
Approximation*, ICLR 2024, arXiv 2309.01753; its momentum is that of Cutkosky and Orabona: *Momentum-Based
Variance Reduction in Non-Convex SGD*, NeurIPS 2019, arXiv 1905.10018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optex.sources.levels import Levels

__all__ = ["SingleLoop"]


class SingleLoop:
    """x, y and z, moved one step each along running means of their gradients.

    At step k, with a batch ξ, and v one of ∇_y g(x, z), ∇_y f(x, y), ∇_y g(x, y), ∇_x f(x, y), ∇_x g(x, y),
    ∇_x g(x, z):

        ṽ_k = v(k; ξ) + (1 - η_k) (ṽ_{k-1} - v(k-1; ξ))             both at the same batch
        z ← z - γ_k g̃_z,   y ← y - γ_k (σ f̃_y + g̃_y),   x ← x - α_k (f̃_x + (g̃_x - g̃_xz) / σ)

    Every step depends on running means of all before it. So this is a loop of its own and no source of
    gradients: its steps can be neither drafted nor computed at once.

    Args:
        levels: f and g; the loop moves their parameters.
        alpha, rate: α_0 and γ_0.
        sampled: whether batches differ. Then η_k = (k + 1)^(-2/3) and both rates fall as (k + 1)^(-1/3), the
            schedule of the momentum's authors; otherwise η is 1, the rates stay, and the means are the
            gradients.

    Attributes:
        steps: taken.
        direction: along which x moved last, one tensor a parameter.
        y, z: [d] each.
    """

    def __init__(self, levels: Levels, alpha: float, rate: float, *, sampled: bool) -> None:
        self.levels: Levels = levels
        self.alpha: float = alpha
        self.rate: float = rate
        self.sampled: bool = sampled
        self.y: Tensor = levels.start()
        self.z: Tensor = levels.start()
        self.steps: int = 0
        self.direction: list[Tensor] = []
        self._before: tuple[list[Tensor], Tensor, Tensor] | None = None
        self._means: list[Tensor] = []

    def step(self, batch: Any) -> None:
        """One step of all three."""
        here = (self.levels.read(), self.y, self.z)
        self._means = self._running(self._gradients(*here, batch), batch)
        self._before = here
        fading = (self.steps + 1) ** (-1 / 3) if self.sampled else 1.0
        sigma, count = self.levels.sigma, len(self.levels.parameters)
        of_z, f_y, g_y = self._means[:3]
        f_x, g_x, g_xz = (self._means[3 + i * count : 3 + (i + 1) * count] for i in range(3))
        self.direction = [f + (g - least) / sigma for f, g, least in zip(f_x, g_x, g_xz, strict=True)]
        self.z = self.z - fading * self.rate * of_z
        self.y = self.y - fading * self.rate * (sigma * f_y + g_y)
        with torch.no_grad():
            for parameter, along in zip(self.levels.parameters, self.direction, strict=True):
                parameter.sub_(along, alpha=fading * self.alpha)
        self.steps += 1

    def _running(self, now: list[Tensor], batch: Any) -> list[Tensor]:
        """ṽ; the gradient itself in the first step, and where η is 1."""
        if self._before is None or not self.sampled:
            return now
        kept = 1 - (self.steps + 1) ** (-2 / 3)
        then = self._gradients(*self._before, batch)
        return [v + kept * (mean - old) for v, mean, old in zip(now, self._means, then, strict=True)]

    def _gradients(
        self,
        x: list[Tensor],
        y: Tensor,  # [d]
        z: Tensor,  # [d]
        batch: Any,
    ) -> list[Tensor]:
        levels = self.levels
        in_y = [
            levels.slope(x, z, batch, 0.0, 1.0)[1],
            levels.slope(x, y, batch, 1.0, 0.0)[1],
            levels.slope(x, y, batch, 0.0, 1.0)[1],
        ]
        in_x = (
            levels.slope_in_x(x, y, batch, 1.0, 0.0)[1],
            levels.slope_in_x(x, y, batch, 0.0, 1.0)[1],
            levels.slope_in_x(x, z, batch, 0.0, 1.0)[1],
        )
        return [*in_y, *(part for parts in in_x for part in parts)]
