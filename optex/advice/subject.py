"""What is measured, and how all that measuring changes is put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.evaluators import EvaluationRequest, Evaluator, RandomDraws
from optex.evaluators.randomness import generator_states, set_generator_states
from optex.sources import GradientSource
from optex.stepping import Buffers, ObservesEvaluations, ParameterVector, Snapshot

__all__ = ["Kept", "Subject"]

# torch's schedulers note in their optimizer that it has stepped.
_STEPPED: Final = "_opt_called"


@dataclass(frozen=True)
class Subject:
    """A training loop: the optimizer that steps, and the gradients that it steps on.

    Attributes:
        base: takes the steps.
        source: of the gradients.
        batches: those drawn, at least one; a run goes through them again and again.
        scheduler: ticks with every step; None without one.
        model: whose buffers follow the steps taken; None where it is not known.
        gradient_hook: changes every true gradient in place.
    """

    base: Optimizer
    source: GradientSource
    batches: Sequence[Any]
    scheduler: LRScheduler | None
    model: nn.Module | None
    gradient_hook: Callable[[], Any] | None

    @cached_property
    def vector(self) -> ParameterVector:
        """The parameters that the base optimizer trains, as one vector."""
        groups = self.base.param_groups
        return ParameterVector(p for group in groups for p in group["params"] if p.requires_grad)

    @property
    def module(self) -> nn.Module | None:
        """The module whose buffers an evaluation changes, as ``OptEx`` finds it."""
        return self.model if self.model is not None else self.source.module

    @property
    def name(self) -> str:
        """Name of the base optimizer's class."""
        return type(self.base).__name__

    def request(self, count: int) -> EvaluationRequest:
        """Gradients at ``count`` points, all of them where the parameters are, each with a batch of its own."""
        return EvaluationRequest(
            self.source,
            self.vector,
            self.vector.read().repeat(count, 1),
            [self.batches[i % len(self.batches)] for i in range(count)],
            [RandomDraws() for _ in range(count)],
            self.gradient_hook,
            None if self.module is None else Buffers.of(self.module),
            self.base.observe if isinstance(self.base, ObservesEvaluations) else None,
        )

    def refuses(self, evaluator: Evaluator) -> str | None:
        """Why the base optimizer cannot use this evaluator; None where it can."""
        if evaluator.observes or not isinstance(self.base, ObservesEvaluations):
            return None
        return f"answers gradients alone, and {self.name} needs more"

    def wait(self) -> None:
        """Wait until the device has finished, so that a clock can be read."""
        if self.vector.device.type == "cuda":
            torch.cuda.synchronize(self.vector.device)


class Kept:
    """Entering the block saves all that measuring changes, leaving it puts all back.

    Parameters, their ``.grad``, the base optimizer's state and settings, the schedule, the model's persistent
    buffers, and the random generators of torch, NumPy and Python.

    Memory: parameters, the base optimizer's state and the buffers once more.
    """

    def __init__(self, base: Optimizer, scheduler: LRScheduler | None, modules: Sequence[nn.Module]) -> None:
        self._base = base
        self._scheduler = scheduler
        found = [p for group in base.param_groups for p in group["params"]]
        found += [p for module in modules for p in module.parameters()]
        self._parameters = list({id(p): p for p in found}.values())
        self._buffers = Buffers({id(t): t for m in modules for t in Buffers.of(m).tensors}.values())

    def __enter__(self) -> Kept:
        self._snapshot = Snapshot(self._base, self._scheduler)
        self._values = self._buffers.read()
        self._random = generator_states(), np.random.get_state(), random.getstate()  # noqa: NPY002
        self._stepped = {_STEPPED: vars(self._base)[_STEPPED]} if _STEPPED in vars(self._base) else {}
        self._gradients: list[Tensor | None] = [p.grad for p in self._parameters]
        # Set aside, not copied: backward would add to those of parameters that are not optimised.
        try:
            self._set_gradients([None] * len(self._parameters))
        except BaseException:
            self._set_gradients(self._gradients)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            self._put_back()
        except BaseException:
            self._put_back()  # once more, should the first have been interrupted
            raise

    def rewind(self) -> None:
        """Put back all but the gradients, which stay aside until the block ends."""
        self._snapshot.restore()
        self._buffers.write(self._values)
        states, numpys, pythons = self._random
        set_generator_states(states)
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)
        vars(self._base).pop(_STEPPED, None)
        vars(self._base).update(self._stepped)

    def _put_back(self) -> None:
        self.rewind()
        self._set_gradients(self._gradients)

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self._parameters, gradients, strict=True):
            p.grad = gradient
