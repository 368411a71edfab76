"""The space of flat vectors: sums over their coordinates, which may be split among processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optex import linalg
from optex.checks import check_integer

__all__ = ["VectorSpace"]


class VectorSpace:
    """Vectors of length ``dimension``, held whole by this process.

    Everything that sums over coordinates goes through here; all else works coordinate by coordinate, on whole
    vectors and on slices alike. Where vectors are split among processes, a subclass adds up the sums of all
    processes, so that each of them goes on with the same numbers.

    Args:
        dimension: d, the length of a vector.

    Raises:
        ValueError: ``dimension`` is no integer of at least 0.

    Attributes:
        dimension: d.
        width: how many of the coordinates (padding included) this process holds: the length of its rows.
        is_split: whether the other coordinates are held by other processes.
    """

    is_split: bool = False

    def __init__(self, dimension: int) -> None:
        self.dimension: int = check_integer("VectorSpace", "dimension", dimension, least=0)
        self.width: int = self.dimension

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over all coordinates from those over this process's, several in one message; same shapes."""
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
        sums = rows.sum(1).isfinite()  # a finite sum has finite terms; another may only have overflowed
        return sums if bool(sums.all()) else torch.linalg.vector_norm(rows, float("inf"), dim=1).isfinite()

    def broadcast(self, values: Tensor) -> Tensor:
        """The first process's values on every process, for decisions: each process rounds in its own way."""
        return values

    def whole(
        self,
        rows: Tensor,  # [..., width]
    ) -> Tensor:  # [..., d]
        """Copies of rows at full length, as a checkpoint keeps them."""
        return rows.clone()

    def local(
        self,
        rows: Tensor,  # [..., d]
    ) -> Tensor:  # [..., width]
        """This process's slices of rows of full length."""
        return rows

    def empty_whole(
        self,
        shape: torch.Size,  # [..., d]
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:  # [..., d]
        """Uninitialised rows of full length, for a checkpoint to be read into."""
        del device  # a checkpoint is read into main memory
        return torch.empty(shape, dtype=dtype)
