"""A symmetric matrix in any of its forms, as a product with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from optex.errors import NotPositiveDefiniteError

__all__ = ["Product", "dimension_of", "product_of", "symmetric_matrix"]

Product = Callable[[Tensor], Tensor]  # [n] float64 to [n] float64


def _is_matrix(A: Any) -> bool:
    return isinstance(A, (Tensor, np.ndarray)) or scipy.sparse.issparse(A)


def dimension_of(owner: str, A: Any) -> int | None:
    """n of A [n, n]; None where it is a function.

    Raises:
        TypeError, ValueError: it is no operator, or not square.
    """
    if not (_is_matrix(A) or isinstance(A, LinearOperator)):
        if callable(A):
            return None
        raise TypeError(
            f"{owner}: A must be a tensor, an array, a SciPy sparse matrix, a LinearOperator or a function of"
            f" a vector, got {type(A).__name__}"
        )
    shape = tuple(A.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{owner}: A must be square, [n, n], got shape {shape}")
    return int(shape[0])


def symmetric_matrix(owner: str, A: Any) -> Any:  # [n, n]
    """A matrix in float64, its own kind kept, that may be positive semidefinite.

    Raises:
        TypeError, ValueError: its numbers are complex or not finite, or it is not symmetric to half its digits.
        NotPositiveDefiniteError: its diagonal has a negative entry.
    """
    if A.is_complex() if isinstance(A, Tensor) else A.dtype.kind not in "biuf":
        raise TypeError(f"{owner}: A must be real, got {A.dtype}")
    if isinstance(A, Tensor):
        eps = torch.finfo(A.dtype).eps if A.is_floating_point() else 0.0
        matrix = A.detach().to(torch.float64)
        if matrix.layout is not torch.strided:
            matrix = matrix.to_sparse_coo().coalesce()
        numbers = matrix.values() if matrix.is_sparse else matrix
        skew = (matrix - matrix.mT).coalesce().values() if matrix.is_sparse else matrix - matrix.mT
        diagonal = _sparse_diagonal(matrix) if matrix.is_sparse else matrix.diagonal()
        largest = [float(part.abs().max()) if part.numel() else 0.0 for part in (numbers, skew)]
    else:
        eps = float(np.finfo(A.dtype).eps) if A.dtype.kind == "f" else 0.0
        matrix = A.astype(np.float64)
        diagonal = matrix.diagonal()
        largest = [float(abs(part).max()) for part in (matrix, matrix - matrix.T)]
    if not np.isfinite(largest[0]):
        raise ValueError(f"{owner}: A holds numbers that are not finite")
    if largest[1] > eps**0.5 * largest[0]:
        raise ValueError(
            f"{owner}: A must be symmetric; A - Aᵀ has an entry of {largest[1]:.2g} where A's largest is "
            f"{largest[0]:.2g}; a system of another kind is one for AᵀA, or for GMRES"
        )
    if float(diagonal.min()) < 0:
        raise NotPositiveDefiniteError(
            f"{owner}: A must be positive definite, and its diagonal has {float(diagonal.min()):.3g} in it;"
            " a negative definite system is solved as -A x = -b"
        )
    return matrix


def _sparse_diagonal(matrix: Tensor) -> Tensor:  # of those entries that are stored
    rows, columns = matrix.indices()
    return torch.cat([matrix.values()[rows == columns], matrix.values().new_zeros(1)])


def product_of(
    owner: str,
    A: Any,
    shape: tuple[int, ...],
    *,
    numpy: bool,
    device: torch.device,
) -> Product:
    """v to A v in float64, for vectors [n] however A is given.

    Args:
        owner: for messages.
        A: tensor, array, SciPy sparse matrix, ``LinearOperator``, or function.
        shape: of what a function takes and returns; its size is n.
        numpy: a function takes and returns arrays, not tensors.
        device: of the vectors.

    Raises:
        TypeError, ValueError: A has the wrong type, is of another size, complex, not finite or not symmetric.
        NotPositiveDefiniteError: its diagonal has a negative entry.
    """
    n, size = dimension_of(owner, A), int(np.prod(shape, dtype=np.int64))
    if n is not None and n != size:
        raise ValueError(f"{owner}: A is [{n}, {n}], and a vector of shape {shape} has {size} numbers")
    if _is_matrix(A):
        matrix = symmetric_matrix(owner, A)
        if isinstance(matrix, Tensor):
            matrix = matrix.to(device)
            return lambda v: torch.mv(matrix, v)
        return lambda v: torch.from_numpy(np.asarray(matrix @ v.cpu().numpy())).to(device)

    given = (size,) if n is not None else shape
    call: Callable[[Any], Any] = A.matvec if isinstance(A, LinearOperator) else A
    arrays = numpy or isinstance(A, LinearOperator)

    def product(v: Tensor) -> Tensor:
        asked = v.view(given)
        answer = call(asked.cpu().numpy() if arrays else asked)
        found = torch.as_tensor(answer).detach()
        if found.is_complex():
            raise TypeError(f"{owner}: A must be real, and a product with it has dtype {found.dtype}")
        if tuple(found.shape) != given:
            raise ValueError(f"{owner}: A of a vector of shape {given} has shape {tuple(found.shape)}")
        # A copy: the function may answer with what it was given, or in one place again and again.
        return found.to(device, torch.float64, copy=True).reshape(-1)

    return product
