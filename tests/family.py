"""The family's optimizers, declared once: tests/test_family_optimizers.py runs its suite over this table.

A row is a paper's method with one setting. A paper's own file of tests has what only that paper promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from optex.optimizers import MKOR

__all__ = ["FAMILY", "Member"]


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


FAMILY: dict[str, Member] = {
    # Steps alternate between those that update factors and those that do not; a graph holds for one of them.
    "mkor": Member(lambda model: MKOR.with_sgd(model, 0.05, interval=3), compiles=False),
    "mkor-exact": Member(lambda model: MKOR.with_sgd(model, 0.05, variant="exact", interval=2), compiles=False),
    "mkor-h": Member(lambda model: MKOR.with_sgd(model, 0.05, hybrid=True, interval=3), compiles=False),
}
