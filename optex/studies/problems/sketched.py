"""Logistic regression whose gradients come through a sketched channel."""

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
    """``LogisticBreastCancer``, whose gradient is ``RᵀR ∇F``: of its 31 numbers ``sketch_size`` are sent.

    The objective itself is deterministic, its ``source`` is not: methods that differentiate by themselves
    (L-BFGS, line search) see the gradient without a sketch.

    Args:
        seed: of the start.
        sketch_size: s, from 1 to 31.
        kind: of ``optex.Sketch``.

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
        """R is drawn anew for every gradient; the objective itself is exact."""
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
        return True

    @property
    def minimum(self) -> float:
        return self.logistic.minimum
