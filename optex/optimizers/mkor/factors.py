"""Inverse factors of a layer, kept by rank-1 updates, and their product with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

_CACHED: Final = 1 << 16  # numbers that stay in a CPU's cache

__all__ = ["UPDATES", "exact_update", "preconditioned", "released_update", "stabilised"]


def released_update(
    factor: Tensor,  # [d, d] symmetric positive definite; changed in place
    vector: Tensor,  # [d]
    decay: float,
) -> None:
    """P <- Q - Q v (Q v)' / (1 + v' Q v) with Q = decay P + (1 - decay) I, as in the authors' code.

    It is the inverse of inv(Q) + v v'. P never exceeds I: Q <= I where P <= I, and the term subtracted is
    positive semidefinite.

    >>> P = torch.eye(2)
    >>> released_update(P, torch.tensor([1.0, 0.0]), 0.95)
    >>> P.diagonal().tolist()
    [0.5, 1.0]
    """
    product = torch.addmv(vector, factor, vector, beta=1 - decay, alpha=decay)  # Q v
    # v' Q v is never negative but for rounding.
    product /= (1 + vector @ product).clamp_min(1).sqrt()
    factor.addr_(product, product, beta=decay, alpha=-1)
    factor.diagonal().add_(1 - decay)


def exact_update(
    factor: Tensor,  # [d, d] symmetric positive definite; changed in place
    vector: Tensor,  # [d]
    decay: float,
) -> None:
    """P <- [P - (1 - decay) P v (P v)' / (decay + (1 - decay) v' P v)] / decay, by Sherman and Morrison.

    It is the inverse of M <- decay M + (1 - decay) v v', for M = inv(P).

    >>> P = torch.eye(2)
    >>> exact_update(P, torch.tensor([1.0, 0.0]), 0.5)
    >>> P.diagonal().tolist()
    [1.0, 2.0]
    """
    product = factor @ vector
    share = (1 - decay) / decay / (decay + (1 - decay) * (vector @ product).clamp_min(0))
    product *= share.sqrt()
    # Not addr_, whose kernel may round an entry and its mirror image differently: an asymmetry grows by
    # 1 / decay in every update and never decays. On CPUs a few rows at a time, which stay in the cache;
    # elsewhere a launch costs more than a pass.
    rows = max(1, _CACHED // len(product)) if factor.device.type == "cpu" else len(product)
    for part, piece in zip(factor.split(rows), product.split(rows), strict=True):
        part.div_(decay).sub_(piece[:, None] * product)


UPDATES: Final[dict[str, Callable[[Tensor, Tensor, float], None]]] = {
    "released": released_update,
    "exact": exact_update,
}


def stabilised(
    factors: Sequence[Tensor],  # each [d, d] symmetric positive definite; changed in place
    threshold: float,
    reset: float,
) -> None:
    """P <- (1 - reset) P + reset I for those factors whose largest entry is above the threshold.

    The largest entry of such a matrix is on its diagonal, as P_ij^2 <= P_ii P_jj.

    >>> P = 3 * torch.eye(2)
    >>> stabilised([P], threshold=2.0, reset=0.5)
    >>> P.diagonal().tolist()
    [2.0, 2.0]
    """
    if not factors:
        return
    home = factors[0].device
    largest = torch.stack([factor.diagonal().max().to(home, torch.float64) for factor in factors])
    for factor, above in zip(factors, (largest > threshold).tolist(), strict=True):
        if above:
            factor.mul_(1 - reset)
            factor.diagonal().add_(reset)


def preconditioned(
    left: Tensor,  # [out, out]
    right: Tensor,  # [in, in], or [in + 1, in + 1] with a bias
    weight: Tensor,  # [out, ...], a gradient of out x in numbers
    bias: Tensor | None,  # [out], a gradient; None where there is no bias, or none that is trained
) -> tuple[Tensor, Tensor | None]:  # of the gradients' shapes and dtypes
    """U = left [weight | bias] right, as long as the gradient was: |U_weight| + |U_bias| = |weight| + |bias|.

    >>> eye = torch.eye(2)
    >>> preconditioned(torch.diag(torch.tensor([2.0, 1.0])), eye, torch.tensor([[0.0, 3.0], [0.0, 0.0]]), None)
    (tensor([[0., 3.],
            [0., 0.]]), None)
    """
    rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
    gradient = weight.reshape(rows, columns).to(right.dtype)
    length = gradient.norm()
    if right.shape[0] > columns:
        last = torch.zeros_like(gradient[:, 0]) if bias is None else bias.to(right.dtype)
        length = length + last.norm()
        gradient = torch.cat([gradient, last[:, None]], 1)
    update = left @ gradient @ right
    new_weight = update[:, :columns]
    new_bias = None if bias is None else update[:, columns]
    new_length = new_weight.norm() if new_bias is None else new_weight.norm() + new_bias.norm()
    scale = torch.where(new_length > 0, length / new_length, 1.0)
    return (
        (scale * new_weight).reshape(weight.shape).to(weight.dtype),
        None if bias is None or new_bias is None else (scale * new_bias).to(bias.dtype),
    )
