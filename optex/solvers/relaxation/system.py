"""A linear system in the forms in which it may come, and the triangle that relaxation solves with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import get_blas_funcs
from scipy.sparse.linalg import splu
from torch import Tensor

from optex.checks import check_number
from optex.errors import NotPositiveDefiniteError
from optex.small import Array

__all__ = ["Matrix", "System", "Triangle", "check_omega", "read_matrix", "read_system"]

_DTYPES: Final = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
_KINDS: Final = {tensor: array for array, tensor in _DTYPES.items()}
# Entries that should be equal may differ by what assembling a matrix in another order does.
_ASYMMETRY: Final = 1e-10
# Up to this n BLAS goes through a dense matrix in less time than SciPy needs to look at a sparse one.
_SMALL: Final = 128


def check_omega(owner: str, omega: Any) -> float:
    """ω as a float.

    Raises:
        ValueError: it is not between 0 and 2, outside of which no relaxation converges (Kahan's theorem).
    """
    return check_number(owner, "omega", omega, open_below=True, most=2.0, open_above=True)


@dataclass(frozen=True)
class Triangle:
    """D / ω + L, D the diagonal and L what is below it.

    Attributes:
        solve: r [n] to (D / ω + L)⁻¹ r.
        solve_transposed: r [n] to (D / ω + L)⁻ᵀ r.
    """

    solve: Callable[[Array], Array]
    solve_transposed: Callable[[Array], Array]


class Matrix(ABC):
    """A square matrix [n, n].

    Attributes:
        size: n.
        diagonal: [n].
    """

    size: int
    diagonal: Array

    @abstractmethod
    def product(
        self,
        x: Array,  # [n]
    ) -> Array:  # [n]
        """A x."""

    @abstractmethod
    def triangle(self, omega: float) -> Triangle:
        """D / ω + L, ready to be solved with."""

    @abstractmethod
    def norm(
        self,
        x: Array,  # [n]
    ) -> float:
        """‖x‖."""

    @abstractmethod
    def asymmetry(self) -> tuple[float, float]:
        """Largest entry of A - Aᵀ and of A, in absolute value."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether all entries are finite."""


class _HostMatrix(Matrix):
    """What lies in main memory, for NumPy, BLAS and SciPy."""

    def __init__(self, dtype: Any) -> None:
        self._norm: Any = get_blas_funcs("nrm2", dtype=dtype)

    def norm(self, x: Array) -> float:
        return self._norm(x)


class SparseMatrix(_HostMatrix):
    """A sparse matrix, by columns, its entries sorted."""

    def __init__(self, matrix: Any) -> None:
        columns: Any = scipy.sparse.csc_array(matrix)  # SciPy's types say too little of their attributes
        if not columns.has_canonical_format:
            columns = columns.copy()
            columns.sum_duplicates()
        self._columns = columns
        self.size: int = columns.shape[0]
        self.diagonal: Array = columns.diagonal()
        super().__init__(columns.dtype)

    def product(self, x: Array) -> Array:
        return self._columns @ x

    def triangle(self, omega: float) -> Triangle:
        columns, size = self._columns, self.size
        across = np.repeat(np.arange(size, dtype=columns.indices.dtype), np.diff(columns.indptr))
        below = columns.indices >= across
        values, rows = columns.data[below], columns.indices[below]
        values[rows == across[below]] /= values.dtype.type(omega)
        starts = np.concatenate([[0], np.cumsum(below)])[columns.indptr].astype(rows.dtype)
        lower = scipy.sparse.csc_array((values, rows, starts), shape=(size, size))
        # In its own order and with its own pivots a triangle is its factor: nothing fills in. Solves with it
        # run in compiled code, a hundredth of spsolve_triangular's time at n = 100, a sixth at 100,000.
        factor = splu(lower, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"Equil": False})
        return Triangle(factor.solve, lambda r: factor.solve(r, "T"))

    def asymmetry(self) -> tuple[float, float]:
        difference = self._columns - self._columns.T
        return float(abs(difference).max()), float(abs(self._columns).max())

    def finite(self) -> bool:
        return bool(np.isfinite(self._columns.data).all())


class DenseMatrix(_HostMatrix):
    """A NumPy array."""

    def __init__(self, matrix: NDArray[Any]) -> None:
        self._matrix = matrix
        self.size: int = len(matrix)
        self.diagonal: Array = matrix.diagonal().copy()  # a view of one has a stride of n + 1
        super().__init__(matrix.dtype)

    def product(self, x: Array) -> Array:
        return self._matrix @ x

    def triangle(self, omega: float) -> Triangle:
        lower = np.array(self._matrix, order="F")  # BLAS reads nothing above the diagonal
        np.fill_diagonal(lower, self.diagonal / self.diagonal.dtype.type(omega))
        solve: Any = get_blas_funcs("trsv", (lower,))
        return Triangle(lambda r: solve(lower, r, lower=1), lambda r: solve(lower, r, lower=1, trans=1))

    def asymmetry(self) -> tuple[float, float]:
        return float(abs(self._matrix - self._matrix.T).max()), float(abs(self._matrix).max())

    def finite(self) -> bool:
        return bool(np.isfinite(self._matrix).all())


class DeviceMatrix(Matrix):
    """A dense tensor on an accelerator, where it stays."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.size: int = len(matrix)
        self.diagonal: Array = matrix.diagonal()

    def product(self, x: Array) -> Array:
        return self._matrix @ x

    def triangle(self, omega: float) -> Triangle:
        lower = self._matrix.tril(-1) + torch.diag(self.diagonal / omega)
        solve = torch.linalg.solve_triangular
        return Triangle(
            lambda r: solve(lower, r[:, None], upper=False)[:, 0],
            lambda r: solve(lower.mT, r[:, None], upper=True)[:, 0],
        )

    def norm(self, x: Array) -> float:
        return float(torch.linalg.vector_norm(x))

    def asymmetry(self) -> tuple[float, float]:
        return float((self._matrix - self._matrix.mT).abs().max()), float(self._matrix.abs().max())

    def finite(self) -> bool:
        return bool(self._matrix.isfinite().all())


@dataclass(frozen=True)
class System:
    """A x = b.

    Attributes:
        matrix: A.
        right: b [n].
        start: x [n], the system's own copy.
        dtype: of the computation.
        present: puts an x [n] in b's form.
    """

    matrix: Matrix
    right: Array
    start: Array
    dtype: torch.dtype
    present: Callable[[Array], Any]


def read_system(owner: str, A: Any, b: Any, x0: Any, *, symmetric: bool = False) -> System:
    """Check a system, and bring it in the form in which it is computed.

    Args:
        owner: the function, for messages.
        A: SciPy sparse, NumPy, or a tensor, dense or sparse.
        b: [n].
        x0: [n], or None for zero.
        symmetric: A has to be, with a positive diagonal.

    Raises:
        TypeError, ValueError, NotPositiveDefiniteError: it cannot be relaxed; the message says why.
    """
    dtype = _common_dtype(owner, A, b)
    matrix = read_matrix(owner, A, dtype, symmetric=symmetric)
    device = A.device if isinstance(matrix, DeviceMatrix) else torch.device("cpu")
    right = _vector(owner, "b", b, matrix.size, dtype, device)
    start = 0 * right if x0 is None else _vector(owner, "x0", x0, matrix.size, dtype, device)
    if isinstance(b, Tensor):
        home = b.device
        return System(matrix, right, start, dtype, lambda x: torch.as_tensor(x).to(home, copy=True))
    if isinstance(right, Tensor):
        return System(matrix, right, start, dtype, lambda x: x.cpu().numpy())
    return System(matrix, right, start, dtype, np.array)


def read_matrix(owner: str, A: Any, dtype: torch.dtype | None = None, *, symmetric: bool = False) -> Matrix:
    """The matrix, checked as ``read_system`` says."""
    dtype = _common_dtype(owner, A) if dtype is None else dtype
    shape = tuple(getattr(A, "shape", np.shape(A)))
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(f"{owner}: A must be a square matrix, got shape {shape}")
    matrix = _form(A, dtype)
    if not matrix.finite():
        raise ValueError(f"{owner}: A holds numbers that are NaN or infinite; look at where it was assembled")
    diagonal = matrix.diagonal
    if not bool(diagonal.all()):
        row = int(torch.as_tensor(diagonal == 0).nonzero()[0])
        raise ValueError(
            f"{owner}: A has a zero on its diagonal, at row {row}, and relaxation divides by it; order the "
            "rows so that none is, or use another solver"
        )
    if symmetric:
        _check_symmetric(owner, matrix, diagonal)
    return matrix


def _check_symmetric(owner: str, matrix: Matrix, diagonal: Array) -> None:
    apart, largest = matrix.asymmetry()
    if apart > _ASYMMETRY * largest:
        raise ValueError(
            f"{owner}: A must be symmetric, but entries of A - Aᵀ are as large as {apart:.3g}; symmetrise it, "
            "or use sor, or a solver for other matrices"
        )
    if bool((diagonal < 0).any()):
        row = int(torch.as_tensor(diagonal < 0).nonzero()[0])
        raise NotPositiveDefiniteError(
            f"{owner}: A must be positive definite, but its diagonal has {float(diagonal[row]):.3g} at row "
            f"{row}; solve with -A and -b if it is negative definite"
        )


def _form(A: Any, dtype: torch.dtype) -> Matrix:
    kind = _KINDS[dtype]
    if scipy.sparse.issparse(A):
        return _sparse(A.astype(kind, copy=False))
    if not isinstance(A, Tensor):
        return DenseMatrix(np.asarray(A, dtype=kind))
    A = A.detach().to(dtype)
    if A.layout == torch.strided:
        return DenseMatrix(A.numpy()) if A.device.type == "cpu" else DeviceMatrix(A)
    # Substitution goes row by row; on sparse rows a processor is the place for it.
    entries = A.cpu().to_sparse_coo().coalesce()
    rows, columns = entries.indices().numpy()
    return _sparse(scipy.sparse.coo_array((entries.values().numpy(), (rows, columns)), shape=A.shape))


def _sparse(matrix: Any) -> Matrix:
    return DenseMatrix(matrix.toarray()) if matrix.shape[0] <= _SMALL else SparseMatrix(matrix)


def _common_dtype(owner: str, *values: Any) -> torch.dtype:
    """float32 where all floating-point numbers are, else float64."""
    found = []
    for value in values:
        if not (scipy.sparse.issparse(value) or isinstance(value, (Tensor, np.ndarray, list, tuple))):
            raise TypeError(
                f"{owner}: A and b must be SciPy sparse, NumPy arrays or tensors, got {type(value).__name__}; "
                "a product alone has no diagonal to relax with"
            )
        dtype: Any = np.asarray(value).dtype if isinstance(value, (list, tuple)) else value.dtype
        if isinstance(dtype, torch.dtype):
            dtype = (
                np.dtype(np.float16) if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
            )
        dtype = np.dtype(np.float64) if dtype.kind in "iub" else dtype
        if dtype not in _DTYPES:
            raise TypeError(f"{owner}: A and b must be real, of float32 or float64, got {dtype}; convert them")
        found.append(_DTYPES[dtype])
    return torch.float32 if set(found) == {torch.float32} else torch.float64


def _vector(owner: str, name: str, value: Any, size: int, dtype: torch.dtype, device: torch.device) -> Array:
    """A copy [n]: a tensor on an accelerator, an array in main memory."""
    if isinstance(value, Tensor) and device.type != "cpu" and value.device != device:
        raise ValueError(f"{owner}: {name} is on {value.device}, A on {device}; move one of them")
    found: Array = value.detach().to(device, dtype, copy=True) if isinstance(value, Tensor) else np.array(value)
    if tuple(found.shape) != (size,):
        raise ValueError(f"{owner}: {name} must have shape ({size},), as A's rows, got {tuple(found.shape)}")
    if device.type == "cpu":
        found = np.asarray(found, dtype=_KINDS[dtype])
    else:
        found = torch.as_tensor(found).to(device, dtype)
    if not bool(torch.isfinite(found).all() if isinstance(found, Tensor) else np.isfinite(found).all()):
        raise ValueError(f"{owner}: {name} holds numbers that are NaN or infinite")
    return found
