"""Messages between the program and its workers: points to evaluate, and the outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optex.stepping import GradientMask

__all__ = ["Answer", "Failure", "Job", "Lost", "Outcome", "Ready", "Task", "Unknown"]


@dataclass(frozen=True)
class Job:
    """One point to evaluate, on a batch, with random numbers from a state of torch's generator on.

    Attributes:
        point: [d].
        batch: pickled.
        generator: [bytes], the state.
    """

    point: Tensor
    batch: bytes
    generator: Tensor


@dataclass(frozen=True)
class Task:
    """A job for a worker of an executor, with all that the worker needs.

    It has arrays and no tensors: torch would send each tensor to another process through an open file.

    Attributes:
        token: that the objective is known by.
        objective: pickled, for a worker that answered that it does not know the token; None for the others.
        point: [d].
        batch: pickled.
        generator: [bytes], state of torch's generator.
        threads: of torch and BLAS, in a worker that is a process of its own.
    """

    token: str
    objective: bytes | None
    point: NDArray[np.floating[Any]]
    batch: bytes
    generator: NDArray[np.uint8]
    threads: int


@dataclass(frozen=True)
class Answer:
    """A gradient that was found.

    Attributes:
        loss: its value.
        dtype: of the loss as a tensor.
        gradient: [d]; None where it lies in shared memory.
        mask: which parameters received a gradient.
        noise_variance: of one component of the gradient; None where the source does not know it.
        generator: [bytes], state of torch's generator after the evaluation; None if nothing was drawn.
    """

    loss: float
    dtype: torch.dtype
    gradient: NDArray[np.floating[Any]] | None
    mask: GradientMask
    noise_variance: float | None
    generator: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Failure:
    """The objective raised an error.

    Attributes:
        error: that error, or its words where it cannot be sent.
        trace: the worker's traceback.
    """

    error: BaseException
    trace: str

    def reraise(self) -> None:
        """Raise the error as if it came from here, with the worker's traceback as its cause."""
        raise self.error from _WorkerTraceback(self.trace)


@dataclass(frozen=True)
class Lost:
    """No answer came.

    Attributes:
        reason: in words.
        error: that told of it, if one did.
    """

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
