"""What is sent to workers and what they make of it: an objective once, then points to evaluate it at."""

from __future__ import annotations

import io
import os
import pickle
import signal
import threading
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.optim import Optimizer

from optex.evaluators.buffers import buffers_refused
from optex.evaluators.interface import EvaluationRequest
from optex.evaluators.randomness import RandomDraws
from optex.evaluators.sequential import SequentialEvaluator
from optex.sources import ClosureSource, GradientSource, ObjectiveSource
from optex.stepping import Buffers, GradientMask, ParameterVector

try:
    import cloudpickle as pickling  # takes lambdas, and what a script or a notebook defines
except ImportError:
    pickling = pickle

__all__ = [
    "Answer",
    "Failure",
    "Job",
    "Lost",
    "Objective",
    "Outcome",
    "Ready",
    "Replica",
    "Task",
    "Unknown",
    "answer",
    "serve",
]

_Base: Final[Any] = pickling.Pickler
_REPLICAS_KEPT: Final = 4  # a thread; several runs may take turns on one executor
_NAMES: Final[dict[type, str]] = {ObjectiveSource: "objective", ClosureSource: "closure"}


@dataclass(frozen=True)
class Job:
    """One point to evaluate: where, on which batch, from which state of torch's generator on."""

    point: Tensor  # [d]
    batch: bytes
    generator: Tensor  # [bytes]


@dataclass(frozen=True)
class Answer:
    """A gradient that was found.

    Attributes:
        loss, dtype: its value, and the dtype it had.
        gradient: [d]; None where it lies in shared memory.
        mask: which parameters received a gradient.
        noise_variance: what the source said of it.
        generator: torch's generator after the evaluation; None if it did not move.
    """

    loss: float
    dtype: torch.dtype
    gradient: np.ndarray | None
    mask: GradientMask
    noise_variance: float | None
    generator: np.ndarray | None


@dataclass(frozen=True)
class Failure:
    """The objective raised an error, and where."""

    error: BaseException
    trace: str

    def reraise(self) -> None:
        """Raise the error as if it came from here, with the worker's traceback as its cause."""
        raise self.error from _WorkerTraceback(self.trace)


@dataclass(frozen=True)
class Lost:
    """No answer came; why."""

    reason: str
    error: BaseException | None = None


class Unknown:
    """The worker has not seen this objective."""


class Ready:
    """The worker has taken in an objective."""


Outcome = Answer | Failure | Lost


class _WorkerTraceback(Exception):  # noqa: N818  (it shows a traceback and is never raised)
    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


# ---------------------------------------------------------------------- the objective, at home


class _OptimizerElsewhere:
    """What a closure sees of its optimizer in a worker, which has no use for its state."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters:
            p.grad = None


class _Pickler(_Base):
    """Notes the tensors and modules that it comes past, and leaves optimizers behind."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []

    def persistent_id(self, obj: Any) -> None:  # called with every object; None: pickle it as usual
        if isinstance(obj, Tensor):
            self.tensors.append(obj)
        elif isinstance(obj, nn.Module):
            self.modules.append(obj)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Optimizer):
            parameters = [p for group in obj.param_groups for p in group["params"]]
            return _OptimizerElsewhere, (parameters,)
        inherited = getattr(super(), "reducer_override", None)
        return NotImplemented if inherited is None else inherited(obj)


class Objective:
    """A source of gradients with its parameters, under a token that workers know it by.

    Workers in this process, threads, take it as it is where it can share all but its parameters; others get
    it pickled, once.
    """

    def __init__(self, source: GradientSource, vector: ParameterVector) -> None:
        self.source = source
        self.vector = vector
        self.token = uuid.uuid4().hex
        self.process = os.getpid()
        self._dtype = torch.get_default_dtype()
        self._watched: list[Tensor] = []
        self._modules: list[nn.Module] = []
        self._state: list[Any] = []
        _AT_HOME[self.token] = self

    @cached_property
    def pickled(self) -> bytes:
        """The source and its parameters in one piece, so that they are the same tensors there as here."""
        file = io.BytesIO()
        pickler = _Pickler(file)
        try:
            pickler.dump((self.source, self.vector.parameters, self._dtype))
            modules = list(pickler.modules)
            pickler.dump(modules)
        except Exception as error:
            raise TypeError(
                f"WorkersEvaluator: {_NAMES.get(type(self.source), 'fun')} cannot be sent to other processes "
                f"({error}); define it at the top level of a module, install cloudpickle for lambdas and "
                "functions within functions, leave out what cannot be copied (locks, open files), or evaluate "
                "in threads: concurrent.futures.ThreadPoolExecutor"
            ) from error
        own = {id(p) for p in self.vector.parameters}
        self._watched = [tensor for tensor in pickler.tensors if id(tensor) not in own]
        self._modules = modules
        self._state = self._state_now()
        return file.getvalue()

    def serves(self, source: GradientSource, vector: ParameterVector) -> bool:
        """Is what was sent still what would be sent for this source?"""
        alike = self.source is source or (type(source) in _NAMES and self.source == source)
        return (
            alike
            and self.vector is vector
            and self._dtype is torch.get_default_dtype()
            and self._state == self._state_now()
        )

    def _state_now(self) -> list[Any]:
        """Changes when a tensor is changed in place, or a module's mode or tensors are."""
        state: list[Any] = [_version(tensor) for tensor in self._watched]
        for module in self._modules:
            state.append(module.training)
            state += [id(tensor) for tensor in (*module._buffers.values(), *module._parameters.values())]
        return state


_AT_HOME: WeakValueDictionary[str, Objective] = WeakValueDictionary()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


# ---------------------------------------------------------------------- the objective, at a worker


class Replica:
    """An objective with parameters that no other thread touches."""

    def __init__(
        self, source: GradientSource, parameters: Iterable[Tensor], modules: Sequence[nn.Module]
    ) -> None:
        self.source = source
        self.vector = ParameterVector(parameters)
        self._modules = modules

    @staticmethod
    def unpickled(pickled: bytes, threads: int | None) -> Replica:
        """What ``Objective.pickled`` holds; in a process of another's, with that many threads."""
        unpickler = pickle.Unpickler(io.BytesIO(pickled))
        source, parameters, dtype = unpickler.load()
        if threads is not None:
            # After loading, which imports what the objective needs, or BLAS might not be there to be told.
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
        """Loss and gradient; the random draws are those that follow on the generator's given state."""
        # Threads share torch's one generator: it can be set for the main one, whose turn it is alone.
        pinned = threading.current_thread() is threading.main_thread()
        before = torch.get_rng_state()
        start = generator if pinned else before
        buffers = self._buffer_versions()
        try:
            if pinned:
                torch.set_rng_state(start)
            evaluation = SequentialEvaluator().evaluate(
                EvaluationRequest(
                    self.source,
                    self.vector,
                    point[None],
                    [pickle.loads(batch)],
                    [RandomDraws()],
                    buffers=Buffers(),
                )
            )
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
            (module, name, id(buffer), _version(buffer))
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


# ---------------------------------------------------------------------- tasks for another's executor


@dataclass(frozen=True)
class Task:
    """All that a worker of an executor needs, in plain bytes and arrays.

    No tensors: where torch has a say in how processes exchange them, each would cost an open file.
    """

    token: str
    objective: bytes | None  # pickled, for a worker that answered that it does not know the token
    point: np.ndarray  # [d]
    batch: bytes
    generator: np.ndarray  # [bytes]
    threads: int


class _Known(threading.local):
    def __init__(self) -> None:
        self.replicas: OrderedDict[str, Replica] = OrderedDict()


_KNOWN: Final = _Known()


def answer(task: Task) -> Answer | Failure | Unknown:
    """Evaluate a task here and now, whatever process and thread this is."""
    try:
        replica = _replica(task)
        if replica is None:
            return Unknown()
        return replica.evaluate(torch.tensor(task.point), task.batch, torch.tensor(task.generator))
    except Exception as error:  # noqa: BLE001  (the user's function may raise anything, and it is reported)
        return _failure(error)


def _replica(task: Task) -> Replica | None:
    """This thread's replica of the task's objective; None where it is not known."""
    replicas = _KNOWN.replicas
    replica = replicas.pop(task.token, None)
    if replica is None:
        home = _AT_HOME.get(task.token)
        at_home = home is not None and home.process == os.getpid()  # and not in a fork of that process
        separate = home.source.replica() if home is not None and at_home else None
        if separate is not None:
            replica = Replica(*separate, modules=[])
        elif task.objective is not None:
            replica = Replica.unpickled(task.objective, None if at_home else task.threads)
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


# ---------------------------------------------------------------------- a process of our own pool


def serve(pipe: Connection, memory: Any, threads: int) -> None:
    """A worker process: take an objective or a job from the pipe, answer, until the pipe is closed.

    Args:
        pipe: brings ``(token, pickled objective)``, answered by ``Ready()`` or a Failure, and
            ``(batch, generator)``, answered by an Answer or a Failure.
        memory: 2 · d numbers of the vector's dtype, shared with the parent: the point, then the gradient.
        threads: of torch and BLAS.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent sees to us
    replica = point = gradient = None
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
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
            pipe.send_bytes(pickle.dumps(reply))
        except OSError:  # the parent is gone
            return
