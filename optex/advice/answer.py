"""What measuring found, and the recommendation that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optex.advice.candidate import Candidate
from optex.advice.text import at_once_table, candidates_table, heading, wrapped

__all__ = ["Advice"]


@dataclass(frozen=True)
class Advice:
    """What ``advise`` found. ``str(advice)`` is the text that it printed, 80 columns wide.

    Attributes:
        recommended: the candidate that takes the least time for a step; None where none of them saves a tenth
            of the base optimizer's, or where the seconds did not suffice to tell.
        reason: why, in a sentence or two.
        notes: what else to know, one sentence each.
        candidates: all that were measured.
        optimizer: the base optimizer's class and rate.
        dimension: d, parameters.
        deterministic: gradients are not sampled.
        gradient_seconds: of one gradient in the plain loop, median.
        step_seconds: of the base optimizer's step, median.
        at_once: seconds of N gradients, by evaluator and N (1, 2, 4, 8); entries that did not fit into the
            time are missing.
        refused: why an evaluator has no row in ``at_once``, by its name.
        batches_drawn: taken from ``batches``.
        seconds: wall time of the measuring.
    """

    recommended: Candidate | None
    reason: str
    notes: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    optimizer: str
    dimension: int
    deterministic: bool
    gradient_seconds: float
    step_seconds: float
    at_once: Mapping[str, Mapping[int, float]]
    refused: Mapping[str, str]
    batches_drawn: int
    seconds: float
    _options: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)
    _evaluators: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    def as_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the advice: ``OptEx(base, **advice.as_kwargs())``.

        ``model``, ``deterministic``, ``scheduler`` and ``gradient_hook`` are among them as they were measured.
        Where nothing is recommended the run is the base optimizer's: ``parallelism=1, stride=1``.
        """
        chosen = self.recommended
        if chosen is None:
            return {"parallelism": 1, "stride": 1, **self._options}
        found = {"parallelism": chosen.parallelism, "stride": chosen.stride, **self._options}
        evaluator = self._evaluators.get(chosen.evaluator)
        return found if evaluator is None else {**found, "evaluator": evaluator}

    def as_dict(self) -> dict[str, Any]:
        """All numbers and texts, for JSON; times in seconds, memory in bytes. Infinity and NaN stay floats."""
        hidden = ("_options", "_evaluators", "recommended", "candidates", "at_once", "refused")
        plain = {name: value for name, value in vars(self).items() if name not in hidden}
        plain["notes"] = list(self.notes)
        chosen = self.recommended
        return {
            "recommended": None if chosen is None else chosen.as_dict(),
            **plain,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "at_once": {
                name: {str(count): seconds for count, seconds in row.items()}
                for name, row in self.at_once.items()
            },
            "refused": dict(self.refused),
        }

    def __str__(self) -> str:
        chosen = self.recommended
        lines = [
            *heading(
                self.optimizer, self.dimension, self.gradient_seconds, self.step_seconds, self.deterministic
            ),
            "",
            *at_once_table(self.at_once, self.refused),
            "",
        ]
        if self.candidates:
            lines += [*candidates_table(self.candidates, chosen), ""]
        lines += wrapped(f"Advice: {self.reason}")
        if chosen is not None:
            lines += ["", "    optimizer = optex.OptEx(base, **advice.as_kwargs())"]
        lines.append("")
        for note in self.notes:
            lines += wrapped(note, "- ")
        return "\n".join(line.rstrip() for line in lines)
