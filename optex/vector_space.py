"""The space that flat vectors live in: where a sum over their coordinates is more than one process's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optex import linalg

__all__ = ["VectorSpace"]


class VectorSpace:
    """Vectors of length ``dimension``, held whole by this process.

    Everything that sums over coordinates goes through here; all else is done coordinate by coordinate, and does
    not depend on how many of them are at hand. Where vectors are split among processes, a subclass adds up what
    each of them finds, so that every process goes on with the same numbers.

    Attributes:
        dimension: d.
        width: how many of the coordinates (padding included) this process holds: the length of its rows.
        is_split: whether other processes hold the others.
    """

    is_split = False

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.width = dimension

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over this process's coordinates made sums over all, several in one message; same shapes."""
        return parts

    def inner_products(
        self,
        left: Tensor,  # [n, width]
        right: Tensor,  # [m, width]
    ) -> Tensor:  # [n, m] float64
        """All inner products of two sets of rows; see :func:`optex.linalg.inner_products`."""
        return self.total(linalg.inner_products(left, right))[0]

    def norms(
        self,
        rows: Iterable[Tensor],  # n of [width]
    ) -> Tensor:  # [n]
        """Euclidean lengths, all found at once."""
        return torch.stack([torch.linalg.vector_norm(row) for row in rows])

    def finite(
        self,
        rows: Tensor,  # [n, width]
    ) -> Tensor:  # [n] bool
        """Which rows hold neither infinities nor NaN."""
        sums = rows.sum(1).isfinite()  # of finite terms alone, where it is; else it may have overflowed
        return sums if bool(sums.all()) else torch.linalg.vector_norm(rows, float("inf"), dim=1).isfinite()

    def broadcast(self, values: Tensor) -> Tensor:
        """Numbers that decide what is done next, the first process's for all: processors round differently."""
        return values

    def whole(
        self,
        rows: Tensor,  # [..., width]
    ) -> Tensor:  # [..., d]
        """Rows as a checkpoint keeps them: a copy of the full length."""
        return rows.clone()

    def local(
        self,
        rows: Tensor,  # [..., d]
    ) -> Tensor:  # [..., width]
        """The part of such rows that belongs here."""
        return rows

    def empty_whole(
        self,
        shape: torch.Size,  # [..., d]
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:  # [..., d]
        """Room for rows as a checkpoint keeps them, to be read into."""
        del device  # a checkpoint is read into main memory
        return torch.empty(shape, dtype=dtype)
