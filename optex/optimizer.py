"""OptEx: a torch optimizer whose steps are drafted on predicted gradients and taken with true ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.checks import check_integer, saved_entry
from optex.distributed import Ranks, lay_out
from optex.errors import NonFiniteError, NonFiniteWarning, PlainStepWarning, warn
from optex.estimators import CommitteeEstimator, Estimator, GradientHistory
from optex.estimators.kernels import Kernel
from optex.evaluators import Evaluator
from optex.round import (
    Acceptance,
    PlannedStep,
    Predictor,
    RoundLoop,
    RoundReport,
    RoundRequest,
    Rounds,
    WithinTolerance,
    alone,
    arguments,
    default_history_size,
    described,
)
from optex.round.stride import Stride
from optex.sources import ClosureSource, GradientSource, ObjectiveSource
from optex.stepping import Buffers, Stepper, check_base
from optex.wrapper import OptimizerWrapper

__all__ = ["OptEx"]

_STATE_KEY = "optex"


class OptEx(OptimizerWrapper):
    """A torch optimizer that takes several steps of another one in a round.

    A round drafts K = N · stride steps on predicted gradients, evaluates the true ones at N of the points, at
    once, and advances by what ``acceptance`` keeps of the K (Shu et al., NeurIPS 2024; ``from_paper`` is their
    Algorithm 1 to the letter). ``param_groups`` and ``state`` are the base optimizer's own.

    Args:
        base: any ``torch.optim.Optimizer`` for dense gradients; it keeps its state and hyperparameters, and
            its step hooks run at every step, drafted ones too. Its ``drafting()``, if it has that context
            manager, is open during steps on predictions alone, to freeze what those should not change.
        parallelism: N, gradients evaluated at once, at least 1.
        stride: steps a round drafts at most for each gradient that it evaluates: K = N · stride steps, of which
            those in between are taken on predictions. ``"auto"`` goes as far as predictions hold, up to 16; a
            number is the bound; 1 takes no step without a gradient of its own, and with ``parallelism=1`` the
            run is then the base optimizer's. Only evaluated steps draw a batch; schedules count steps.
        history_size: T0, pairs of iterate and gradient to predict from; by default 16 up to N = 8, else 32.
        estimator: predicts gradients; ``CommitteeEstimator()`` by default.
        acceptance: which steps are kept; ``WithinTolerance()`` by default.
        evaluator: how gradients are computed at once; ``SequentialEvaluator()`` by default. ``"vectorized"`` is
            ``VectorizedEvaluator(model)``, and needs ``model``.
        scheduler: a learning-rate scheduler of ``base`` that ticks once for every step taken, drafted steps
            included, so that each step has its own rate. One that is ticked outside sees rounds.
        model: the module whose persistent buffers (BatchNorm's running statistics) follow the steps taken; not
            needed where ``rounds`` is given a module as its objective.
        deterministic: closures and objectives answer the same loss and gradient whenever they are asked at a
            point. Declare it for full batches, simulators and the like, which then predict better; with False,
            the default, gradients count as noisy samples. It is checked once, by evaluating the first point
            twice; a ``GradientSource`` declares its own.
        gradient_hook: called after every true gradient, with the parameters at its point and it in their
            ``.grad``, to change it in place; for clipping. What it leaves is stepped with and remembered.
        on_nonfinite: when the loss or gradient at a round's start is not finite, ``"raise"`` an error or
            ``"skip"`` that step and its batch with a warning. Either way nothing of the round is kept.
        shard: split vectors among the ranks of a ``DistributedEvaluator``; by default where the base optimizer
            is known to step every coordinate by itself (``optex.stepping.ELEMENTWISE``) and has no step hooks.
        history_dtype, history_device: where the history's rows are kept; the parameters' by default.

    Attributes:
        last_report: the last round's; None before the first.

    Memory, in numbers beyond the base optimizer's: ``(2 · T0 + 1) · d`` for the history (of ``history_dtype``),
    ``T0 · d`` more while its anchor moves, ``5 · N · d`` in a round for proxies, predictions, gradients and the
    pairs they replace, at most ``2 · N · d`` for steps not kept yet, two copies of parameters and base state,
    N + 1 copies of the model's buffers. What the evaluator needs comes on top.

    Raises:
        TypeError, ValueError: an argument cannot work; the message names it and the remedy.

    >>> import torch, optex
    >>> theta = torch.nn.Parameter(torch.full((4,), 2.0))
    >>> optimizer = optex.OptEx(torch.optim.Adam([theta], lr=0.1), parallelism=4, deterministic=True)
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
        stride: float | Literal["auto"] = "auto",
        history_size: int | None = None,
        estimator: Estimator | None = None,
        acceptance: Acceptance | None = None,
        evaluator: Evaluator | Literal["sequential", "vectorized"] | None = None,
        scheduler: LRScheduler | None = None,
        model: nn.Module | None = None,
        deterministic: bool = False,
        gradient_hook: Callable[[], Any] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        shard: bool | None = None,
        history_dtype: torch.dtype | None = None,
        history_device: torch.device | str | None = None,
    ) -> None:
        if isinstance(base, OptEx):
            raise TypeError("OptEx: base is an OptEx already; pass base.base to wrap its base optimizer anew")
        check_base(base)
        self.parallelism: int = check_integer("OptEx", "parallelism", parallelism)
        size = default_history_size(parallelism) if history_size is None else history_size
        self.history_size: int = check_integer("OptEx", "history_size", size)
        computes = arguments.named_evaluator(evaluator, model)
        arguments.check_parts(base, estimator, acceptance, computes, scheduler, model)
        arguments.check_choices(deterministic, gradient_hook, on_nonfinite)
        arguments.check_layout(shard, history_dtype, history_device)
        self.scheduler = scheduler
        self.model = model
        self.deterministic = deterministic
        self.on_nonfinite = on_nonfinite
        self.last_report: RoundReport | None = None
        self._shard = shard
        self._history_dtype = history_dtype
        self._history_device = history_device
        self._verify = deterministic
        self._warned_of_plain_steps = False
        super().__init__(base)
        acceptance = copy.deepcopy(acceptance) or WithinTolerance()
        largest = arguments.check_stride(stride, acceptance)
        self._flat = not arguments.is_exact(acceptance, parallelism, largest)
        stepper = self._lay_out(computes, self._trainable())
        predictor = self._predictor(copy.deepcopy(estimator) or CommitteeEstimator(), stepper)
        self._rounds = Rounds(
            stepper, predictor, acceptance, computes, self.parallelism, Stride(largest), gradient_hook
        )

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
            base, parallelism, history_size: the paper's FO-OPT, N and T0.
            kernel, lengthscale, noise_variance: of the separable Gaussian process with mean zero; see
                :class:`~optex.estimators.SeparableEstimator`.
            selection: which of the N results the round keeps.
            evaluate: true gradients at ``"all"`` proxies, or at the ``"last"`` alone (with ``"last"``
                selection only).
            options: the keywords of ``OptEx`` that are not named here.

        Raises:
            ValueError: a name is unknown, or ``evaluate="last"`` meets another selection.
        """
        estimator, acceptance = arguments.published_parts(
            kernel, lengthscale, noise_variance, selection, evaluate
        )
        return cls(
            base,
            parallelism=parallelism,
            history_size=history_size,
            estimator=estimator,
            acceptance=acceptance,
            **options,
        )

    # ------------------------------------------------------------------ its parts

    @property
    def estimator(self) -> Estimator:
        """Predicts gradients."""
        return self._rounds.predictor.estimator

    @property
    def history(self) -> GradientHistory:
        """The pairs that predictions are made from."""
        return self._rounds.predictor.history

    @property
    def acceptance(self) -> Acceptance:
        """Says which steps a round keeps."""
        return self._rounds.acceptance

    @property
    def evaluator(self) -> Evaluator:
        """Computes true gradients."""
        return self._rounds.evaluator

    @evaluator.setter
    def evaluator(self, evaluator: Evaluator) -> None:
        arguments.check_evaluator(self.base, evaluator)
        self._rounds.evaluator = evaluator

    @property
    def stepper(self) -> Stepper:
        """Takes the base optimizer's steps."""
        return self._rounds.stepper

    @property
    def gradient_hook(self) -> Callable[[], Any] | None:
        """Changes every true gradient in place."""
        return self._rounds.gradient_hook

    @gradient_hook.setter
    def gradient_hook(self, hook: Callable[[], Any] | None) -> None:
        self._rounds.gradient_hook = hook

    @property
    def steps_taken(self) -> int:
        """Steps of the base optimizer kept so far."""
        return self._rounds.progress.steps_taken

    @property
    def batches_drawn(self) -> int:
        """Batches taken from what ``rounds`` was handed, those still in the window among them."""
        return self._rounds.queue.next_number(self._rounds.progress)

    # ------------------------------------------------------------------ rounds

    @alone
    def step(self, closure: Any = None) -> Any:
        """One round: evaluates ``closure`` up to ``parallelism`` times and advances the parameters.

        The closure is torch's: it clears the gradients, backpropagates and returns the loss. One that draws its
        own minibatch cannot be asked for the same one again, so gradients of steps not kept serve the history
        only; ``rounds`` keeps them.

        Without a closure: one plain step of the base optimizer with the gradients that are there, after the
        gradient hook, and a warning the first time: nothing is predicted then.

        Returns:
            The loss at the round's start, as a tensor; None without a closure.

        Raises:
            NonFiniteError: the loss or gradient at the round's start, or the parameters at its end, are not
                finite. Parameters and state are those of before the call.
        """
        if closure is None:
            return self._plain_step()
        if isinstance(closure, RoundRequest):
            return self._round(closure.source, closure.window)
        if not callable(closure):
            raise TypeError(f"OptEx.step: closure must be callable or None, got {type(closure).__name__}")
        # A closure has a window for this round alone; batches that rounds has in hand wait.
        window = tuple(PlannedStep(None) for _ in range(self.parallelism))
        return self._round(ClosureSource(closure, self._is_deterministic), window)

    def rounds(self, batches: Iterable[Any], objective: Callable[[Any], Tensor] | GradientSource) -> RoundLoop:
        """Run rounds until ``batches`` is used up; an iterator of one report a round, with a length for tqdm.

        A step that is evaluated has one batch for good, in the order they come; steps between have none. At
        their end the ones at hand are used; leaving the loop early keeps them for the next call. An optimizer
        that Accelerate prepared has the method as ``prepared.optimizer.rounds``.

        Args:
            batches: one item for each step with a gradient; for a deterministic objective ``repeat(None, n)``.
            objective: the scalar loss of a batch at the parameters' present values, without backward; or a
                ``GradientSource``, which leaves its gradient itself.

        To resume: ``rounds(itertools.islice(loader, optimizer.batches_drawn, None), objective)``.

        Raises:
            TypeError: ``batches`` cannot be iterated, or ``objective`` cannot be called.
            NonFiniteError: as in ``step``. The batch of the step that failed is let go, the others are kept.
        """
        arguments.check_run(batches, objective)
        own = arguments.unwrapped(self)
        return RoundLoop(own._reports(batches, objective), batches, own._rounds)

    def _reports(
        self, batches: Iterable[Any], objective: Callable[[Any], Tensor] | GradientSource
    ) -> Generator[RoundReport, None, None]:
        iterator = iter(batches)
        while True:
            with self._rounds.one_thread.entered("OptEx.rounds"):
                self._rounds.queue.draw(iterator, self._rounds.progress, self.parallelism)
                window = self._rounds.plan()
                if not window:
                    self.gather()
                    return
                source = arguments.source_of(self.base, objective, deterministic=self._is_deterministic)
                self.step(RoundRequest(source, window))
                report = cast(RoundReport, self.last_report)
            yield report

    @property
    def _is_deterministic(self) -> bool:
        return self.deterministic and not self._rounds.contradicted

    def _round(self, source: GradientSource, window: tuple[PlannedStep, ...]) -> Tensor:
        self._refresh_layout()
        model = self.model if self.model is not None else source.module
        buffers = None if model is None else Buffers.of(model)
        verify = self._verify and source.deterministic and isinstance(source, (ClosureSource, ObjectiveSource))
        try:
            record = self._rounds.run(source, window, buffers, verify=verify)
        except NonFiniteError as error:
            if self.on_nonfinite == "raise":
                raise
            warn(f"{error} The step is skipped.", NonFiniteWarning)
            record = self._rounds.skip()
        self._verify = self._verify and not verify
        self.last_report = record.report()
        return record.losses[record.evaluated[0]]

    def _plain_step(self) -> None:
        # torch's own distributed checkpointing does this at rate 0, to have the base optimizer make its state.
        moves = any(float(group.get("lr", 1.0)) != 0 for group in self.param_groups)
        if moves and not self._warned_of_plain_steps:
            self._warned_of_plain_steps = True
            warn(arguments.PLAIN_STEP, PlainStepWarning)
        self._rounds.plain_step()

    # ------------------------------------------------------------------ layout

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]

    def _lay_out(self, evaluator: Evaluator, parameters: list[Tensor]) -> Stepper:
        self.ranks: Ranks | None = evaluator.connect(parameters)
        return lay_out(self.base, parameters, self.scheduler, self.ranks, self._shard, self._flat)

    def _predictor(self, estimator: Estimator, stepper: Stepper) -> Predictor:
        vector, dtype, device = stepper.vector, self._history_dtype, self._history_device
        history = GradientHistory(
            self.history_size, vector.space, dtype=dtype or vector.dtype, device=device or vector.device
        )
        return Predictor(estimator, history)

    def _refresh_layout(self) -> None:
        """Start a new history where parameters were added, frozen, unfrozen or replaced."""
        parameters = self._trainable()
        known = self.stepper.vector.whole.parameters
        if len(parameters) == len(known) and all(p is q for p, q in zip(parameters, known, strict=True)):
            self.stepper.vector.whole.check()
            return
        check_base(self.base)
        self.stepper.release()
        stepper = self._lay_out(self.evaluator, parameters)
        self._rounds.lay_out_anew(stepper, self._predictor(self.estimator, stepper))

    # ------------------------------------------------------------------ torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. The history starts anew, its vectors being longer now."""
        if self._ready:
            self.base.add_param_group(param_group)
            self._refresh_layout()

    def gather(self) -> None:
        """Make parameters whole on every rank where they are split among ranks; every rank has to call it."""
        self.stepper.gather()

    @alone
    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with one more entry, ``"optex"``: history, window, schedule.

        It holds the window's batches and the states of torch's random generators, but not the model.
        ``torch.load(..., weights_only=True)`` loads it if it does the batches. Vectors split among ranks are in
        it as ``DTensor``; see :mod:`optex.distributed.checkpoint`.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self.stepper.state_dict()
        state[_STATE_KEY] = {
            **self._rounds.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    @alone
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, bit for bit; torch's random generators are set to their saved states.

        A state dict of the base optimizer alone is taken too; the history then starts empty.

        Raises:
            ValueError: the state is cut short, broken, or of other parameters, history, estimator or
                acceptance; the optimizer is as it was.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        own = state_dict.pop(_STATE_KEY, None)
        self._refresh_layout()
        put_back = self._rounds.held()
        try:
            self._take_over(state_dict, own)
        except Exception as error:
            put_back()
            if isinstance(error, (ValueError, MemoryError, torch.OutOfMemoryError)):
                raise
            raise ValueError(
                f"OptEx.load_state_dict: this state cannot be taken over ({type(error).__name__}: {error}); "
                "the optimizer is as it was. Load one that an OptEx over the same parameters saved"
            ) from error
        except BaseException:
            put_back()
            raise
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _take_over(self, base: dict[str, Any], own: dict[str, Any] | None) -> None:
        self.stepper.load_state_dict(base)
        if own is None:
            self._rounds.forget()
        else:
            schedule = saved_entry("OptEx.load_state_dict", own, "scheduler")
            if self.scheduler is not None and schedule is not None:
                if schedule.keys() != self.scheduler.state_dict().keys():
                    raise ValueError(
                        "OptEx.load_state_dict: the saved schedule is of another scheduler; build the same kind"
                    )
                self.scheduler.load_state_dict(schedule)
            self._rounds.load_state_dict(own)
        self.stepper.check_step()
        self._verify = self._verify and own is None

    def __repr__(self) -> str:
        return described(self)
