"""The second derivatives of the lower level at a point, by products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from optex.sources.inexact_bilevel.levels import LowerLevelError, SmoothBilevel, norm_of
from optex.sources.interface import scalar_loss

__all__ = ["Linearised"]

_KRYLOV: Final = 30


class Linearised:
    """The second derivatives of h at a point, by products."""

    def __init__(self, problem: SmoothBilevel, theta: Sequence[Tensor], x: Tensor) -> None:
        self.problem = problem
        self.x: Tensor = x.detach().requires_grad_()
        self.theta: list[Tensor] = [t.detach().requires_grad_() for t in theta]
        value = scalar_loss(problem.lower(self.x, *self.theta), "lower")
        self.slope: Tensor = torch.autograd.grad(value, self.x, create_graph=True)[0]
        if not self.slope.requires_grad:
            raise LowerLevelError("hypergradient: lower is linear in x: its Hessian is singular, zero")

    def hessian(self, v: Tensor) -> Tensor:  # A v, of x's shape
        (product,) = torch.autograd.grad(
            self.slope, self.x, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    def cross_transposed(self, v: Tensor, *, create_graph: bool = False) -> list[Tensor]:  # Bᵀ v
        return list(
            torch.autograd.grad(
                self.slope,
                self.theta,
                v,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    def cross_norm(self) -> float:
        """‖B‖ on a Krylov space of BᵀB from a start of its own seed: exact for at most 30 components of θ."""
        dummy = torch.zeros_like(self.slope).requires_grad_()
        columns = self.cross_transposed(dummy, create_graph=True)
        if not any(column.requires_grad for column in columns):
            return 0.0
        sizes = [t.numel() for t in self.theta]
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(sum(sizes), generator=generator, dtype=torch.float64).to(self.slope)
        basis, images = w.new_zeros(0, len(w)), []
        for _ in range(min(len(w), self.slope.numel() + 1, _KRYLOV)):
            w = w - basis.mT @ (basis @ w)
            w = w - basis.mT @ (basis @ w)
            length = float(w.norm())
            if not length or not math.isfinite(length):
                break
            basis = torch.cat([basis, (w / length)[None]])
            parts = [p.reshape(t.shape) for p, t in zip(basis[-1].split(sizes), self.theta, strict=True)]
            (image,) = torch.autograd.grad(columns, dummy, parts, retain_graph=True, materialize_grads=True)
            images.append(image.flatten())
            w = torch.cat([part.flatten() for part in self.cross_transposed(image)])
        return float(torch.linalg.matrix_norm(torch.stack(images), 2)) if images else 0.0

    def changes(self, q: Tensor, epsilon: float) -> tuple[float, float]:
        """‖A'[v] q‖ and ‖B'[v]ᵀ q‖ as secants of length ε along v = ∇ₓh / ‖∇ₓh‖."""
        length = float(self.slope.detach().norm())
        towards = self.slope.detach() / length if length else torch.full_like(q, q.numel() ** -0.5)
        step = max(epsilon, 1e-5 * (1 + float(self.x.detach().norm())))
        there = Linearised(self.problem, self.theta, self.x.detach() - step * towards)
        curved = float((there.hessian(q) - self.hessian(q)).norm()) / step
        before, after = self.cross_transposed(q), there.cross_transposed(q)
        return curved, norm_of([a - b for a, b in zip(after, before, strict=True)]) / step
