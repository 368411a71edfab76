"""The two levels of a bilevel problem, as functions of x and of one vector y."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from optex.errors import LowerLevelWarning, warn
from optex.sources.interface import scalar_loss

__all__ = ["Level", "Levels"]

Level = Callable[[Any, Any, Any], Tensor]

_SMALL: Final = 1e-3  # at and below, a difference over σ needs float64
_NOTHING: Final = 0.1  # the share of a difference that may be rounding; beyond it nothing is left


class Levels:
    """f and g as functions of x and of one vector y, with their gradients.

    Attributes:
        parameters: x.
        blame: which level was last seen not to be finite.
    """

    def __init__(
        self,
        owner: str,
        upper: Level,
        lower: Level,
        parameters: Tensor | Sequence[Tensor],
        start: Tensor | Sequence[Tensor],
        sigma: float,
    ) -> None:
        for name, level in (("upper", upper), ("lower", lower)):
            if not callable(level):
                raise TypeError(
                    f"{owner}: {name} must be a function of (x, y, batch), got {type(level).__name__}"
                )
        self._owner, self._levels = owner, (upper, lower)
        self.parameters: list[Tensor]
        self.parameters, self._one_x = _tensors(owner, "parameters", parameters)
        pieces, self._one_y = _tensors(owner, "start", start)
        self._shapes = [piece.shape for piece in pieces]
        self._start = torch.cat([piece.detach().reshape(-1) for piece in pieces]).clone()
        if not bool(self._start.isfinite().all()):
            raise ValueError(
                f"{owner}: start has components that are not finite; start at a y where g is defined"
            )
        self.blame: str = "nothing was evaluated"
        self.sigma = sigma
        _check_precision(owner, self._start.dtype, sigma)

    def start(self) -> Tensor:  # [d]
        """A copy of the y to start from."""
        return self._start.clone()

    def at(self, parameters: list[Tensor]) -> Levels:
        """The same levels at other parameters."""
        other = copy.copy(self)
        other.parameters = parameters
        return other

    def read(self) -> list[Tensor]:
        """x, as leaves of its own."""
        return [p.detach().clone() for p in self.parameters]

    def form(
        self,
        vector: Tensor,  # [d]
    ) -> Any:
        """y as the levels are handed it."""
        pieces = vector.split([shape.numel() for shape in self._shapes])
        shaped = tuple(piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True))
        return shaped[0] if self._one_y else shaped

    def slope(
        self,
        x: list[Tensor],
        vector: Tensor,  # [d]
        batch: Any,
        of_upper: float,
        of_lower: float,
    ) -> tuple[Tensor, Tensor]:  # [], [d]
        """Value of ``of_upper f + of_lower g`` and its gradient in y."""
        with torch.enable_grad():
            leaf = vector.detach().requires_grad_()
            value = self._mixed(x, leaf, batch, of_upper, of_lower)
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
        if gradient is None and of_lower:
            raise ValueError(
                f"{self._owner}: lower does not depend on y through autograd; compute it from the y that it is "
                "handed, without .item(), .detach() or torch.no_grad()"
            )
        return value.detach(), torch.zeros_like(vector) if gradient is None else gradient

    def slope_in_x(
        self,
        x: list[Tensor],
        vector: Tensor,  # [d]
        batch: Any,
        of_upper: float,
        of_lower: float,
    ) -> tuple[Tensor, list[Tensor]]:  # [], as x
        """Value of ``of_upper f + of_lower g`` and its gradient in x."""
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in x]
            value = self._mixed(leaves, vector, batch, of_upper, of_lower)
            if not value.requires_grad:
                return value.detach(), [torch.zeros_like(part) for part in x]
            found = torch.autograd.grad(value, leaves, allow_unused=True)
        kept = [torch.zeros_like(p) if g is None else g for p, g in zip(x, found, strict=True)]
        return value.detach(), kept

    def penalty(
        self,
        x: list[Tensor],
        y: Tensor,  # [d]
        z: Tensor,  # [d]
        batch: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # [], [], as x
        """ψ_σ(x), f(x, z) and ∇ψ_σ(x), given the two minimisers."""
        sigma = self.sigma
        upper, direct = self.slope_in_x(x, y, batch, 1.0, 0.0)
        high, pushed = self.slope_in_x(x, y, batch, 0.0, 1.0)
        low, rested = self.slope_in_x(x, z, batch, 0.0, 1.0)
        gradients = [f + (g - least) / sigma for f, g, least in zip(direct, pushed, rested, strict=True)]
        with torch.no_grad():
            true = self._mixed(x, z, batch, 1.0, 0.0)
        return upper + (high - low) / sigma, true, gradients

    def _mixed(self, x: list[Tensor], vector: Tensor, batch: Any, of_upper: float, of_lower: float) -> Tensor:
        outer, inner = (x[0] if self._one_x else tuple(x)), self.form(vector)
        total = None
        for name, level, weight in zip(("upper", "lower"), self._levels, (of_upper, of_lower), strict=True):
            if weight == 0:
                continue
            value = scalar_loss(level(outer, inner, batch), f"{self._owner}: {name}")
            if not bool(value.isfinite()):
                self.blame = f"{name} is {float(value.detach()):g}"
            part = value if weight == 1 else weight * value
            total = part if total is None else total + part
        assert total is not None
        return total


def _tensors(owner: str, name: str, given: Any) -> tuple[list[Tensor], bool]:
    """The tensors as a list, and whether one was given instead of a sequence.

    Raises:
        TypeError, ValueError: there is none, or one is not real and floating-point.
    """
    one = isinstance(given, Tensor)
    tensors = [given] if one else list(given) if isinstance(given, Sequence) else None
    if tensors is None or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(
            f"{owner}: {name} must be a tensor or a sequence of tensors, got {type(given).__name__}"
        )
    if not tensors or not all(tensor.numel() for tensor in tensors):
        raise ValueError(f"{owner}: {name} is empty; there is nothing to optimise")
    kinds = {tensor.dtype for tensor in tensors}
    if len(kinds) > 1 or not tensors[0].is_floating_point():
        came = ", ".join(sorted(map(str, kinds)))
        raise TypeError(f"{owner}: {name} must be floating-point tensors of one dtype, got {came}")
    return tensors, one


def _check_precision(owner: str, dtype: torch.dtype, sigma: float) -> None:
    share = torch.finfo(dtype).eps / sigma
    if share > _NOTHING:
        raise ValueError(
            f"{owner}: sigma {sigma:g} is lost in {dtype}: what it divides is mostly rounding (eps / sigma = "
            f"{share:.0e}). Use float64, or a larger sigma."
        )
    if sigma <= _SMALL and dtype is not torch.float64:
        warn(
            f"{owner}: sigma {sigma:g} in {dtype}: differences of lower-level gradients carry rounding of "
            f"about eps / sigma = {share:.0e} of a gradient. Use float64 for sigma <= {_SMALL:g}.",
            LowerLevelWarning,
        )
