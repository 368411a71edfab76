"""A pool of our own processes, with points and gradients in shared memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import wait as wait_for_any
from typing import Any, Final

import torch

from optex.evaluators.workers.messages import Answer, Failure, Job, Lost, Outcome, Ready
from optex.evaluators.workers.objective import SharedObjective
from optex.evaluators.workers.pool import WorkerPool
from optex.evaluators.workers.replica import serve

__all__ = ["ProcessPool"]

_EXIT_SECONDS: Final = 2.0  # for an idle process to end by itself


class _Worker:
    """One process, its pipe, and a stretch of memory for a point and its gradient.

    The memory is an anonymous mapping that processes inherit: it has no name that could outlive them.
    """

    def __init__(self, context: Any, objective: SharedObjective, threads: int) -> None:
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

    def fits(self, objective: SharedObjective) -> bool:
        """Is its memory the right one for this objective?"""
        vector = objective.vector
        return len(self._point) == vector.dimension and self._point.dtype == vector.dtype

    def send_objective(self, objective: SharedObjective) -> None:
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
            self.process.join(_EXIT_SECONDS)
            return Lost(f"a worker process ended (exit code {self.process.exitcode})")
        if isinstance(reply, Answer):
            return replace(reply, gradient=self._gradient.numpy().copy())
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class ProcessPool(WorkerPool):
    """Up to ``count`` processes, started when first needed; one that is lost is replaced by a new one."""

    def __init__(self, count: int, threads: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:  # the server imports torch once; its forks have it
            self._context.set_forkserver_preload([serve.__module__])
        self._count = count
        self._threads = threads
        self._workers: list[_Worker] = []

    def run(self, objective: SharedObjective, jobs: Sequence[Job], timeout: float | None) -> list[Outcome]:
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

    def _prepare(self, objective: SharedObjective, count: int) -> Failure | Lost | None:
        """``count`` workers that know the objective, or what went wrong with all of them.

        A worker's start and its imports do not count against the timeout, so they are waited for here.
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
            worker.process.join(_EXIT_SECONDS)
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
