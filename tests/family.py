"""The family, declared once: tests/test_family_*.py run their suites over these tables.

A row is a paper's method with one setting. A paper's own file of tests has what only that paper promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from optex import GradientSource, InexactBilevelSource, SmoothBilevel
from tests.references.maid import dense_quadratic

__all__ = ["FAMILY", "SOURCES", "Member", "SourceRow"]


@dataclass(frozen=True)
class Member:
    """An optimizer as the suite drives it.

    Attributes:
        make: of a network (``tests.models.network``: linear, tanh, linear; float64), with any further groups'
            worth of settings left at their defaults.
        needs_graph: gradients have to come by ``backward(create_graph=True)``.
        groups: takes parameter groups handed to it, as torch's optimizers do: ``make_groups`` of such a list.
        under_optex: may be the base of ``OptEx``.
        compiles: ``torch.compile`` of a step leaves no graph break.
    """

    make: Callable[[nn.Module], Optimizer]
    make_groups: Callable[[list[dict]], Optimizer] | None = None
    needs_graph: bool = False
    under_optex: bool = True
    compiles: bool = True


FAMILY: dict[str, Member] = {}


@dataclass(frozen=True)
class SourceRow:
    """A source as the suite drives it.

    Attributes:
        make: builds everything anew, from the same seeds: the source, the parameters that are optimised, and
            ``count -> batches`` (None for each where it needs none).
        lr: of SGD, at which the objective falls.
        exact: the gradient that the source estimates, one tensor a parameter, given what ``make`` made; None
            where there is no closed form.
        tolerance: relative error of the mean of so many ``answers`` against it.
        pickles: can be sent to worker processes.
    """

    make: Callable[[], tuple[GradientSource, list[torch.Tensor], Callable[[int], list]]]
    lr: float = 0.05
    exact: Callable[[GradientSource, list[torch.Tensor]], list[torch.Tensor]] | None = None
    tolerance: float = 1e-6
    answers: int = 1
    pickles: bool = True


_QUADRATIC = dense_quadratic(6, 3)


def _inexact_bilevel() -> tuple[GradientSource, list[torch.Tensor], Callable[[int], list]]:
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    start = torch.zeros(6, dtype=torch.float64)
    levels = SmoothBilevel(_QUADRATIC.lower, _QUADRATIC.upper, start, **_QUADRATIC.constants())
    source = InexactBilevelSource(levels, [theta], epsilon=1e-8, delta=1e-8)
    return source, [theta], lambda count: [None] * count


SOURCES: dict[str, SourceRow] = {
    "inexact-bilevel": SourceRow(
        _inexact_bilevel,
        lr=0.005,
        exact=lambda source, parameters: [_QUADRATIC.gradient(parameters[0].detach())],
    ),
}
