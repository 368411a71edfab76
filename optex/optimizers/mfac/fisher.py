"""The empirical Fisher matrix F = λI + (1/m) Gᵀ G of m gradients, by systems of size m or d.

All of it rests on two identities, for any G of m rows and any λ > 0:

    (m λI + GᵀG)⁻¹ Gᵀ = Gᵀ (m λI + GGᵀ)⁻¹                             push-through
    F⁻¹ = m (m λI + GᵀG)⁻¹ = (1/λ) (I - Gᵀ (m λI + GGᵀ)⁻¹ G)          Woodbury

The second is a difference of nearly equal numbers where GᵀG is large beside m λ: at the published λ = 1e-5
float32 loses all digits in it. The first is used wherever it can be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optex import linalg, small

__all__ = ["gram", "ridge", "row_coefficients", "slabs", "woodbury"]

_SLAB = 65_536  # columns widened to float64 at a time
_REMEDY = "damping"


def slabs(width: int) -> list[slice]:
    """Slices of the columns, each narrow enough to bound the scratch memory."""
    return [slice(start, start + _SLAB) for start in range(0, width, _SLAB)]


def gram(
    rows: Tensor,  # [m, d]
) -> Tensor:  # [m, m] float64
    """GGᵀ, every product in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for slab in slabs(rows.shape[1]):
        piece = rows[:, slab].to(torch.float64)
        total += linalg.inner_products(piece, piece)
    return total


def row_coefficients(
    products: Tensor,  # [k, k] float64, GGᵀ
    place: int,
    damping: float,
) -> Tensor:  # [k] float64
    """The coefficients of the rows of G in F⁻¹ g, where g is row ``place`` of G.

    g = Gᵀ e_j, so F⁻¹ g = k (k λI + GᵀG)⁻¹ Gᵀ e_j = Gᵀ [k (k λI + GGᵀ)⁻¹ e_j]: no difference is taken.

    Raises:
        NotPositiveDefiniteError: the rows are not finite, or λ is below the rounding of their products.
    """
    count = len(products)
    unit = torch.zeros(count, dtype=torch.float64, device=products.device)
    unit[place] = count
    return solve(products, unit, damping)


def solve(
    products: Tensor,  # [k, k] float64, GGᵀ, or GᵀG where that is smaller
    right: Tensor,  # [k] float64
    damping: float,
    count: int | None = None,
) -> Tensor:  # [k] float64
    """(m λI + GGᵀ)⁻¹ r, with m = ``count``, or k where that is None."""
    factor = factorised(products, damping, count)
    return small.tensor(small.cholesky_solve(small.array(right), factor))


def factorised(
    products: Tensor,  # [k, k] float64
    damping: float,
    count: int | None = None,
) -> small.Array:  # [k, k], the lower triangle holds the factor
    """Cholesky factor of m λI + GGᵀ."""
    matrix = small.array(products)
    ridge_term = damping * (len(products) if count is None else count)
    shifted = small.plus_diagonal(matrix, small.full(len(products), ridge_term, matrix))
    return small.jittered_cholesky(shifted, remedy=_REMEDY)


def ridge(
    rows: Tensor,  # [m, b] float64, G
    targets: Tensor,  # [m] float64
    damping: float,
) -> Tensor:  # [b] float64
    """Gᵀ (m λI + GGᵀ)⁻¹ t = (m λI + GᵀG)⁻¹ Gᵀ t, by the smaller of the two systems."""
    count, width = rows.shape
    if width <= count:
        return solve(rows.mT @ rows, rows.mT @ targets, damping, count)
    return rows.mT @ solve(rows @ rows.mT, targets, damping)


def woodbury(
    rows: Tensor,  # [m, d]
    vector: Tensor,  # [d] float64
    damping: float,
) -> Tensor:  # [d] float64
    """F⁻¹ x for any x, as a difference, all in float64."""
    pieces = [(slab, rows[:, slab]) for slab in slabs(rows.shape[1])]
    seen = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for slab, piece in pieces:
        seen += piece.to(torch.float64) @ vector[slab]
    weights = solve(gram(rows), seen, damping)
    explained = torch.cat([piece.to(torch.float64).mT @ weights for _, piece in pieces])
    return (vector - explained) / damping
