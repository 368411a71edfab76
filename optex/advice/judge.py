"""The rule that turns what was measured into a recommendation with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from optex.advice.candidate import Candidate
from optex.advice.text import duration
from optex.advice.timing import IN_TURN, PlainLoop
from optex.advice.trial import FEWEST, Trial

__all__ = ["candidates_of", "judge", "notes_for"]

_LEAST_SAVING: Final = 0.1  # of the plain loop's time, to be worth another optimizer
_WRONG: Final = 0.5  # relative error of predictions beyond which they are of no use


def candidates_of(
    trials: Sequence[Trial], at_once: Mapping[str, Mapping[int, float]], loop: PlainLoop
) -> tuple[Candidate, ...]:
    """Every trial with every evaluator: steps and overhead are the trial's, gradient times the evaluator's."""
    return tuple(
        Candidate(
            parallelism=trial.parallelism,
            stride="auto",
            evaluator=name,
            rounds=trial.rounds,
            steps=trial.steps,
            stride_reached=trial.stride,
            prediction_error=trial.prediction_error,
            gradient_seconds=row[trial.parallelism],
            overhead_seconds=trial.overhead_seconds,
            plain_gradient_seconds=loop.gradient_seconds,
            plain_step_seconds=loop.step_seconds,
            memory_bytes=trial.memory_bytes,
        )
        for trial in trials
        for name, row in at_once.items()
        # A single gradient is computed in turn.
        if trial.parallelism in row and (trial.parallelism > 1 or name == IN_TURN)
    )


def judge(
    candidates: Sequence[Candidate], loop: PlainLoop, base: str, seconds: float
) -> tuple[Candidate | None, str]:
    """The candidate to take, or None, and the reason.

    Args:
        candidates: to choose from; none of them kept fewer than one step a round.
        loop: the plain loop that they have to beat.
        base: name of the base optimizer.
        seconds: the time that measuring was given.
    """
    if not candidates:
        wanted = math.ceil(max(4 * FEWEST * loop.gradient_seconds, 3 * seconds))
        return None, (
            f"none. A gradient takes {duration(loop.gradient_seconds)}, and {FEWEST} rounds, the fewest to "
            f"judge by, did not fit into the time. Ask again with seconds={wanted} or more."
        )
    best = min(candidates, key=lambda candidate: candidate.seconds_per_step)
    saved = 1 - best.relative_time
    if saved >= _LEAST_SAVING:
        return best, (
            f"use OptEx with {_setting(best)}. It takes {best.steps:.1f} steps a round, at "
            f"{duration(best.seconds_per_step)} a step where {base} alone takes {duration(loop.seconds)}: "
            f"{saved:.0%} less time."
        )
    stay = f"don't: stay with {base}."
    fewer = max(candidates, key=lambda candidate: candidate.steps / candidate.gradient_ratio)
    if fewer.steps / fewer.gradient_ratio < 1 / (1 - _LEAST_SAVING):
        return None, f"{stay} {_nothing_saved(candidates)}"
    if saved > 0:
        return None, (
            f"{stay} The best of these, {_setting(best)}, would save {saved:.0%} of the time; below "
            f"{_LEAST_SAVING:.0%} it is not worth another optimizer."
        )
    nearest = min(candidates, key=lambda candidate: candidate.break_even_seconds)
    return None, (
        f"{stay} A gradient is too cheap: it takes {duration(loop.gradient_seconds)}, and a round of OptEx "
        f"{duration(nearest.overhead_seconds)} beyond its gradients. It would pay, with "
        f"{_setting(nearest)}, for gradients of more than {duration(nearest.break_even_seconds)}."
    )


def _setting(candidate: Candidate) -> str:
    how = {"sequential": ", in turn", "vectorized": ", vectorized"}
    at_once = how.get(candidate.evaluator, f", by {candidate.evaluator}")
    return f"parallelism={candidate.parallelism}" + (at_once if candidate.parallelism > 1 else "")


def _nothing_saved(candidates: Sequence[Candidate]) -> str:
    """Why rounds would not be faster even without overhead."""
    alone = candidates[0]
    error = alone.prediction_error
    said = f"A round of {_setting(alone)} took {alone.steps:.1f} steps"
    if math.isinf(error):
        said += ": gradients of different batches have nothing in common here, there is nothing to predict."
    elif error > _WRONG:
        said += f": predicted gradients are off by {error:.0%}, too wrong to step on."
    else:
        said += " for its gradient."
    at_once = [candidate for candidate in candidates if candidate.parallelism > 1]
    if at_once:
        most = min(at_once, key=lambda candidate: candidate.gradient_ratio / candidate.parallelism)
        n = most.parallelism
        said += f" And {n} gradients take {most.gradient_ratio:.1f} times as long as one,"
        said += f" for {most.steps:.1f} steps."
    return said


def notes_for(
    candidates: Sequence[Candidate],
    missing: Sequence[str],
    *,
    deterministic: bool,
    in_turn_alone: bool,
) -> tuple[str, ...]:
    """What a reader should know beside the advice."""
    notes = [f"{text}." for text in missing]
    if candidates:
        notes.append(
            "Steps were counted over a few rounds from the present parameters, a sample: predictions may do "
            "better or worse later. Ask again from there."
        )
        notes.append(
            "Many small steps may be what one larger step does: tune the learning rate first, with "
            "the plain loop."
        )
    if deterministic:
        notes.append(
            "Deterministic gradients: where the landscape is smooth, try L-BFGS first. It often needs fewer "
            "gradients than any first-order method (results/tuned says where, and where not)."
        )
    if in_turn_alone:
        notes.append(
            "N > 1 pays most where gradients are computed at once: on idle cores (workers=), or vectorized."
        )
    return tuple(notes)
