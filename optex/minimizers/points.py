"""Values of a function at many points: in one call, in turn, or on workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optex.checks import check_flag, check_integer, check_positive, shown
from optex.evaluators import EvaluationRequest, WorkersEvaluator
from optex.evaluators.randomness import RandomDraws
from optex.sources.consensus import values_of
from optex.sources.functions import Point
from optex.sources.interface import GradientSource, scalar_loss
from optex.stepping import ParameterVector

__all__ = ["Form", "Points", "read_points"]


@dataclass(frozen=True)
class Form:
    """How the caller sees points: as float64 arrays, or as tensors."""

    arrays: bool

    def present(
        self,
        values: Tensor,  # [...]
    ) -> Any:  # [...]
        """A copy in the caller's form."""
        copied = values.detach().clone()
        return copied.numpy() if self.arrays else copied


def read_points(
    owner: str, x0: Any, particles: Any, spread: Any, generator: torch.Generator
) -> tuple[Form, Tensor]:  # [N, d]
    """The caller's form, and the first points: x0 itself if it is [N, d], else N drawn around it.

    Raises:
        TypeError, ValueError: x0 is not real, not finite, empty or of another shape; ``particles`` or
            ``spread`` are out of range, or given beside points that need none.
    """
    form, start = _read(owner, x0)
    if start.ndim == 2:
        if particles is not None or spread is not None:
            raise ValueError(
                f"{owner}: x0 of shape {tuple(start.shape)} has the particles already; leave particles= and "
                "spread= out, or pass one point [d]"
            )
        check_integer(owner, "the number of rows of x0", len(start), least=2)
        return form, start
    count = check_integer(owner, "particles", 200 if particles is None else particles, least=2)
    width = check_positive(owner, "spread", 0.5 if spread is None else spread)
    noise = torch.randn(count, len(start), generator=generator, dtype=torch.float64).to(start)
    return form, start + width * noise


def _read(owner: str, x0: Any) -> tuple[Form, Tensor]:
    if isinstance(x0, Tensor):
        if x0.is_complex() or x0.layout is not torch.strided:
            raise TypeError(f"{owner}: x0 must be a real, dense tensor, got one of {x0.dtype} and {x0.layout}")
        start = x0.detach().clone()
        start = start if start.is_floating_point() else start.to(torch.float64)
    else:
        try:
            start = torch.from_numpy(np.array(x0, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{owner}: x0 must be a real array or tensor, got {shown(x0)}: {error}") from error
    start = torch.atleast_1d(start)
    if start.ndim > 2 or not start.numel():
        raise ValueError(f"{owner}: x0 must be a point [d] or particles [n, d], got shape {tuple(start.shape)}")
    if not bool(start.isfinite().all()):
        raise ValueError(f"{owner}: x0 has components that are not finite; start where fun is defined")
    return Form(not isinstance(x0, Tensor)), start


class Points:
    """Evaluates a function at many points, and counts them.

    Args:
        owner: the caller's function, for messages.
        fun, args: ``fun(x, *args)`` of a point [d], or of all points [n, d] with ``vectorized``.
        form: in which ``fun`` gets points.
        vectorized: whether ``fun`` takes all points in one call.
        workers: as in ``optex.minimize``.

    Attributes:
        form: as given.
        count: points evaluated.
        lost: how many of them got no answer.

    Raises:
        TypeError, ValueError: an argument cannot work; at evaluation, what ``fun`` returns cannot.
    """

    def __init__(
        self,
        owner: str,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        form: Form,
        *,
        vectorized: bool,
        workers: Any,
    ) -> None:
        if not callable(fun):
            raise TypeError(f"{owner}: fun must be callable, got {type(fun).__name__}")
        alone = workers is None or workers is map or (workers == 1 and not isinstance(workers, bool))
        check_flag(owner, "vectorized", vectorized)
        if vectorized and not alone:
            raise ValueError(
                f"{owner}: vectorized=True evaluates all points in one call, which workers cannot share; leave "
                "one of the two out"
            )
        self._name, self._fun, self._args, self._vectorized = f"{owner}: fun", fun, args, vectorized
        self.form: Form = form
        self.count: int = 0
        self.lost: int = 0
        self._evaluator = None if alone else WorkersEvaluator(workers)
        self._source: _Values | None = None
        self._vector: ParameterVector | None = None

    def __enter__(self) -> Points:
        return self

    def __exit__(self, *_: object) -> None:
        if self._evaluator is not None:
            self._evaluator.close()

    @torch.no_grad()
    def values(
        self,
        points: Tensor,  # [n, d]
    ) -> Tensor:  # [n] float64
        """The function's values; NaN at points that got no answer."""
        if self._evaluator is not None:
            found = self._on_workers(self._evaluator, points)
        elif self._vectorized:
            found = values_of(self._fun(self.form.present(points), *self._args), len(points), self._name)
        else:
            found = torch.stack([self._value(point) for point in points])
        self.count += len(points)
        return found.to(points.device)

    def _value(
        self,
        point: Tensor,  # [d]
    ) -> Tensor:  # []
        return _scalar(self._fun(self.form.present(point), *self._args), self._name)

    def _on_workers(
        self,
        evaluator: WorkersEvaluator,
        points: Tensor,  # [n, d]
    ) -> Tensor:  # [n]
        if self._source is None or self._vector is None:
            point = Point(points[0].clone())
            self._source = _Values(self._fun, self._args, self.form, point, self._name)
            self._vector = ParameterVector([point.x])
        count = len(points)
        draws = [RandomDraws() for _ in range(count)]
        request = EvaluationRequest(self._source, self._vector, points, [None] * count, draws)
        evaluation = evaluator.evaluate(request)
        self.lost += len(evaluation.lost)
        return evaluation.losses.to(torch.float64)


@dataclass(frozen=True)
class _Values(GradientSource):
    """A function's values as a source for workers, which need a gradient: it is zero."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    form: Form
    point: Point
    name: str

    @torch.no_grad()
    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x: nn.Parameter = self.point.x
        x.grad = torch.zeros_like(x)
        return _scalar(self.fun(self.form.present(x), *self.args), self.name), None

    def replica(self) -> tuple[GradientSource, list[Tensor]]:
        point = Point(self.point.x.detach().clone())
        return replace(self, point=point), [point.x]


def _scalar(value: Any, name: str) -> Tensor:  # [] float64
    if not isinstance(value, Tensor):
        value = np.asarray(value, dtype=np.float64) if np.ndim(value) else value
        value = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
    return scalar_loss(value, name).detach().to(torch.float64)
