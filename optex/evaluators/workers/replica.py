"""The objective at a worker: a copy that evaluates one point at a time, in another process or thread."""

from __future__ import annotations

import io
import pickle
import signal
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from socket import socket
from typing import Any, Final

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from optex.evaluators.buffers import buffers_refused
from optex.evaluators.interface import EvaluationRequest
from optex.evaluators.randomness import RandomDraws
from optex.evaluators.sequential import SequentialEvaluator
from optex.evaluators.workers.channel import receive, send
from optex.evaluators.workers.messages import Answer, Failure, Ready, Task, Unknown
from optex.evaluators.workers.objective import SharedObjective, tensor_version
from optex.evaluators.workers.parent_watch import end_with_program
from optex.sources import GradientSource
from optex.stepping import Buffers, ParameterVector

__all__ = ["Replica", "answer", "serve"]

_REPLICAS_KEPT: Final = 4  # by each thread; several runs may take turns on one executor


class Replica:
    """An objective whose parameters no other thread touches.

    Args:
        source: of gradients.
        parameters: that it evaluates at.
        modules: whose buffers no evaluation may change.
    """

    def __init__(
        self, source: GradientSource, parameters: Iterable[Tensor], modules: Sequence[nn.Module]
    ) -> None:
        self.source: GradientSource = source
        self.vector: ParameterVector = ParameterVector(parameters)
        self._modules = modules

    @staticmethod
    def unpickled(pickled: bytes, threads: int | None) -> Replica:
        """Load ``SharedObjective.pickled``; ``threads`` is None in the process that pickled it.

        Any other process is set to compute with that many threads and with the program's default dtype.
        """
        unpickler = pickle.Unpickler(io.BytesIO(pickled))
        source, parameters, dtype = unpickler.load()
        if threads is not None:
            # After loading, which imports what the objective needs: threadpoolctl sets only libraries that
            # are loaded already, and BLAS might not have been.
            threadpool_limits(threads)
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
        return Replica(source, parameters, unpickler.load())

    def evaluate(
        self,
        point: Tensor,  # [d]
        batch: bytes,
        generator: Tensor,  # [bytes]
    ) -> Answer:
        """Loss and gradient at a point; random numbers start from the generator's given state.

        Raises:
            ValueError: the objective updates buffers, or it draws random numbers in a thread.
            Exception: whatever the objective raises.
        """
        # Threads share torch's one generator. Only the main thread, which evaluates alone, can set it.
        pinned = threading.current_thread() is threading.main_thread()
        before = torch.get_rng_state()
        start = generator if pinned else before
        buffers = self._buffer_versions()
        try:
            if pinned:
                torch.set_rng_state(start)
            request = EvaluationRequest(
                self.source,
                self.vector,
                point[None],
                [pickle.loads(batch)],
                [RandomDraws()],
                buffers=Buffers(),  # none to hand on: _check_buffers refuses any change
            )
            evaluation = SequentialEvaluator().evaluate(request)
            end = torch.get_rng_state()
        finally:
            if pinned:
                torch.set_rng_state(before)
        self._check_buffers(buffers)
        moved = not torch.equal(start, end)
        if moved and not pinned:
            raise ValueError(
                "WorkersEvaluator: the objective draws random numbers (dropout?), which cannot be pinned to "
                "their step in threads; use processes, as workers=4, or the SequentialEvaluator"
            )
        loss = evaluation.losses[0]
        return Answer(
            float(loss),
            loss.dtype,
            evaluation.gradients[0].numpy(),
            evaluation.masks[0],
            None if evaluation.noise_variance is None else float(evaluation.noise_variance[0]),
            end.numpy() if moved else None,
        )

    def _buffer_versions(self) -> list[tuple[nn.Module, str, int, int]]:
        return [
            (module, name, id(buffer), tensor_version(buffer))
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _check_buffers(self, before: list[tuple[nn.Module, str, int, int]]) -> None:
        for now, (module, name, number, version) in zip(self._buffer_versions(), before, strict=True):
            if now[2:] != (number, version):
                raise buffers_refused(
                    "WorkersEvaluator",
                    f"{type(module).__name__} (its {name!r})",
                    "Points evaluated at once cannot share them; use SequentialEvaluator()",
                )


# ---------------------------------------------------------------------- in an executor


class _ReplicasOfThread(threading.local):
    def __init__(self) -> None:
        self.by_token: OrderedDict[str, Replica] = OrderedDict()


_REPLICAS: Final = _ReplicasOfThread()


def answer(task: Task) -> Answer | Failure | Unknown:
    """Evaluate a task in this process and thread; ``Unknown`` where they do not have its objective."""
    try:
        replica = _replica(task)
        if replica is None:
            return Unknown()
        return replica.evaluate(torch.tensor(task.point), task.batch, torch.tensor(task.generator))
    except Exception as error:  # noqa: BLE001  (the user's function may raise anything, and it is reported)
        return _failure(error)


def _replica(task: Task) -> Replica | None:
    """This thread's replica of the task's objective; None if there is none and the task brings none."""
    replicas = _REPLICAS.by_token
    replica = replicas.pop(task.token, None)
    if replica is None:
        original = SharedObjective.of_this_process(task.token)
        separate = None if original is None else original.source.replica()
        if separate is not None:
            replica = Replica(*separate, modules=[])
        elif task.objective is not None:
            replica = Replica.unpickled(task.objective, task.threads if original is None else None)
        else:
            return None
    replicas[task.token] = replica
    while len(replicas) > _REPLICAS_KEPT:
        replicas.popitem(last=False)
    return replica


def _failure(error: Exception) -> Failure:
    """The error in a form that is sure to reach another process."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (an exception class may fail here in any way)
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Failure(error, trace)


# ---------------------------------------------------------------------- in a process of a ProcessPool


def serve(connection: socket, memory: Any, threads: int) -> None:
    """A worker process: receive objectives and jobs, and reply, until the connection or the program ends.

    Args:
        connection: brings ``(token, pickled objective)``, answered by ``Ready()`` or a ``Failure``, and
            ``(batch, generator)``, answered by an ``Answer`` or a ``Failure``.
        memory: 2 · d numbers of the vector's dtype, shared with the program: the point, then the gradient.
        threads: of torch and BLAS.
    """
    end_with_program()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers, too; the program ends them
    connection.setblocking(True)  # socket.setdefaulttimeout may say otherwise
    replica = point = gradient = None
    while True:
        try:
            message = pickle.loads(receive(connection))
        except (EOFError, OSError):
            return
        reply: Answer | Failure | Ready = Ready()
        try:
            if isinstance(message[0], str):
                replica = Replica.unpickled(message[1], threads)
                d, dtype = replica.vector.dimension, replica.vector.dtype
                point, gradient = torch.frombuffer(memory, dtype=dtype, count=2 * d).view(2, d)
            elif replica is not None and point is not None and gradient is not None:
                reply = replica.evaluate(point, message[0], torch.tensor(message[1]))
                gradient.copy_(torch.from_numpy(reply.gradient))
                reply = replace(reply, gradient=None)
        except Exception as error:  # noqa: BLE001  (as in answer)
            reply = _failure(error)
        try:
            send(connection, pickle.dumps(reply))
        except OSError:  # the program has ended
            return
