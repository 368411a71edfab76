"""A base optimizer that can be walked ahead with gradients handed to it, and taken back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.stepping.parameters import GradientMask, ParameterVector
from optex.stepping.snapshot import Snapshot

__all__ = ["FreezesWhileDrafting", "Stepper"]


@runtime_checkable
class FreezesWhileDrafting(Protocol):
    """A base optimizer that keeps some of its state fixed during steps with predicted gradients.

    Factorisations and curvature estimates are costly to update, and a prediction says nothing new of them:
    while the context is open, steps use them as they are.
    """

    def drafting(self) -> AbstractContextManager[None]:
        """Freeze that state until the context is left."""
        ...


class Stepper:
    """Takes a base optimizer's steps with gradients that are handed to it, and goes back to where they began.

    The scheduler, if any, ticks after every step, so that each step has its own learning rate whether it is
    drafted or final.

    Attributes:
        vector: the parameters, as one vector.
        mask: which parameters get a gradient in the steps to come.
        taken: steps since the mark.
    """

    def __init__(self, base: Optimizer, vector: ParameterVector, scheduler: LRScheduler | None = None) -> None:
        self._base = base
        self._scheduler = scheduler
        self.vector = vector
        self.mask: GradientMask = (True,) * len(vector.parameters)
        self.taken = 0
        self._start = self.mark()

    def mark(self) -> Snapshot:
        """Remember this place; ``rewind`` comes back to it."""
        self._start = Snapshot(self._base, self._scheduler)
        self.taken = 0
        return self._start

    def rewind(self) -> None:
        """Back to the mark, bit for bit."""
        self._start.restore()
        self.taken = 0

    def drafting(self) -> AbstractContextManager[None]:
        """Steps inside are drafts: a base that freezes state while drafting does so."""
        return self._base.drafting() if isinstance(self._base, FreezesWhileDrafting) else nullcontext()

    def step(
        self,
        gradient: Tensor,  # [d]
    ) -> None:
        """One step of the base optimizer (and its schedule) with this gradient."""
        self.vector.write_gradients(gradient, self.mask)
        self._step()

    def step_with_current_gradients(self) -> None:
        """One step with whatever the parameters' ``.grad`` hold."""
        self._step()

    def _step(self) -> None:
        self._step_base()
        if self._scheduler is not None:
            self._scheduler.step()
        self.taken += 1

    def _step_base(self) -> None:
        self._base.step()

    @property
    def point(self) -> Tensor:  # [d]
        """The parameters as they are, copied."""
        return self.vector.read()

    def move_to(
        self,
        point: Tensor,  # [d]
    ) -> None:
        """Put the parameters here."""
        self.vector.write(point)

    def gather(self) -> None:
        """Make the parameters whole where they are split among processes; every one of them has to."""

    def release(self) -> None:
        """Give parameters and state back to the base optimizer, where the stepper keeps them elsewhere."""

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self._base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state of the base optimizer."""
        self._base.load_state_dict(state)
