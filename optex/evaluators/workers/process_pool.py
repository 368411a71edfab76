"""Who does a round's work: processes of our own, another's executor, or a map function."""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import wait as wait_for_any
from typing import Any, Final

import torch

from optex.evaluators.workers.messages import (
    Answer,
    Failure,
    Job,
    Lost,
    Objective,
    Outcome,
    Ready,
    Task,
    Unknown,
    answer,
    serve,
)

__all__ = ["Crew", "HiredCrew", "ProcessCrew"]

_FAREWELL: Final = 2.0  # seconds for an idle process to end by itself


class Crew(ABC):
    """Evaluates jobs at once."""

    @abstractmethod
    def run(self, objective: Objective, jobs: Sequence[Job], timeout: float | None) -> list[Outcome]:
        """One outcome a job, in their order, within ``timeout`` seconds."""

    def renew(self) -> None:
        """Make good what the losses of the last run have broken."""

    def abandon(self) -> None:
        """Drop whatever is under way; nobody waits for it any more."""

    def close(self) -> None:
        """Let go of all that the crew has made."""


# ---------------------------------------------------------------------- processes of our own


class _Worker:
    """One process, its pipe, and a stretch of memory for a point and its gradient.

    The memory is an anonymous mapping that processes inherit: it has no name that could outlive them.
    """

    def __init__(self, context: Any, objective: Objective, threads: int) -> None:
        vector = objective.vector
        self._memory = context.RawArray(ctypes.c_byte, 2 * vector.dimension * vector.dtype.itemsize)
        shared = torch.frombuffer(self._memory, dtype=vector.dtype, count=2 * vector.dimension)
        self._point, self._gradient = shared.view(2, vector.dimension)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self._memory, threads), daemon=True, name="optex-worker"
        )
        self.process.start()
        theirs.close()
        self.token: str | None = None

    def fits(self, objective: Objective) -> bool:
        """Is its memory the right one for this objective?"""
        vector = objective.vector
        return len(self._point) == vector.dimension and self._point.dtype == vector.dtype

    def send_objective(self, objective: Objective) -> None:
        """To be answered by ``Ready`` or a Failure."""
        self.token = objective.token
        self._send(objective.token, objective.pickled)

    def send_job(self, job: Job) -> None:
        """To be answered by an Answer or a Failure."""
        self._point.copy_(job.point)
        self._send(job.batch, job.generator.numpy())

    def _send(self, *message: Any) -> None:
        with suppress(OSError):  # it is dead; waiting for its answer will tell
            self.pipe.send_bytes(pickle.dumps(message))

    def receive(self) -> Any:
        """Its answer, or that it is lost; to be called when ``_wait`` has named it."""
        try:
            reply = pickle.loads(self.pipe.recv_bytes()) if self.pipe.poll() else None
        except (EOFError, OSError):
            reply = None
        if reply is None:
            self.process.join(_FAREWELL)
            return Lost(f"a worker process ended (exit code {self.process.exitcode})")
        if isinstance(reply, Answer):
            return replace(reply, gradient=self._gradient.numpy().copy())
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class ProcessCrew(Crew):
    """Up to ``count`` processes, started when first needed; one that is lost is replaced by a new one."""

    def __init__(self, count: int, threads: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:  # the server imports torch once; its forks have it
            self._context.set_forkserver_preload([serve.__module__])
        self._count = count
        self._threads = threads
        self._workers: list[_Worker] = []

    def run(self, objective: Objective, jobs: Sequence[Job], timeout: float | None) -> list[Outcome]:
        outcomes: list[Outcome] = [Lost("no worker process could be started")] * len(jobs)
        refusal = self._prepare(objective, min(len(jobs), self._count))
        if refusal is not None:
            return [refusal] * len(jobs)
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting, idle = deque(range(len(jobs))), list(self._workers)
        busy: dict[_Worker, int] = {}
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop()
                busy[worker] = waiting.popleft()
                worker.send_job(jobs[busy[worker]])
            if not busy:  # the last worker is gone
                break
            ready = _wait(busy, deadline)
            if not ready:
                self._dismiss(list(busy))
                late = Lost(f"no answer within timeout={timeout:g} seconds")
                for number in [*waiting, *busy.values()]:
                    outcomes[number] = late
                break
            for worker in ready:
                number = busy.pop(worker)
                outcomes[number] = worker.receive()
                if isinstance(outcomes[number], Lost):
                    self._dismiss([worker])
                else:
                    idle.append(worker)
        return outcomes

    def _prepare(self, objective: Objective, count: int) -> Failure | Lost | None:
        """``count`` workers that know the objective, or what went wrong with all of them.

        A worker's start and its imports are none of a round's seconds, so they are waited for here.
        """
        self._dismiss([worker for worker in self._workers if not worker.fits(objective)])
        objective.pickled  # noqa: B018  (an objective that cannot be sent should start nothing)
        while len(self._workers) < count:
            self._workers.append(_Worker(self._context, objective, self._threads))
        learning = [worker for worker in self._workers if worker.token != objective.token]
        for worker in learning:
            worker.send_objective(objective)
        refusal: Failure | Lost | None = None
        while learning:
            for worker in _wait(learning, None):
                learning.remove(worker)
                reply = worker.receive()
                if not isinstance(reply, Ready):
                    refusal = _refused(reply)
                    self._dismiss([worker])
        return None if self._workers else refusal

    def _dismiss(self, workers: Iterable[_Worker]) -> None:
        for worker in workers:
            self._workers.remove(worker)
            worker.kill()

    def abandon(self) -> None:
        self._dismiss(list(self._workers))

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()  # upon which it ends
        for worker in self._workers:
            worker.process.join(_FAREWELL)
        self.abandon()


def _wait(workers: Iterable[_Worker], deadline: float | None) -> list[_Worker]:
    """Those that have answered or ended; none when the deadline has passed."""
    seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
    signs: dict[Any, _Worker] = {}
    for worker in workers:
        signs |= {worker.pipe: worker, worker.process.sentinel: worker}
    return list(dict.fromkeys(signs[sign] for sign in wait_for_any(list(signs), seconds)))


def _refused(reply: Failure | Lost) -> Failure | Lost:
    if isinstance(reply, Lost):
        return Lost(
            f"{reply.reason} while it started; see what it printed. A script that uses worker processes starts "
            "its work under if __name__ == '__main__':, as each of them imports it"
        )
    reply.error.add_note(
        "WorkersEvaluator: a worker process could not load what was sent to it; it must be importable there, "
        "or cloudpickle be installed"
    )
    return reply


# ---------------------------------------------------------------------- another's workers


class HiredCrew(Crew):
    """Workers of another's executor or map function; they are told the objective when they say they need it.

    Args:
        workers: an executor, or a function like ``map``; None: what ``rebuild`` makes.
        threads: of torch and BLAS in each worker that is a process of its own.
        rebuild: makes another one where the present one has lost a job; executors that it made are shut down.
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
        self._made = False
        # Those who did not know the objective need not be those who get the second message, so that in the next
        # run it comes with every task.
        self._newcomers = False
        self._spoilt = False  # broken, or with a worker that hangs

    def run(self, objective: Objective, jobs: Sequence[Job], timeout: float | None) -> list[Outcome]:
        if self._workers is None:
            self.renew()
        deadline = None if timeout is None else time.monotonic() + timeout
        pickled = objective.pickled if self._newcomers else None
        outcomes = self._submit([self._task(objective, job, pickled) for job in jobs], deadline)
        unknown = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Unknown)]
        self._newcomers = bool(unknown)
        if unknown:
            pickled = objective.pickled
            again = self._submit([self._task(objective, jobs[i], pickled) for i in unknown], deadline)
            for i, outcome in zip(unknown, again, strict=True):
                outcomes[i] = outcome
        self._spoilt = any(isinstance(outcome, Lost) for outcome in outcomes)
        return outcomes

    def _task(self, objective: Objective, job: Job, pickled: bytes | None) -> Task:
        point, generator = job.point.numpy(), job.generator.numpy()
        return Task(objective.token, pickled, point, job.batch, generator, self._threads)

    def _submit(self, batch: Sequence[Task], deadline: float | None) -> list[Any]:
        """What each task is answered."""
        if isinstance(self._workers, Executor):
            return _through_executor(self._workers, batch, deadline)
        try:
            return list(self._workers(answer, batch))
        except Exception as error:  # noqa: BLE001  (answer raises nothing, so this is the pool's)
            return [Lost("the map function failed", error)] * len(batch)

    def renew(self) -> None:
        if self._rebuild is not None and (self._spoilt or self._workers is None):
            self.close()
            self._workers, self._made, self._spoilt = self._rebuild(), True, False

    def close(self) -> None:
        if self._made:
            if isinstance(self._workers, Executor):
                self._workers.shutdown(wait=not self._spoilt)
            self._workers = None


def _through_executor(executor: Executor, batch: Sequence[Task], deadline: float | None) -> list[Any]:
    futures: list[Future[Any]] = []
    broken: Exception | None = None
    try:
        for task in batch:
            futures.append(executor.submit(answer, task))  # noqa: PERF401  (those before an error count)
    except Exception as error:  # noqa: BLE001  (a broken executor says so in words of its own)
        broken = error
    try:
        wait(futures, None if deadline is None else max(0.0, deadline - time.monotonic()))
    finally:
        for future in futures:
            future.cancel()
    outcomes = [_outcome(future) for future in futures]
    return outcomes + [Lost("the executor takes no more tasks", broken)] * (len(batch) - len(futures))


def _outcome(future: Future[Any]) -> Any:
    if future.cancelled() or not future.done():
        return Lost("no answer within the timeout")
    error = future.exception()
    return future.result() if error is None else Lost("the executor lost the task", error)
