"""Right-hand sides to train on: random combinations of a matrix's Ritz vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from optex.checks import check_integer, check_number, shown
from optex.errors import NotPositiveDefiniteError
from optex.solvers.dcdm.operator import Product, dimension_of, product_of

__all__ = ["RitzVectors", "ritz_vectors"]

_OWNER: Final = "ritz_vectors"
_ZERO: Final = 1e-8  # of the largest Ritz value
_EXHAUSTED: Final = 1e-10  # of a vector, left beside those so far


@dataclass(frozen=True)
class RitzVectors:
    """Orthonormal vectors on which A is nearly diagonal, and its values there, the smallest first.

    Attributes:
        values: [m] float64.
        vectors: [m, ...] float64.
    """

    values: Tensor
    vectors: Tensor

    def right_hand_sides(
        self,
        count: int,
        *,
        weight: float = 9.0,
        low: float = 0.55,
        seed: int = 0,
    ) -> Tensor:  # [count, ...] float64
        """Random combinations of norm 1, in which smooth vectors weigh more.

            b = Σ_i c_i v_i / ‖Σ_i c_i v_i‖,   c_i ~ N(0, weight²) for the first ``low`` of i, else N(0, 1)

        Args:
            count: how many; the paper's: 20,000.
            weight: standard deviation of the first coefficients; the paper's: 9.
            low: share of vectors that have it; the paper's m / 2 + θ with m = 10,000 and θ = 500.
            seed: of the draw.

        Raises:
            ValueError: count, weight, low or seed is out of range.
        """
        owner = "RitzVectors.right_hand_sides"
        count = check_integer(owner, "count", count)
        weight = check_number(owner, "weight", weight, open_below=True)
        low = check_number(owner, "low", low, most=1.0)
        generator = torch.Generator().manual_seed(check_integer(owner, "seed", seed, least=0))
        found = len(self.values)
        coefficients = torch.randn(count, found, generator=generator, dtype=torch.float64)
        coefficients[:, : round(low * found)] *= weight
        rows = coefficients.to(self.vectors.device) @ self.vectors.flatten(1)
        return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).view(count, *self.vectors.shape[1:])


def ritz_vectors(
    A: Any,  # [n, n], or of shape to shape
    count: int,
    *,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> RitzVectors:
    """Ritz vectors of a symmetric matrix: from its lowest end to its highest, without its eigenvectors.

    Lanczos' iteration from A z, z random, makes V with Vᵀ A V = T tridiagonal; T's eigenvectors s give v = V s.
    Every new vector is made orthogonal to all before it, twice, which is what keeps V orthonormal in floating
    point. Where the iteration has exhausted an invariant subspace, it goes on from another A z. Values below
    1e-8 of the largest belong to A's null space and are left out.

    Args:
        A: tensor, array, SciPy sparse matrix, ``LinearOperator``, or a function of a float64 tensor.
        count: m, at most n. The time is O(m² n), the memory O(m n). The paper's: 10,000.
        shape: of a vector, a grid's, for one; needed where A is a function, else [n].
        seed: of z.

    Returns:
        At most m values and vectors, fewer where A's rank is smaller, as tensors on the CPU.

    Raises:
        TypeError, ValueError: A is no symmetric operator, or shape or count do not fit it; A is 0, or a product
            with it is not finite.
        NotPositiveDefiniteError: it has a negative Ritz value.

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763.

    >>> found = ritz_vectors(torch.diag(torch.tensor([1.0, 2.0, 4.0])), 3)
    >>> [round(value, 6) for value in found.values.tolist()]
    [1.0, 2.0, 4.0]
    """
    n = dimension_of(_OWNER, A)
    if shape is None:
        if n is None:
            raise ValueError(f"{_OWNER}: shape must say what a vector is like where A is a function, got None")
        shape = (n,)
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{_OWNER}: shape must be a tuple of integers, got {shown(shape)}")
    shape = tuple(check_integer(_OWNER, "every entry of shape", entry) for entry in shape)
    size = int(torch.Size(shape).numel())
    count = check_integer(_OWNER, "count", count, most=size)
    product = product_of(_OWNER, A, tuple(shape), numpy=False, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(check_integer(_OWNER, "seed", seed, least=0))
    basis, diagonal, beside = _lanczos(product, size, count, generator)
    values, small = eigh_tridiagonal(diagonal.numpy(), beside.numpy())
    if values[0] < -_ZERO * abs(values).max():
        raise NotPositiveDefiniteError(
            f"{_OWNER}: A must be positive definite, and has a Ritz value {values[0]:.3g}"
        )
    kept = torch.from_numpy(values > _ZERO * values[-1])
    vectors = torch.from_numpy(small).mT[kept] @ basis
    return RitzVectors(torch.from_numpy(values)[kept], vectors.view(-1, *shape))


def _lanczos(
    product: Product,
    size: int,
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:  # V's rows [m, n], T's diagonal [m], and beside it [m - 1]
    basis = torch.zeros(count, size, dtype=torch.float64)
    diagonal, beside = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    largest, following = 0.0, _fresh(product, basis[:0], generator)
    for k in range(count):
        if following is None:  # the range is exhausted
            return basis[:k], diagonal[:k], beside[: max(k - 1, 0)]
        basis[k] = following
        image = product(basis[k])
        length = float(torch.linalg.vector_norm(image))
        if not math.isfinite(length):
            raise ValueError(f"{_OWNER}: a product with A is not finite")
        largest = max(largest, length)
        diagonal[k] = image @ basis[k]
        following, left = _orthogonal(image, basis[: k + 1])
        if left <= _EXHAUSTED * largest:
            following = _fresh(product, basis[: k + 1], generator)
        else:
            beside[k] = left
    return basis, diagonal, beside[:-1]


def _fresh(
    product: Product,
    basis: Tensor,  # [k, n]
    generator: torch.Generator,
) -> Tensor | None:  # [n]
    """A z for a random z, orthogonal to all so far and of norm 1; None where nothing of it is left."""
    image = product(torch.randn(basis.shape[1], generator=generator, dtype=torch.float64))
    length = float(torch.linalg.vector_norm(image))
    if not 0 < length < math.inf:
        raise ValueError(f"{_OWNER}: A times a random vector has norm {length:g}; A must be finite, and not 0")
    following, left = _orthogonal(image / length, basis)
    return following if left > _EXHAUSTED else None


def _orthogonal(
    vector: Tensor,  # [n]
    basis: Tensor,  # [k, n]
) -> tuple[Tensor, float]:  # [n] of norm 1, and its norm before
    for _ in range(2):  # twice is enough (Parlett, Kahan)
        vector = vector - basis.mT @ (basis @ vector)
    norm = float(torch.linalg.vector_norm(vector))
    return vector / norm if norm > 0 else vector, norm
