"""Long rows: inner products that keep their digits, and combinations of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from optex import small

__all__ = [
    "accumulate_rows",
    "combine_rows",
    "inner_products",
    "product_rounding",
    "rows_at",
    "squared_norms",
    "threads_for",
]

_BLOCK: Final = 1024  # columns summed in float32
_SLAB: Final = 1024 * _BLOCK  # columns handled at a time, which bounds the scratch memory
_WIDENED: Final = 4096  # rows up to this length are multiplied in float64: it takes no longer
_SHORT: Final = 32_768  # torch splits elementwise work among threads from this length on


@contextmanager
def threads_for(width: int) -> Iterator[None]:
    """One thread for small systems, and for rows of this width, too, unless they are long."""
    threads = torch.get_num_threads()
    with small.one_thread():
        if threads == 1 or width >= _SHORT:
            yield
            return
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)


def _slabs(dimension: int) -> list[slice]:
    return [slice(start, start + _SLAB) for start in range(0, dimension, _SLAB)]


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is for storage only: sums of its products are taken in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def inner_products(
    left: Tensor,  # [n, d]
    right: Tensor,  # [m, d]
) -> Tensor:  # [n, m] float64
    """All inner products of two sets of rows, as float64.

    Long rows in lower precision are multiplied in blocks and the blocks summed in float64. The distance of
    nearby iterates is a difference of such products, and one float32 sum over d = 100,000 terms of equal sign,
    as Adam's steps make them, loses one digit more than the difference has.
    """
    if left.shape[1] <= _WIDENED or left.dtype == right.dtype == torch.float64:
        return left.to(torch.float64) @ right.to(torch.float64).mT
    dtype = _working_dtype(torch.promote_types(left.dtype, right.dtype))
    if left.shape[1] <= _SLAB:
        return _in_blocks(left.to(dtype), right.to(dtype))
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    for slab in _slabs(left.shape[1]):
        total += _in_blocks(left[:, slab].to(dtype), right[:, slab].to(dtype))
    return total


def _in_blocks(
    left: Tensor,  # [n, d]
    right: Tensor,  # [m, d]
) -> Tensor:  # [n, m] float64
    count, rest = divmod(left.shape[1], _BLOCK)
    whole = left.shape[1] - rest
    blocks = torch.bmm(
        left[:, :whole].view(len(left), count, _BLOCK).transpose(0, 1),  # [blocks, n, _BLOCK]
        right[:, :whole].view(len(right), count, _BLOCK).permute(1, 2, 0),  # [blocks, _BLOCK, m]
    )
    total = blocks.sum(0, dtype=torch.float64)
    return total + left[:, whole:] @ right[:, whole:].mT if rest else total


def rows_at(
    matrix: Tensor,  # [n, d]
    indices: list[int],  # m
) -> Tensor:  # [m, d]
    """The rows at these indices; a view where the indices are consecutive, as long rows are costly to copy."""
    first = indices[0] if indices else 0
    if indices == list(range(first, first + len(indices))):
        return matrix[first : first + len(indices)]
    return matrix[indices]


def product_rounding(
    rows: Tensor,  # [n, d]
) -> float:
    """Typical relative error of ``inner_products`` of such rows, whose terms are rounded independently."""
    if rows.shape[1] <= _WIDENED or rows.dtype == torch.float64:
        return 16 * torch.finfo(torch.float64).eps
    return torch.finfo(_working_dtype(rows.dtype)).eps / rows.shape[1] ** 0.5


def squared_norms(
    rows: Tensor,  # [n, d]
) -> Tensor:  # [n] float64
    """Squared norms, summed in float64."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


def combine_rows(
    coefficients: Tensor,  # [n, m] float64
    rows: Tensor,  # [m, d]
) -> Tensor:  # [n, d], in the rows' dtype, float32 at least
    """``coefficients @ rows``, with half-precision rows widened a piece at a time."""
    dtype = _working_dtype(rows.dtype)
    coefficients = coefficients.to(rows.device, dtype)
    if rows.dtype != dtype:
        return torch.cat([coefficients @ rows[:, slab].to(dtype) for slab in _slabs(rows.shape[1])], dim=1)
    if len(coefficients) == 1:
        return torch.mv(rows.mT, coefficients[0])[None]
    return coefficients @ rows


def accumulate_rows(
    result: Tensor,  # [n, d], changed
    coefficients: Tensor,  # [n, m] float64
    rows: Tensor,  # [m, d]
) -> None:
    """Add ``coefficients @ rows`` to ``result``, without memory for the product where dtypes allow."""
    if rows.dtype != result.dtype:
        result += combine_rows(coefficients, rows)
    elif len(result) == 1:
        result[0].addmv_(rows.mT, coefficients[0].to(rows.device, rows.dtype))
    else:
        result.addmm_(coefficients.to(rows.device, rows.dtype), rows)
