"""Algebra of a history's T0 × T0 matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from optex.small import Array, array, concatenate

__all__ = ["fill", "joined", "merged"]


def fill(
    matrix: Tensor,  # [T0, T0], changed
    slots: list[int],
    rows: Array,  # [n, T0]
    *columns: Array,  # [T0, n]
) -> None:
    """Set the rows of these slots, then their columns, if any are given."""
    here = array(matrix)
    here[slots] = rows
    for values in columns:
        here[:, slots] = values


def joined(
    gradients: Array,  # [T0, T0]
    cross: Array,  # [T0, T0], gradients with displacements
    displacements: Array,  # [T0, T0]
) -> Array:  # [2 T0, 2 T0]
    """Inner products of all rows, gradients first, from those of each kind."""
    return concatenate([concatenate([gradients, cross.T]).T, concatenate([cross, displacements]).T])


def merged(
    groups: Sequence[int | None],  # T0
    held: Sequence[int],
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Merge pairs at the same iterate.

    Args:
        groups: a number for each slot, the same for those at one iterate.
        held: the slots that are filled; the first of a group stands for it.

    Returns:
        The slots that stand for an iterate, in order; how many pairs each slot stands for, [T0]; the matrix
        that takes the means of their gradients, [T0, T0]; and which slots are at one iterate, [T0, T0].
    """
    size = len(groups)
    members: dict[int | None, list[int]] = {}
    for slot in held:
        members.setdefault(groups[slot], []).append(slot)
    counts = np.zeros(size)
    counts[list(held)] = 1
    averaging, same = np.diag(counts), np.eye(size, dtype=bool)
    for slots in members.values():
        if len(slots) > 1:
            counts[slots], averaging[slots] = 0, 0
            counts[slots[0]], averaging[slots[0], slots] = len(slots), 1 / len(slots)
            same[np.ix_(slots, slots)] = True
    return sorted(slots[0] for slots in members.values()), counts, averaging, same
