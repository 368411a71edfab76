"""The family's optimizers, declared once: tests/test_family_optimizers.py runs its suite over this table.

A row is a paper's method with one setting. A paper's own file of tests has what only that paper promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from optex.optimizers import MFAC

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
    # Its m × m system is solved by LAPACK, outside of what torch compiles.
    "m-fac": Member(
        make=lambda model: MFAC(model.parameters(), lr=0.05, window_size=8, damping=1e-2),
        make_groups=lambda groups: MFAC(groups, window_size=4),
        compiles=False,
    ),
    "m-fac-momentum": Member(
        make=lambda model: MFAC(
            model.parameters(), lr=0.02, window_size=4, damping=0.1, momentum=0.9, weight_decay=1e-3
        ),
        make_groups=lambda groups: MFAC(groups, window_size=4, momentum=0.5),
        compiles=False,
    ),
}
