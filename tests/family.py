"""The family's optimizers, declared once: tests/test_family_optimizers.py runs its suite over this table.

A row is a paper's method with one setting. A paper's own file of tests has what only that paper promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from optex.optimizers import AdaHessian

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
    # A step differentiates the gradient again, which torch.compile does not trace.
    "adahessian": Member(
        lambda model: AdaHessian(model.parameters(), lr=0.05), AdaHessian, needs_graph=True, compiles=False
    ),
    "adahessian-signed": Member(
        lambda model: AdaHessian(model.parameters(), lr=0.05, average="signed", block="rows"),
        lambda groups: AdaHessian(groups, lr=0.05, average="signed", block="rows"),
        needs_graph=True,
        compiles=False,
    ),
}
