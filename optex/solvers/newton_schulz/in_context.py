"""Linear regression in context: predictors that a transformer is compared with, layer by iteration.

Fu, Chen, Jia, Sharan: Transformers Learn to Achieve Second-Order Convergence Rates for In-Context Linear
Regression, NeurIPS 2024, arXiv 2310.17086, section 3. All predictors answer alike: at every place t of a
sequence (x_1, y_1), ..., (x_n, y_n), what they take y_t to be from x_t and the examples before it.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from optex.checks import check_integer, check_number, shown

__all__ = [
    "gradient_descent_predictor",
    "iterative_newton_predictor",
    "online_gradient_descent_predictor",
    "similarity_of_errors",
]

_RATE: Final = 0.01  # of gradient descent, in the authors' code
Rule = Literal["constant", "decaying", "normalised"]


def iterative_newton_predictor(
    inputs: Tensor,  # [..., n, d]
    targets: Tensor,  # [..., n]
    steps: int,
    *,
    init: Literal["norm", "trace"] = "norm",
) -> Tensor:  # [..., steps + 1, n]
    """Predictions of the iterative Newton method after 0, 1, ..., steps iterations.

        S = XᵀX,   M_0 = Sᵀ / ‖S Sᵀ‖_F,   M_{k+1} = M_k (2 I - S M_k),   w_k = M_k Xᵀy

    X and y are the examples before each place. With fewer than d of them, w_k goes to the least-squares
    solution of least norm.

    Args:
        inputs: x_1, ..., x_n of each sequence.
        targets: y_1, ..., y_n; the last one is never used.
        steps: iterations.
        init: M_0; ``"trace"`` is I / tr(S).

    Returns:
        What each iterate takes y_t to be, [..., steps + 1, n].

    Raises:
        TypeError, ValueError: shapes, dtypes or ``steps`` do not fit, or numbers are not finite.

    Source: arXiv 2310.17086, section 3, with M_0 of the authors' code.

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.0, 4.0, 6.0])
    >>> iterative_newton_predictor(x, y, 1)
    tensor([[0., 4., 6.],
            [0., 4., 6.]])
    """
    owner = "iterative_newton_predictor"
    grams, moments = _examples_before(owner, inputs, targets)
    check_integer(owner, "steps", steps)
    if init not in ("norm", "trace"):
        raise ValueError(f'{owner}: init must be "norm" or "trace", got {shown(init)}')
    identity = torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
    start = grams if init == "norm" else identity.expand_as(grams)
    size = (
        torch.linalg.matrix_norm(grams @ grams) if init == "norm" else grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    )
    # Before the first example S = 0, and w = 0 whatever M is.
    inverse = start / size.where(size > 0, torch.ones_like(size))[..., None, None]
    found = [_predicted(inputs, _times(inverse, moments))]
    for _ in range(steps):
        inverse = inverse @ (2 * identity - grams @ inverse)
        found.append(_predicted(inputs, _times(inverse, moments)))
    return torch.stack(found, dim=-2)


def gradient_descent_predictor(
    inputs: Tensor,  # [..., n, d]
    targets: Tensor,  # [..., n]
    steps: int,
    *,
    lr: float = _RATE,
) -> Tensor:  # [..., steps + 1, n]
    """Predictions of gradient descent on ½‖Xw - y‖², from w_0 = 0, after 0, 1, ..., steps steps.

        w_{k+1} = w_k - lr (S w_k - Xᵀy)

    Args:
        inputs, targets: as of :func:`iterative_newton_predictor`.
        steps: over the examples before a place, all at once.
        lr: the rate; it converges below 2 / ‖S‖₂, with S of the longest context, and diverges above.

    Returns:
        What each iterate takes y_t to be, [..., steps + 1, n].

    Raises:
        TypeError, ValueError: as :func:`iterative_newton_predictor`, or ``lr`` is not positive.

    Source: arXiv 2310.17086, section 3; the rate is that of the authors' code.

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.0, 4.0, 6.0])
    >>> gradient_descent_predictor(x, y, 1, lr=0.5)[1]
    tensor([ 0.,  2., 15.])
    """
    owner = "gradient_descent_predictor"
    grams, moments = _examples_before(owner, inputs, targets)
    check_integer(owner, "steps", steps)
    check_number(owner, "lr", lr, open_below=True)
    weights = torch.zeros_like(moments)
    found = [_predicted(inputs, weights)]
    for _ in range(steps):
        weights = weights - lr * (_times(grams, weights) - moments)
        found.append(_predicted(inputs, weights))
    return torch.stack(found, dim=-2)


def online_gradient_descent_predictor(
    inputs: Tensor,  # [..., n, d]
    targets: Tensor,  # [..., n]
    passes: int = 1,
    *,
    lr: float = _RATE,
    rule: Rule = "constant",
) -> Tensor:  # [..., passes + 1, n]
    """Predictions of gradient descent on one example after the other, after 0, 1, ..., passes passes.

        w <- w - r_i (w·x_i - y_i) x_i,   i = 1, 2, ...

    Args:
        inputs, targets: as of :func:`iterative_newton_predictor`.
        passes: how often the examples before a place are gone through; one is the online method.
        lr: the rate.
        rule: r_i. ``"constant"``: lr; ``"decaying"``: lr / √i, with i counted through all passes;
            ``"normalised"``: lr / ‖x_i‖², below 2 (with lr = 1 Kaczmarz's method, which meets each example
            exactly).

    Returns:
        What w takes y_t to be after each pass over the examples before it, [..., passes + 1, n].

    Raises:
        TypeError, ValueError: as :func:`gradient_descent_predictor`, or the rule is unknown.

    Source: arXiv 2310.17086, section 3, one pass at a constant rate; the other rules and more passes are ours.

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.0, 4.0, 6.0])
    >>> online_gradient_descent_predictor(x, y, lr=1.0, rule="normalised")[1]
    tensor([0., 4., 6.])
    """
    owner = "online_gradient_descent_predictor"
    _check(owner, inputs, targets)
    check_integer(owner, "passes", passes)
    if rule not in get_args(Rule):
        raise ValueError(f"{owner}: rule must be one of {', '.join(get_args(Rule))}, got {shown(rule)}")
    check_number(owner, "lr", lr, open_below=True, most=2.0 if rule == "normalised" else float("inf"))
    count = inputs.shape[-2]
    places = torch.arange(count, device=inputs.device)
    weights = torch.zeros_like(inputs)  # a place's own, [..., n, d]
    found = [_predicted(inputs, weights)]
    for taken in range(passes):
        for i in range(count - 1):
            x, y = inputs[..., i : i + 1, :], targets[..., i : i + 1]  # [..., 1, d], [..., 1]
            # A place t has t examples before it: in a later pass it is at its (taken t + i + 1)-th.
            rates = torch.full_like(targets[..., :1], lr)
            if rule == "normalised":
                rates = lr / x.square().sum(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
            elif rule == "decaying":
                rates = lr / (taken * places + i + 1).to(x.dtype).sqrt()
            step = (rates * ((weights * x).sum(dim=-1) - y))[..., None] * x
            weights = torch.where((places > i)[:, None], weights - step, weights)
        found.append(_predicted(inputs, weights))
    return torch.stack(found, dim=-2)


def similarity_of_errors(
    first: Tensor,  # [..., k, n]
    second: Tensor,  # [..., l, n]
    targets: Tensor,  # [..., n]
) -> Tensor:  # [k, l]
    """How alike the errors of two families of predictors are, each with each.

        SimE(A, B) = mean over sequences of cos(e_A, e_B),   e_A = (A_2 - y_2, ..., A_n - y_n)

    The first place has no examples before it and is left out. An error of exactly 0 is like none: its cosine
    is 0.

    Args:
        first: predictions of k predictors, layers of a transformer for one.
        second: those of l others, iterations of a method for one.
        targets: what was to be predicted.

    Returns:
        The similarities, between -1 and 1.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, or numbers are not finite.

    Source: arXiv 2310.17086, section 3.

    >>> targets = torch.zeros(1, 3)
    >>> similarity_of_errors(torch.tensor([[[9.0, 1.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 1.0]]]), targets)
    tensor([[0.7071]])
    """
    owner = "similarity_of_errors"
    for name, value in (("targets", targets), ("first", first), ("second", second)):
        _check_tensor(owner, name, value)
        if value.dtype != targets.dtype:
            raise TypeError(f"{owner}: {name} must be of targets' dtype {targets.dtype}, got {value.dtype}")
    for name, value in (("first", first), ("second", second)):
        if value.ndim < 2 or value.shape[:-2] + value.shape[-1:] != targets.shape or targets.shape[-1] < 2:
            raise ValueError(
                f"{owner}: {name} must be [..., k, n] beside targets [..., n] with n at least 2, got "
                f"{tuple(value.shape)} and {tuple(targets.shape)}"
            )
    one, two = ((value - targets[..., None, :])[..., 1:] for value in (first, second))
    cosines = functional.normalize(one, dim=-1) @ functional.normalize(two, dim=-1).mT  # [..., k, l]
    return cosines.reshape(-1, *cosines.shape[-2:]).mean(dim=0)


def _examples_before(
    owner: str,
    inputs: Tensor,  # [..., n, d]
    targets: Tensor,  # [..., n]
) -> tuple[Tensor, Tensor]:  # XᵀX [..., n, d, d], Xᵀy [..., n, d]
    """The sums over the examples before each place."""
    _check(owner, inputs, targets)
    squares = inputs[..., :, None] * inputs[..., None, :]
    moments = inputs * targets[..., None]
    before = torch.zeros_like(squares), torch.zeros_like(moments)
    before[0][..., 1:, :, :] = squares[..., :-1, :, :].cumsum(dim=-3)
    before[1][..., 1:, :] = moments[..., :-1, :].cumsum(dim=-2)
    return before


def _check(owner: str, inputs: Any, targets: Any) -> None:
    for name, value in (("inputs", inputs), ("targets", targets)):
        _check_tensor(owner, name, value)
    if inputs.ndim < 2 or inputs.shape[:-1] != targets.shape or inputs.numel() == 0:
        raise ValueError(
            f"{owner}: inputs must be [..., n, d] and targets [..., n], got {tuple(inputs.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if inputs.dtype != targets.dtype:
        raise TypeError(
            f"{owner}: inputs and targets must be of one dtype, got {inputs.dtype}, {targets.dtype}"
        )


def _check_tensor(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{owner}: {name} must be a floating-point tensor, got {came}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{owner}: {name} holds numbers that are not finite")


def _times(
    matrices: Tensor,  # [..., d, d]
    vectors: Tensor,  # [..., d]
) -> Tensor:  # [..., d]
    return (matrices @ vectors[..., None])[..., 0]


def _predicted(
    inputs: Tensor,  # [..., n, d]
    weights: Tensor,  # [..., n, d]
) -> Tensor:  # [..., n]
    return (inputs * weights).sum(dim=-1)
