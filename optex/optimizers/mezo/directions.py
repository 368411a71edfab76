"""Normal directions that are drawn again from their seed instead of being stored, and steps along them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from optex.checks import shown
from optex.errors import NonFiniteError

__all__ = [
    "check_seed",
    "direction",
    "finite_loss",
    "fresh_seed",
    "update_",
]

_WORD: Final = (1 << 64) - 1


def direction(
    seed: int,
    query: int,
    place: int,
    like: Tensor,  # [...]
) -> Tensor:  # [...], independent N(0, 1)
    """The direction of one parameter in one query of a step.

    It depends on these numbers alone, so that parameters can be visited in any order, one at a time, and no
    state of a generator has to be saved between two visits. torch's global generators are not used.

    Args:
        seed: of the step.
        query: number of the direction in the step.
        place: number of the parameter among all parameters.
        like: gives shape, dtype and device.
    """
    generator = torch.Generator(like.device).manual_seed(_mixed(seed, query, place))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _mixed(*parts: int) -> int:
    # SplitMix64's finaliser, one round a number: torch's CPU generator reads only the low 32 bits of a seed,
    # and seeds that differ by 1 must give unrelated generators.
    word = 0
    for part in parts:
        word = (word + part + 0x9E3779B97F4A7C15) & _WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        word ^= word >> 31
    return word


def update_(
    parameter: Tensor,  # [...]
    place: int,
    seed: int,
    scalars: Sequence[float],  # q
    rate: float,
    weight_decay: float,
) -> None:
    """θ ← (1 - rate · weight_decay) θ - rate (Σ_k s_k z_k) / q, in place."""
    if weight_decay:
        parameter.mul_(1 - rate * weight_decay)
    for query, scalar in enumerate(scalars):
        parameter.add_(direction(seed, query, place, parameter), alpha=-rate * scalar / len(scalars))


def fresh_seed() -> int:
    """A seed drawn from torch's global generator."""
    return int(torch.randint(1 << 62, ()))


def check_seed(owner: str, seed: Any) -> int:
    """The seed as it is, 0 included; for None one drawn from torch's global generator.

    Raises:
        ValueError: it is no integer from 0 to 2⁶⁴ - 1.
    """
    if seed is None:
        return fresh_seed()
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _WORD:
        raise ValueError(f"{owner}: seed must be an integer from 0 to 2**64 - 1, or None, got {shown(seed)}")
    return seed


def finite_loss(owner: str, loss: Any, where: str, remedy: str) -> float:
    """The loss at a shifted point as a number.

    Raises:
        TypeError, ValueError: it is no real scalar.
        NonFiniteError: it is NaN or infinite.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"{owner}: the loss must be a real scalar, got shape {tuple(loss.shape)} of {loss.dtype}; "
                "reduce it, with .mean() or .sum()"
            )
        value = float(loss.detach())
    elif isinstance(loss, (int, float)) and not isinstance(loss, bool):
        value = float(loss)
    else:
        raise TypeError(f"{owner}: the loss must be a scalar, got {type(loss).__name__}; return it")
    if not math.isfinite(value):
        raise NonFiniteError(f"{owner}: the loss is {value} {where}; {remedy}")
    return value
