"""A network trained with forward passes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import Tensor

from optex.checks import check_integer
from optex.sources import GradientSource, SPSASource
from optex.studies.problems.interface import Problem
from optex.studies.problems.tabular import DigitsMLP

__all__ = ["DigitsForward"]


@final
class DigitsForward(Problem):
    """``DigitsMLP``, d = 4,810, with gradients that ``SPSASource`` estimates from losses.

    Args:
        seed: of the start and of the batches.
        batch_size: digits a batch, 1 to 1,437.
        queries: random directions a gradient, at least 1; each costs two forward passes.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.
    """

    name = "digits-forward"

    def __init__(self, seed: int = 0, batch_size: int = 128, queries: int = 16) -> None:
        super().__init__(seed)
        self.queries: int = check_integer("DigitsForward", "queries", queries)
        self.digits: DigitsMLP = DigitsMLP(seed, batch_size)

    def forward(
        self,
        batch: tuple[Tensor, Tensor],  # [n, 64], [n]
    ) -> Tensor:
        return self.digits(batch)

    def source(self) -> GradientSource:
        """Two-point estimates along random directions; the objective is never differentiated."""
        return SPSASource(self, self.parameters(), queries=self.queries)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.digits.batches()

    def evaluate(self) -> float:
        return self.digits.evaluate()

    def test_error(self) -> float:
        """Share of the held-out digits that the network gets wrong."""
        return self.digits.test_error()

    def reset(self) -> None:
        self.digits.reset()
