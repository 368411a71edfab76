"""A pool over somebody else's workers: any concurrent.futures.Executor, or a map function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any

from optex.evaluators.workers.messages import Job, Lost, Outcome, Task, Unknown
from optex.evaluators.workers.objective import SharedObjective
from optex.evaluators.workers.pool import WorkerPool
from optex.evaluators.workers.replica import answer

__all__ = ["ExecutorPool"]


class ExecutorPool(WorkerPool):
    """Workers of an executor or a map function; they get the objective when they answer that they need it.

    Args:
        workers: an executor, or a function like ``map``; None: what ``rebuild`` makes.
        threads: of torch and BLAS in each worker that is a process of its own.
        rebuild: makes a replacement after a job was lost; executors that it made are shut down by the pool.
    """

    def __init__(
        self,
        workers: Executor | Callable[..., Iterable[Any]] | None,
        threads: int,
        rebuild: Callable[[], Any] | None,
    ) -> None:
        self._workers: Any = workers
        self._threads = threads
        self._rebuild = rebuild
        self._rebuilt = False  # the present one is ours to shut down
        # Nobody tells which worker gets a task: those that did not know the objective need not be those that
        # got it afterwards. So after an Unknown every task of the next run brings the objective along.
        self._send_objective = False
        self._broken = False  # the present one has lost a job: it is broken, or one of its workers hangs

    def run(self, objective: SharedObjective, jobs: Sequence[Job], timeout: float | None) -> list[Outcome]:
        if self._workers is None:
            self.renew()
        deadline = None if timeout is None else time.monotonic() + timeout
        pickled = objective.pickled if self._send_objective else None
        outcomes = self._submit([self._task(objective, job, pickled) for job in jobs], deadline)
        unknown = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Unknown)]
        self._send_objective = bool(unknown)
        if unknown:
            pickled = objective.pickled
            again = self._submit([self._task(objective, jobs[i], pickled) for i in unknown], deadline)
            for i, outcome in zip(unknown, again, strict=True):
                outcomes[i] = outcome
        self._broken = any(isinstance(outcome, Lost) for outcome in outcomes)
        return outcomes

    def _task(self, objective: SharedObjective, job: Job, pickled: bytes | None) -> Task:
        point, generator = job.point.numpy(), job.generator.numpy()
        return Task(objective.token, pickled, point, job.batch, generator, self._threads)

    def _submit(self, tasks: Sequence[Task], deadline: float | None) -> list[Any]:
        """The answer to each task, in their order; Lost for those that got none by the deadline."""
        if isinstance(self._workers, Executor):
            return _through_executor(self._workers, tasks, deadline)
        try:
            return list(self._workers(answer, tasks))
        except Exception as error:  # noqa: BLE001  (answer raises nothing, so the map function itself failed)
            return [Lost("the map function failed", error)] * len(tasks)

    def renew(self) -> None:
        if self._rebuild is not None and (self._broken or self._workers is None):
            self.close()
            self._workers, self._rebuilt, self._broken = self._rebuild(), True, False

    def close(self) -> None:
        if self._rebuilt:
            if isinstance(self._workers, Executor):
                self._workers.shutdown(wait=not self._broken)
            self._workers = None


def _through_executor(executor: Executor, tasks: Sequence[Task], deadline: float | None) -> list[Any]:
    futures: list[Future[Any]] = []
    refusal: Exception | None = None
    try:
        for task in tasks:
            futures.append(executor.submit(answer, task))  # noqa: PERF401  (those before an error count)
    except Exception as error:  # noqa: BLE001  (every executor has its own way to say that it is broken)
        refusal = error
    try:
        wait(futures, None if deadline is None else max(0.0, deadline - time.monotonic()))
    finally:
        for future in futures:
            future.cancel()
    outcomes = [_outcome(future) for future in futures]
    return outcomes + [Lost("the executor takes no more tasks", refusal)] * (len(tasks) - len(futures))


def _outcome(future: Future[Any]) -> Any:
    if future.cancelled() or not future.done():
        return Lost("no answer within the timeout")
    error = future.exception()
    return future.result() if error is None else Lost("the executor lost the task", error)
