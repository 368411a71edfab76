"""Logistic regression with gradients that are sent as random sketches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import Tensor

from optex.sources import GradientSource, ObjectiveSource, Sketch, SketchedSource
from optex.studies.problems.interface import Problem
from optex.studies.problems.tabular import LogisticBreastCancer

__all__ = ["LogisticSketched"]


@final
class LogisticSketched(Problem):
    """``LogisticBreastCancer`` with the gradient ``RᵀR ∇F``, of which ``sketch_size`` numbers are sent, not 31.

    Losses are exact and gradients are noisy, so methods for deterministic objectives refuse it. Code that
    differentiates the problem itself sees the gradient without a sketch.

    Args:
        seed: of the start.
        sketch_size: rows of R, from 1 to 31.
        kind: of R, as in ``optex.Sketch``.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.
    """

    name = "logistic-sketched"

    def __init__(self, seed: int = 0, sketch_size: int = 8, kind: str = "srht") -> None:
        super().__init__(seed)
        self.logistic: LogisticBreastCancer = LogisticBreastCancer(seed)
        self.sketch: Sketch = Sketch(kind, sketch_size)  # pyright: ignore[reportArgumentType]  (Sketch checks it)
        self.sketch.second_moment(self.dimension)  # refuses sizes above the dimension

    def forward(self, batch: None) -> Tensor:
        return self.logistic(batch)

    def source(self) -> GradientSource:
        """Gradients through sketches; R is drawn anew for each."""
        exact = ObjectiveSource(self, deterministic=True)
        return SketchedSource(exact, self.sketch, self.parameters())

    def batches(self) -> Iterator[None]:
        return self.logistic.batches()

    def evaluate(self) -> float:
        return self.logistic.evaluate()

    def reset(self) -> None:
        self.logistic.reset()

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def minimum(self) -> float:
        return self.logistic.minimum
