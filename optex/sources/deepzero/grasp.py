"""How many coordinates a layer gets: pruning at initialisation, from losses alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from optex.checks import check_flag, check_number, check_parameters
from optex.draws import generator_states, set_generator_states
from optex.errors import NonFiniteError
from optex.sources.interface import GradientSource

__all__ = ["zo_grasp_ratios"]

_OWNER = "zo_grasp_ratios"


@torch.no_grad()
def zo_grasp_ratios(
    source: GradientSource,
    parameters: Iterable[Tensor],
    batch: Any,
    sparsity: float = 0.9,
    mu: float = 5e-3,
    *,
    signed: bool = False,
) -> list[float]:
    """The share of each parameter that pruning at its present values keeps: ZO-GraSP.

    GraSP's score of a weight, -θ_i (H g)_i, says how the gradient's norm changes when the weight goes. Without
    derivatives the product with the Hessian is a difference of two estimates of the gradient::

        S = -θ ⊙ (ĝ(θ + μ ĝ(θ)) - ĝ(θ)) / μ

    The weights with the largest ``|S|`` over all layers are kept. Both estimates are of the same
    batch and make the same draws, directions and dropout: with draws of their own their noise, divided by μ,
    would be nearly all that is left. Parameters and their ``.grad`` are as before.

    Args:
        source: of the estimates: ``SPSASource`` with ``queries=192`` as the authors have it,
            ``CoordinateSource`` without a mask for nearly exact scores, ``ObjectiveSource`` for GraSP by
            backward passes.
        parameters: those of the source. Of one dimension (biases, norms) they stay whole and are not counted.
        batch: to score with; the authors' has 25 samples of each class.
        sparsity: the share of weights that go, below 1.
        mu: the step along the gradient.
        signed: keep the lowest S, as GraSP's authors do, in place of the largest ``|S|``, which is what
            DeepZero's code keeps.

    Returns:
        A ratio for each parameter, for ``DynamicMask``. A layer may get 0: it then never learns.

    Raises:
        TypeError: ``source`` is no ``GradientSource``.
        ValueError: a number is out of range, or no parameter has two dimensions.
        NonFiniteError: a score is NaN or infinite.

    >>> import torch, optex
    >>> x, y = torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.ones(2, 2))
    >>> objective = lambda _: x.square().sum() + y.square().sum()     # S = -4 θ²
    >>> optex.zo_grasp_ratios(optex.CoordinateSource(objective, [x, y]), [x, y], None, sparsity=0.5)
    [1.0, 0.0]

    Source: Chen et al., ICLR 2024, arXiv 2310.02025, section 4, and the authors' code; GraSP: Wang, Zhang,
    Grosse, ICLR 2020, arXiv 2002.07376.
    """
    if not isinstance(source, GradientSource):
        raise TypeError(f"{_OWNER}: source must be an optex.GradientSource, got {type(source).__name__}")
    sparsity = check_number(_OWNER, "sparsity", sparsity, most=1.0, open_above=True)
    mu = check_number(_OWNER, "mu", mu, open_below=True)
    check_flag(_OWNER, "signed", signed)
    parameters = check_parameters(_OWNER, parameters)
    layers = [place for place, p in enumerate(parameters) if p.ndim > 1]
    if not layers:
        raise ValueError(f"{_OWNER}: no parameter has two dimensions; there is no weight to score")
    change = _change_along_gradient(source, parameters, batch, mu)
    scores = torch.cat([(-parameters[i].double() * change[i]).flatten() for i in layers])
    if not scores.isfinite().all():
        raise NonFiniteError(f"{_OWNER}: a score is NaN or infinite; check the batch, or lower mu")
    kept = len(scores) - round(sparsity * len(scores))
    order = torch.argsort(scores if signed else -scores.abs(), stable=True)
    chosen = torch.zeros_like(scores)
    chosen[order[:kept]] = 1
    ratios = [1.0] * len(parameters)
    for i, part in zip(layers, chosen.split([parameters[i].numel() for i in layers]), strict=True):
        ratios[i] = float(part.mean())
    return ratios


def _change_along_gradient(
    source: GradientSource, parameters: Sequence[Tensor], batch: Any, mu: float
) -> list[Tensor]:  # float64, of the parameters' shapes
    """(ĝ(θ + μ ĝ(θ)) - ĝ(θ)) / μ, with the same draws for both."""
    before, grads = [p.clone() for p in parameters], [p.grad for p in parameters]
    draws = generator_states()
    try:
        here = _estimate(source, parameters, batch)
        for p, g in zip(parameters, here, strict=True):
            p.add_(g.to(p.dtype), alpha=mu)
        set_generator_states(draws)
        there = _estimate(source, parameters, batch)
    finally:
        for p, value, grad in zip(parameters, before, grads, strict=True):
            p.copy_(value)
            p.grad = grad
    return [(b - a) / mu for a, b in zip(here, there, strict=True)]


def _estimate(source: GradientSource, parameters: Sequence[Tensor], batch: Any) -> list[Tensor]:  # float64
    for p in parameters:
        p.grad = None
    with torch.enable_grad():
        source.gradient(batch)
    return [torch.zeros_like(p).double() if p.grad is None else p.grad.detach().double() for p in parameters]
