"""A pool of our own processes, with points and gradients in shared memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from threading import Thread
from typing import Any, Final

import torch

from optex.evaluators.workers.channel import Channel
from optex.evaluators.workers.messages import Answer, Failure, Job, Lost, Outcome, Ready
from optex.evaluators.workers.objective import SharedObjective
from optex.evaluators.workers.pool import WorkerPool
from optex.evaluators.workers.replica import serve

__all__ = ["ProcessPool"]

_FORK_SERVER: Final = "optex.evaluators.workers.fork_server"
_EXIT_SECONDS: Final = 2.0  # for processes to end
_START_SECONDS: Final = 60.0  # for processes to start and to load the objective, where there is a timeout


class _Worker:
    """One process, the channel to it, and shared memory for a point and its gradient.

    The memory is an anonymous mapping that processes inherit: it has no name that could outlive them.

    Raises:
        OSError, EOFError: the process could not be started, or not before the deadline.
    """

    def __init__(self, context: Any, objective: SharedObjective, threads: int, deadline: float | None) -> None:
        vector = objective.vector
        self._memory = context.RawArray(ctypes.c_byte, 2 * vector.dimension * vector.dtype.itemsize)
        shared = torch.frombuffer(self._memory, dtype=vector.dtype, count=2 * vector.dimension)
        self._point, self._gradient = shared.view(2, vector.dimension)
        self.channel = Channel()
        self.process = context.Process(
            target=serve,
            args=(self.channel.other_end, self._memory, threads),
            daemon=True,
            name="optex-worker",
        )
        try:
            _start_within(self._start, deadline)
        except BaseException:
            self.channel.close()
            raise
        self.token: str | None = None

    def _start(self) -> None:
        try:
            self.process.start()
        finally:
            self.channel.other_end.close()  # only now: until it has started, the process has yet to inherit it

    def fits(self, objective: SharedObjective) -> bool:
        """Whether its memory has the right size and dtype for this objective."""
        vector = objective.vector
        return len(self._point) == vector.dimension and self._point.dtype == vector.dtype

    def send_objective(self, objective: SharedObjective) -> None:
        """Send the objective; the worker will reply with ``Ready`` or a ``Failure``."""
        self.token = objective.token
        self._post(objective.token, objective.pickled)

    def send_job(self, job: Job) -> None:
        """Send a job; the worker will reply with an ``Answer`` or a ``Failure``."""
        self._point.copy_(job.point)
        self._post(job.batch, job.generator.numpy())

    def _post(self, *message: Any) -> None:
        with suppress(OSError):  # the process has ended, which ``reply`` will find
            self.channel.post(pickle.dumps(message))

    def reply(self) -> Any:
        """Its reply if that is complete, ``Lost`` if the process has ended, else None; does not wait."""
        alive = self.process.is_alive()  # asked first: a reply may be its last
        try:
            message = self.channel.proceed()
        except (EOFError, OSError):
            message, alive = None, False
        if message is None:
            if alive:
                return None
            self.process.join(_EXIT_SECONDS)
            return Lost(f"a worker process ended (exit code {self.process.exitcode})")
        reply = pickle.loads(message)
        if isinstance(reply, Answer):
            return replace(reply, gradient=self._gradient.numpy().copy())
        return reply


class ProcessPool(WorkerPool):
    """Processes of our own, started when first needed; one that is lost is replaced by a new one.

    With a timeout no call waits for ever: processes have that time for the evaluations, which includes sending
    messages and loading an objective or a batch, and new ones have ``_START_SECONDS`` before that to start.

    Args:
        count: of processes, at most.
        threads: of torch and BLAS in each.
    """

    def __init__(self, count: int, threads: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:  # the server imports torch once; its forks have it
            self._context.set_forkserver_preload([_FORK_SERVER, serve.__module__])
        self._count = count
        self._threads = threads
        self._workers: list[_Worker] = []

    def run(self, objective: SharedObjective, jobs: Sequence[Job], timeout: float | None) -> list[Outcome]:
        self._dismiss([worker for worker in self._workers if not worker.fits(objective)])
        refusal = self._grow(objective, min(len(jobs), self._count), timeout)
        outcomes: dict[int, Outcome] = {}
        for number, reply in self._exchange(objective, jobs, _deadline(timeout)):
            if number is None:
                refusal = reply
            else:
                outcomes[number] = reply
        missing = refusal or Lost("no worker process was left")
        return [outcomes.get(number, missing) for number in range(len(jobs))]

    def _exchange(
        self, objective: SharedObjective, jobs: Sequence[Job], deadline: float | None
    ) -> Iterator[tuple[int | None, Outcome]]:
        """A job's number with its outcome, as they come; None with the reason why other jobs have none."""
        waiting = deque(range(len(jobs)))
        idle = [worker for worker in self._workers if worker.token == objective.token]
        # The job that each evaluates; None: it loads the objective.
        busy: dict[_Worker, int | None] = {worker: None for worker in self._workers if worker not in idle}
        for worker in busy:
            worker.send_objective(objective)
        while busy or (waiting and idle):
            while waiting and idle:
                worker, number = idle.pop(), waiting.popleft()
                worker.send_job(jobs[number])
                busy[worker] = number
            replies = _replies(busy, deadline)
            if not replies:
                self._dismiss(busy)
                yield None, Lost("no answer within the timeout")
                return
            for worker, reply in replies:
                number = busy.pop(worker)
                if isinstance(reply, Ready):
                    idle.append(worker)
                elif number is None:
                    self._dismiss([worker])
                    yield None, _refused(reply)
                else:
                    if isinstance(reply, Lost):
                        self._dismiss([worker])
                    else:
                        idle.append(worker)
                    yield number, reply

    def _grow(self, objective: SharedObjective, count: int, timeout: float | None) -> Failure | Lost | None:
        """Start processes until there are ``count``; returns what went wrong with one, None if nothing did.

        Their start and their imports do not count against the timeout, so they are waited for here.
        """
        objective.pickled  # noqa: B018  (an objective that cannot be sent should start nothing)
        deadline = None if timeout is None else _deadline(_START_SECONDS)
        started: set[_Worker] = set()
        refusal: Failure | Lost | None = None
        while len(self._workers) < count:
            try:
                worker = _Worker(self._context, objective, self._threads, deadline)
            except (OSError, EOFError) as error:
                refusal = Lost(f"a worker process could not be started ({error})", error)
                break
            self._workers.append(worker)
            worker.send_objective(objective)
            started.add(worker)
        while started:
            replies = _replies(started, deadline)
            if not replies:
                self._dismiss(started)
                return Lost(f"a worker process did not load the objective within {_START_SECONDS:g} seconds")
            for worker, reply in replies:
                started.remove(worker)
                if not isinstance(reply, Ready):
                    refusal = _refused(reply)
                    self._dismiss([worker])
        return refusal

    def _dismiss(self, workers: Iterable[_Worker]) -> None:
        """Kill processes, whether they are stopped or compute; all at once, as each takes a moment to end."""
        dismissed = list(workers)
        self._workers = [worker for worker in self._workers if worker not in dismissed]
        for worker in dismissed:
            worker.channel.close()
            worker.process.kill()
        _join(dismissed)

    def abandon(self) -> None:
        self._dismiss(self._workers)

    def close(self) -> None:
        for worker in self._workers:
            worker.channel.close()  # upon which it ends
        _join(self._workers)
        self.abandon()


def _start_within(start: Callable[[], None], deadline: float | None) -> None:
    """Start a process, in a thread where there is a deadline.

    multiprocessing waits for its fork server without a timeout, and that may be stopped. A process that the
    thread starts after the deadline finds its channel closed, and ends.

    Raises:
        TimeoutError: the deadline has passed.
    """
    if deadline is None:
        start()
        return
    errors: list[BaseException] = []

    def call() -> None:
        try:
            start()
        except BaseException as error:  # noqa: BLE001  (raised by the thread that waits)
            errors.append(error)

    thread = Thread(target=call, daemon=True, name="optex-start")
    thread.start()
    thread.join(_seconds_until(deadline))
    if thread.is_alive():
        raise TimeoutError(f"it did not start within {_START_SECONDS:g} seconds")
    if errors:
        raise errors[0]


def _replies(workers: Collection[_Worker], deadline: float | None) -> list[tuple[_Worker, Any]]:
    """Wait for at least one reply; an empty list when the deadline has passed."""
    while ready := _wait(workers, deadline):
        replies = [(worker, worker.reply()) for worker in ready]
        if complete := [(worker, reply) for worker, reply in replies if reply is not None]:
            return complete
    return []


def _wait(workers: Collection[_Worker], deadline: float | None) -> list[_Worker]:
    """Those that take more of a message, send a reply or have ended; none once the deadline has passed."""
    with DefaultSelector() as selector:
        for worker in workers:
            events = EVENT_READ | EVENT_WRITE if worker.channel.sending else EVENT_READ
            selector.register(worker.channel.socket, events, worker)
            # On Windows only sockets can be waited for. Elsewhere the process itself can be, too: its channel
            # does not end where it has left its end to a child of its own.
            if os.name == "posix":
                selector.register(worker.process.sentinel, EVENT_READ, worker)
        seconds = None if deadline is None else _seconds_until(deadline)
        return list(dict.fromkeys(key.data for key, _ in selector.select(seconds)))


def _join(workers: Iterable[_Worker]) -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for worker in workers:
        worker.process.join(_seconds_until(deadline))


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _seconds_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _refused(reply: Failure | Lost) -> Failure | Lost:
    """What became of a worker that was to load the objective, with a remedy added."""
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
