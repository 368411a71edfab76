"""Saved histories: what an append overwrites, and what a checkpoint holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from optex.checks import saved_entry, saved_integer, saved_tensor, shown
from optex.vector_space import VectorSpace

__all__ = ["Overwritten", "SavedHistory", "check_saved"]

_OWNER: Final = "GradientHistory.load_state_dict"


@dataclass(frozen=True)
class Overwritten:
    """What an append of some pairs is about to change, so that it can be taken back."""

    slots: list[int]
    rows: tuple[Tensor, Tensor]  # displacements and gradients [n, d]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SavedHistory:
    """The entries of a saved history, checked; rows are this process's."""

    displacements: Tensor  # [T0, width]
    gradients: Tensor  # [T0, width]
    iterate_gram: Tensor  # [T0, T0]
    gradient_gram: Tensor  # [T0, T0]
    cross_gram: Tensor  # [T0, T0]
    anchor: Tensor | None  # [width]
    groups: list[int | None]
    noise: list[float]
    appended: int


def check_saved(state: Any, size: int, space: VectorSpace) -> SavedHistory:
    """A saved state, checked against the size and the space of the history that loads it.

    Raises:
        ValueError: size or dimension differ, or an entry is missing, of another kind, or not finite.
    """
    rows = {}
    for name in ("displacements", "gradients"):
        value = saved_entry(_OWNER, state, name)
        if isinstance(value, Tensor) and tuple(value.shape) != (size, space.dimension):
            raise ValueError(
                f"{_OWNER}: saved {name} are {tuple(value.shape)} [T0, d], this history's "
                f"{(size, space.dimension)}; build it with the same history_size and parameters"
            )
        value = saved_tensor(_OWNER, state, name, (size, space.dimension), finite=False)
        rows[name] = _finite(name, space.local(value), space)
    grams = {
        name: saved_tensor(_OWNER, state, name, (size, size))
        for name in ("iterate_gram", "gradient_gram", "cross_gram")
    }
    appended = saved_integer(_OWNER, state, "appended")
    anchor = None
    if saved_entry(_OWNER, state, "anchor") is not None:
        whole = saved_tensor(_OWNER, state, "anchor", (space.dimension,), finite=False)
        anchor = _finite("anchor", space.local(whole)[None], space)[0]
    if (anchor is None) != (appended == 0):
        raise ValueError(f"{_OWNER}: saved anchor and appended ({appended}) contradict each other")
    groups, noise = _slots(state, size, min(appended, size))
    return SavedHistory(**rows, **grams, anchor=anchor, groups=groups, noise=noise, appended=appended)


def _finite(
    name: str,
    rows: Tensor,  # [n, width]
    space: VectorSpace,
) -> Tensor:  # [n, width]
    if not bool(space.finite(rows).all()):
        raise ValueError(f"{_OWNER}: saved {name} holds numbers that are not finite")
    return rows


def _slots(state: Any, size: int, filled: int) -> tuple[list[int | None], list[float]]:
    groups, noise = (saved_entry(_OWNER, state, name) for name in ("groups", "noise"))
    for name, values in (("groups", groups), ("noise", noise)):
        if not isinstance(values, (list, tuple)) or len(values) != size:
            raise ValueError(f"{_OWNER}: saved {name} must be a list of {size}, got {repr(values)[:60]}")
    for slot, group in enumerate(groups):
        told = isinstance(group, int) and not isinstance(group, bool)
        if told != (slot < filled) or not (told or group is None):
            raise ValueError(
                f"{_OWNER}: saved groups do not fit {filled} pairs, got {shown(group)} for slot {slot}"
            )
    for variance in noise:
        if variance is not None and not (isinstance(variance, (int, float)) and variance >= 0):
            raise ValueError(
                f"{_OWNER}: saved noise must be numbers that are not negative, or None, got {shown(variance)}"
            )
    return list(groups), [math.nan if variance is None else float(variance) for variance in noise]
