"""Acceptance: which of a round's steps are kept, and with which gradients they are taken."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from optex.checks import check_flag, check_real, saved_entry, saved_integer, saved_number, shown
from optex.round.linear import linear_replay
from optex.round.record import RoundRecord
from optex.round.replay import Replay, Vectors
from optex.vector_space import VectorSpace

__all__ = [
    "SELECTIONS",
    "Acceptance",
    "Last",
    "LowestLoss",
    "SmallestGradient",
    "WithinTolerance",
]

LEAST_AHEAD: Final = 4  # steps drafted under a lookahead, however few were kept
# Factors of the tolerance, where steps are taken without gradients of their own:
EARNED: Final = 1.4  # between gradients: strides get that long where rounds were kept whole
EXTRAPOLATED: Final = 0.8  # after a round's only gradient
LONGER: Final = 1.5  # longest prediction stepped on, in usual lengths of a prediction
NEAREST: Final = 3  # predictions a round that the tolerance learns from


class Acceptance(ABC):
    """Takes a round's final steps.

    Attributes:
        keeps_window: steps not accepted keep their minibatch and their measured gradient for later rounds;
            if False, a round uses its minibatches up.
    """

    keeps_window: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def strides(self) -> bool:
        """Whether it takes steps at which no gradient was evaluated."""
        return False

    def evaluated(self, count: int) -> range:
        """Which of the ``count`` proxies need a true gradient; all of them unless a rule says otherwise."""
        return range(count)

    def ahead(self, parallelism: int) -> int:
        """How many steps of the window are worth drafting and evaluating this round, 1..parallelism."""
        return parallelism

    def plausible(
        self,
        gradients: Tensor,  # [n, d]
        space: VectorSpace,
    ) -> Tensor:  # [n] bool
        """Which gradients may be remembered and used, beyond being finite."""
        return torch.ones(len(gradients), dtype=torch.bool, device=gradients.device)

    def state_dict(self) -> dict[str, Any]:
        """What the rule has learned from earlier rounds."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another rule of these settings has learned; checked before anything changes.

        Raises:
            ValueError: it is not what such a rule saves.
        """

    @abstractmethod
    def replay(self, record: RoundRecord) -> int:
        """Take the round's steps; answer how many the stepper is from the round's start then, at least one."""


class _Selection(Acceptance):
    """The paper's rules: one true step from one of the proxies, reached by the steps that were drafted."""

    @abstractmethod
    def choose(self, record: RoundRecord) -> int:
        """Index of the proxy to go on from, one that is usable."""

    def replay(self, record: RoundRecord) -> int:
        chosen = self.choose(record)
        stepper = record.stepper
        if stepper.taken != chosen:
            stepper.rewind()
            with stepper.drafting():
                for gradient in record.drafted[:chosen]:
                    stepper.step(gradient)
        stepper.recall(record.observations, chosen)
        stepper.step(record.gradients[chosen])
        return chosen + 1


def _best(values: Tensor, usable: Sequence[bool]) -> int:
    mask = torch.tensor(usable, device=values.device)
    return int(torch.where(mask, values, torch.inf).argmin())


class Last(_Selection):
    """Keep the last proxy's true step (Algorithm 1's default).

    Args:
        evaluate: ``"all"`` proxies (the paper), or the ``"last"`` alone, which is its sequential ablation:
            one gradient a round, N - 1 steps taken on predictions.
    """

    def __init__(self, evaluate: Literal["all", "last"] = "all") -> None:
        if evaluate not in ("all", "last"):
            raise ValueError(f"Last: evaluate must be 'all' or 'last', got {shown(evaluate)}")
        self.evaluate = evaluate

    def __repr__(self) -> str:
        return f"Last({self.evaluate!r})"

    def evaluated(self, count: int) -> range:
        return range(count - 1, count) if self.evaluate == "last" else range(count)

    def choose(self, record: RoundRecord) -> int:
        return max(i for i, usable in enumerate(record.usable) if usable)


class LowestLoss(_Selection):
    """Keep the true step from the proxy with the smallest loss."""

    def choose(self, record: RoundRecord) -> int:
        return _best(record.losses, record.usable)


class SmallestGradient(_Selection):
    """Keep the true step from the proxy with the smallest gradient norm."""

    def choose(self, record: RoundRecord) -> int:
        return _best(record.space.norms(record.gradients), record.usable)


class WithinTolerance(Acceptance):
    """Replay the base optimizer's own steps with true gradients, as far as they were measured nearby.

    Step 0 uses its exact gradient. Step i ≥ 1, at y_i, uses the gradient measured at the proxy x_i plus the
    estimator's difference, ``g_i + μ(y_i) - μ(x_i)``; the replay stops before the first step with
    ``‖y_i - x_i‖ > tolerance · min_{j ≤ i} ‖y_j - y_{j-1}‖``. With tolerance 0 the trajectory is the base
    optimizer's. (The shortest step, not the last: a run that starts to diverge takes ever longer steps, and
    must not measure its tolerance by them.)

    The tolerance adapts to evidence. Each drafted gradient was predicted at some distance ρ, in steps, from
    where its step had been measured, and is now measured itself; with e its relative error, the prediction
    would be wrong by ``error`` at about ``error · ρ / e`` steps. The median of that over the ``NEAREST`` such
    predictions (far ones say nothing: an error cannot grow past everything) is the new tolerance, taken at
    once if it is lower and half way, in logarithms, if it is higher.

    Args:
        tolerance: how far, in steps, a gradient may have been measured from where it is used; ≥ 0. With
            ``adaptive`` the value to start from; 0 stays 0.
        adaptive: learn the tolerance.
        error: the relative error of a gradient that is tolerated, > 0.
        lowest, highest: bounds of the adaptive tolerance.
        absurd: a gradient more than this many times as long as step 0's counts as implausible, and is neither
            remembered nor stepped on; at least 1.
        lookahead: draft and evaluate at most this many times the steps that the last round kept, at least
            ``LEAST_AHEAD``; saves gradients where they are not free. None evaluates all N: proxies that are
            not kept still teach the estimator.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    keeps_window = True

    def __init__(
        self,
        tolerance: float = 2.0,
        *,
        adaptive: bool = True,
        error: float = 0.5,
        lowest: float = 0.1,
        highest: float = 32.0,
        absurd: float = 20.0,
        lookahead: float | None = None,
    ) -> None:
        tolerance = check_real("WithinTolerance", "tolerance", tolerance)
        error = check_real("WithinTolerance", "error", error)
        lowest = check_real("WithinTolerance", "lowest", lowest)
        highest = check_real("WithinTolerance", "highest", highest)
        absurd = check_real("WithinTolerance", "absurd", absurd)
        lookahead = None if lookahead is None else check_real("WithinTolerance", "lookahead", lookahead)
        if not tolerance >= 0:
            raise ValueError(f"WithinTolerance: tolerance must not be negative, got {shown(tolerance)}")
        if not absurd >= 1:
            raise ValueError(
                f"WithinTolerance: absurd must be at least 1, or step 0's own gradient would count as "
                f"implausible, got {shown(absurd)}"
            )
        if not error > 0:
            raise ValueError(f"WithinTolerance: error must be positive, got {shown(error)}")
        if not 0 < lowest <= highest:
            raise ValueError(
                f"WithinTolerance: needs 0 < lowest <= highest, got {shown(lowest)} and {shown(highest)}"
            )
        if lookahead is not None and not 1 <= lookahead < math.inf:
            raise ValueError(
                f"WithinTolerance: lookahead must be at least 1 and finite, or None, got {shown(lookahead)}"
            )
        self.tolerance: float = tolerance
        self.adaptive: bool = check_flag("WithinTolerance", "adaptive", adaptive) and tolerance > 0
        self.error = error
        self.lowest = lowest
        self.highest = highest
        self.absurd = absurd
        self.lookahead = lookahead
        self._kept: int | None = None  # steps of the last round
        self._length = 0.0  # of a step in the last round, where only its first was evaluated

    def __repr__(self) -> str:
        return f"WithinTolerance({self.tolerance:.3g}, adaptive={self.adaptive})"

    @property
    def strides(self) -> bool:
        return self.tolerance > 0

    def plausible(self, gradients: Tensor, space: VectorSpace) -> Tensor:
        if len(gradients) == 1:  # step 0's own
            return super().plausible(gradients, space)
        norms = space.norms(gradients)
        longest = self.absurd * norms[0].clamp_min(torch.finfo(norms.dtype).tiny)
        return (norms <= longest) | ~norms[
            0
        ].isfinite()  # if it is not finite, there is nothing to compare with

    def state_dict(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance, "kept": self._kept, "length": self._length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        owner = "WithinTolerance.load_state_dict"
        tolerance = saved_number(owner, state, "tolerance", least=0)
        kept = None if saved_entry(owner, state, "kept") is None else saved_integer(owner, state, "kept")
        if (tolerance == 0) != (self.tolerance == 0):
            raise ValueError(
                f"{owner}: saved tolerance is {tolerance:g}, this rule's {self.tolerance:g}; 0 stays 0"
            )
        length = saved_number(owner, state, "length", least=0)
        self.tolerance, self._kept, self._length = tolerance, kept, length

    def ahead(self, parallelism: int) -> int:
        if self.lookahead is None or self._kept is None:
            return parallelism
        return min(parallelism, max(LEAST_AHEAD, math.ceil(self.lookahead * self._kept)))

    def replay(self, record: RoundRecord) -> int:
        if self.adaptive:
            self._learn(record)
        self._kept = self._take_steps(record)
        return self._kept

    def _take_steps(self, record: RoundRecord) -> int:
        stepper, space = record.stepper, record.space
        if stepper.taken:
            stepper.rewind()
        replay: Replay = linear_replay(record) or Vectors(record)
        row, tolerance = 1, self.tolerance  # the next row that was evaluated
        if record.steps > len(record.positions) and record.source.deterministic:
            tolerance *= EXTRAPOLATED if len(record.positions) == 1 else EARNED
        usable, shortest = [i for i, flag in enumerate(record.usable) if flag], math.inf
        for position in range(1, record.steps):
            measured = row < len(record.positions) and record.positions[row] == position
            rows = [row] if measured else usable
            row += measured
            if measured or record.source.deterministic:
                if not record.usable[rows[0]]:
                    break
                step, gaps = replay.lengths(rows)
                shortest, gap = min(shortest, step), min(gaps)
                if not gap <= tolerance * shortest:
                    break
                gradient = replay.corrected(rows[gaps.index(gap)], gap)
            else:
                # A gradient measured at another step has another minibatch's noise: a prediction is better.
                # The errors known are of predictions of usual length: a model chosen just now may predict one
                # gradient, noise and all, at every step.
                if record.posterior is None:
                    break
                gradient, length = replay.predicted()
                if not length <= LONGER * record.surprises.usual_length:
                    break
            replay.step(gradient, measured=measured)
        replay.finish()
        if stepper.taken > 1 and not space.finite(stepper.point[None])[0]:
            # A correction went wrong; step 0 is exact, whatever the estimator said.
            stepper.rewind()
            stepper.recall(record.observations, 0)
            stepper.step(record.gradients[0])
        if len(record.positions) == 1 and record.predicted:
            self._length = float(space.norms([stepper.point - record.proxies[0]])[0]) / stepper.taken
        return stepper.taken

    def _step_lengths(self, record: RoundRecord, rows: list[int]) -> Tensor:  # [k]
        """The draft's mean step from each row to the next; the last round's where there is none."""
        proxies, positions = record.proxies, record.positions
        if len(positions) == 1:
            return torch.full((len(rows),), self._length, dtype=proxies.dtype, device=proxies.device)
        steps = [(proxies[i + 1] - proxies[i]) / (positions[i + 1] - positions[i]) for i in rows]
        return record.space.norms(steps)

    def _learn(self, record: RoundRecord) -> None:
        rows, gaps, norms = record.comparison
        known = [(i, place, far) for place, i in enumerate(rows) if (far := record.distances[i]) is not None]
        if not known:
            return
        lengths = self._step_lengths(record, [i for i, _, _ in known])
        errors = gaps / norms
        evidence = []
        for (_, place, distance), length in zip(known, lengths, strict=True):
            steps, error = float(distance / length), errors[place]
            # Closer than rounding is no distance to learn from.
            if 1e-6 < steps < math.inf and not torch.isnan(error):
                evidence.append((steps, steps / max(float(error), 1e-12)))
        if not evidence:
            return
        bearable = self.error * statistics.median(ratio for _, ratio in sorted(evidence)[:NEAREST])
        bearable = min(max(bearable, self.lowest), self.highest)
        self.tolerance = min(bearable, math.sqrt(self.tolerance * bearable))


SELECTIONS: Final[dict[str, type[_Selection]]] = {
    "last": Last,
    "lowest-loss": LowestLoss,
    "smallest-gradient": SmallestGradient,
}
