"""What travels between the program and its workers: points to evaluate, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optex.stepping import GradientMask

__all__ = ["Answer", "Failure", "Job", "Lost", "Outcome", "Ready", "Task", "Unknown"]


@dataclass(frozen=True)
class Job:
    """One point to evaluate: where, on which batch, from which state of torch's generator on."""

    point: Tensor  # [d]
    batch: bytes
    generator: Tensor  # [bytes]


@dataclass(frozen=True)
class Task:
    """A job for a worker of an executor, in plain bytes and arrays, with all that the worker needs.

    No tensors: where torch decides how processes exchange them, each would cost an open file.
    """

    token: str
    objective: bytes | None  # pickled, for a worker that answered that it does not know the token
    point: np.ndarray  # [d]
    batch: bytes
    generator: np.ndarray  # [bytes]
    threads: int


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
    """The worker does not have this objective."""


class Ready:
    """The worker has loaded an objective."""


Outcome = Answer | Failure | Lost


class _WorkerTraceback(Exception):  # noqa: N818  (it shows a traceback and is never raised)
    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'
