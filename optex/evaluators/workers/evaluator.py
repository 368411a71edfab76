"""Gradients in other processes or threads, some of which may be lost."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from numbers import Real
from threading import RLock
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from optex.checks import as_float, check_integer, shown
from optex.errors import WorkerLostError
from optex.evaluators.interface import Evaluation, EvaluationRequest, Evaluator, stack_noise, with_hook
from optex.evaluators.workers.executor_pool import ExecutorPool
from optex.evaluators.workers.foresight import DrawForesight
from optex.evaluators.workers.messages import Answer, Failure, Job, Lost, Outcome
from optex.evaluators.workers.objective import SharedObjective
from optex.evaluators.workers.pool import WorkerPool
from optex.evaluators.workers.process_pool import ProcessPool
from optex.stepping import ParameterVector

__all__ = ["WorkersEvaluator"]


class WorkersEvaluator(Evaluator):
    """Evaluate a round's points at once in worker processes or threads.

    The objective is sent to each worker once, with copies of the parameters; after that only points, batches
    and states of torch's random generator are sent. Losses and gradients are those of the
    ``SequentialEvaluator``, provided that a worker computes with as many threads. The objective must depend on
    nothing but the parameters and the batch; what it writes elsewhere, such as a counter, stays in the worker.
    Tensors that it holds and the modes of its modules are watched, and it is sent again when they change; other
    things that it reads must stay as they are. Modules that update buffers in training, such as BatchNorm, are
    refused.

    A point that gets no answer (its worker died, hung or raised an error) is evaluated once more, by a new
    worker if one can be started. If that fails too, the round goes on without the point and lists it in its
    report's ``lost``. Without the first point, the round's start, the round fails.

    Args:
        workers: an integer: that many processes of our own, -1 for one per core, started when first needed,
            with points and gradients in shared memory. Or any ``concurrent.futures.Executor``, or a function
            like ``map`` (that of a ``multiprocessing.Pool``, for one), which the caller closes. None: what
            ``rebuild`` makes, and -1 without ``rebuild``.
        timeout: seconds for the evaluations of a round and what is sent for them, positive, and as many for the
            second try; None waits for ever. Processes of our own that are started for a try have 60 seconds
            before it, to start and to load the objective. Needs an integer or an executor.
        threads: of torch and BLAS in each worker process; by default cores // workers for processes of our
            own, at least 1, and 1 for those of an executor. The threads of this process keep their settings.
        rebuild: a function without arguments that makes a new executor or map function, for the second try
            after the present one has lost a point; executors that it made are shut down when they are no longer
            needed.

    Threads of the program may share an evaluator: their calls take turns, and an objective is sent again if
    another one was evaluated in between. Several runs at once are faster with an evaluator for each.

    Worker processes end with the program, however that ends.

    Memory: ``2 · workers · d`` numbers in shared memory, and in every worker what the objective holds.

    Raises:
        TypeError, ValueError: an argument is of no use, the objective cannot be sent to another process, or it
            cannot be evaluated at several points at once; the message says what would do.
        WorkerLostError: at evaluation, there was no answer for the round's start, not even at the second try.
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
        self._arguments = (workers, timeout, threads, rebuild)
        if workers is None and rebuild is None:
            workers = -1
        self._pool: WorkerPool
        if isinstance(workers, int):
            cores = _cores()
            count = cores if workers == -1 else workers
            self._pool = ProcessPool(count, threads or max(1, cores // count))
        else:
            self._pool = ExecutorPool(workers, threads or 1, rebuild)
        self._timeout = timeout
        self._lock = RLock()  # one evaluation at a time: they share processes and their channels
        self._objective: SharedObjective | None = None
        self._foresight = DrawForesight()
        self._end = finalize(self, self._pool.close)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copy, (type(self), *self._arguments)  # a copy starts processes of its own

    def __enter__(self) -> WorkersEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End our processes, after the evaluation under way; the caller's executor is left open.

        The next evaluation starts new processes.
        """
        with self._lock:
            self._objective = None
            self._pool.close()

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        _check_device(request.vector)
        with self._lock:
            evaluation = self._evaluate(request)
        return with_hook(request, evaluation)

    def _evaluate(self, request: EvaluationRequest) -> Evaluation:
        points, draws = request.points, request.draws
        if self._objective is None or not self._objective.serves(request.source, request.vector):
            self._objective = SharedObjective(request.source, request.vector)
        packed = [_packed(batch) for batch in request.batches]
        starts = self._foresight.starts(draws)
        outcomes: list[Outcome] = [Lost("not tried yet")] * len(points)
        retried: set[int] = set()
        pending = list(range(len(points)))
        while pending:
            jobs = {i: Job(points[i], packed[i], starts[i]) for i in pending}
            try:
                found = self._run(self._objective, jobs, retried)
            except BaseException:  # Ctrl-C, for one
                self._pool.abandon()
                raise
            for i, outcome in found.items():
                outcomes[i] = outcome
            pending = self._foresight.mistaken(draws, starts, outcomes)
        self._foresight.pin(draws, starts, outcomes)
        return _evaluation(outcomes, points, sorted(retried))

    def _run(self, objective: SharedObjective, jobs: dict[int, Job], retried: set[int]) -> dict[int, Outcome]:
        """The outcome of each job; those that fail are tried a second time."""
        outcomes = dict(zip(jobs, self._pool.run(objective, list(jobs.values()), self._timeout), strict=True))
        again = [i for i, outcome in outcomes.items() if not isinstance(outcome, Answer)]
        if again:
            retried.update(again)
            self._pool.renew()
            second = self._pool.run(objective, [jobs[i] for i in again], self._timeout)
            outcomes.update(zip(again, second, strict=True))
        start = outcomes.get(0)
        if isinstance(start, Failure):
            start.reraise()
        if isinstance(start, Lost):
            raise WorkerLostError(
                f"WorkersEvaluator: no gradient at the round's start, in two tries: {start.reason}. Parameters "
                "are as before the round. workers=<a number> restarts processes as needed; for an executor, "
                "rebuild= can make a new one"
            ) from start.error
        return outcomes


def _copy(kind: type[WorkersEvaluator], workers: Any, timeout: Any, threads: Any, rebuild: Any) -> Any:
    return kind(workers, timeout=timeout, threads=threads, rebuild=rebuild)


# ---------------------------------------------------------------------- in and out


def _packed(batch: Any) -> bytes:
    try:
        return pickle.dumps(batch, protocol=5)
    except Exception as error:
        raise TypeError(
            f"WorkersEvaluator: a batch of type {type(batch).__name__} cannot be sent to workers ({error}); "
            "pass tensors, arrays, numbers and containers of these"
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
        stack_noise([answers[i].noise_variance if i in answers else None for i in range(len(points))]),
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
        raise ValueError(
            f"WorkersEvaluator: workers must be at least 1, or -1 for all cores, got {shown(workers)}"
        )
    if not (workers is None or number or isinstance(workers, Executor) or callable(workers)):
        raise TypeError(
            "WorkersEvaluator: workers must be an integer, a concurrent.futures.Executor or a function like "
            f"map, got {shown(workers)}"
        )
    if not (rebuild is None or callable(rebuild)):
        raise TypeError(f"WorkersEvaluator: rebuild must be a function without arguments, got {shown(rebuild)}")
    if number and rebuild is not None:
        raise ValueError("WorkersEvaluator: rebuild is for an executor; processes are restarted without it")
    if threads is not None:
        check_integer("WorkersEvaluator", "threads", threads)
    if timeout is not None and not (isinstance(timeout, Real) and 0 < as_float(timeout) < math.inf):
        raise ValueError(
            f"WorkersEvaluator: timeout must be a positive number of seconds, got {shown(timeout)}"
        )
    if timeout is not None and callable(workers):
        raise ValueError(
            "WorkersEvaluator: a map function cannot keep a timeout; pass a concurrent.futures.Executor or "
            "a number of processes"
        )
