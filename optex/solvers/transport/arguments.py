"""What a transport problem is given as, checked, and how answers are handed back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optex.checks import check_integer, check_number, shown

__all__ = ["TransportProblem"]

_UNIT = 1e-6  # how far from 1 masses may add up: rounding of float32, which is then divided out


@dataclass(frozen=True)
class TransportProblem:
    """One or more transport problems of one size, in float64.

    Attributes:
        a: [batch, m]
        b: [batch, n]
        costs: [batch, n, m], transposed.
        gamma, k: as given.
        shape: of the batch, as given.
        like: an empty tensor of the costs' dtype and device; None where they came as NumPy's.
        dtype: of the arrays that are handed back where the costs came as NumPy's.
    """

    a: Tensor
    b: Tensor
    costs: Tensor
    gamma: float
    k: int
    shape: tuple[int, ...]
    like: Tensor | None
    dtype: Any

    @classmethod
    def read(cls, owner: str, a: Any, b: Any, C: Any, gamma: Any, k: Any) -> TransportProblem:
        """The problem in float64, checked.

        Raises:
            TypeError, ValueError: an argument cannot work; the message names it.
        """
        tensor = isinstance(C, Tensor)
        costs = _double(owner, "C", C, None)
        if costs.ndim < 2 or not costs.numel():
            raise ValueError(f"{owner}: C must be [..., m, n] and hold costs, got shape {tuple(costs.shape)}")
        *batch, m, n = costs.shape
        weight = check_number(owner, "gamma", gamma, open_below=True)
        count = check_integer(owner, "k", k, most=m)
        largest = float(costs.abs().max())
        if not np.isfinite(largest):
            raise ValueError(f"{owner}: C must be finite; give forbidden pairs a large cost instead")
        if not np.isfinite(largest / weight):
            raise ValueError(f"{owner}: C / gamma overflows; scale C and gamma down together")
        masses_a = _masses(owner, "a", a, (*batch, m), costs.device)
        masses_b = _masses(owner, "b", b, (*batch, n), costs.device)
        _check_room(owner, masses_a, masses_b, count)
        dtype = getattr(C, "dtype", None)
        if tensor or not np.issubdtype(dtype, np.floating):
            dtype = np.dtype(np.float64)
        return cls(
            masses_a.reshape(-1, m),
            masses_b.reshape(-1, n),
            costs.reshape(-1, m, n).transpose(1, 2).contiguous(),
            weight,
            count,
            tuple(batch),
            _empty_like(C) if tensor else None,
            dtype,
        )

    def present(
        self,
        values: Tensor,  # [batch, ...]
    ) -> Any:  # [..., ...]
        """In the form of the costs: their library, dtype and device, the batch's shape in front."""
        shaped = values.reshape((*self.shape, *values.shape[1:]))
        if self.like is not None:
            return shaped.to(self.like) if shaped.is_floating_point() else shaped.to(self.like.device)
        array = shaped.numpy()
        return (array.astype(self.dtype) if shaped.is_floating_point() else array)[()]


def _empty_like(C: Tensor) -> Tensor:
    return torch.empty(0, dtype=C.dtype if C.is_floating_point() else torch.float64, device=C.device)


def _double(owner: str, name: str, value: Any, device: torch.device | None) -> Tensor:
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{owner}: {name} must be an array or a tensor of numbers, got {shown(value)}"
        ) from error
    if tensor.is_complex():
        raise TypeError(f"{owner}: {name} must be real, got {tensor.dtype}")
    return tensor.to(device or tensor.device, torch.float64)


def _masses(
    owner: str, name: str, value: Any, shape: tuple[int, ...], device: torch.device
) -> Tensor:  # of this shape
    """Masses that are not negative and add up to 1, to float32's rounding; that rounding is divided out.

    If the sums of a and b differed, the dual would be unbounded along constants.
    """
    masses = _double(owner, name, value, device)
    if masses.ndim == 0 or masses.shape[-1] != shape[-1] or masses.ndim > len(shape):
        raise ValueError(f"{owner}: {name} must be {list(shape)} or {[shape[-1]]}, got {list(masses.shape)}")
    if not bool((masses >= 0).all()):  # NaN, too
        raise ValueError(f"{owner}: {name} must not be negative, got {float(masses.min()):g} at least")
    sums = masses.sum(-1, keepdim=True)
    off = float((sums - 1).abs().max())
    if not off <= _UNIT:
        raise ValueError(f"{owner}: {name} must add up to 1, is off by {off:.3g}; divide it by its sum")
    try:
        return (masses / sums).expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{owner}: {name} must be {list(shape)}, got {list(masses.shape)}") from error


def _check_room(
    owner: str,
    a: Tensor,  # [..., m]
    b: Tensor,  # [..., n]
    k: int,
) -> None:
    """A source with mass needs an entry of its own in some column."""
    sources, targets = (a > 0).sum(-1), (b > 0).sum(-1)
    short = sources > k * targets
    if bool(short.any()):
        m, n = int(sources[short][0]), int(targets[short][0])
        raise ValueError(
            f"{owner}: k = {k} nonzeros in each of {n} columns cannot serve {m} rows with mass; k must be at "
            f"least {-(-m // n)}"
        )
