"""What a sketched gradient gives away: the attack that looks for data with the same sketch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optex.checks import check_integer, check_kind, check_positive, shown
from optex.errors import NonFiniteError
from optex.sources.sketched.sketch import Sketch

__all__ = ["Leakage", "leakage_attack"]


@dataclass(frozen=True)
class Leakage:
    """What an attack found.

    Attributes:
        data: shaped as its start, the best found.
        mismatch: ``‖R ∇F(data) - y‖ / ‖y‖`` there. Near 0, these data explain what was seen; they are the
            client's own only where no others do.
        history: of the mismatch, after every step.
    """

    data: Tensor
    mismatch: float
    history: tuple[float, ...]


def leakage_attack(
    gradient: Callable[[Tensor], Tensor],
    observed: Tensor,  # [s], or [d] without a sketch
    start: Tensor,  # [...]
    *,
    sketch: Sketch | None = None,
    number: int = 0,
    steps: int = 100,
    lr: float = 1.0,
) -> Leakage:
    """Reconstruct data from a message: minimise ‖R_t ∇F(data) - y‖² over data, by L-BFGS.

    A diagnosis, for one's own model: run it on a message of made-up data, and look at what comes back. Linear
    in the gradient, and known to all, R does not hide: where y has more numbers than the data, it tells
    them about as well as the gradient does. Noise before the sketch (:class:`GaussianMechanism`) does hide.

    Args:
        gradient: ``gradient(data)``, the flat gradient [d] that a client with these data would send, computed
            by ``torch.autograd.grad(..., create_graph=True)``.
        observed: y.
        start: where to begin, of the data's shape; several starts, several attacks.
        sketch, number: R and t, as the client has them; without a sketch y is the gradient itself.
        steps: of L-BFGS, with a line search each.
        lr: the step length that its line search tries first.

    Returns:
        The data with the least mismatch.

    Raises:
        TypeError, ValueError: an argument cannot work, or ``gradient`` answers without a graph or of another
            length.
        NonFiniteError: y is zero or not finite, or the gradient at the start is not finite.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> weights, secret = torch.randn(6, 8), torch.randn(8)
    >>> def gradient(x):                                # of ½ ‖W x‖² by W, for one sample x
    ...     return torch.outer(weights @ x, x).flatten()
    >>> sketch = optex.Sketch("gaussian", 24)
    >>> found = optex.leakage_attack(gradient, sketch.sk(gradient(secret)), torch.randn(8), sketch=sketch)
    >>> error = torch.minimum((found.data - secret).norm(), (found.data + secret).norm())
    >>> bool(error < 1e-2 * secret.norm())              # up to its sign, which the gradient does not tell
    True

    Source: Song, Wang, Yu, Zhang, ICML 2023, arXiv 2210.08371; without a sketch Zhu, Liu, Han, *Deep Leakage
    from Gradients*, NeurIPS 2019.
    """
    for name, value in (("observed", observed), ("start", start)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"leakage_attack: {name} must be a floating-point tensor, got {shown(value)}")
    if not callable(gradient):
        raise TypeError(f"leakage_attack: gradient must be callable, got {type(gradient).__name__}")
    check_kind("leakage_attack", "sketch", sketch, Sketch, "a Sketch or None")
    steps, lr = check_integer("leakage_attack", "steps", steps), check_positive("leakage_attack", "lr", lr)
    observed = observed.detach()
    length = float(observed.norm())
    if not math.isfinite(length) or length == 0:
        raise NonFiniteError(f"leakage_attack: the message has length {length}; there is nothing to match")
    data = start.detach().clone().requires_grad_()

    def mismatch() -> Tensor:  # []
        seen = _sketched(gradient(data), sketch, number, len(observed))
        return ((seen - observed) / length).square().sum()

    best, history = (math.inf, data.detach().clone()), []
    optimizer = torch.optim.LBFGS(
        [data],
        lr=lr,
        max_iter=20,
        line_search_fn="strong_wolfe",
        # torch's own would end it where the mismatch is 1e-5.
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
    )

    def closure() -> Tensor:  # []
        nonlocal best
        optimizer.zero_grad()
        value = mismatch()
        value.backward()
        if float(value.detach()) < best[0]:
            best = (float(value.detach()), data.detach().clone())
        return value

    for _ in range(steps):
        before = float(optimizer.step(closure).detach())
        if not history and not math.isfinite(before):
            raise NonFiniteError("leakage_attack: the gradient is not finite at the start; begin elsewhere")
        history.append(math.sqrt(best[0]))
        if not math.isfinite(before) or best[0] == 0 or (len(history) > 1 and history[-1] == history[-2]):
            break
    return Leakage(best[1], math.sqrt(best[0]), tuple(history))


def _sketched(flat: Tensor, sketch: Sketch | None, number: int, length: int) -> Tensor:  # [length]
    if not isinstance(flat, Tensor) or flat.ndim != 1 or not flat.requires_grad:
        raise ValueError(
            "leakage_attack: gradient must return a flat tensor [d] with a graph; take "
            "torch.autograd.grad(..., create_graph=True), flattened and concatenated"
        )
    seen = flat if sketch is None else sketch.sk(flat, number)
    if len(seen) != length:
        raise ValueError(f"leakage_attack: observed has {length} numbers, and the gradient's are {len(seen)}")
    return seen
