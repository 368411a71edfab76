"""What each paper of the family is held to; benchmarks/family.py runs these files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from optex import OptEx
from optex.studies.problems import Problem

__all__ = ["Check", "grad_of", "losses_by_round"]


@dataclass(frozen=True)
class Check:
    """A number to be reproduced, or contradicted with evidence.

    Attributes:
        name: what is measured, as the table's row has it.
        asked: what it has to be, in words, and by whom it was published or derived.
        run: measures; the figure in words, and whether it is as asked.
    """

    name: str
    asked: str
    run: Callable[[], tuple[str, bool]]

    def described(self) -> dict[str, Any]:
        """What of it is written down."""
        return {"name": self.name, "asked": self.asked}


def grad_of(parameter: Tensor) -> Tensor:  # of the parameter's shape
    """The gradient that a source or a backward pass has left there."""
    assert parameter.grad is not None
    return parameter.grad


def losses_by_round(optimizer: OptEx, problem: Problem, rounds: int) -> list[float]:  # [rounds + 1]
    """The problem's objective at the start and after each round on its own batches and gradients."""
    start = problem.evaluate()
    return [start] + [
        problem.evaluate() for _ in islice(optimizer.rounds(problem.batches(), problem.source()), rounds)
    ]
