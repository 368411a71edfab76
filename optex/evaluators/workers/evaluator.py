"""Gradients in other processes or threads, with what it takes to lose some of them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Final
from weakref import finalize

import torch
from torch import Tensor

from optex.errors import WorkerLostError
from optex.evaluators.interface import Evaluation, EvaluationRequest, Evaluator, with_hook
from optex.evaluators.randomness import RandomDraws, generator_states
from optex.evaluators.sequential import stack_noise
from optex.evaluators.workers.messages import Answer, Failure, Job, Lost, Objective, Outcome
from optex.evaluators.workers.process_pool import Crew, HiredCrew, ProcessCrew
from optex.stepping import ParameterVector

__all__ = ["WorkersEvaluator"]

_LONGEST_STRIDE: Final = 2**24  # random numbers an evaluation may draw and still be foreseen


class WorkersEvaluator(Evaluator):
    """Evaluate a round's points at once in worker processes or threads.

    The objective is sent to each worker once, with copies of the parameters, and then only points, batches and
    the state of torch's random generator; losses and gradients are those of the ``SequentialEvaluator``, as
    long as a worker computes with as many threads. It must be a function of the parameters and the batch: what
    it writes elsewhere, a counter say, stays in the worker. Tensors that it holds and modules' modes are
    watched, and it is sent anew when they change; other things that it reads must stay as they are. Modules
    that update buffers while they are trained, as BatchNorm, are refused.

    A point without an answer (its worker died, hung or raised an error) is evaluated once more, by a new worker
    where there is one to be had. If that fails too the round goes on without it, and says so in its report's
    ``lost``; only the first point, the round's start, is not to be had without.

    Args:
        workers: an integer: so many processes of our own, -1 one for each core, started when first needed, with
            points and gradients in shared memory. Or any ``concurrent.futures.Executor``, or a function like
            ``map`` (of a ``multiprocessing.Pool``, say); these stay the caller's to close. None: what
            ``rebuild`` makes, else -1.
        timeout: seconds for the evaluations of a round, and as many for the second try; None waits for ever.
            Not counted is the time in which processes of our own start. Needs an integer or an executor.
        threads: torch's and BLAS' in each worker process; by default cores // workers for processes of our
            own, at least 1, and 1 in another's. Threads of this process keep their settings.
        rebuild: makes another executor or map function, for the second try after the present one has lost a
            point; executors that it made are shut down when done with.

    Memory: ``2 · workers · d`` numbers in shared memory, and in every worker what the objective holds.

    Raises:
        TypeError, ValueError: an argument cannot work, the objective cannot be sent to another process, or
            cannot be evaluated at several points at once; the message says what would do.
        WorkerLostError: at evaluation, no answer for the round's start, at the second try either.
        Exception: whatever the objective raises at the round's start, with the worker's traceback as its cause.

    Source: ``workers`` as in ``scipy.optimize.differential_evolution``.

    >>> import torch, optex
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> result = optex.minimize(lambda x: x.square().sum(), [3.0, 4.0], lr=0.1, workers=ThreadPoolExecutor(2))
    >>> result.success, result.nstep > result.nit
    (True, True)
    """

    def __init__(
        self,
        workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
        *,
        timeout: float | None = None,
        threads: int | None = None,
        rebuild: Callable[[], Any] | None = None,
    ) -> None:
        _check_arguments(workers, timeout, threads, rebuild)
        if workers is None and rebuild is None:
            workers = -1
        self._crew: Crew
        if isinstance(workers, int):
            cores = _cores()
            count = cores if workers == -1 else workers
            self._crew = ProcessCrew(count, threads or max(1, cores // count))
        else:
            self._crew = HiredCrew(workers, threads or 1, rebuild)
        self._timeout = timeout
        self._objective: Objective | None = None
        self._stride: int | None = 0  # random numbers that an evaluation draws; None: cannot be told
        self._end = finalize(self, self._crew.close)

    def __enter__(self) -> WorkersEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; an executor of the caller's is left as it is. The next evaluation starts anew."""
        self._objective = None
        self._crew.close()

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        source, vector, points, draws = request.source, request.vector, request.points, request.draws
        _check_device(vector)
        if self._objective is None or not self._objective.serves(source, vector):
            self._objective = Objective(source, vector)
        packed = [_packed(batch) for batch in request.batches]
        new = [i for i, drawn in enumerate(draws) if drawn.state is None]
        starts = self._generators(draws, new)
        outcomes: list[Outcome] = [Lost("not tried yet")] * len(points)
        retried: set[int] = set()
        redo = list(range(len(points)))
        while redo:
            jobs = {i: Job(points[i], packed[i], starts[i]) for i in redo}
            try:
                found = self._run(self._objective, jobs, retried)
            except BaseException:  # Ctrl-C, say
                self._crew.abandon()
                raise
            for i, outcome in found.items():
                outcomes[i] = outcome
            redo = self._mistaken(starts, outcomes, new)
        self._pin(draws, new, starts, outcomes)
        return with_hook(request, _evaluation(outcomes, points, sorted(retried)))

    def _run(self, objective: Objective, jobs: dict[int, Job], retried: set[int]) -> dict[int, Outcome]:
        """The outcome of each job, those that fail at first tried twice."""
        outcomes = dict(zip(jobs, self._crew.run(objective, list(jobs.values()), self._timeout), strict=True))
        again = [i for i, outcome in outcomes.items() if not isinstance(outcome, Answer)]
        if again:
            retried.update(again)
            self._crew.renew()
            second = self._crew.run(objective, [jobs[i] for i in again], self._timeout)
            outcomes.update(zip(again, second, strict=True))
        start = outcomes.get(0)
        if isinstance(start, Failure):
            start.reraise()
        if isinstance(start, Lost):
            raise WorkerLostError(
                f"WorkersEvaluator: no gradient at the round's start, in two tries: {start.reason}. Parameters "
                "are those of before the round. A number of workers is restarted as needed; for an executor, "
                "rebuild= can make a new one"
            ) from start.error
        return outcomes

    # ------------------------------------------------------------------ random numbers

    # One after the other, each new step would draw where the one before it left off. How many numbers that one
    # draws is foreseen from the last evaluation; where it turns out otherwise, the steps behind are redone.

    def _generators(self, draws: Sequence[RandomDraws], new: list[int]) -> list[Tensor]:  # n states
        """The state of torch's generator that each step starts from, for new ones as far as can be foreseen."""
        starts = [torch.empty(0) if drawn.state is None else drawn.state[0] for drawn in draws]
        state = torch.get_rng_state()
        for i in new:
            starts[i] = state
            state = _advanced(state, self._stride)
        return starts

    def _mistaken(
        self,
        starts: list[Tensor],  # n states
        outcomes: Sequence[Outcome],
        new: list[int],
    ) -> list[int]:
        """The new steps that started from the wrong state, now with a better one."""
        for position, (before, here) in enumerate(pairwise(new)):
            end = _end(starts[before], outcomes[before])
            if end is None or torch.equal(starts[here], end):
                continue
            if self._stride is not None:
                self._stride = _distance(starts[before], end)
            for i in new[position + 1 :]:
                starts[i] = end
                end = _advanced(end, self._stride)
            return new[position + 1 :]
        return []

    @staticmethod
    def _pin(
        draws: Sequence[RandomDraws],
        new: list[int],
        starts: Sequence[Tensor],  # n states
        outcomes: Sequence[Outcome],
    ) -> None:
        """The new steps keep their states for good, and the generator goes on behind the last of them."""
        others = generator_states()[1:]
        for i in new:
            draws[i].state = [starts[i], *others]
        if new:
            end = _end(starts[new[-1]], outcomes[new[-1]])
            torch.set_rng_state(starts[new[-1]] if end is None else end)


def _end(start: Tensor, outcome: Outcome) -> Tensor | None:  # a state
    """Where an evaluation left the generator; None where there was none."""
    if not isinstance(outcome, Answer):
        return None
    return start if outcome.generator is None else torch.tensor(outcome.generator)


def _advanced(state: Tensor, count: int | None) -> Tensor:  # a state
    """The state of torch's CPU generator after ``count`` more random numbers."""
    if not count:
        return state
    generator = torch.Generator()
    generator.set_state(state)
    torch.empty(count, dtype=torch.int32).random_(generator=generator)
    return generator.get_state()


def _distance(start: Tensor, end: Tensor) -> int | None:
    """How many random numbers lie between two states; None where that cannot be told.

    The generator is a Mersenne twister: 624 numbers, made anew when used up, and the position in them.
    """
    position = [int(state.view(torch.int64)[2]) for state in (start, end)]
    count = (position[1] - position[0]) % 624
    state = _advanced(start, count)
    while not torch.equal(state, end):
        count += 624
        if count > _LONGEST_STRIDE:
            return None
        state = _advanced(state, 624)
    return count


# ---------------------------------------------------------------------- in and out


def _packed(batch: Any) -> bytes:
    try:
        return pickle.dumps(batch, protocol=5)
    except Exception as error:
        raise TypeError(
            f"WorkersEvaluator: batches cannot be sent to workers ({error}); let them be tensors, arrays, "
            "numbers and containers of these"
        ) from error


def _evaluation(
    outcomes: Sequence[Outcome],
    points: Tensor,  # [n, d]
    retried: Sequence[int],
) -> Evaluation:
    answers = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Answer)}
    losses = torch.full((len(points),), torch.nan, dtype=answers[0].dtype)
    gradients = torch.zeros_like(points)
    rows = gradients.numpy()
    for i, found in answers.items():
        losses[i] = found.loss
        rows[i] = found.gradient
    return Evaluation(
        losses,
        gradients,
        tuple(answers.get(i, answers[0]).mask for i in range(len(points))),
        stack_noise([None if i not in answers else answers[i].noise_variance for i in range(len(points))]),
        retried=tuple(retried),
        lost=tuple(i for i in range(len(points)) if i not in answers),
    )


def _cores() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available is not None else os.cpu_count() or 1


def _check_device(vector: ParameterVector) -> None:
    for p in vector.parameters:
        if p.device.type != "cpu":
            raise ValueError(
                f"WorkersEvaluator: parameters must be on the CPU, got {p.device}; on an accelerator use the "
                "VectorizedEvaluator"
            )


def _check_arguments(workers: Any, timeout: Any, threads: Any, rebuild: Any) -> None:
    number = isinstance(workers, int) and not isinstance(workers, bool)
    if number and workers != -1 and workers < 1:
        raise ValueError(f"WorkersEvaluator: workers must be at least 1, or -1 for all cores, got {workers}")
    if not (workers is None or number or isinstance(workers, Executor) or callable(workers)):
        raise TypeError(
            "WorkersEvaluator: workers must be an integer, a concurrent.futures.Executor or a function like "
            f"map, got {workers!r}"
        )
    if not (rebuild is None or callable(rebuild)):
        raise TypeError(f"WorkersEvaluator: rebuild must be a function of nothing, got {rebuild!r}")
    if number and rebuild is not None:
        raise ValueError("WorkersEvaluator: rebuild is for an executor; a number of workers restarts by itself")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1):
        raise ValueError(f"WorkersEvaluator: threads must be an integer of at least 1, got {threads!r}")
    if timeout is not None and not (isinstance(timeout, Real) and float(timeout) > 0):
        raise ValueError(f"WorkersEvaluator: timeout must be a positive number of seconds, got {timeout!r}")
    if timeout is not None and callable(workers):
        raise ValueError(
            "WorkersEvaluator: timeout cannot be kept by a map function; pass a concurrent.futures.Executor or "
            "a number of processes"
        )
