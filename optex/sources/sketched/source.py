"""The gradient of any source as it comes out of a sketched channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn

from optex.checks import check_kind, check_parameters
from optex.sources.interface import GradientSource
from optex.sources.sketched.sketch import Sketch

__all__ = ["SketchedSource"]


@final
class SketchedSource(GradientSource):
    """``RᵀR g`` for the gradient g of another source: what is left of g after s numbers were sent.

    R is drawn anew for every gradient, its number t by torch's global generator: ``E RᵀR g = g``, with the
    noise ``E‖RᵀR g - g‖² = ω ‖g‖²`` (:class:`Sketch` has ω). The variance that is reported is of that
    and of the other source's noise together. The sketch's noise is relative to the gradient's length, so it
    vanishes at a minimum: descent converges with steps of ``1 / ((1 + ω) L)``; at 1/L it diverges.

    Args:
        source: of the gradients g.
        sketch: of the matrices R.
        parameters: those that are optimised, d numbers in all; the whole gradient is one vector.
        fixed: R_0 for every gradient. Descent then stays in the s dimensions that the rows of R_0 span, and the
            answer is no unbiased estimate of the gradient.

    Raises:
        TypeError, ValueError: an argument cannot work, or there are fewer than s parameters.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> x = torch.nn.Parameter(torch.ones(64))
    >>> plain = optex.ObjectiveSource(lambda _: 0.5 * x.square().sum(), deterministic=True)
    >>> source = optex.SketchedSource(plain, optex.Sketch("count", 16), [x])
    >>> optimizer = torch.optim.SGD([x], lr=1 / source.sketch.second_moment(64))
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     loss, variance = source.gradient(None)
    ...     optimizer.step()
    >>> bool(loss < 1e-4)
    True

    Source: Song, Wang, Yu, Zhang, ICML 2023, arXiv 2210.08371.
    """

    def __init__(
        self, source: GradientSource, sketch: Sketch, parameters: Iterable[Tensor], *, fixed: bool = False
    ) -> None:
        if not isinstance(source, GradientSource):
            raise TypeError(
                f"SketchedSource: source must be a GradientSource, got {type(source).__name__}; wrap an "
                "objective in ObjectiveSource"
            )
        if not isinstance(sketch, Sketch):
            raise TypeError(f"SketchedSource: sketch must be a Sketch, got {type(sketch).__name__}")
        check_kind("SketchedSource", "fixed", fixed, bool, "True or False")
        self.source: GradientSource = source
        self.sketch: Sketch = sketch
        self.fixed: bool = bool(fixed)
        self.parameters: list[Tensor] = check_parameters("SketchedSource", parameters)
        dimension = sum(p.numel() for p in self.parameters)
        self._moment = sketch.second_moment(dimension)
        self.deterministic: bool = source.deterministic and self.fixed
        self.evaluations: float = source.evaluations
        self.module: nn.Module | None = source.module

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        loss, noise = self.source.gradient(batch)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in found])  # [d], of the widest dtype
        # Behind the other source's own draws, which are then those of a run without a sketch.
        number = 0 if self.fixed else int(torch.randint(1 << 62, ()))
        back = self.sketch.desk(self.sketch.sk(flat, number), len(flat), number)
        for p, piece in zip(self.parameters, back.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.view_as(p).to(p.dtype, copy=True)
        return loss, self._noise(noise, flat)

    def _noise(
        self,
        inner: Tensor | None,  # []
        flat: Tensor,  # [d]
    ) -> Tensor | None:  # []
        if inner is None and self.source.deterministic:
            inner = torch.zeros((), dtype=flat.dtype, device=flat.device)
        if inner is None:
            return None
        # A fixed R is part of what is optimised, not noise; noise that goes through it grows to (1 + ω) times.
        if self.fixed:
            return inner * self._moment
        # Given g, ω ‖g‖² / d a component; and g's own noise beside it.
        return inner + (self._moment - 1) * flat.square().mean()

    def replica(self) -> tuple[GradientSource, list[Tensor]] | None:
        made = self.source.replica()
        if made is None:
            return None
        source, parameters = made
        return SketchedSource(source, self.sketch, parameters, fixed=self.fixed), parameters

    def with_graph(self) -> NoReturn:
        raise ValueError(
            "SketchedSource: a sketched gradient is no derivative, and is not differentiated again; use a base "
            "optimizer that needs nothing beside the gradient"
        )
