"""Tuned against tuned: each method with its best optimizer and rate, in rounds and gradients to a level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

import numpy as np
import torch

from optex.studies.baselines import Method, Setting
from optex.studies.measures import best_so_far
from optex.studies.problems import Problem

__all__ = [
    "FRACTIONS",
    "Attempt",
    "Choice",
    "Cost",
    "Limits",
    "Tuned",
    "Watch",
    "attempt",
    "finalists",
    "first_level_within",
    "held_out",
    "median",
    "search",
    "tuned",
]

FRACTIONS: Final = (0.25, 0.5, 1.0)  # of vanilla's rounds: its best losses by then are the levels
_DIVERGED: Final = 1e3  # times the loss at the start
_PATIENCE: Final = 3  # times the best run's rounds to the first level


@dataclass(frozen=True)
class Choice:
    """A base optimizer and its learning rate."""

    optimizer: str
    rate: float

    def beside(self, steps: int) -> Choice:
        """The same optimizer, so many steps up the grid of rates ..., 0.01, 0.03, 0.1, 0.3, 1, ...

        >>> [Choice("adam", 0.01).beside(steps).rate for steps in (-2, -1, 0, 1, 2)]
        [0.001, 0.003, 0.01, 0.03, 0.1]
        """
        decade, half = divmod(round(2 * math.log10(self.rate)) + steps, 2)
        return Choice(self.optimizer, float(f"{3 if half else 1}e{decade}"))


@dataclass(frozen=True)
class Limits:
    """How far a run goes.

    Attributes:
        rounds: at most.
        levels: losses from high to low; the run ends when the last is reached.
        first: rounds within which the first level has to be reached; None for no such limit.
        every: rounds from one evaluation of the objective to the next.
        held_at: rounds after which the held-out measure is taken, as it is whenever a level is reached.
    """

    rounds: int
    levels: Sequence[float] = ()
    first: int | None = None
    every: int = 1
    held_at: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Attempt:
    """A run of a method with a choice of optimizer and rate.

    Attributes:
        choice: what it ran with.
        seed: of the start.
        rounds: [levels], gradients in turn to each level; infinite where it was not reached.
        gradients: [levels], all gradients to each level; infinite where it was not reached.
        held: held-out measure at each level, or at each of ``held_at`` where there are no levels; NaN where it
            was not taken.
        curve: pairs of a round and the loss after it.
    """

    choice: Choice
    seed: int
    rounds: list[float]
    gradients: list[float]
    held: list[float]
    curve: list[tuple[int, float]]

    @property
    def best(self) -> float:
        """The lowest loss."""
        return float(best_so_far([loss for _, loss in self.curve])[-1])

    def best_by(self, rounds: float) -> float:
        """The lowest loss after at most so many rounds."""
        return float(best_so_far([loss for r, loss in self.curve if r <= rounds])[-1])


class _OverError(Exception):
    """Ends a run from inside the evaluation of its objective."""


@dataclass
class Watch:
    """Watches a run from the problem's side, and ends it when its outcome is known.

    A round is counted whenever the objective is evaluated after it, a gradient whenever the loss is computed
    with autograd: neither count relies on what a method reports. Inside the context, ``problem.evaluate`` is
    replaced.

    Attributes:
        problem: that the run is of.
        limits: how far it goes.
        seen: (round, gradients so far, loss) of each evaluation.
        held: held-out measures by round.
    """

    problem: Problem
    limits: Limits
    seen: list[tuple[int, int, float]] = field(default_factory=list)
    held: dict[int, float] = field(default_factory=dict)
    _calls: int = 0
    _gradients: int = 0

    def __enter__(self) -> Watch:
        self._plain = self.problem.evaluate
        self._hook = self.problem.register_forward_pre_hook(self._count)
        vars(self.problem)["evaluate"] = self._evaluate
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        del vars(self.problem)["evaluate"]
        self._hook.remove()
        return isinstance(error, _OverError)

    def _count(self, *_: object) -> None:
        self._gradients += torch.is_grad_enabled()

    def _evaluate(self) -> float:
        round_, self._calls = self._calls, self._calls + 1
        if round_ % self.limits.every and round_ < self.limits.rounds:
            return self.seen[-1][2]
        loss = self._plain()
        best = min((seen[2] for seen in self.seen), default=math.inf)
        self.seen.append((round_, self._gradients, loss))
        levels = self.limits.levels
        if round_ in self.limits.held_at or any(loss <= level < best for level in levels):
            self.held[round_] = held_out(self.problem)
        start = self.seen[0][2]
        reached = bool(levels) and loss <= levels[-1]
        hopeless = math.isnan(loss) or loss > start + _DIVERGED * abs(start)
        late = self.limits.first is not None and round_ >= self.limits.first and min(best, loss) > levels[0]
        if reached or hopeless or late:
            raise _OverError
        return loss


def held_out(problem: Problem) -> float:
    """The problem's ``test_error``; NaN where it has none."""
    measure = getattr(problem, "test_error", None)
    return math.nan if measure is None else float(measure())


def attempt(
    method: Method, problem: Problem, setting: Setting, choice: Choice, limits: Limits, gradients: int = 1
) -> Attempt:
    """Run a method until the last level is reached, the rounds are used up, it diverges or is too late.

    Args:
        method, problem, setting: as in a comparison; ``setting.base`` makes the choice's optimizer.
        choice: for the record.
        limits: how far the run goes.
        gradients: how many each gradient that is seen stands for: N for a method whose N gradients are known to
            be the same, and which computes one of them.
    """
    with Watch(problem, limits) as watch:
        method(problem, setting)
    reached = [_first(watch.seen, level) for level in limits.levels]
    marks = [entry[0] for entry in reached] if limits.levels else sorted(limits.held_at)
    return Attempt(
        choice,
        problem.seed,
        rounds=[entry[0] for entry in reached],
        gradients=[gradients * entry[1] for entry in reached],
        held=[watch.held.get(int(mark), math.nan) if math.isfinite(mark) else math.nan for mark in marks],
        curve=[(round_, loss) for round_, _, loss in watch.seen],
    )


def _first(seen: Iterable[tuple[int, int, float]], level: float) -> tuple[float, float]:
    return next(
        ((float(round_), float(count)) for round_, count, loss in seen if loss <= level), (math.inf, math.inf)
    )


# ---------------------------------------------------------------------- choosing

Cost = tuple[float, ...]  # compared entry by entry; less is better


def search(
    run: Callable[[Choice], Sequence[Cost]],
    starts: Iterable[Choice],
    most: int = 40,
) -> dict[Choice, Sequence[Cost]]:
    """Try some choices, then the neighbours of the best ones, until these have worse neighbours on both sides.

    The best ones are the best overall at each level, and the best of each optimizer at the last level.

    Args:
        run: a choice's costs, one a level.
        starts: the choices to try first.
        most: how many choices to try in all, at most.

    Returns:
        The costs of all that were tried.

    >>> costs = search(lambda choice: [(abs(choice.rate - 10.0),)], [Choice("sgd", 1.0)])
    >>> [choice.rate for choice in costs]
    [1.0, 3.0, 0.3, 10.0, 30.0]
    """
    costs: dict[Choice, Sequence[Cost]] = {}
    waiting = list(dict.fromkeys(starts))
    while waiting and len(costs) < most:
        for choice in waiting[: most - len(costs)]:
            costs[choice] = run(choice)
        ends = {choice for choice in _leaders(costs) if any(math.isfinite(cost[-1]) for cost in costs[choice])}
        beside = [choice.beside(step) for choice in costs if choice in ends for step in (1, -1)]
        waiting = [choice for choice in dict.fromkeys(beside) if choice not in costs]
    return costs


def _leaders(costs: dict[Choice, Sequence[Cost]]) -> set[Choice]:
    levels = len(next(iter(costs.values())))
    leaders = {min(costs, key=lambda choice, level=level: costs[choice][level]) for level in range(levels)}
    for optimizer in {choice.optimizer for choice in costs}:
        own = [choice for choice in costs if choice.optimizer == optimizer]
        leaders.add(min(own, key=lambda choice: costs[choice][-1]))
    return leaders


def finalists(costs: dict[Choice, Sequence[Cost]], count: int) -> list[Choice]:
    """The best ``count`` choices at each level, each choice once.

    >>> costs = {Choice("sgd", r): [(r,), (-r,)] for r in (1.0, 2.0, 3.0)}
    >>> [choice.rate for choice in finalists(costs, 1)]
    [1.0, 3.0]
    """
    levels = len(next(iter(costs.values())))
    chosen = [sorted(costs, key=lambda choice, n=n: costs[choice][n])[:count] for n in range(levels)]
    return list(dict.fromkeys(choice for group in chosen for choice in group))


def first_level_within(best: float, rounds: int) -> int:
    """Rounds within which a run has to reach the first level, where the best run so far took ``best``.

    Args:
        best: rounds of the best run; infinite where none has reached the level.
        rounds: at most.
    """
    return rounds if math.isinf(best) else min(rounds, max(10, math.ceil(_PATIENCE * best)))


@dataclass(frozen=True)
class Tuned:
    """A method at its best at one level.

    Attributes:
        choice: the optimizer and rate that need the fewest rounds; None where no choice reaches the level.
        rounds: gradients in turn to the level with ``choice``, median over the seeds.
        gradients: all gradients to the level with the choice that needs the fewest, median over the seeds.
        held: the held-out measure at the level with ``choice``, median over the seeds.
    """

    choice: Choice | None
    rounds: float
    gradients: float
    held: float


def tuned(attempts: Sequence[Attempt], level: int, seeds: int) -> Tuned:
    """The best of those choices that were run on every seed.

    Args:
        attempts: of one method.
        level: index among the levels.
        seeds: how many there are.

    >>> tried = [Choice("sgd", 1.0), Choice("sgd", 2.0)]
    >>> runs = [Attempt(c, s, [10 * c.rate + s], [20 * c.rate], [], []) for c in tried for s in range(3)]
    >>> tuned(runs, level=0, seeds=3)
    Tuned(choice=Choice(optimizer='sgd', rate=1.0), rounds=11.0, gradients=20.0, held=nan)
    """
    groups: dict[Choice, list[Attempt]] = {}
    for entry in attempts:
        groups.setdefault(entry.choice, []).append(entry)
    whole = {choice: group for choice, group in groups.items() if len({a.seed for a in group}) == seeds}
    rounds = {choice: median(a.rounds[level] for a in group) for choice, group in whole.items()}
    gradients = [median(a.gradients[level] for a in group) for group in whole.values()]
    if not rounds or math.isinf(min(rounds.values())):
        return Tuned(None, math.inf, math.inf, math.nan)
    best = min(rounds, key=lambda choice: rounds[choice])
    held = [a.held[level] for a in whole[best] if len(a.held) > level and not math.isnan(a.held[level])]
    return Tuned(best, rounds[best], min(gradients), median(held) if held else math.nan)


def median(values: Iterable[float]) -> float:
    """The median of numbers that may be infinite, as rounds to a level that was not reached are.

    >>> median([1.0, math.inf, 3.0]), median([1.0, math.inf])
    (3.0, inf)
    """
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else float(np.mean([low, high]))
