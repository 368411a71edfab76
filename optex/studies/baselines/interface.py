"""What every method of a comparison is given, and the trace it leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from torch.optim import Optimizer

from optex.errors import NonFiniteError, NotPositiveDefiniteError
from optex.studies.problems import Problem

__all__ = ["BaseFactory", "Method", "Recorder", "Setting", "Trace"]

BaseFactory = Callable[[Any], Optimizer]


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison have in common.

    Attributes:
        base: makes the base optimizer of the parameters it is given.
        parallelism: N, gradients evaluated at once, at least 1.
        history_size: T0, pairs to predict from, at least 1; None is each method's own default.
        rounds: how many to run, at least 1.
        stride: of ``optex`` and ``optex-alone``, as in ``OptEx``.
        of_module: whether ``base`` is given the whole problem, a module, instead of its parameters, for
            optimizers that have to know the layers.
    """

    base: BaseFactory
    parallelism: int
    history_size: int | None
    rounds: int
    stride: float | Literal["auto"] = "auto"
    of_module: bool = False

    def base_optimizer(self, problem: Problem) -> Optimizer:
        """A new base optimizer of the problem's parameters."""
        return self.base(problem if self.of_module else problem.parameters())


@dataclass(frozen=True)
class Trace:
    """A run, round by round. Entry r of a list is after r rounds; entry 0 is the start.

    The lists of a run that stopped early are filled up to their length: ``loss`` with NaN, ``gradients`` and
    ``seconds`` with what was spent until then, ``accepted`` with 0.

    Attributes:
        loss: [rounds + 1], the noise-free objective.
        gradients: [rounds + 1], evaluated so far.
        seconds: [rounds + 1], wall time so far, including what happens between rounds, without the evaluations
            of ``loss``.
        accepted: [rounds + 1], steps of the base optimizer that the round kept.
        lr: the learning rate it ran with.
        overhead_seconds: of a round beyond its gradients, mean, as in ``RoundReport``; NaN where not measured.
        stopped: why the run ended before its last round; None where it did not.
    """

    loss: list[float]
    gradients: list[int]
    seconds: list[float]
    accepted: list[int]
    lr: float
    overhead_seconds: float
    stopped: str | None

    @property
    def rounds(self) -> int:
        """Rounds after the start."""
        return len(self.loss) - 1


Method = Callable[[Problem, Setting], Trace]


class Recorder:
    """Records one run: evaluates the objective after every round, and times the rounds without that.

    Entering the context resets the problem to its start. Inside, ``round`` is called at the end of every round.
    A value that is not finite, or a matrix that is not positive definite, ends the run, and leaving the context
    suppresses that error: a method that diverges is a result.

        with Recorder(problem, rounds) as recorder:
            ...
            recorder.round(gradients=1, accepted=1)
        return recorder.trace(lr)
    """

    def __init__(self, problem: Problem, rounds: int) -> None:
        self._problem = problem
        self._rounds = rounds
        self._loss: list[float] = []
        self._gradients = [0]
        self._seconds = [0.0]
        self._accepted = [0]
        self._overheads: list[float] = []
        self._stopped: str | None = None
        self._started = math.nan

    def __enter__(self) -> Recorder:
        self._problem.reset()
        self._loss.append(self._problem.evaluate())
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, NonFiniteError | NotPositiveDefiniteError):
            self._stopped = str(error)
            return True
        return False

    @property
    def done(self) -> bool:
        """Whether all rounds have been recorded."""
        return len(self._loss) > self._rounds

    def round(self, *, gradients: int, accepted: int, overhead_seconds: float | None = None) -> None:
        """Record a round that ended at the present parameters; calls ``problem.between_rounds()`` first.

        Args:
            gradients: evaluated in it.
            accepted: steps of the base optimizer that it kept.
            overhead_seconds: its wall time beyond the gradients, where the method measures that.

        Raises:
            NonFiniteError: the objective is not finite there, or the problem cannot continue from there; the
                round is not recorded.
        """
        self._problem.between_rounds()
        seconds = time.perf_counter() - self._started
        loss = self._problem.evaluate()
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{self._problem.name}: the objective after round {len(self._loss)} is {loss:g}"
            )
        self._loss.append(loss)
        self._gradients.append(self._gradients[-1] + gradients)
        self._seconds.append(self._seconds[-1] + seconds)
        self._accepted.append(accepted)
        if overhead_seconds is not None:
            self._overheads.append(overhead_seconds)
        self._started = time.perf_counter()

    def trace(self, lr: Any) -> Trace:
        """The run, its lists filled up to their full length.

        Args:
            lr: the learning rate it ran with, a number or a tensor of one.
        """
        missing = self._rounds + 1 - len(self._loss)
        return Trace(
            loss=self._loss + [math.nan] * missing,
            gradients=self._gradients + self._gradients[-1:] * missing,
            seconds=self._seconds + self._seconds[-1:] * missing,
            accepted=self._accepted + [0] * missing,
            lr=float(lr),
            overhead_seconds=sum(self._overheads) / len(self._overheads) if self._overheads else math.nan,
            stopped=self._stopped,
        )
