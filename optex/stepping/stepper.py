"""A base optimizer that is walked ahead with given gradients, and taken back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.stepping.linear import LinearRule
from optex.stepping.parameters import GradientMask, ParameterVector
from optex.stepping.snapshot import Snapshot

__all__ = ["FreezesWhileDrafting", "ObservesEvaluations", "Stepper"]


@runtime_checkable
class FreezesWhileDrafting(Protocol):
    """A base optimizer that keeps some of its state fixed during steps with predicted gradients.

    Factorisations and curvature estimates are costly to update, and predicted gradients hold no new information
    on them: while the context is open, steps use them as they are.
    """

    def drafting(self) -> AbstractContextManager[None]:
        """Freeze that state until the context is left."""
        ...


@runtime_checkable
class ObservesEvaluations(Protocol):
    """A base optimizer whose steps need more of an evaluation than its gradient.

    Such as a product with the Hessian, or a layer's inputs and output gradients: it is read off right after the
    backward pass, and handed back before the step that uses that evaluation's gradient. Steps on predictions
    have no evaluation; such an optimizer is ``FreezesWhileDrafting``, too.

    Attributes:
        needs_graph: the backward pass has to be ``backward(create_graph=True)``.
    """

    needs_graph: bool

    def observe(self) -> Any:
        """What the evaluation that just ended left, which is removed; the parameters' ``.grad`` are set."""
        ...

    def recall(self, observation: Any) -> None:
        """Prepare for a step with the gradient of the evaluation in which this was observed."""
        ...


class Stepper:
    """Takes a base optimizer's steps with given gradients, and goes back to where they began.

    The scheduler, if any, ticks after every step, so that each step has its own learning rate whether it is
    drafted or final.

    Attributes:
        vector: the parameters, as one vector.
        mask: which parameters get a gradient in the steps to come.
        taken: steps since the mark.
    """

    def __init__(self, base: Optimizer, vector: ParameterVector, scheduler: LRScheduler | None = None) -> None:
        self._base = base
        # Asked once: to check a protocol takes longer than a small step.
        self._freezing = base if isinstance(base, FreezesWhileDrafting) else None
        self._observing = base if isinstance(base, ObservesEvaluations) else None
        self._scheduler = scheduler
        self.vector = vector
        self.mask: GradientMask = (True,) * len(vector.parameters)
        self.taken: int = 0
        self.mark()

    def mark(self, *, ahead: bool = True) -> None:
        """Remember this place; ``rewind`` comes back to it.

        Args:
            ahead: whether several steps may follow; preparing for a single one does not pay.
        """
        self._start = Snapshot(self._base, self._scheduler)
        self.taken = 0

    def rewind(self) -> None:
        """Back to the mark, bit for bit.

        Raises:
            TypeError: a step since then changed what cannot be put back.
        """
        self.take_back()
        self._start.check()

    def take_back(self) -> None:
        """Back to the mark, without the check that all could be put back."""
        self._start.restore()
        self.taken = 0

    def drafting(self) -> AbstractContextManager[None]:
        """Steps inside are taken on predictions alone: a base that freezes state for them does so."""
        return nullcontext() if self._freezing is None else self._freezing.drafting()

    @property
    def observe(self) -> Callable[[], Any] | None:
        """The function that reads off every evaluation what the base needs; None where gradients are enough."""
        return None if self._observing is None else self._observing.observe

    def recall(self, observations: Sequence[Any] | None, row: int) -> None:
        """Prepare for a step with the gradient in this row, by what was observed in its evaluation."""
        if self._observing is not None and observations is not None:
            self._observing.recall(observations[row])

    def step(
        self,
        gradient: Tensor,  # [d]
    ) -> None:
        """One step of the base optimizer (and its schedule) with this gradient."""
        self.vector.write_gradients(gradient, self.mask)
        self._step()

    def linear_rule(self) -> LinearRule | None:
        """The rule of the steps from here; None where they are not linear in the gradients, or not alike."""
        return None

    def arrive(
        self,
        point: Tensor,  # [d]
        gradient: Tensor,  # [d]
        state: Mapping[str, Tensor],  # of [d]
        taken: int,
    ) -> None:
        """Take over the result of steps that were computed elsewhere by ``linear_rule``.

        Args:
            point: where they lead.
            gradient: of the last step.
            state: the base optimizer's after them, by name.
            taken: how many steps.
        """
        self.vector.write(point)
        self.vector.write_gradients(gradient, self.mask)
        for name, values in state.items():
            for p, piece in zip(self.vector.parameters, self.vector.parts(values), strict=True):
                self._base.state[p][name] = piece.clone()
        self.taken = taken

    def step_with_current_gradients(self) -> None:
        """One step with whatever the parameters' ``.grad`` hold."""
        self._step()

    def _step(self) -> None:
        self._step_base()
        self._tick()

    def _tick(self) -> None:
        if self._scheduler is not None:
            self._scheduler.step()
        self.taken += 1

    def _step_base(self) -> None:
        self._base.step()

    def settle(self) -> None:
        """Hand the steps taken to the base optimizer and its parameters, should they be kept elsewhere."""

    @property
    def point(self) -> Tensor:  # [d]
        """The parameters as they are, copied."""
        return self.vector.read()

    def move_to(
        self,
        point: Tensor,  # [d]
    ) -> None:
        """Set the parameters to this point."""
        self.vector.write(point)

    def gather(self) -> None:
        """Make the parameters whole where they are split among processes; every process has to call it."""

    def release(self) -> None:
        """Give parameters and state back to the base optimizer, where the stepper keeps them elsewhere."""

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict."""
        return self._base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state of the base optimizer.

        Raises:
            ValueError: it is of other groups or parameters.
        """
        self._base.load_state_dict(state)

    def held(self) -> Callable[[], None]:
        """A function that puts the base optimizer's parameters, state, groups and schedule back as they are."""
        base, state, groups = self._base, self._base.state, self._base.param_groups
        hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
        snapshot = Snapshot(base, self._scheduler)

        def put_back() -> None:
            base.state, base.param_groups = state, groups  # torch's loading makes new ones
            base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = hooks
            snapshot.restore()

        return put_back

    def check_step(self) -> None:
        """Try two steps with zero gradients and take them back, to find a state that cannot be stepped with.

        Two steps, as the schedule's new rate is first used in the second.

        Raises:
            Exception: whatever the base optimizer or the schedule raise.
            ValueError: the steps lead to parameters that are not finite.
        """
        self.mark()
        gradients = [p.grad for p in self.vector.parameters]
        hooks = self._base._optimizer_step_pre_hooks, self._base._optimizer_step_post_hooks
        try:
            # The user's hooks are for steps that count.
            self._base._optimizer_step_pre_hooks, self._base._optimizer_step_post_hooks = (
                OrderedDict(),
                OrderedDict(),
            )
            with self.drafting():  # there is no evaluation behind these gradients
                for _ in range(2):
                    for p in self.vector.parameters:
                        p.grad = torch.zeros_like(p)
                    self._step()
            if not all(bool(p.isfinite().all()) for p in self.vector.parameters):
                raise ValueError("steps with it lead to parameters that are not finite")
        finally:
            self._base._optimizer_step_pre_hooks, self._base._optimizer_step_post_hooks = hooks
            self.take_back()
            for p, gradient in zip(self.vector.parameters, gradients, strict=True):
                p.grad = gradient
