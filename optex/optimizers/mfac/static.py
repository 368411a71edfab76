"""M-FAC, the static algorithm: pruning with the inverse Fisher matrix of a fixed set of gradients.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
NeurIPS 2021, arXiv 2107.03356; the saliency and the update of one weight are those of Hassibi and Stork,
"Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992.

The paper computes vectors h_i = F_{i-1}⁻¹ g_i one after the other, and from them
F⁻¹ = (1/λ) I - Σ h_i h_iᵀ / (m + g_iᵀ h_i). Up to their lengths they are the rows of L⁻¹ G, with L the Cholesky
factor of m λI + GGᵀ: the recursion is that factorisation, a row at a time. Here the factor comes first, and the
h_i are computed from it in float64, a slab of columns at a time and only where needed. So they never take m × d
numbers, and G may have a lower precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optex import small
from optex.checks import check_integer, check_number
from optex.errors import NonFiniteError
from optex.optimizers.mfac.fisher import factorised, gram, ridge, slabs, woodbury

__all__ = ["gradient_rows", "inverse_diagonal", "inverse_product", "obs_mask", "obs_update"]


def gradient_rows(
    parameters: Iterable[Tensor],
    objective: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:  # [m, d]
    """The gradient of every batch as a row, parameters one after the other; ``.grad`` is left alone.

    Args:
        parameters: in the order of ``torch.nn.utils.parameters_to_vector``.
        objective: ``objective(batch)`` returns the loss.
        batches: one row each; batches of one sample give the empirical Fisher matrix of the literature; the
            released code takes 32 samples each.
        dtype: of the rows; None is the gradients'.

    Raises:
        ValueError: there is no batch, or no parameter.
        NonFiniteError: a gradient is NaN or infinite; the message names the batch.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> gradient_rows([weight], lambda x: (weight * x).sum(), [torch.tensor([3.0, 4.0])])
    tensor([[3., 4.]])
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("gradient_rows: there is no parameter to take gradients of")
    rows = []
    for number, batch in enumerate(batches):
        with torch.enable_grad():
            found = torch.autograd.grad(objective(batch), parameters, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        row = torch.cat([piece.detach().reshape(-1) for piece in pieces])
        if not bool(row.isfinite().all()):
            raise NonFiniteError(
                f"gradient_rows: the gradient of batch {number} is not finite; check that batch"
            )
        rows.append(row if dtype is None else row.to(dtype))
    if not rows:
        raise ValueError("gradient_rows: there is no batch, and a Fisher matrix needs one gradient at least")
    return torch.stack(rows)


def inverse_diagonal(
    rows: Tensor,  # [m, d]
    damping: float = 1e-5,
    *,
    block_size: int | None = None,
) -> Tensor:  # [d] float64
    """The diagonal of F⁻¹, F = λI + (1/m) GᵀG, without a d × d matrix.

    [F⁻¹]_ii = (1 - ‖L⁻¹ G e_i‖²) / λ with L Lᵀ = m λI + GGᵀ. For blocks that are not wider than m their own
    matrix is inverted instead, without cancellation.

    Args:
        rows: G, one gradient a row.
        damping: λ, above 0.
        block_size: F is replaced by its diagonal blocks of as many coordinates; None takes all of F. The
            released pruning takes 128.

    Raises:
        ValueError: rows are no matrix of finite numbers, or another argument is out of range.

    >>> inverse_diagonal(torch.tensor([[2.0, 0.0]]), damping=1.0)
    tensor([0.2000, 1.0000], dtype=torch.float64)

    Source: the static algorithm of arXiv 2107.03356.
    """
    _check_rows("inverse_diagonal", rows, damping, block_size)
    return torch.cat([_diagonal(rows[:, block], damping) for block in _blocks(rows, block_size)])


def _diagonal(
    rows: Tensor,  # [m, b]
    damping: float,
) -> Tensor:  # [b] float64
    count, width = rows.shape
    if width <= count:
        wide = rows.to(torch.float64)
        factor = factorised(wide.mT @ wide, damping, count)
        return count * small.tensor(small.cholesky_inverse(factor)).diagonal().clone()
    factor, found = small.tensor(factorised(gram(rows), damping)), []
    for slab in slabs(width):
        wide = rows[:, slab].to(torch.float64)
        explained = torch.linalg.solve_triangular(factor, wide, upper=False).square().sum(0)
        # Never below 1 / F_ii (Cauchy and Schwarz), which rounding alone could cross.
        least = 1 / (damping + wide.square().mean(0))
        found.append(torch.maximum((1 - explained) / damping, least))
    return torch.cat(found)


def inverse_product(
    rows: Tensor,  # [m, d]
    vector: Tensor,  # [d]
    damping: float = 1e-5,
    *,
    block_size: int | None = None,
) -> Tensor:  # [d] float64
    """F⁻¹ x, all in float64.

    Args:
        rows: G, one gradient a row.
        vector: x.
        damping: λ, above 0.
        block_size: as in ``inverse_diagonal``.

    Raises:
        ValueError: shapes do not fit, or an argument is out of range.

    >>> inverse_product(torch.tensor([[2.0, 0.0]]), torch.tensor([5.0, 3.0]), damping=1.0)
    tensor([1., 3.], dtype=torch.float64)
    """
    _check_rows("inverse_product", rows, damping, block_size)
    _check_vector("inverse_product", "vector", vector, rows)
    wide = vector.to(rows.device, torch.float64)
    return torch.cat([woodbury(rows[:, block], wide[block], damping) for block in _blocks(rows, block_size)])


def obs_mask(
    weights: Tensor,  # [d]
    rows: Tensor,  # [m, d]
    sparsity: float,
    damping: float = 1e-5,
    *,
    block_size: int | None = None,
) -> Tensor:  # [d] bool
    """Which weights to keep: all but those of the least saliency w_i² / (2 [F⁻¹]_ii).

    The saliency is how much the loss grows, to second order, if weight i alone is set to zero and all others
    are moved to compensate for it.

    Args:
        weights: of the trained network, as one vector.
        rows: gradients there, one a row.
        sparsity: share of the weights to drop, 0 to 1; their number is rounded.
        damping: λ, above 0.
        block_size: as in ``inverse_diagonal``.

    Raises:
        ValueError: shapes do not fit, or an argument is out of range.

    >>> obs_mask(torch.tensor([1.0, 2.0]), torch.tensor([[9.0, 0.1]]), 0.5)     # magnitude would keep the other
    tensor([ True, False])
    """
    _check_rows("obs_mask", rows, damping, block_size)
    _check_vector("obs_mask", "weights", weights, rows)
    check_number("obs_mask", "sparsity", sparsity, most=1.0)
    diagonal = inverse_diagonal(rows, damping, block_size=block_size)
    saliency = weights.to(rows.device, torch.float64).square() / (2 * diagonal)
    keep = torch.ones(len(weights), dtype=torch.bool, device=rows.device)
    keep[saliency.argsort(stable=True)[: round(sparsity * len(weights))]] = False
    return keep.to(weights.device)


def obs_update(
    weights: Tensor,  # [d]
    rows: Tensor,  # [m, d]
    keep: Tensor,  # [d] bool
    damping: float = 1e-5,
    *,
    block_size: int | None = None,
    together: bool = True,
) -> Tensor:  # [d], as weights
    """The weights with those that are not kept at zero, and the others moved to compensate.

    Let K be kept and Q dropped. The minimum of ½ δᵀFδ with δ_Q = -w_Q is at δ_K = F_KK⁻¹ F_KQ w_Q, and with
    F_KK = λI + (1/m) G_KᵀG_K and F_KQ = (1/m) G_KᵀG_Q this is, by the push-through identity,

        δ_K = G_Kᵀ (m λI + G_K G_Kᵀ)⁻¹ G_Q w_Q.

    Args:
        weights: of the trained network, as one vector.
        rows: gradients there, one a row.
        keep: which weights stay, by ``obs_mask`` or any other rule.
        damping: λ, above 0.
        block_size: as in ``inverse_diagonal``.
        together: False adds up the changes for each dropped weight alone, -F⁻¹ e_i w_i / [F⁻¹]_ii, and then
            sets the dropped ones to zero, as the released code does: exact for one weight, not for several.

    Raises:
        ValueError: shapes do not fit, or an argument is out of range.

    >>> rows = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    >>> obs_update(torch.tensor([1.0, 2.0]), rows, torch.tensor([False, True]), damping=1e-9)
    tensor([0., 3.])
    """
    _check_rows("obs_update", rows, damping, block_size)
    _check_vector("obs_update", "weights", weights, rows)
    if keep.dtype != torch.bool or keep.shape != weights.shape:
        raise ValueError(
            f"obs_update: keep must be a boolean tensor {tuple(weights.shape)}, got {keep.dtype} "
            f"{tuple(keep.shape)}; obs_mask makes one"
        )
    wide, stays = weights.to(rows.device, torch.float64), keep.to(rows.device)
    change = _together if together else _one_by_one
    changes = [change(rows[:, b], wide[b], stays[b], damping) for b in _blocks(rows, block_size)]
    return torch.where(stays, wide + torch.cat(changes), 0.0).to(weights.device, weights.dtype)


def _together(
    rows: Tensor,  # [m, b]
    weights: Tensor,  # [b] float64
    keep: Tensor,  # [b] bool
    damping: float,
) -> Tensor:  # [b] float64
    targets = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for slab in slabs(rows.shape[1]):
        targets += rows[:, slab].to(torch.float64) @ torch.where(keep[slab], 0.0, weights[slab])
    change = torch.zeros_like(weights)
    if bool(keep.any()):
        change[keep] = ridge(rows[:, keep].to(torch.float64), targets, damping)
    return change


def _one_by_one(
    rows: Tensor,  # [m, b]
    weights: Tensor,  # [b] float64
    keep: Tensor,  # [b] bool
    damping: float,
) -> Tensor:  # [b] float64
    return woodbury(rows, torch.where(keep, 0.0, -weights / _diagonal(rows, damping)), damping)


def _blocks(
    rows: Tensor,  # [m, d]
    block_size: int | None,
) -> list[slice]:
    width = rows.shape[1]
    size = width if block_size is None else block_size
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def _check_rows(owner: str, rows: Tensor, damping: float, block_size: int | None) -> None:
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        raise ValueError(
            f"{owner}: rows must be a matrix of floating-point numbers, a gradient a row, got {rows.dtype} "
            f"{tuple(rows.shape)}; gradient_rows makes one"
        )
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{owner}: rows hold numbers that are not finite; leave those gradients out")
    check_number(owner, "damping", damping, open_below=True)
    if block_size is not None:
        check_integer(owner, "block_size", block_size)


def _check_vector(owner: str, name: str, vector: Tensor, rows: Tensor) -> None:
    if vector.ndim != 1 or len(vector) != rows.shape[1] or not vector.is_floating_point():
        raise ValueError(
            f"{owner}: {name} must be a floating-point vector of {rows.shape[1]} numbers, one a column of "
            f"rows, got {vector.dtype} {tuple(vector.shape)}"
        )
