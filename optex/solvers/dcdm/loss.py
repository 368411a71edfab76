"""What a direction is trained for: the residual that is left by the best step along it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from optex.solvers.dcdm.operator import dimension_of, symmetric_matrix

__all__ = ["DCDMLoss"]

_OWNER: Final = "DCDMLoss"


class DCDMLoss(nn.Module):
    """Mean over a batch of the squared residual after the best step along the model's direction.

        ‖b - A q (qᵀ b) / (qᵀ A q)‖²,   q = f(b)

    It is 0 for q = c A⁻¹ b with any c, so the model learns the inverse up to a factor, which may differ from b
    to b. It needs no solutions. A direction with qᵀ A q <= 0 has no best step and counts ‖b‖².

    Args:
        A: a matrix [n, n] (tensor, dense or sparse; array; SciPy sparse matrix), held in the default dtype
            until ``to`` says another; or a function of a batch [batch, ...] that autograd can differentiate.

    Raises:
        TypeError, ValueError: A has the wrong type, or is not square or not symmetric.
        NotPositiveDefiniteError: the diagonal of a matrix has a negative entry.

    >>> A = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
    >>> b = torch.tensor([[1.0, 0.0]])
    >>> loss = DCDMLoss(A)
    >>> loss(-3 * b @ torch.linalg.inv(A), b).item() < 1e-12, loss(b, b).item()
    (True, 0.25)
    """

    matrix: Tensor | None

    def __init__(self, A: Any) -> None:
        super().__init__()
        n = dimension_of(_OWNER, A)
        self.function: Callable[[Tensor], Tensor] | None = A if n is None else None
        matrix = None
        if n is not None:
            if not (isinstance(A, Tensor) or hasattr(A, "astype")):
                raise TypeError(
                    f"{_OWNER}: A must be a matrix, or a function in torch that can be differentiated, got "
                    f"{type(A).__name__}"
                )
            matrix = _as_tensor(symmetric_matrix(_OWNER, A)).to(torch.get_default_dtype())
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(
        self,
        q: Tensor,  # [batch, ...]
        b: Tensor,  # [batch, ...]
    ) -> Tensor:  # []
        """The loss of directions q for right-hand sides b, of one shape.

        Raises:
            ValueError: they are not of one shape, or not of A's size.
        """
        if q.shape != b.shape or q.ndim < 2:
            raise ValueError(
                f"{_OWNER}: q and b must have one shape [batch, ...], got {tuple(q.shape)} and {tuple(b.shape)}"
            )
        rows, right = q.flatten(1), b.flatten(1)
        if self.matrix is not None:
            if rows.shape[1] != len(self.matrix):
                raise ValueError(
                    f"{_OWNER}: A is of dimension {len(self.matrix)}, and q has {rows.shape[1]} numbers"
                )
            product = (self.matrix @ rows.mT).mT
        else:
            assert self.function is not None
            product = self.function(q).flatten(1)
        curvature = (rows * product).sum(1, keepdim=True)  # [batch, 1]
        along = (rows * right).sum(1, keepdim=True)
        usable = curvature > 0
        step = torch.where(usable, along / torch.where(usable, curvature, 1.0), 0.0)
        return (right - step * product).square().sum(1).mean()


def _as_tensor(matrix: Any) -> Tensor:  # [n, n]
    if isinstance(matrix, Tensor):
        return matrix
    if hasattr(matrix, "tocoo"):
        found = matrix.tocoo()
        places = torch.stack([torch.from_numpy(part.astype("int64")) for part in (found.row, found.col)])
        return torch.sparse_coo_tensor(
            places, torch.from_numpy(found.data), found.shape, check_invariants=True
        ).coalesce()
    return torch.from_numpy(matrix)
