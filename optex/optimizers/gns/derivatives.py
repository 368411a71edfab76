"""Products with second derivatives, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["flatten", "gauss_newton_product", "hessian_product", "parts"]


def flatten(
    pieces: Sequence[Tensor | None],  # of the parameters' shapes
    parameters: Sequence[Tensor],
) -> Tensor:  # [d]
    """Pieces as one vector in the widest of the parameters' dtypes; zeros where a piece is None."""
    dtype, device = parameters[0].dtype, parameters[0].device
    for p in parameters:
        dtype = torch.promote_types(dtype, p.dtype)
    found = [torch.zeros_like(p) if v is None else v for v, p in zip(pieces, parameters, strict=True)]
    return torch.cat([v.detach().reshape(-1).to(device, dtype) for v in found])


def parts(
    vector: Tensor,  # [d]
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """A vector's pieces, each in its parameter's shape, dtype and place."""
    pieces = vector.split([p.numel() for p in parameters])
    return [v.view(p.shape).to(p.device, p.dtype) for v, p in zip(pieces, parameters, strict=True)]


def hessian_product(
    gradients: Sequence[Tensor | None],  # of the parameters' shapes, with their graph
    parameters: Sequence[Tensor],
) -> Callable[[Tensor], Tensor]:  # [d] to [d]
    """The map from v to H v, by differentiating gradients that were taken with ``create_graph``.

    Source: Pearlmutter, Neural Computation 6 (1994) 147-160.
    """
    kept = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def product(vector: Tensor) -> Tensor:
        pieces = parts(vector, parameters)
        found = torch.autograd.grad(
            [g for _, g in kept], parameters, [pieces[i] for i, _ in kept], retain_graph=True, allow_unused=True
        )
        return flatten(found, parameters)

    return product


def gauss_newton_product(
    loss: Tensor,  # []
    outputs: Tensor,  # [...]
    parameters: Sequence[Tensor],
) -> Callable[[Tensor], Tensor]:  # [d] to [d]
    """The map from v to Jᵀ H J v, with J of the outputs by the parameters, H of the loss by the outputs.

    Source: Schraudolph, Neural Computation 14 (2002) 1723-1738; J v is the derivative of Jᵀ w by w.
    """
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        probe = torch.zeros_like(outputs, requires_grad=True)
        backward = torch.autograd.grad(outputs, parameters, probe, create_graph=True, allow_unused=True)
    kept = [(i, g) for i, g in enumerate(backward) if g is not None and g.requires_grad]

    def product(vector: Tensor) -> Tensor:
        pieces = parts(vector, parameters)
        (forward,) = torch.autograd.grad(
            [g for _, g in kept], probe, [pieces[i] for i, _ in kept], retain_graph=True
        )
        if not slope.requires_grad:  # a loss that is linear in the outputs
            return torch.zeros_like(vector)
        (bent,) = torch.autograd.grad(slope, outputs, forward, retain_graph=True)
        found = torch.autograd.grad(outputs, parameters, bent, retain_graph=True, allow_unused=True)
        return flatten(found, parameters)

    return product
