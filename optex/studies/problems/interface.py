"""What every problem provides: a loss for a batch, batches in a fixed order, the objective without noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from optex.checks import check_integer
from optex.sources import GradientSource, ObjectiveSource

__all__ = ["Problem", "seeded_generator"]

_STREAMS: Final = {"start": 0, "batches": 1, "acting": 2}


def seeded_generator(seed: int, stream: Literal["start", "batches", "acting"]) -> torch.Generator:
    """A generator for one purpose, so that a start does not depend on how many batches were drawn."""
    state = np.random.SeedSequence([seed, _STREAMS[stream]]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class Problem(nn.Module, ABC):
    """One start of one objective: a module whose parameters are optimised.

    The problem is its own objective, ``optimizer.rounds(problem.batches(), problem)``, and the module to pass
    to ``VectorizedEvaluator``. Two problems with the same arguments have the same start and the same batches,
    to the last bit.

    Args:
        seed: of the start and of the batches; not negative.

    Attributes:
        name: as in ``optex.studies.problems.PROBLEMS``.
        seed: as given.
    """

    name: ClassVar[str]

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed: int = check_integer(type(self).__name__, "seed", seed, least=0)

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:  # []
        """The loss of a batch at the parameters' present values."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Batches, one a step, without end; every call starts over, so that all methods see the same ones."""

    @abstractmethod
    def evaluate(self) -> float:
        """The whole objective, without noise, at the parameters' present values."""

    @abstractmethod
    def reset(self) -> None:
        """Put the parameters back to the start, bit for bit."""

    def source(self) -> GradientSource:
        """The source of the problem's gradients: those of its loss, unless the problem has another source."""
        return ObjectiveSource(self, self.deterministic)

    def between_rounds(self) -> None:
        """What happens between rounds, after each one; nothing by default.

        A problem whose data comes from acting with the present parameters acts here, so that at equal rounds
        all methods have acted equally often. Batches that a method drew before stay as they were.

        Raises:
            NonFiniteError: the problem cannot continue with the present parameters; the run ends there.
        """

    @property
    def deterministic(self) -> bool:
        """Whether the gradient at a point is always the same, whatever the batch; False by default."""
        return False

    @property
    def minimum(self) -> float | None:
        """The objective's lowest value; None where it is not known."""
        return None

    @property
    def dimension(self) -> int:
        """Number of parameters, d."""
        return sum(parameter.numel() for parameter in self.parameters())
