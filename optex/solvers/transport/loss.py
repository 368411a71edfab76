"""``SparseOTLoss``: the value of the transport problem as a loss."""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from optex.checks import check_integer, check_number, shown
from optex.errors import ConvergenceWarning, warn
from optex.solvers.outcome import check_tolerance
from optex.solvers.transport.solver import sparse_ot

__all__ = ["SparseOTLoss"]

_OWNER: Final = "SparseOTLoss"


class SparseOTLoss(nn.Module):
    """The dual's maximum, differentiable in costs and masses without a pass through the solver.

    At the maximum the derivative with respect to what stands in the objective is that at fixed potentials (the
    envelope theorem):

        ∂/∂C = T,   ∂/∂a = α,   ∂/∂b = β

    Masses stay on the simplex, so their gradients are given without the part along constants. Where k binds, T
    is one of the plans at a kink: rows do not carry their mass, T is no exact derivative, and a
    ``ConvergenceWarning`` says so.

    Args:
        gamma, k, form, tol, maxiter: as in :func:`~optex.sparse_ot`.
        reduction: of a batch's values: ``"mean"``, ``"sum"``, or ``"none"``.

    Raises:
        TypeError, ValueError: an argument cannot work.

    >>> import torch, optex
    >>> x = torch.linspace(0, 1, 6, dtype=torch.float64).requires_grad_()
    >>> y = torch.linspace(0, 2, 3, dtype=torch.float64)
    >>> loss = optex.SparseOTLoss(gamma=0.1, k=3)((x[:, None] - y).square())
    >>> loss.backward()
    >>> x.grad.shape, bool(x.grad.sum() < 0)                     # sources move to the right
    (torch.Size([6]), True)

    Source: Liu, Puigcerver, Blondel, ICLR 2023, arXiv 2209.15466; Danskin's theorem.
    """

    def __init__(
        self,
        gamma: float,
        k: int,
        *,
        form: Literal["semi-dual", "dual"] = "semi-dual",
        tol: float = 1e-9,
        maxiter: int = 5000,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{_OWNER}: reduction must be 'mean', 'sum' or 'none', got {shown(reduction)}")
        if form not in ("semi-dual", "dual"):
            raise ValueError(f"{_OWNER}: form must be 'semi-dual' or 'dual', got {shown(form)}")
        self.gamma: float = check_number(_OWNER, "gamma", gamma, open_below=True)
        self.k: int = check_integer(_OWNER, "k", k)
        self.form: Literal["semi-dual", "dual"] = form
        self.tol: float = check_tolerance(_OWNER, tol, torch.float64)
        self.maxiter: int = check_integer(_OWNER, "maxiter", maxiter)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}, k={self.k}, form={self.form!r}"

    def forward(
        self,
        C: Tensor,  # [..., m, n]
        a: Tensor | None = None,  # [..., m]
        b: Tensor | None = None,  # [..., n]
    ) -> Tensor:  # [], or [...] with reduction="none"
        """The value; masses are uniform where they are not given."""
        if not isinstance(C, Tensor) or not C.is_floating_point() or C.ndim < 2:
            raise TypeError(f"{_OWNER}: C must be a floating-point tensor [..., m, n], got {_told(C)}")
        m, n = C.shape[-2:]
        masses = [C.new_full((size,), 1 / size) if mass is None else mass for mass, size in ((a, m), (b, n))]
        for name, mass in zip("ab", masses, strict=True):
            if not isinstance(mass, Tensor) or not mass.is_floating_point():
                raise TypeError(f"{_OWNER}: {name} must be a floating-point tensor, got {_told(mass)}")
        values = _Value.apply(C, *masses, self)
        if self.reduction == "none":
            return values
        return values.mean() if self.reduction == "mean" else values.sum()


def _told(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class _Value(torch.autograd.Function):
    """Values, with the plan and the potentials as their derivatives."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, a: Tensor, b: Tensor, loss: SparseOTLoss) -> Tensor:  # [...]
        result = sparse_ot(a, b, C, loss.gamma, loss.k, form=loss.form, tol=loss.tol, maxiter=loss.maxiter)
        if not result.success:
            warn(f"{_OWNER}: {result.message} The gradient is only as right as that.", ConvergenceWarning)
        centred = [p - p.mean(-1, keepdim=True) for p in (result.alpha, result.beta)]
        ctx.save_for_backward(result.x, *centred)
        ctx.shapes = a.shape, b.shape
        ctx.dtypes = a.dtype, b.dtype
        return result.value

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides ctx's name)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (outer,) = grad_outputs  # [...]
        plan, alpha, beta = ctx.saved_tensors
        of_masses = [
            (outer[..., None] * potential).sum_to_size(shape).to(dtype)
            for potential, shape, dtype in zip((alpha, beta), ctx.shapes, ctx.dtypes, strict=True)
        ]
        return outer[..., None, None] * plan, *of_masses, None
