"""Times of a step of the plain loop and of N gradients at once."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
from torch import Tensor

from optex.advice.subject import Kept, Subject
from optex.errors import NonFiniteError
from optex.evaluators import Evaluation, Evaluator, SequentialEvaluator, VectorizedEvaluator

__all__ = [
    "IN_TURN",
    "NUMBERS",
    "Clock",
    "PlainLoop",
    "find_evaluators",
    "reference_gradients",
    "time_at_once",
    "time_plain_loop",
]

IN_TURN: Final = "sequential"
NUMBERS: Final = (1, 2, 4, 8)  # values of N: gradients at once
_STEPS: Final = 16  # of the plain loop, at most
_REPEATS: Final = 5
_AGREEMENT: Final = 0.05  # relative difference of gradients in turn and vectorized: bfloat16's, with room


class Clock:
    """Counts down the seconds that measuring may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.perf_counter())


@dataclass(frozen=True)
class PlainLoop:
    """Medians over some steps of the loop that OptEx would replace.

    Attributes:
        gradient_seconds: time of a gradient.
        step_seconds: time of the base optimizer's step with it.
        state_numbers: how many numbers the base optimizer keeps beside the parameters once it has stepped.
    """

    gradient_seconds: float
    step_seconds: float
    state_numbers: int

    @property
    def seconds(self) -> float:
        """Time of a step with its gradient."""
        return self.gradient_seconds + self.step_seconds


def time_plain_loop(subject: Subject, kept: Kept, seconds: float) -> PlainLoop:
    """Time some steps, as many as fit into the seconds but at least one, and take them back.

    Raises:
        NonFiniteError: the loss at the present parameters is not finite.
    """
    gradients, steps = [], []
    clock = Clock(seconds)
    for i in range(_STEPS):
        if gradients and not clock.left:
            break
        subject.vector.clear_gradients()
        started = time.perf_counter()
        with torch.enable_grad():
            loss, _ = subject.source.gradient(subject.batches[i % len(subject.batches)])
            if subject.gradient_hook is not None:
                subject.gradient_hook()
        subject.wait()
        between = time.perf_counter()
        if not i and not bool(loss.isfinite()):
            raise NonFiniteError("advise: the loss at the present parameters is not finite; start elsewhere")
        with torch.no_grad():
            subject.base.step()
        subject.wait()
        gradients.append(between - started)
        steps.append(time.perf_counter() - between)
        if subject.scheduler is not None:
            subject.scheduler.step()
    state = sum(
        value.numel()
        for entries in subject.base.state.values()
        for value in entries.values()
        if isinstance(value, Tensor)
    )
    kept.rewind()
    return PlainLoop(median(gradients), median(steps), state)


# ---------------------------------------------------------------------- at once


def find_evaluators(
    subject: Subject, given: Mapping[str, Evaluator], reference: Evaluation
) -> tuple[dict[str, Evaluator], dict[str, str]]:
    """The evaluators that work for this objective, by name, and why others do not.

    Each has made its first evaluation then, in which processes are started and kernels compiled.

    Args:
        subject: whose gradients they are.
        given: to be tried beside the one in turn and a vectorized one.
        reference: the gradients in turn that those at once are compared with.
    """
    found: dict[str, Evaluator] = {IN_TURN: SequentialEvaluator()}
    refused: dict[str, str] = {}
    if "vectorized" not in given:
        vectorized = _find_vectorized(subject, reference)
        if isinstance(vectorized, str):
            refused["vectorized"] = vectorized
        else:
            found["vectorized"] = vectorized
    for name, evaluator in given.items():
        if why := subject.refuses(evaluator):
            refused[name] = why
            continue
        try:
            with torch.no_grad():
                evaluator.evaluate(subject.request(len(reference.gradients)))
            found[name] = evaluator
        except Exception as error:  # noqa: BLE001  (whatever the objective raises there and not in turn)
            refused[name] = _in_short(error)
    return found, refused


def _find_vectorized(subject: Subject, reference: Evaluation) -> VectorizedEvaluator | str:
    if subject.module is None:
        return "needs the model: pass model="
    if why := subject.refuses(VectorizedEvaluator(subject.module)):
        return why
    why = ""
    for randomness in ("error", "different"):
        evaluator = VectorizedEvaluator(subject.module, randomness=randomness)
        try:
            with torch.no_grad():
                found = evaluator.evaluate(subject.request(len(reference.gradients)))
        except Exception as error:  # noqa: BLE001  (whatever the objective raises under vmap and not without)
            why = why or _in_short(error)
            continue
        if randomness == "error" and not _agree(found.gradients, reference.gradients):
            return "its gradients are not those in turn: does the objective use this model's parameters?"
        return evaluator
    return why


def _agree(found: Tensor, expected: Tensor) -> bool:
    gap, length = float((found - expected).norm()), float(expected.norm())
    return gap <= _AGREEMENT * length or not math.isfinite(length)


def _in_short(error: Exception) -> str:
    """The first sentence of a message, without the name of the class that raised it."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix("VectorizedEvaluator: ").removeprefix("WorkersEvaluator: ")
    first = text.split("; ")[0].split(". ")[0].rstrip(".")
    return first if len(first) <= 160 else f"{first[:157]}..."


def time_at_once(
    subject: Subject,
    evaluators: Mapping[str, Evaluator],
    loop: PlainLoop,
    seconds: float,
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Seconds of N gradients, by evaluator and N, and why an evaluator has none.

    Measurements that would not fit into the time are left out; for gradients in turn N times one is taken.
    """
    table: dict[str, dict[int, float]] = {}
    refused: dict[str, str] = {}
    clock, missing = Clock(seconds), len(NUMBERS) * len(evaluators)
    for name, evaluator in evaluators.items():
        row = table.setdefault(name, {})
        expected = loop.gradient_seconds
        for count in NUMBERS:
            share, missing = clock.left / missing, missing - 1
            if name == IN_TURN and 2 * count * loop.gradient_seconds > share:
                row[count] = count * loop.gradient_seconds
                continue
            if 2 * expected > share:  # a warm-up, and one that counts
                continue
            try:
                row[count] = expected = _typical_seconds(subject, evaluator, count, share)
            except Exception as error:
                if name == IN_TURN:
                    raise
                refused[name] = _in_short(error)
                break
        if not row:
            refused.setdefault(name, "not measured in these seconds")
    return {name: row for name, row in table.items() if name not in refused}, refused


def _typical_seconds(subject: Subject, evaluator: Evaluator, count: int, seconds: float) -> float:
    def call() -> float:
        request = subject.request(count)
        subject.wait()
        started = time.perf_counter()
        with torch.no_grad():
            evaluator.evaluate(request)
        subject.wait()
        return time.perf_counter() - started

    clock = Clock(seconds)
    call()  # the first one compiles, starts processes, fills caches
    found = [call()]
    while len(found) < _REPEATS and clock.left > found[-1]:
        found.append(call())
    return median(found)


def reference_gradients(subject: Subject, kept: Kept) -> Evaluation:
    """Two gradients in turn, as rounds compute them: an objective that does not work raises here."""
    with torch.no_grad():
        found = SequentialEvaluator().evaluate(subject.request(2))
    kept.rewind()
    return found
