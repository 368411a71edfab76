"""The norm in which steps and gradients are measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Metric", "real_tensor"]


def real_tensor(owner: str, name: str, value: Any) -> Tensor:
    """The value as a real, dense floating-point tensor; anything but a tensor is copied, as float64.

    Raises:
        TypeError: it cannot be one.
    """
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise TypeError(f"{owner}: {name} must be a real array: {error}") from error
        if array.dtype.kind not in "biuf":
            kind = f"{type(value).__name__} of dtype {array.dtype}"
            raise TypeError(f"{owner}: {name} must be a real dense array, got {kind}")
        return torch.from_numpy(np.array(array, dtype=np.float64))
    if value.is_complex() or value.layout is not torch.strided:
        raise TypeError(
            f"{owner}: {name} must be a real dense array, got a tensor of {value.dtype} and {value.layout}"
        )
    return value.detach() if value.is_floating_point() else value.to(torch.float64)


class Metric:
    """B, symmetric and positive definite: ‖h‖² = hᵀ B h of a step, ‖g‖*² = gᵀ B⁻¹ g of a gradient.

    Args:
        matrix: None, the identity; [d], a diagonal; or [d, d]. Tensor or array, best on the gradients' device
            and in their dtype: gradients are moved to it for every solve.

    Attributes:
        matrix: as a tensor, or None.

    Raises:
        TypeError, ValueError: it is no such matrix, or not positive definite.

    >>> Metric([4.0, 1.0]).dual_norm(torch.tensor([2.0, 0.0]))
    1.0
    """

    def __init__(self, matrix: Any = None) -> None:
        self.matrix: Tensor | None = None if matrix is None else real_tensor("Metric", "matrix", matrix)
        self._factor: Tensor | None = None
        if self.matrix is None:
            return
        if self.matrix.ndim not in (1, 2) or len(set(self.matrix.shape)) != 1 or not self.matrix.numel():
            raise ValueError(f"Metric: matrix must be [d] or [d, d], got shape {tuple(self.matrix.shape)}")
        if self.matrix.ndim == 1:
            positive = bool((self.matrix > 0).all() & self.matrix.isfinite().all())
        else:
            factor, failed = torch.linalg.cholesky_ex(self.matrix)
            positive = not failed and bool(factor.isfinite().all())
            self._factor = factor
        if not positive:
            raise ValueError("Metric: matrix is not positive definite; add to its diagonal")

    def check(self, owner: str, dimension: int) -> None:
        """Refuse vectors of another length.

        Raises:
            ValueError: the matrix is of another dimension.
        """
        if self.matrix is not None and len(self.matrix) != dimension:
            raise ValueError(
                f"{owner}: metric is of dimension {len(self.matrix)}, and there are {dimension} numbers to "
                "optimise"
            )

    def inverse(
        self,
        gradients: Tensor,  # [d] or [m, d]
    ) -> Tensor:  # [d] or [m, d]
        """B⁻¹ g, of one gradient or of each row."""
        if self.matrix is None:
            return gradients
        given = gradients.to(self.matrix.device, self.matrix.dtype)
        if self._factor is None:
            return (given / self.matrix).to(gradients.device, gradients.dtype)
        rows = given if given.ndim == 2 else given[None]
        solved = torch.cholesky_solve(rows.mT, self._factor).mT
        return solved.reshape(gradients.shape).to(gradients.device, gradients.dtype)

    def dual_norm(
        self,
        gradient: Tensor,  # [d]
    ) -> float:
        """‖g‖* = √(gᵀ B⁻¹ g)."""
        if self.matrix is None:
            return float(torch.linalg.vector_norm(gradient))
        return math.sqrt(max(float(gradient @ self.inverse(gradient)), 0.0))

    def added(
        self,
        matrix: Tensor,  # [d, d]
        shift: float,
    ) -> Tensor:  # [d, d]
        """H + λ B."""
        result = matrix.clone()
        if self.matrix is None:
            result.diagonal().add_(shift)
        elif self.matrix.ndim == 1:
            result.diagonal().add_(shift * self.matrix.to(matrix.device, matrix.dtype))
        else:
            result += shift * self.matrix.to(matrix.device, matrix.dtype)
        return result
