"""A round: draft, evaluate, remember, replay, keep."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from optex import linalg
from optex.errors import NonFiniteError, NotDeterministicWarning, warn
from optex.estimators import Posterior
from optex.estimators.history import Locations
from optex.evaluators import Evaluation, EvaluationRequest, RandomDraws
from optex.evaluators.randomness import generator_states, set_generator_states
from optex.linalg import rows_at
from optex.round.linear import draft_linearly, linear_rule
from optex.round.record import RoundRecord
from optex.round.state import RunState
from optex.round.stride import Stride
from optex.round.surprise import Surprises
from optex.round.window import PlannedStep, Progress
from optex.sources import GradientSource
from optex.stepping import Buffers

__all__ = ["Rounds"]

_UNCHANGED: Final = "parameters and state are those of before the round"


class Rounds(RunState):
    """The rounds of a run, each told in its order: draft, evaluate, remember, replay, keep."""

    progress: Progress
    record: RoundRecord | None = None  # of the round under way, or the last one

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
        window = self._ahead(source, window)
        record = RoundRecord(
            self.progress.rounds,
            source,
            window,
            *self._layout(len(window)),
            self.stepper,
            self.stepper.vector.space,
            buffers,
        )
        self.record = record
        self._note_start(record)
        try:
            with _algebra(record):
                self._draft(record)
            self._evaluate(record, verify=verify)
            with _algebra(record):
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
        """Note how to take back all that drafting and evaluating change."""
        self.stepper.mark(ahead=not self._is_plain())
        record.undo.append(self.stepper.take_back)
        record.undo.append(partial(setattr, self.stepper, "mask", self.stepper.mask))
        if record.buffers is not None:
            record.undo.append(partial(record.buffers.write, record.buffers.read()))
        record.undo.append(partial(torch.set_num_threads, torch.get_num_threads()))
        record.undo.append(partial(self.evaluator.load_state_dict, self.evaluator.state_dict()))
        record.undo.append(partial(set_generator_states, generator_states()))
        record.undo += [partial(step.draws.put_back, step.draws.held()) for step in record.window]

    def _ahead(self, source: GradientSource, window: Sequence[PlannedStep]) -> Sequence[PlannedStep]:
        """The steps of the window that this round drafts."""
        if self.acceptance.keeps_window and not len(self.predictor.history) and source.deterministic:
            return window[:1]  # with nothing to predict from, all would be one point and one gradient
        return window[: self.acceptance.ahead(self.parallelism)]

    def _layout(self, count: int) -> tuple[int, list[int]]:
        """How many steps the round drafts, and which of them are those that it evaluates."""
        stride = self.progress.stride
        if self._strides:
            return stride.steps(count), stride.positions(count)
        return count, list(range(count))

    @property
    def _strides(self) -> bool:
        """Whether a round may take steps that it does not evaluate."""
        return self._may_stride and not self.progress.stride.rest and len(self.predictor.history) > 0

    @property
    def _may_stride(self) -> bool:
        return self.acceptance.strides and self.progress.stride.most > 1

    def _is_plain(self) -> bool:
        """Whether the round is one step of the base optimizer, with nothing to predict now or soon."""
        return self.parallelism == 1 and (not self._may_stride or self.progress.stride.rest > 0)

    # ------------------------------------------------------------------ draft

    def _draft(self, record: RoundRecord) -> None:
        """Walk ahead on predictions: ĝ_i = g_i + μ(y_i) - μ(x_i) where step i was measured, else μ(y_i)."""
        stepper, posterior, window = self.stepper, self.predictor.posterior(), record.window
        vector, last = stepper.vector, record.positions[-1]
        record.proxies = torch.empty(len(window), vector.space.width, dtype=vector.dtype, device=vector.device)
        record.drafted = torch.zeros_like(record.proxies)
        record.distances = [None] * len(window)
        record.draft_mask = stepper.mask
        record.proxies[0] = stepper.point
        origins, row = _locate_measured(window, posterior), 0
        rule = linear_rule(record, posterior)
        if rule is not None and posterior is not None:
            draft_linearly(record, posterior, rule, origins)
            self._measure_distances(record)
            return
        with stepper.drafting():
            for position in range(last):
                if record.positions[row] == position:
                    self._predict(record, row, posterior, origins.get(row))
                    gradient = record.drafted[row]
                    row += 1
                else:
                    assert posterior is not None  # without one every step is evaluated
                    gradient = posterior.mean(stepper.point)
                stepper.step(gradient)
                if record.positions[row] == position + 1:
                    record.proxies[row] = stepper.point
        if not last and self._strides:  # nothing to draft: predicted to see how well that goes
            self._predict(record, 0, posterior, origins.get(0))
        self._measure_distances(record)

    def _predict(
        self, record: RoundRecord, row: int, posterior: Posterior | None, origin: Locations | None
    ) -> None:
        """The drafted gradient of a row; for a deterministic source also how far the nearest pair is."""
        measured = record.window[row].measured
        if posterior is None:
            if measured is not None:
                record.drafted[row] = measured[1]
            return
        record.predicted.append(row)
        here = record.located[row] = posterior.locate(record.proxies[row : row + 1])
        if measured is not None and origin is not None:
            record.drafted[row] = measured[1] + posterior.differences(here, origin)[0]
            return
        record.drafted[row] = posterior.means(here)[0]
        record.note_distance(row, here)

    @staticmethod
    def _measure_distances(record: RoundRecord) -> None:
        """Prediction distances of the steps measured in earlier rounds; all computed at once."""
        held = {row: step.measured[0] for row in record.predicted if (step := record.window[row]).measured}
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
            self.stepper.observe,
        )
        evaluation, repeats = self._verified(request) if verify else (self.evaluator.evaluate(request), 0)
        record.gradient_seconds = time.perf_counter() - started
        record.evaluated = chosen
        record.evaluations = len(chosen) - len(evaluation.lost) + repeats
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
        if evaluation.observations is not None:
            record.observations = _spread(evaluation.observations, chosen, count, None)
        if len(chosen) < count:
            record.losses = evaluation.losses.new_full((count,), torch.nan)
            record.losses[chosen.start : chosen.stop] = evaluation.losses
            record.gradients = torch.zeros_like(record.proxies)
            record.gradients[chosen.start : chosen.stop] = evaluation.gradients
        if not (record.usable[0] if chosen.start == 0 else any(record.usable)):
            self._fail(record, chosen.start)

    def _verified(self, request: EvaluationRequest) -> tuple[Evaluation, int]:
        """The evaluation with the first point's loss found twice, and how many more gradients that took."""
        again = [i for i in range(1, len(request)) if torch.equal(request.points[i], request.points[0])]
        evaluation = self.evaluator.evaluate(request)
        if again:
            second = evaluation.losses[again[0]]
        else:
            # Not observed: a base optimizer's random probes are drawn once a step, as in the plain loop.
            repeated = replace(request.rows(slice(1)), draws=[RandomDraws()], observe=None)
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
        return evaluation, 0 if again else 1

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
        record.surprises = self.progress.surprises
        if self._is_plain():
            return
        rows = [i for i, usable in enumerate(record.usable) if usable]
        record.surprises = self._surprises(record)
        record.undo.append(partial(self.predictor.take_back, self.predictor.before_remembering(len(rows))))
        slots = self.predictor.remember(
            rows_at(record.proxies, rows),
            rows_at(record.gradients, rows),
            [record.noise_variance[i] for i in rows],
            [record.window[i].measured for i in rows],
            self._located(record, rows),
        )
        record.slots = dict(zip(rows[-len(slots) :], slots, strict=True))
        record.located.clear()  # N offsets, and of a history that is no more
        record.posterior = self.predictor.posterior() if self.acceptance.keeps_window else None

    def _located(self, record: RoundRecord, rows: list[int]) -> Locations | None:
        """The proxies in these rows as the draft saw them."""
        if not record.located:
            return None
        history = self.predictor.history
        parts = [record.located.get(i) or history.locate(record.proxies[i : i + 1]) for i in rows]
        return Locations.joined(parts, rows_at(record.proxies, rows))

    def _surprises(self, record: RoundRecord) -> Surprises:
        """What the measured gradients say of their predictions."""
        history, known = self.predictor.history, self.progress.surprises
        rows, gaps, norms = record.comparison
        if record.source.deterministic:
            return known.compared(gaps, norms) if rows else known
        # The history has seen the noise of minibatches that were measured before.
        rows = [i for i in rows if record.window[i].measured is None]
        usable = [i for i, flag in enumerate(record.usable) if flag]
        if not rows:
            return known
        measured, places = rows_at(record.gradients, usable), [usable.index(i) for i in rows]
        if len(usable) == 1:  # the neighbour is the last round's
            newest = history.gradients[history.newest].to(measured.device, measured.dtype)
            measured, places = torch.stack([newest, measured[0]]), [1]
        return known.averaged(record.space, rows_at(record.drafted, rows), measured, places)

    # ------------------------------------------------------------------ replay

    def _replay(self, record: RoundRecord) -> None:
        """Take the steps that the acceptance keeps, from the round's start."""
        if record.mask != record.draft_mask:
            # The draft stepped parameters that get no gradient; the base optimizer would have left them.
            self.stepper.rewind()
            self.stepper.mask = record.mask
        record.undo.append(partial(self.acceptance.load_state_dict, self.acceptance.state_dict()))
        record.accepted = self.acceptance.replay(record)
        self.stepper.settle()
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
            measured = [i for i in record.evaluated if record.positions[i] < accepted]
            record.buffers.write(record.buffers_after[measured[-1] - record.evaluated.start])
        steps_taken = self.progress.steps_taken + accepted
        after = replace(
            self.progress,
            rounds=record.number + 1,
            steps_taken=steps_taken,
            surprises=record.surprises,
            stride=self._next_stride(record),
        )
        if self._is_planned(record):
            after = replace(after, window=self._left(record))
        record.after = after
        self.progress = after

    def _next_stride(self, record: RoundRecord) -> Stride:
        stride, deterministic = self.progress.stride, record.source.deterministic
        if stride.rest:
            return stride.rested()
        if not self._strides or not record.predicted:
            return stride
        return stride.after(len(record.window), record.accepted, record.surprises, deterministic=deterministic)

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
            if record.positions[i] >= record.accepted
        ]
        return (*measured, *self.progress.window[len(record.window) :])

    def _drop_failed(self, record: RoundRecord) -> None:
        """Let go of the batch of the step that failed; the others are kept."""
        if record.failed is not None and self._is_planned(record):
            window = self.progress.window
            left = (*window[: record.failed], *window[record.failed + 1 :])
            self.progress = replace(self.progress, window=left)

    def skip(self) -> RoundRecord:
        """Count the round that failed as one that kept nothing."""
        record = self.record
        if record is None:
            raise RuntimeError("Rounds.skip: no round has failed")
        record.accepted = 0
        self.progress = replace(self.progress, rounds=record.number + 1)
        return record


@contextmanager
def _algebra(record: RoundRecord) -> Iterator[None]:
    """Threads and warnings for the algebra between gradients; values that are not finite are checked later."""
    with linalg.threads_for(record.space.width), np.errstate(all="ignore"):
        yield


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


def _spread(values: Sequence[Any], chosen: range, count: int, otherwise: Any) -> list[Any]:
    result = [otherwise] * count
    result[chosen.start : chosen.stop] = values
    return result
