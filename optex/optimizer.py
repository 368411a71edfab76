"""OptEx: several steps of a first-order optimizer in a round, with gradients evaluated at once."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from optex.errors import NonFiniteError, NonFiniteWarning
from optex.estimators import CommitteeEstimator, Estimator, Posterior, SeparableEstimator
from optex.estimators.history import GradientHistory, Locations
from optex.estimators.kernels import Kernel
from optex.evaluators import Draws, Evaluation, Evaluator, GradientSource, SequentialEvaluator
from optex.evaluators.interface import (
    ClosureSource,
    ObjectiveSource,
    generator_states,
    set_generator_states,
)
from optex.round.acceptance import SELECTIONS, Acceptance, Last, LowestLoss, MeasuredRound, WithinTolerance
from optex.round.report import RoundReport
from optex.stepping.bases import check_base
from optex.stepping.parameters import Presence
from optex.vector_space import Space

__all__ = ["OptEx"]

_STATE_KEY = "optex"


@dataclass
class _PlannedStep:
    """A step of the window: its minibatch and random numbers, and where it was measured, if it was."""

    batch: Any
    number: int | None = None  # of the batch, in the order they came
    held: tuple[Tensor, Tensor] | None = None  # proxy [d] and gradient [d]
    draws: Draws = field(default_factory=Draws)


@dataclass(frozen=True)
class _Draft:
    proxies: Tensor  # [n, d]
    gradients: Tensor  # [n - 1, d], as predicted
    reach: list[Tensor | None]  # how far each of them was predicted: [] from where its step was measured
    present: Presence  # the parameters that were stepped


@dataclass(frozen=True)
class _Measured:
    losses: Tensor  # [n], NaN where not evaluated
    gradients: Tensor  # [n, d]
    present: Presence  # at the first point evaluated
    buffers: tuple[list[Tensor], ...] | None  # after each point evaluated
    usable: list[bool]
    evaluated: range
    retried: tuple[int, ...]
    lost: tuple[int, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(i for i in self.evaluated if not self.usable[i] and i not in self.lost)


@dataclass(frozen=True)
class _RoundRequest:
    """What ``rounds`` hands to ``step`` in the closure's place, so that hooks and schedulers see a step."""

    source: GradientSource


class OptEx(Optimizer):
    """A torch optimizer that takes up to ``parallelism`` steps of another one in a round.

    A round drafts steps on predicted gradients, evaluates the true gradients at all drafted points at once,
    and advances by what ``acceptance`` keeps (Shu et al., NeurIPS 2024, Algorithm 1; ``from_paper`` has it
    to the letter). ``param_groups`` and ``state`` are the base optimizer's own.

    Args:
        base: any ``torch.optim.Optimizer`` for dense gradients; it keeps its state and hyperparameters, and
            its step hooks run at every step, drafted ones too.
        parallelism: N, gradients evaluated at once, at least 1. With 1 the run is the base optimizer's.
        history_size: T0, pairs of iterate and gradient to predict from; 16 up to N = 8, else 32, by
            default.
        estimator: predicts gradients; ``CommitteeEstimator()`` by default. False switches prediction off: a
            round is then one step of the base.
        acceptance: which steps are kept; ``WithinTolerance()`` by default.
        evaluator: how gradients are computed at once; ``SequentialEvaluator()`` by default.
        scheduler: a learning-rate scheduler of ``base`` that ticks once for every step taken, drafted steps
            included, so that each step has its own rate. One that is ticked outside sees rounds.
        model: the module whose persistent buffers (BatchNorm's running statistics) follow the steps taken; not
            needed where ``rounds`` is given a module as its objective.
        gradient_hook: called after every true gradient, with the parameters at its point and it in their
            ``.grad``, to change it in place; for clipping. What it leaves is stepped with and remembered.
        on_nonfinite: when the loss or gradient at a round's start is not finite, ``"raise"`` an error or
            ``"skip"`` that step and its batch with a warning. Either way nothing of the round is kept.
        history_dtype, history_device: where the history's rows are kept; the parameters' by default.

    Attributes:
        steps_taken: steps of the base optimizer kept so far.
        batches_drawn: batches taken from what ``rounds`` was handed, those still in the window among them.
        last_report: of the last round, None before it.

    Memory, in numbers beyond the base optimizer's: ``(2 · T0 + 1) · d`` for the history (of ``history_dtype``), ``3 · N · d`` in a round for proxies, predictions and gradients, at most ``2 · N · d`` for steps not kept yet, one copy of
    parameters and base state, and N + 1 copies of the model's buffers. What the evaluator needs comes on top.

    Raises:
        TypeError, ValueError: an argument cannot work; the message names it and the remedy.

    >>> import torch, optex
    >>> theta = torch.nn.Parameter(torch.full((4,), 2.0))
    >>> optimizer = optex.OptEx(torch.optim.Adam([theta], lr=0.1), parallelism=4)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (theta**2).sum()
    ...     loss.backward()
    ...     return loss
    >>> losses = [float(optimizer.step(closure)) for _ in range(10)]
    >>> losses[0], losses[-1] < 1.0
    (16.0, True)
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        parallelism: int = 4,
        history_size: int | None = None,
        estimator: Estimator | Literal[False] | None = None,
        acceptance: Acceptance | None = None,
        evaluator: Evaluator | None = None,
        scheduler: LRScheduler | None = None,
        model: nn.Module | None = None,
        gradient_hook: Callable[[], Any] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        history_dtype: torch.dtype | None = None,
        history_device: torch.device | str | None = None,
    ) -> None:
        if isinstance(base, OptEx):
            raise TypeError("OptEx: base is an OptEx already; pass base.base to wrap its base optimizer anew")
        check_base(base)
        _check_count("parallelism", parallelism)
        if history_size is None:
            history_size = 16 if parallelism <= 8 else 32
        _check_count("history_size", history_size)
        _check_kind("estimator", estimator, (Estimator,), "an optex.estimators.Estimator, or False for none")
        _check_kind("acceptance", acceptance, (Acceptance,), "an optex.round.acceptance.Acceptance")
        _check_kind("evaluator", evaluator, (Evaluator,), "an optex.evaluators.Evaluator")
        _check_kind("scheduler", scheduler, (LRScheduler,), "a torch.optim.lr_scheduler.LRScheduler")
        _check_kind("model", model, (nn.Module,), "the torch.nn.Module whose buffers follow the steps taken")
        if gradient_hook is not None and not callable(gradient_hook):
            raise TypeError(
                "OptEx: gradient_hook must be a function without arguments, as "
                f"lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), got {gradient_hook!r}"
            )
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"OptEx: on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "OptEx: scheduler cannot be ReduceLROnPlateau, whose tick needs a metric; tick it yourself "
                "between rounds"
            )
        if isinstance(acceptance, LowestLoss) and any(group.get("maximize") for group in base.param_groups):
            raise ValueError("OptEx: acceptance keeps the lowest loss, but base was built with maximize=True")
        self.base = base
        self.parallelism = parallelism
        self.history_size = history_size
        if estimator is None:
            estimator = CommitteeEstimator()
        self.estimator: Estimator | None = copy.deepcopy(estimator) if estimator else None
        self.acceptance = WithinTolerance() if acceptance is None else copy.deepcopy(acceptance)
        self.evaluator = evaluator if evaluator is not None else SequentialEvaluator()
        self.scheduler = scheduler
        self.model = model
        self.gradient_hook = gradient_hook
        self.on_nonfinite = on_nonfinite
        self._history_dtype = history_dtype
        self._history_device = history_device
        self._ready = False
        super().__init__(base.param_groups, base.defaults)
        self._ready = True
        self.last_report: RoundReport | None = None
        self._rounds = 0
        self.steps_taken = 0
        self.batches_drawn = 0
        self._window: list[_PlannedStep] = []
        self._posterior: Posterior | None = None
        self._lay_out()

    @classmethod
    def from_paper(
        cls,
        base: Optimizer,
        parallelism: int = 5,
        history_size: int = 20,
        kernel: Kernel | str = "matern-5/2",
        lengthscale: float | Literal["median", "leave-one-out"] = "median",
        noise_variance: float | Literal["leave-one-out"] = 1e-6,
        selection: Literal["last", "lowest-loss", "smallest-gradient"] = "last",
        evaluate: Literal["all", "last"] = "all",
        **options: Any,
    ) -> OptEx:
        """Algorithm 1 as published, and the ablations of the paper's Figure 6.

        Args:
            base: the paper's FO-OPT.
            parallelism: N.
            history_size: T0.
            kernel, lengthscale, noise_variance: of the separable Gaussian process with mean zero; see
                :class:`~optex.estimators.SeparableEstimator`.
            selection: which of the N results the round keeps.
            evaluate: true gradients at ``"all"`` proxies, or at the ``"last"`` alone (with ``"last"``
                selection only).
            options: the keywords of ``OptEx`` that are not named here.

        Raises:
            ValueError: a name is unknown, or ``evaluate="last"`` meets another selection.
        """
        if selection not in SELECTIONS:
            raise ValueError(
                f"OptEx.from_paper: selection must be one of {', '.join(SELECTIONS)}, got {selection!r}"
            )
        if evaluate not in ("all", "last"):
            raise ValueError(f"OptEx.from_paper: evaluate must be 'all' or 'last', got {evaluate!r}")
        if evaluate == "last" and selection != "last":
            raise ValueError(
                f"OptEx.from_paper: selection {selection!r} compares all proxies; it needs evaluate='all'"
            )
        estimator = SeparableEstimator(kernel, lengthscale, noise_variance, prior_mean="zero")
        acceptance = Last(evaluate) if selection == "last" else SELECTIONS[selection]()
        return cls(
            base,
            parallelism=parallelism,
            history_size=history_size,
            estimator=estimator,
            acceptance=acceptance,
            **options,
        )

    # ------------------------------------------------------------------ the round

    def step(self, closure: Any = None) -> Any:
        """One round: evaluates ``closure`` up to ``parallelism`` times and advances the parameters.

        The closure is torch's: it clears the gradients, backpropagates and returns the loss. It is called
        once for every point evaluated. A closure that draws its own minibatch cannot be asked for the same
        one again, so gradients of steps not kept serve the history only; ``rounds`` keeps them.

        Without a closure: one plain step of the base optimizer with the gradients that are there.

        Returns:
            The loss at the round's start, as a tensor; None without a closure.

        Raises:
            NonFiniteError: the loss or gradient at the round's start, or the parameters at its end, are not
                finite. Parameters and state are those of before the call.
        """
        if closure is None:
            self._walk.step_with_current_gradients()
            return None
        if isinstance(closure, _RoundRequest):
            return self._round(closure)
        if not callable(closure):
            raise TypeError(f"OptEx.step: closure must be callable or None, got {type(closure).__name__}")
        # A closure has a window for this round alone; batches that rounds has in hand wait.
        waiting, self._window = self._window, [_PlannedStep(None) for _ in range(self._window_size)]
        try:
            return self._round(_RoundRequest(ClosureSource(closure)))
        finally:
            self._window = waiting

    def rounds(
        self, batches: Iterable[Any], objective: Callable[[Any], Tensor] | GradientSource
    ) -> Iterator[RoundReport]:
        """Run rounds until ``batches`` is used up; a generator of one report a round.

        Each step has one batch for good, in the order they come. When the batches end inside a round, the
        ones at hand are used. Leaving the loop early keeps the batches not yet stepped on for the next call.

        Args:
            batches: one item a step; for a deterministic objective ``itertools.repeat(None, steps)``.
            objective: the scalar loss of a batch at the parameters' present values, without backward; or a
                ``GradientSource``, which leaves its gradient itself.

        After ``load_state_dict`` go on behind the batches that were drawn before:
        ``rounds(itertools.islice(loader, optimizer.batches_drawn, None), objective)``.

        Raises:
            NonFiniteError: as in ``step``. The batch of the step that failed is let go, later ones are kept.
        """
        source = objective if isinstance(objective, GradientSource) else ObjectiveSource(objective)
        if self.model is None and isinstance(objective, nn.Module):
            self.model = objective
        request = _RoundRequest(source)
        iterator = iter(batches)
        while True:
            while len(self._window) < self._window_size:
                try:
                    self._window.append(_PlannedStep(next(iterator), self.batches_drawn))
                except StopIteration:
                    break
                self.batches_drawn += 1
            if not self._window:
                self._walk.gather()
                return
            self.step(request)
            yield cast(RoundReport, self.last_report)

    @property
    def _window_size(self) -> int:
        return self.parallelism if self.estimator is not None else 1

    @torch.no_grad()
    def _round(self, request: _RoundRequest) -> Tensor:
        started = time.perf_counter()
        self._refresh_layout()
        window = self._window[: self.acceptance.ahead(self._window_size)]
        if self.acceptance.keeps_window and not len(self.history) and window[0].batch is None:
            window = window[:1]  # with nothing to predict from, all would be one point and one gradient
        self.history.noisy = window[0].batch is not None
        self._walk.mark()
        try:
            draft = self._draft(window)
            gradients_started = time.perf_counter()
            measured = self._measure(request.source, window, draft)
            gradient_seconds = time.perf_counter() - gradients_started
            self._remember(draft, measured)
            accepted = self._advance(draft, measured)
        except NonFiniteError as error:
            self._walk.rewind()
            skipped = self._window.pop(0)
            text = f"{error} {self._whereabouts(skipped)}"
            if self.on_nonfinite == "raise":
                raise NonFiniteError(text) from error
            warnings.warn(f"{text} The step is skipped.", NonFiniteWarning, stacklevel=4)
            return self._report_nothing(time.perf_counter() - started)
        except BaseException:
            self._walk.rewind()
            raise
        self._keep(accepted, draft, measured)
        self.last_report = RoundReport(
            number=self._rounds,
            losses=measured.losses,
            accepted=accepted,
            evaluated=len(measured.evaluated) - len(measured.lost),
            dropped=measured.dropped,
            retried=measured.retried,
            lost=measured.lost,
            relative_errors=_relative_errors(draft, measured, self._vector.space),
            seconds=time.perf_counter() - started,
            gradient_seconds=gradient_seconds,
        )
        self._rounds += 1
        return measured.losses[measured.evaluated[0]]

    def _whereabouts(self, planned: _PlannedStep) -> str:
        batch = "" if planned.number is None else f", batch {planned.number}"
        return f"(Step {self.steps_taken}{batch}, counted from 0.)"

    def _report_nothing(self, seconds: float) -> Tensor:
        """Count a round that kept nothing."""
        nothing = torch.full((1,), torch.nan, dtype=self._vector.dtype, device=self._vector.device)
        self.last_report = RoundReport(
            number=self._rounds,
            losses=nothing,
            accepted=0,
            evaluated=1,
            dropped=(0,),
            retried=(),
            lost=(),
            relative_errors=nothing[:0],
            seconds=seconds,
            gradient_seconds=seconds,
        )
        self._rounds += 1
        return nothing[0]

    def _draft(self, window: Sequence[_PlannedStep]) -> _Draft:
        """Walk ahead on predictions: ĝ_i = g_i + μ(y_i) - μ(x_i) where step i was measured, else μ(y_i)."""
        walk, vector, posterior = self._walk, self._vector, self._fitted()
        proxies = torch.empty(len(window), vector.space.width, dtype=vector.dtype, device=vector.device)
        gradients = torch.zeros_like(proxies[1:])
        reach: list[Tensor | None] = [None] * len(gradients)
        proxies[0] = walk.point
        origins = self._locate_held(window, posterior)
        for i, planned in enumerate(window[:-1]):
            here = None if posterior is None else posterior.locate(proxies[i : i + 1])
            if planned.held is not None:
                gradients[i] = planned.held[1]
                if posterior is not None and here is not None:
                    gradients[i] += posterior.differences(here, origins[i])[0]
            elif posterior is not None and here is not None:
                gradients[i] = posterior.means(here)[0]
                # Without minibatches the nearest pair of the history is a measurement of this step, too.
                nearest = here.squared_distances[0, self.history.representatives].min().sqrt()
                reach[i] = nearest if planned.batch is None else None
            walk.step(gradients[i])
            proxies[i + 1] = walk.point
        held = {i: planned.held[0] for i, planned in enumerate(window[:-1]) if planned.held is not None}
        if held:
            gaps = vector.space.norms([proxies[i] - point for i, point in held.items()])
            reach = [gaps[list(held).index(i)] if i in held else known for i, known in enumerate(reach)]
        return _Draft(proxies, gradients, reach, walk.present)

    def _locate_held(self, window: Sequence[_PlannedStep], posterior: Posterior | None) -> dict[int, Locations]:
        """Where the window's steps were measured, by index, located all at once."""
        held = {i: planned.held[0] for i, planned in enumerate(window) if planned.held is not None}
        if posterior is None or not held:
            return {}
        locations = posterior.locate(torch.stack(list(held.values())))
        return {i: locations[row] for row, i in enumerate(held)}

    def _fitted(self) -> Posterior | None:
        """The estimator's posterior, fitted when the history has changed; None while it is empty."""
        if self.estimator is None or not len(self.history):
            return None
        if self._posterior is None:
            self._posterior = self.estimator.fit(self.history)
        return self._posterior

    def _measure(self, source: GradientSource, window: Sequence[_PlannedStep], draft: _Draft) -> _Measured:
        """True gradients at the proxies, and which of them are fit for use."""
        count = len(window)
        chosen = self.acceptance.evaluated(count)
        points = draft.proxies[chosen.start : chosen.stop]
        planned = [window[i] for i in chosen]
        evaluation = self.evaluator.evaluate_hooked(
            source,
            self._vector,
            points,
            [p.batch for p in planned],
            [p.draws for p in planned],
            self.gradient_hook,
        )
        space = self._vector.space
        finite = evaluation.losses.isfinite().to(points.device) & space.finite(evaluation.gradients)
        usable = (finite & self.acceptance.believed(evaluation.gradients, space)).tolist()
        if not (usable[0] if chosen.start == 0 else any(usable)):
            raise _non_finite_start(evaluation, self._rounds)
        losses, gradients = evaluation.losses, evaluation.gradients
        if len(chosen) < count:
            losses = losses.new_full((count,), torch.nan)
            losses[chosen.start : chosen.stop] = evaluation.losses
            gradients = torch.zeros_like(draft.proxies)
            gradients[chosen.start : chosen.stop] = evaluation.gradients
        flags = [False] * count
        flags[chosen.start : chosen.stop] = usable
        retried, lost = (tuple(chosen[i] for i in rows) for rows in (evaluation.retried, evaluation.lost))
        present, buffers = evaluation.present[0], evaluation.buffers
        return _Measured(losses, gradients, present, buffers, flags, chosen, retried, lost)

    def _remember(self, draft: _Draft, measured: _Measured) -> None:
        if self.estimator is None:
            return
        rows = [i for i, usable in enumerate(measured.usable) if usable]
        points, gradients = draft.proxies[rows], measured.gradients[rows]
        posterior, held = self._fitted(), [self._window[i].held for i in rows]
        if posterior is not None:
            self.estimator.judge(posterior, points, gradients, held)
        self.history.append(points, gradients)
        self._posterior = None

    def _advance(self, draft: _Draft, measured: _Measured) -> int:
        walk = self._walk
        if measured.present != draft.present:
            # The draft stepped parameters that get no gradient; the base optimizer would have left them.
            walk.rewind()
            walk.present = measured.present
        accepted = self.acceptance.advance(
            MeasuredRound(
                walk,
                draft.proxies,
                draft.gradients,
                measured.losses,
                measured.gradients,
                measured.usable,
                draft.reach,
                self._fitted() if self.acceptance.keeps_window else None,
                self._vector.space,
            )
        )
        if not self._vector.space.finite(self._walk.point[None])[0]:
            raise NonFiniteError(
                f"OptEx: round {self._rounds} led to parameters that are not finite; they are back at the "
                "round's start. Lower the learning rate."
            )
        return accepted

    def _keep(self, accepted: int, draft: _Draft, measured: _Measured) -> None:
        """Let go of the steps taken; the rest of the window keeps what was measured for it."""
        if measured.buffers:
            self._vector.whole.write_buffers(measured.buffers[accepted - 1 - measured.evaluated.start])
        self.steps_taken += accepted
        if not self.acceptance.keeps_window:
            self._window.clear()
            return
        for i in range(accepted, len(measured.usable)):
            pair = draft.proxies[i].clone(), measured.gradients[i].clone()  # or a row would hold all rows
            self._window[i].held = pair if measured.usable[i] else None
        del self._window[:accepted]

    # ------------------------------------------------------------------ layout

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]

    def _lay_out(self) -> None:
        self._walk = self.evaluator.lay_out(self.base, self._trainable(), self.scheduler)
        self._vector = self._walk.vector
        self.history = GradientHistory(
            self.history_size,
            self._vector.space,
            dtype=self._history_dtype or self._vector.dtype,
            device=self._history_device or self._vector.device,
        )
        self._posterior = None
        for planned in self._window:
            planned.held = None

    def _refresh_layout(self) -> None:
        """Start a new history where parameters were added, frozen, unfrozen or replaced."""
        parameters = self._trainable()
        known = self._vector.whole.parameters
        if len(parameters) != len(known) or any(p is not q for p, q in zip(parameters, known, strict=True)):
            check_base(self.base)
            self._walk.dissolve()
            self._lay_out()
        # A module that moves to another device replaces its buffers.
        self._vector.whole.buffers = None if self.model is None else _persistent_buffers(self.model)

    # ------------------------------------------------------------------ torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own groups, live."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, groups: list[dict[str, Any]]
    ) -> None:
        if self._ready:
            self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state, live."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._ready:
            self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. The history starts anew, its vectors being longer now."""
        if self._ready:  # while torch's constructor runs, the groups are already the base's
            self.base.add_param_group(param_group)
            self._refresh_layout()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise RuntimeError(
            "OptEx: torch.amp.GradScaler scales gradients by a factor that changes, and the history would mix "
            "them; use bfloat16 autocast, which needs no scaler"
        )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with one more entry, ``"optex"``: history, window, schedule.

        The window's batches are in it, how many were drawn, and where torch's random generators stand; the
        model's parameters and buffers are not. ``torch.load(..., weights_only=True)`` loads it if it does the
        batches. Where vectors are split among ranks they are in it as ``DTensor``; see ``optex.distributed.checkpoint``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self._walk.state_dict()
        whole = self._vector.space.whole
        state[_STATE_KEY] = {
            "history": self.history.state_dict(),
            "window": [
                (planned.batch, planned.number, _map_held(whole, planned.held), planned.draws.state)
                for planned in self._window
            ],
            "estimator": {} if self.estimator is None else self.estimator.state_dict(),
            "acceptance": self.acceptance.state_dict(),
            "evaluator": self.evaluator.state_dict(),
            "present": list(self._walk.present),
            "rounds": self._rounds,
            "steps_taken": self.steps_taken,
            "batches_drawn": self.batches_drawn,
            "random": generator_states(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def gather(self) -> None:
        """Make the model's parameters whole where they are split among ranks; every rank has to.

        Rounds with a ``DistributedEvaluator`` that splits leave them as they were gathered last.
        """
        self._walk.gather()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, bit for bit; torch's random generators are set to where they stood.

        A state dict of the base optimizer alone is taken too; the history then starts empty.

        Raises:
            ValueError: the state is of other parameters, or the history of another size.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        own = state_dict.pop(_STATE_KEY, None)
        self._refresh_layout()
        if own is None:
            self.history.clear()
        else:
            self.history.load_state_dict(own["history"])
        self._posterior = None
        self._window = []
        if own is not None:
            vector = self._vector
            self._window = [
                _PlannedStep(
                    batch,
                    number,
                    _map_held(lambda rows: vector.space.local(rows.to(vector.device)), held),
                    Draws(state),
                )
                for batch, number, held, state in own["window"]
            ]
            if self.estimator is not None:
                self.estimator.load_state_dict(own["estimator"])
            self.acceptance.load_state_dict(own["acceptance"])
            self.evaluator.load_state_dict(own["evaluator"])
            self._walk.present = tuple(own["present"])
            self._rounds = own["rounds"]
            self.steps_taken = own["steps_taken"]
            self.batches_drawn = own["batches_drawn"]
            set_generator_states(own["random"])
            if self.scheduler is not None and own["scheduler"] is not None:
                self.scheduler.load_state_dict(own["scheduler"])
        self._walk.load_state_dict(state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._patch_step_function()

    def __repr__(self) -> str:
        return (
            f"OptEx(parallelism={self.parallelism}, history_size={self.history_size}, "
            f"estimator={self.estimator}, base={self.base})"
        )


def _persistent_buffers(model: nn.Module) -> list[Tensor]:
    """Those of the state dict: buffers that are not saved hold data, not what was learned."""
    # Looked up every round, so not through state_dict(), whose hooks (gathering, converting) are for saving.
    found = {
        id(buffer): buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return list(found.values())


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"OptEx: {name} must be an integer of at least 1, got {value!r}")


def _check_kind(name: str, value: Any, kinds: tuple[type, ...], remedy: str) -> None:
    if value is not None and value is not False and not isinstance(value, kinds):
        raise TypeError(f"OptEx: {name} must be {remedy}, got {value!r}")


def _non_finite_start(evaluation: Evaluation, number: int) -> NonFiniteError:
    what = "gradient" if evaluation.losses[0].isfinite() else f"loss ({evaluation.losses[0].item():g})"
    return NonFiniteError(
        f"OptEx: the {what} at the start of round {number} is not finite; parameters and state are those of "
        "before the round. Check the batch, or lower the learning rate."
    )


def _map_held(
    change: Callable[[Tensor], Tensor], held: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | None:
    return None if held is None else (change(held[0]), change(held[1]))


def _relative_errors(draft: _Draft, measured: _Measured, space: Space) -> Tensor:  # [evaluated but the last]
    rows = [i for i in measured.evaluated[:] if i < len(draft.gradients) and measured.usable[i]]
    truth = measured.gradients[rows]
    if not rows:
        return truth.new_empty(0)
    gaps, norms = space.norms([*(draft.gradients[rows] - truth), *truth]).view(2, -1)
    return gaps / norms.clamp_min(torch.finfo(truth.dtype).tiny)
