"""A round: draft, evaluate, remember, replay, keep."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from optex import linalg
from optex.checks import saved_entry
from optex.errors import NonFiniteError, NotDeterministicWarning, warn
from optex.estimators import Posterior
from optex.estimators.history import Locations
from optex.evaluators import Evaluation, EvaluationRequest, Evaluator, RandomDraws
from optex.evaluators.randomness import generator_states, set_generator_states
from optex.round.acceptance import Acceptance
from optex.round.predictor import Predictor
from optex.round.record import RoundRecord
from optex.round.saved import OWNER, load_generators, load_mask, load_progress
from optex.round.window import BatchQueue, PlannedStep, Progress
from optex.sources import GradientSource
from optex.stepping import Buffers, Stepper

__all__ = ["Rounds"]

_UNCHANGED: Final = "parameters and state are those of before the round"


@dataclass
class Rounds:
    """The rounds of a run: what they work with, and how far they are.

    Attributes:
        stepper: the base optimizer, to be walked ahead and taken back.
        predictor: of gradients.
        acceptance: which steps are kept.
        evaluator: of true gradients.
        parallelism: N.
        gradient_hook: changes every true gradient in place.
        progress: how far the run is.
        queue: batches drawn and not planned yet.
        contradicted: a source that was declared deterministic answered differently at one point.
    """

    stepper: Stepper
    predictor: Predictor
    acceptance: Acceptance
    evaluator: Evaluator
    parallelism: int
    gradient_hook: Callable[[], Any] | None

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.queue = BatchQueue()
        self.contradicted = False
        self.record: RoundRecord | None = None  # of the round under way, or the last one

    def plan(self) -> tuple[PlannedStep, ...]:
        """The window, with what waits in the queue as new steps behind it."""
        new = self.queue.waiting(self.progress)
        if new:
            planned = self.queue.next_number(self.progress)
            self.progress = replace(self.progress, window=(*self.progress.window, *new), planned=planned)
        return self.progress.window

    @torch.no_grad()
    def run(
        self,
        source: GradientSource,
        window: Sequence[PlannedStep],
        buffers: Buffers | None,
        *,
        verify: bool = False,
    ) -> RoundRecord:
        """One round. Whatever ends it early, the run is as before it, but for the batch of a step that failed.

        Args:
            source: of the gradients.
            window: the steps to come, at least one: the progress's window, or steps of this round alone.
            buffers: that an evaluation changes; None where they are not known.
            verify: evaluate the start twice, to see whether a deterministic source is.

        Raises:
            NonFiniteError: the loss or gradient at the round's start, or the parameters at its end, are not
                finite.
        """
        record = RoundRecord(
            self.progress.rounds,
            source,
            self._ahead(source, window),
            self.stepper,
            self.stepper.vector.space,
            buffers,
        )
        self.record = record
        self._note_start(record)
        try:
            with linalg.threads_for(record.space.width):
                self._draft(record)
            self._evaluate(record, verify=verify)
            with linalg.threads_for(record.space.width):
                self._remember(record)
                self._replay(record)
                self._keep(record)
        except BaseException as error:
            if record.after is None or self.progress is not record.after:
                record.take_back()
                if isinstance(error, NonFiniteError):
                    self._drop_failed(record)
            raise
        record.undo.clear()
        return record

    def _note_start(self, record: RoundRecord) -> None:
        """What takes back all that drafting and evaluating change."""
        self.stepper.mark()
        record.undo.append(self.stepper.take_back)
        record.undo.append(partial(setattr, self.stepper, "mask", self.stepper.mask))
        if record.buffers is not None:
            record.undo.append(partial(record.buffers.write, record.buffers.read()))
        record.undo.append(partial(torch.set_num_threads, torch.get_num_threads()))
        record.undo.append(partial(self.evaluator.load_state_dict, self.evaluator.state_dict()))
        record.undo.append(partial(set_generator_states, generator_states()))
        record.undo += [partial(step.draws.put_back, step.draws.held()) for step in record.window]

    def _ahead(self, source: GradientSource, window: Sequence[PlannedStep]) -> Sequence[PlannedStep]:
        """Those of the window that this round drafts."""
        if self.acceptance.keeps_window and not len(self.predictor.history) and source.deterministic:
            return window[:1]  # with nothing to predict from, all would be one point and one gradient
        return window[: self.acceptance.ahead(self.parallelism)]

    # ------------------------------------------------------------------ draft

    def _draft(self, record: RoundRecord) -> None:
        """Walk ahead on predictions: ĝ_i = g_i + μ(y_i) - μ(x_i) where step i was measured, else μ(y_i)."""
        stepper, posterior, window = self.stepper, self.predictor.posterior(), record.window
        vector = stepper.vector
        record.proxies = torch.empty(len(window), vector.space.width, dtype=vector.dtype, device=vector.device)
        record.drafted = torch.zeros_like(record.proxies[1:])
        record.distances = [None] * len(record.drafted)
        record.draft_mask = stepper.mask
        record.proxies[0] = stepper.point
        origins = _locate_measured(window, posterior)
        with stepper.drafting():
            for i, planned in enumerate(window[:-1]):
                if posterior is not None:
                    here = posterior.locate(record.proxies[i : i + 1])
                    record.drafted[i], record.distances[i] = self._predict(
                        planned, posterior, here, origins.get(i), nearest=record.source.deterministic
                    )
                elif planned.measured is not None:
                    record.drafted[i] = planned.measured[1]
                stepper.step(record.drafted[i])
                record.proxies[i + 1] = stepper.point
        self._measure_distances(record)

    def _predict(
        self,
        planned: PlannedStep,
        posterior: Posterior,
        here: Locations,
        origin: Locations | None,
        *,
        nearest: bool,
    ) -> tuple[Tensor, Tensor | None]:  # [d], []
        """A drafted gradient; for a deterministic source also how far the nearest pair is."""
        if planned.measured is not None and origin is not None:
            return planned.measured[1] + posterior.differences(here, origin)[0], None
        gradient = posterior.means(here)[0]
        if not nearest:  # a pair of another minibatch is no measurement of this step
            return gradient, None
        return gradient, here.squared_distances[0, self.predictor.history.representatives].min().sqrt()

    @staticmethod
    def _measure_distances(record: RoundRecord) -> None:
        """From where they were measured, for the steps of earlier rounds; all found at once."""
        held = {i: step.measured[0] for i, step in enumerate(record.window[:-1]) if step.measured is not None}
        if held:
            gaps = record.space.norms([record.proxies[i] - point for i, point in held.items()])
            for i, gap in zip(held, gaps, strict=True):
                record.distances[i] = gap

    # ------------------------------------------------------------------ evaluate

    def _evaluate(self, record: RoundRecord, *, verify: bool) -> None:
        """True gradients at the proxies, and which of them are fit for use."""
        started = time.perf_counter()
        count = len(record.window)
        chosen = self.acceptance.evaluated(count)
        steps = [record.window[i] for i in chosen]
        request = EvaluationRequest(
            record.source,
            self.stepper.vector,
            record.proxies[chosen.start : chosen.stop],
            [step.batch for step in steps],
            [step.draws for step in steps],
            self.gradient_hook,
            record.buffers,
        )
        evaluation = self._verified(request) if verify else self.evaluator.evaluate(request)
        record.gradient_seconds = time.perf_counter() - started
        record.evaluated = chosen
        record.evaluations = len(chosen) - len(evaluation.lost) + (verify and len(chosen) == 1)
        record.retried, record.lost = (
            tuple(chosen[i] for i in rows) for rows in (evaluation.retried, evaluation.lost)
        )
        record.mask, record.buffers_after = evaluation.masks[0], evaluation.buffers
        finite = evaluation.losses.isfinite().to(record.proxies.device) & record.space.finite(
            evaluation.gradients
        )
        plausible = self.acceptance.plausible(evaluation.gradients, record.space)
        record.usable = _spread((finite & plausible).tolist(), chosen, count, False)
        record.noise_variance = _spread(_noise(record.source, evaluation), chosen, count, 0.0)
        record.losses, record.gradients = evaluation.losses, evaluation.gradients
        if len(chosen) < count:
            record.losses = evaluation.losses.new_full((count,), torch.nan)
            record.losses[chosen.start : chosen.stop] = evaluation.losses
            record.gradients = torch.zeros_like(record.proxies)
            record.gradients[chosen.start : chosen.stop] = evaluation.gradients
        if not (record.usable[0] if chosen.start == 0 else any(record.usable)):
            self._fail(record, chosen.start)

    def _verified(self, request: EvaluationRequest) -> Evaluation:
        """The evaluation, in which the first point's loss was found twice; says so if the two differ."""
        again = [i for i in range(1, len(request)) if torch.equal(request.points[i], request.points[0])]
        evaluation = self.evaluator.evaluate(request)
        if again:
            second = evaluation.losses[again[0]]
        else:
            repeated = replace(request.rows(slice(1)), draws=[RandomDraws()])
            second = self.evaluator.evaluate(repeated).losses[0]
        losses = float(evaluation.losses[0]), float(second)
        rounding = torch.finfo(evaluation.losses.dtype).eps ** 0.5
        if abs(losses[0] - losses[1]) > rounding * max(map(abs, losses)):
            self.contradicted = True
            warn(
                f"OptEx: deterministic=True was declared, but the losses at one point were {losses[0]:g} and "
                f"{losses[1]:g}; gradients count as sampled from now on. Leave deterministic=False for a "
                "closure or objective that draws minibatches, dropout or other random numbers.",
                NotDeterministicWarning,
            )
        return evaluation

    def _fail(self, record: RoundRecord, index: int) -> None:
        record.failed = index
        loss = float(record.losses[index])
        what = f"loss ({loss:g})" if not record.losses[index].isfinite() else "gradient"
        where = "the start" if index == 0 else f"proxy {index}"
        remedy = "Lower the learning rate, or start elsewhere."
        if not record.source.deterministic:
            remedy = "Check the batch, or lower the learning rate."
        raise NonFiniteError(
            f"OptEx: the {what} at {where} of round {record.number} is not finite; {_UNCHANGED}. {remedy} "
            f"{self._whereabouts(record, index)}"
        )

    def _whereabouts(self, record: RoundRecord, index: int) -> str:
        number = record.window[index].number
        batch = "" if number is None or record.source.deterministic else f", batch {number}"
        return f"(Step {self.progress.steps_taken + index}{batch}, counted from 0.)"

    # ------------------------------------------------------------------ remember

    def _remember(self, record: RoundRecord) -> None:
        """The usable pairs go into the history, after it was judged how well they had been predicted."""
        rows = [i for i, usable in enumerate(record.usable) if usable]
        record.undo.append(partial(self.predictor.take_back, self.predictor.before_remembering(len(rows))))
        self.predictor.remember(
            record.proxies[rows],
            record.gradients[rows],
            [record.noise_variance[i] for i in rows],
            [record.window[i].measured for i in rows],
        )
        record.posterior = self.predictor.posterior() if self.acceptance.keeps_window else None

    # ------------------------------------------------------------------ replay

    def _replay(self, record: RoundRecord) -> None:
        """Take the steps that the acceptance keeps, from the round's start."""
        if record.mask != record.draft_mask:
            # The draft stepped parameters that get no gradient; the base optimizer would have left them.
            self.stepper.rewind()
            self.stepper.mask = record.mask
        record.undo.append(partial(self.acceptance.load_state_dict, self.acceptance.state_dict()))
        record.accepted = self.acceptance.replay(record)
        if not record.space.finite(self.stepper.point[None])[0]:
            record.failed = 0
            raise NonFiniteError(
                f"OptEx: round {record.number} led to parameters that are not finite; {_UNCHANGED}. Lower the "
                f"learning rate. {self._whereabouts(record, 0)}"
            )

    # ------------------------------------------------------------------ keep

    def _keep(self, record: RoundRecord) -> None:
        """Steps taken leave the window, others keep what was measured for them. The commit is last."""
        accepted = record.accepted
        if record.buffers is not None and record.buffers_after is not None:
            record.buffers.write(record.buffers_after[accepted - 1 - record.evaluated.start])
        steps_taken = self.progress.steps_taken + accepted
        after = replace(self.progress, rounds=record.number + 1, steps_taken=steps_taken)
        if self._is_planned(record):
            after = replace(after, window=self._left(record))
        record.after = after
        self.progress = after

    def _is_planned(self, record: RoundRecord) -> bool:
        """Whether the steps are those of the progress's window, and not of a closure, which has none."""
        return record.window[0].number is not None

    def _left(self, record: RoundRecord) -> tuple[PlannedStep, ...]:
        if not self.acceptance.keeps_window:
            return self.progress.window[len(record.window) :]
        measured = [
            # Copies, or a row would hold all rows.
            replace(step, measured=(record.proxies[i].clone(), record.gradients[i].clone()) if usable else None)
            for i, (step, usable) in enumerate(zip(record.window, record.usable, strict=True))
            if i >= record.accepted
        ]
        return (*measured, *self.progress.window[len(record.window) :])

    def _drop_failed(self, record: RoundRecord) -> None:
        """Let go of the batch of the step that failed; the others are kept."""
        if record.failed is not None and self._is_planned(record):
            window = self.progress.window
            left = (*window[: record.failed], *window[record.failed + 1 :])
            self.progress = replace(self.progress, window=left)

    def plain_step(self) -> None:
        """One step of the base optimizer with the gradients that are there, after the hook."""
        if self.gradient_hook is not None:
            with torch.enable_grad():
                self.gradient_hook()
        self.stepper.step_with_current_gradients()
        self.progress = replace(self.progress, steps_taken=self.progress.steps_taken + 1)

    def skip(self) -> RoundRecord:
        """Count the round that failed as one that kept nothing."""
        record = self.record
        if record is None:
            raise RuntimeError("Rounds.skip: no round has failed")
        record.accepted = 0
        self.progress = replace(self.progress, rounds=record.number + 1)
        return record

    # ------------------------------------------------------------------ saved states

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
            "evaluator": self.evaluator.state_dict(),
            "random": generator_states(),
            "mask": list(self.stepper.mask),
            "rounds": self.progress.rounds,
            "steps_taken": self.progress.steps_taken,
            "batches_drawn": self.queue.next_number(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the saved state is checked, and all is built aside before anything changes.

        What ``held`` gave before puts the rest back, should this be interrupted while it takes over.

        Raises:
            ValueError: it is not what ``state_dict`` saves, or of another history, estimator or acceptance.
        """
        predictor = self.predictor.loaded(state)
        progress = load_progress(state, self.stepper.vector)
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
        """What puts the rounds back to where they are now."""
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
        """Go on with vectors of another length: what was measured along the old ones is of no use."""
        self.stepper, self.predictor = stepper, predictor
        window = tuple(replace(step, measured=None) for step in self.progress.window)
        self.progress = replace(self.progress, window=window)


def _locate_measured(window: Sequence[PlannedStep], posterior: Posterior | None) -> dict[int, Locations]:
    """Where the window's steps were measured, by index, located all at once."""
    held = {i: step.measured[0] for i, step in enumerate(window) if step.measured is not None}
    if posterior is None or not held:
        return {}
    locations = posterior.locate(torch.stack(list(held.values())))
    return {i: locations[row] for row, i in enumerate(held)}


def _noise(source: GradientSource, evaluation: Evaluation) -> list[float]:
    if source.deterministic:
        return [0.0] * len(evaluation.masks)
    if evaluation.noise_variance is None:
        return [torch.nan] * len(evaluation.masks)
    return evaluation.noise_variance.tolist()


def _spread(values: list[Any], chosen: range, count: int, otherwise: Any) -> list[Any]:
    result = [otherwise] * count
    result[chosen.start : chosen.stop] = values
    return result
