"""``advise``: is OptEx of use here, and how?"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from numbers import Real
from typing import Any, Final, TextIO

from torch import Tensor, nn
from torch.optim import Optimizer

from optex.advice.answer import Advice
from optex.advice.judge import candidates_of, judge, notes_for
from optex.advice.subject import Kept, Subject
from optex.advice.timing import (
    IN_TURN,
    Clock,
    find_evaluators,
    reference_gradients,
    time_at_once,
    time_plain_loop,
)
from optex.advice.trial import PARALLELISM, run_trials
from optex.checks import as_float, check_flag, check_kind, shown
from optex.errors import NotDeterministicWarning, warn
from optex.evaluators import (
    Evaluation,
    Evaluator,
    SequentialEvaluator,
    VectorizedEvaluator,
    WorkersEvaluator,
)
from optex.optimizer import OptEx
from optex.round import default_history_size
from optex.round.arguments import source_of
from optex.sources import GradientSource, ObjectiveSource
from optex.stepping import check_base

__all__ = ["BATCHES", "advise"]

# Enough that no batch comes again while the history or the window holds it: T0 plus the largest N.
BATCHES: Final = default_history_size(max(PARALLELISM)) + max(PARALLELISM)
_PLAIN_SHARE: Final = 0.1  # of the seconds, for the plain loop
_AT_ONCE_SHARE: Final = 0.3  # of those left, for gradients at once


def advise(
    optimizer: Optimizer,
    batches: Iterable[Any],
    objective: Callable[[Any], Tensor] | GradientSource,
    *,
    model: nn.Module | None = None,
    deterministic: bool = False,
    workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
    seconds: float = 10.0,
    file: TextIO | None = None,
    quiet: bool = False,
) -> Advice:
    """Measure on your own model whether ``OptEx`` pays, and with which settings; print and return it.

    From the present parameters it takes some steps of the plain loop, computes 1, 2, 4 and 8 gradients at
    once with the evaluators at hand, and runs rounds of ``OptEx`` with N = 1, 4 and 8. The time of a step is

        (seconds of its N gradients + overhead of a round) / steps kept in a round,

    and the quickest is recommended if it saves a tenth of the plain loop's time. Steps are counted over a few
    rounds, so that is a sample.

    Everything is put back, to the bit, whatever ends the call: parameters and their ``.grad``, the base
    optimizer's state, the schedule, the model's persistent buffers, the random generators of torch, NumPy and
    Python, and an ``OptEx`` with its history. The batches drawn are used up. What the objective or hooks of the
    optimizer change elsewhere is not put back, nor are random generators of their own.

    Args:
        optimizer: any optimizer of torch that ``OptEx`` takes; or an ``OptEx``, of which base, scheduler,
            model, gradient hook, evaluator and ``deterministic`` are used.
        batches: as for ``OptEx.rounds``. 24 are drawn (1 where the objective is deterministic) and held at
            once; what can be iterated again, a list or a ``DataLoader``, may be shorter.
        objective: the scalar loss of a batch, without backward; or a ``GradientSource``.
        model: the module whose buffers follow the steps, and which ``VectorizedEvaluator`` needs; not needed
            where the objective is a module.
        deterministic: the objective answers the same loss whenever it is asked at a point, as in ``OptEx``;
            it is checked. A ``GradientSource`` declares its own.
        workers: measure these worker processes, too, as ``WorkersEvaluator`` takes them; the objective is then
            pickled. Processes that are started here end with the call.
        seconds: time to spend, roughly; starting processes comes on top, and so does a gradient that takes
            longer.
        file: to print to, as in ``print``; standard output by default.
        quiet: print nothing.

    Raises:
        TypeError, ValueError: an argument cannot work, or there are too few batches; the message says which and
            what would do.
        NonFiniteError: the loss is not finite at the present parameters.
        Exception: whatever the objective raises; everything is put back.

    >>> import torch, optex
    >>> theta = torch.nn.Parameter(torch.full((4,), 2.0))
    >>> base = torch.optim.Adam([theta], lr=0.01)
    >>> advice = optex.advise(
    ...     base, [None], lambda _: theta.square().sum(), deterministic=True, seconds=1.0, quiet=True
    ... )
    >>> advice.dimension, theta.tolist()
    (4, [2.0, 2.0, 2.0, 2.0])
    >>> optimizer = optex.OptEx(base, **advice.as_kwargs())
    """
    started = time.perf_counter()
    _check_arguments(optimizer, objective, model, deterministic, seconds, quiet)
    given = optimizer if isinstance(optimizer, OptEx) else None
    base = optimizer if given is None else given.base
    check_base(base)
    if given is not None:
        model = model if model is not None else given.model
        deterministic = deterministic or given.deterministic
    source = source_of(base, objective, deterministic=deterministic)
    scheduler = None if given is None else given.scheduler
    hook = None if given is None else given.gradient_hook
    with ExitStack() as stack:
        modules = [module for module in (model, source.module) if module is not None]
        kept = stack.enter_context(Kept(base, scheduler, modules))
        drawn = _draw(batches, 1 if source.deterministic else BATCHES)
        subject = Subject(base, source, drawn, scheduler, model, hook)
        if not subject.vector.parameters:
            raise ValueError("advise: optimizer has no parameter with requires_grad; there is nothing to train")
        evaluators = {}
        if workers is not None:
            evaluators["workers"] = stack.enter_context(WorkersEvaluator(workers))
        if given is not None and not isinstance(given.evaluator, SequentialEvaluator):
            evaluators[_name(given.evaluator)] = given.evaluator
        advice = _measure(subject, kept, evaluators, started, float(seconds))
    if not quiet:
        print(advice, file=file if file is not None else sys.stdout)
    return advice


def _measure(
    subject: Subject, kept: Kept, evaluators: dict[str, Evaluator], started: float, seconds: float
) -> Advice:
    reference = reference_gradients(subject, kept)
    subject = _checked(subject, reference)
    deterministic = subject.source.deterministic
    evaluators, refused = find_evaluators(subject, evaluators, reference)
    clock = Clock(seconds)
    loop = time_plain_loop(subject, kept, _PLAIN_SHARE * clock.left)
    at_once, failed = time_at_once(subject, evaluators, loop, _AT_ONCE_SHARE * clock.left)
    kept.rewind()
    trials, missing = run_trials(subject, kept, evaluators, at_once, loop, clock)
    candidates = candidates_of(trials, at_once, loop)
    recommended, reason = judge(candidates, loop, subject.name, seconds)
    rate = subject.base.param_groups[0].get("lr")
    return Advice(
        recommended=recommended,
        reason=reason,
        notes=notes_for(candidates, missing, deterministic=deterministic, in_turn_alone=len(at_once) == 1),
        candidates=candidates,
        optimizer=subject.name if rate is None else f"{subject.name}, lr {float(rate):.3g}",
        dimension=subject.vector.dimension,
        deterministic=deterministic,
        gradient_seconds=loop.gradient_seconds,
        step_seconds=loop.step_seconds,
        at_once=at_once,
        refused={**refused, **failed},
        batches_drawn=len(subject.batches),
        seconds=time.perf_counter() - started,
        _options=_options(subject),
        _evaluators={name: found for name, found in evaluators.items() if name != IN_TURN},
    )


def _options(subject: Subject) -> dict[str, Any]:
    """What an ``OptEx`` as it was measured has to be given beside N, stride and evaluator."""
    found = {
        "model": subject.model,
        "scheduler": subject.scheduler,
        "gradient_hook": subject.gradient_hook,
    }
    declared = isinstance(subject.source, ObjectiveSource) and subject.source.deterministic
    return {name: value for name, value in found.items() if value is not None} | (
        {"deterministic": True} if declared else {}
    )


def _name(evaluator: Evaluator) -> str:
    names = {VectorizedEvaluator: "vectorized", WorkersEvaluator: "workers"}
    return names.get(type(evaluator), type(evaluator).__name__)


# ---------------------------------------------------------------------- arguments


def _check_arguments(
    optimizer: Any, objective: Any, model: Any, deterministic: Any, seconds: Any, quiet: Any
) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "advise: optimizer must be a torch.optim.Optimizer or an optex.OptEx, got "
            f"{type(optimizer).__name__}; build it over the parameters to be trained"
        )
    if isinstance(optimizer, OptEx) and optimizer.ranks is not None:
        raise ValueError(
            "advise: optimizer has a DistributedEvaluator, and measuring is for one process; ask with the base "
            "optimizer, on one rank's share of the data"
        )
    if not isinstance(objective, GradientSource) and not callable(objective):
        raise TypeError(
            "advise: objective must be a function of a batch that returns the scalar loss, or a "
            f"GradientSource, got {type(objective).__name__}"
        )
    check_kind("advise", "model", model, nn.Module, "the torch.nn.Module that the objective uses")
    check_flag("advise", "deterministic", deterministic)
    check_flag("advise", "quiet", quiet)
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < as_float(seconds) < math.inf:
        raise ValueError(
            f"advise: seconds must be a positive, finite number of seconds to spend, got {shown(seconds)}"
        )


def _draw(batches: Iterable[Any], count: int) -> list[Any]:
    try:
        iterator = iter(batches)
    except TypeError:
        raise TypeError(
            f"advise: batches must be iterable, got {type(batches).__name__}; a list or a DataLoader, [None] "
            "for a deterministic objective that needs none"
        ) from None
    drawn = list(itertools.islice(iterator, count))
    again = iterator is not batches  # epoch after epoch
    while drawn and again and len(drawn) < count:
        more = list(itertools.islice(iter(batches), count - len(drawn)))
        if not more:
            break
        drawn += more
    if not drawn or (not again and len(drawn) < count):
        raise ValueError(
            f"advise: batches gave {len(drawn)}, and {count} are needed; hand over an iterator of that many, "
            "or something that can be iterated again and again: a list, a DataLoader"
        )
    return drawn


def _checked(subject: Subject, reference: Evaluation) -> Subject:
    """The subject, its gradients counted as sampled if two losses at one point show that they are."""
    source = subject.source
    if not source.deterministic or not isinstance(source, ObjectiveSource):
        return subject
    losses = reference.losses.tolist()
    rounding = 1e-4 if reference.losses.dtype.itemsize < 8 else 1e-8
    if not abs(losses[0] - losses[1]) > rounding * max(map(abs, losses)):  # NaN shows nothing
        return subject
    warn(
        f"advise: deterministic=True was declared, but the losses at one point were {losses[0]:g} and "
        f"{losses[1]:g}; gradients count as sampled here. Leave deterministic=False for an objective that "
        "draws minibatches, dropout or other random numbers.",
        NotDeterministicWarning,
    )
    return replace(subject, source=replace(source, deterministic=False))
