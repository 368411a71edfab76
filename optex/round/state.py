"""The parts and the progress of a run: what a checkpoint saves and a failed load puts back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import InitVar, dataclass, replace
from typing import Any

import torch

from optex.checks import saved_entry
from optex.evaluators import Evaluator
from optex.evaluators.randomness import generator_states, set_generator_states
from optex.round.acceptance import Acceptance
from optex.round.alone import OneThread
from optex.round.predictor import Predictor
from optex.round.saved import OWNER, load_generators, load_mask, load_progress
from optex.round.stride import Stride
from optex.round.window import BatchQueue, PlannedStep, Progress
from optex.stepping import Stepper

__all__ = ["RunState"]


@dataclass
class RunState:
    """The parts that the rounds of a run work with, and the run's progress.

    Attributes:
        stepper: the base optimizer, to be walked ahead and taken back.
        predictor: of gradients.
        acceptance: which steps are kept.
        evaluator: of true gradients.
        parallelism: N.
        gradient_hook: changes every true gradient in place.
        progress: rounds and steps so far, and the window ahead.
        queue: batches drawn and not planned yet.
        contradicted: a source that was declared deterministic answered differently at one point.
        one_thread: lets one thread at a time change any of it.
    """

    stepper: Stepper
    predictor: Predictor
    acceptance: Acceptance
    evaluator: Evaluator
    parallelism: int
    stride: InitVar[Stride]
    gradient_hook: Callable[[], Any] | None

    def __post_init__(self, stride: Stride) -> None:
        self.progress: Progress = Progress(stride=stride)
        self.queue: BatchQueue = BatchQueue()
        self.contradicted: bool = False
        self.one_thread: OneThread = OneThread()

    def plan(self) -> tuple[PlannedStep, ...]:
        """The window, with what waits in the queue as new steps behind it."""
        new = self.queue.waiting(self.progress)
        if new:
            planned = self.queue.next_number(self.progress)
            self.progress = replace(self.progress, window=(*self.progress.window, *new), planned=planned)
        return self.progress.window

    def plain_step(self) -> None:
        """One step of the base optimizer with the gradients that are there, after the hook."""
        if self.gradient_hook is not None:
            with torch.enable_grad():
                self.gradient_hook()
        self.stepper.step_with_current_gradients()
        self.progress = replace(self.progress, steps_taken=self.progress.steps_taken + 1)

    def state_dict(self) -> dict[str, Any]:
        """All that the rounds to come depend on, but for the base optimizer's own state."""
        whole = self.stepper.vector.space.whole
        steps = (*self.progress.window, *self.queue.waiting(self.progress))
        return {
            **self.predictor.state_dict(),
            "window": [
                (
                    step.batch,
                    step.number,
                    None if step.measured is None else (whole(step.measured[0]), whole(step.measured[1])),
                    step.draws.state,
                )
                for step in steps
            ],
            "acceptance": self.acceptance.state_dict(),
            "surprises": self.progress.surprises.state_dict(),
            "stride": self.progress.stride.state_dict(),
            "evaluator": self.evaluator.state_dict(),
            "random": generator_states(),
            "mask": list(self.stepper.mask),
            "rounds": self.progress.rounds,
            "steps_taken": self.progress.steps_taken,
            "batches_drawn": self.queue.next_number(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, which is checked before anything changes.

        Should it be interrupted while it takes over, the function that ``held`` answered before puts all back.

        Raises:
            ValueError: it is not what ``state_dict`` saves, or of another history, estimator or acceptance.
        """
        predictor = self.predictor.loaded(state)
        progress = load_progress(state, self.stepper.vector, self.progress.stride)
        mask = load_mask(state, len(self.stepper.mask))
        random = load_generators(state)
        acceptance = copy.deepcopy(self.acceptance)
        acceptance.load_state_dict(saved_entry(OWNER, state, "acceptance"))
        self.evaluator.load_state_dict(saved_entry(OWNER, state, "evaluator"))
        self.predictor, self.acceptance, self.stepper.mask = predictor, acceptance, mask
        set_generator_states(random)
        self.queue.clear()
        self.progress = progress

    def held(self) -> Callable[[], None]:
        """A function that puts the rounds back to their present state."""
        parts = self.predictor, self.acceptance, self.stepper.mask, self.progress
        queue, evaluator, random = copy.copy(self.queue), self.evaluator.state_dict(), generator_states()
        put_stepper_back = self.stepper.held()

        def put_back() -> None:
            self.predictor, self.acceptance, self.stepper.mask, self.progress = parts
            self.queue = queue
            self.evaluator.load_state_dict(evaluator)
            set_generator_states(random)
            put_stepper_back()

        return put_back

    def forget(self) -> None:
        """Start with an empty history and window; the steps taken stay counted."""
        self.predictor = Predictor(self.predictor.estimator, self.predictor.history.like())
        self.queue.clear()
        self.progress = replace(self.progress, window=())

    def lay_out_anew(self, stepper: Stepper, predictor: Predictor) -> None:
        """Go on with vectors of another length; what was measured as vectors of the old length is dropped."""
        self.stepper, self.predictor = stepper, predictor
        window = tuple(replace(step, measured=None) for step in self.progress.window)
        self.progress = replace(self.progress, window=window)
