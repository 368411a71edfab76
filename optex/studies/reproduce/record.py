"""A figure's runs and their record: compact JSON that tables, pictures and checks are made from."""

from __future__ import annotations

import json
import math
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from optex.studies.baselines import Trace
from optex.studies.comparison import describe
from optex.studies.problems import Problem
from optex.studies.records import significant, write_whole
from optex.studies.reproduce.studies import Choice, Figure, Section, make_figure

__all__ = [
    "PlannedRun",
    "Record",
    "WithTestError",
    "planned_runs",
    "meta",
    "read_record",
    "rounds_of",
    "run_curve",
    "run_missing",
    "write_record",
]

# A run as the JSON has it: section, label, seed, parallelism, history_size, lr, seconds, stopped, warnings, the
# number of its rounds, and lists over the recorded rounds (``rounds_of``): loss, and gradients spent and steps
# kept so far; "test" has the test error by round.
Record = dict[str, Any]

_DIGITS: Final = 5
_LONG: Final = 240  # of a section with more rounds, a quarter of this number are recorded, evenly spread


@dataclass(frozen=True)
class PlannedRun:
    """One run of a figure to make."""

    section: str
    label: str
    seed: int


def planned_runs(figure: Figure) -> list[PlannedRun]:
    """The runs to make, seed by seed, so that an interrupted command leaves whole seeds."""
    most = max(section.comparison.seeds for section in figure.sections)
    return [
        PlannedRun(section.name, curve.label, seed)
        for seed in range(most)
        for section in figure.sections
        if seed < section.comparison.seeds
        for curve in section.curves
    ]


def run_curve(name: str, choice: Choice, planned: PlannedRun) -> Record:
    """Make one run of a figure; a method that diverges leaves a run that stopped, not an error.

    Args:
        name: of the figure, which unlike the figure itself can be sent to another process.
        choice: that the figure is made with.
        planned: which of its runs.
    """
    section = make_figure(name, choice).section(planned.section)
    curve = next(curve for curve in section.curves if curve.label == planned.label)
    setting = section.setting(curve)
    problem = section.comparison.problem(section.problem, planned.seed)
    watched = WithTestError(problem, setting.rounds, section.tests) if section.tests else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = curve.run(watched or problem, setting)
    places = _recorded(setting.rounds, section)
    return {
        **asdict(planned),
        "parallelism": setting.parallelism,
        "history_size": setting.history_size,
        "lr": trace.lr,
        "seconds": significant(trace.seconds[-1], _DIGITS),
        "stopped": trace.stopped,
        "warnings": dict(Counter(warning.category.__name__ for warning in caught)),
        "rounds": setting.rounds,
        "loss": [significant(trace.loss[i], _DIGITS) for i in places],
        "gradients": [trace.gradients[i] for i in places],
        "steps": [sum(trace.accepted[: i + 1]) for i in places],
        "test": {} if watched is None else watched.errors_of(trace),
    }


def run_missing(figure: Figure, choice: Choice, made: Sequence[Record], workers: int = 1) -> Iterator[Record]:
    """Make the runs that are not among ``made``, and yield each as it ends.

    Args:
        figure: whose runs.
        choice: that the figure was made with.
        made: runs already there.
        workers: runs made at once; with more than 1, each in a process of its own with one thread.
    """
    there = {(run["section"], run["label"], run["seed"]) for run in made}
    missing = [run for run in planned_runs(figure) if (run.section, run.label, run.seed) not in there]
    if workers == 1:
        yield from (run_curve(figure.name, choice, run) for run in missing)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        yield from (
            future.result()
            for future in as_completed(pool.submit(run_curve, figure.name, choice, run) for run in missing)
        )


def _recorded(rounds: int, section: Section) -> list[int]:
    usual = section.comparison.rounds
    count = rounds if usual <= _LONG else -(-rounds * _LONG // (4 * usual))
    return _spread(rounds, count + 1)


def _spread(rounds: int, count: int) -> list[int]:
    return np.linspace(0, rounds, count).round().astype(int).tolist()


def rounds_of(run: Record) -> list[int]:
    """The recorded rounds of a run, which its lists are over.

    >>> rounds_of({"rounds": 3, "loss": [4.0, 3.0, 2.0, 1.0]})
    [0, 1, 2, 3]
    >>> rounds_of({"rounds": 9, "loss": [4.0, 3.0, 2.0, 1.0]})
    [0, 3, 6, 9]
    """
    return _spread(run["rounds"], len(run["loss"]))


class WithTestError(Problem):
    """A problem that also measures its test error, after some of the rounds.

    Args:
        problem: with a ``test_error``.
        rounds: that it will be run for.
        tests: at how many of them, evenly spread, the last included.
    """

    name = "tested"

    def __init__(self, problem: Problem, rounds: int, tests: int) -> None:
        super().__init__(problem.seed)
        self.problem = problem
        self._due = {0} | {round(rounds * i / tests) for i in range(1, tests + 1)}
        # Losses, and test errors by round, of each try: a method that tries several settings resets the
        # problem.
        self._tries: list[tuple[list[float], dict[str, float | None]]] = []

    def forward(self, batch: Any) -> Tensor:
        return self.problem(batch)

    def batches(self) -> Iterator[Any]:
        return self.problem.batches()

    def evaluate(self) -> float:
        losses, errors = self._tries[-1]
        if len(losses) in self._due:
            errors[str(len(losses))] = significant(self.problem.test_error(), _DIGITS)  # type: ignore[operator]
        losses.append(self.problem.evaluate())
        return losses[-1]

    def between_rounds(self) -> None:
        self.problem.between_rounds()

    @property
    def deterministic(self) -> bool:
        return self.problem.deterministic

    def reset(self) -> None:
        self._tries.append(([], {}))
        self.problem.reset()

    def errors_of(self, trace: Trace) -> dict[str, float | None]:
        """The test errors, by round, of the try that this trace is of."""
        kept = [loss for loss in trace.loss if math.isfinite(loss)]
        return next(errors for losses, errors in self._tries if losses[: len(kept)] == kept)


def meta(figure: Figure, choice: Choice, command: Sequence[str]) -> dict[str, Any]:
    """What is run, on which machine and with which versions: the ``meta`` of the figure's JSON."""
    described = {section.name: describe(section.comparison) for section in figure.sections}
    common = ("optex", "torch", "python", "platform", "cpu", "cpus", "threads", "date")
    first = next(iter(described.values()))
    return {
        "figure": figure.name,
        **{name: first[name] for name in common},
        "command": list(command),
        "choice": asdict(choice),
        "sections": {
            section.name: _section_meta(section, described[section.name]) for section in figure.sections
        },
    }


def _section_meta(section: Section, described: dict[str, Any]) -> dict[str, Any]:
    comparison, problem = section.comparison, section.problem
    return {
        "problem": problem,
        **{name: described[name][problem] for name in ("dimension", "minimum", "batch_size")},
        "options": dict(comparison.problem_options),
        "optimizer": comparison.optimizer,
        "lr": comparison.lr,
        **{name: getattr(comparison, name) for name in ("parallelism", "history_size", "rounds", "seeds")},
        "vanilla_rounds": section.vanilla_rounds,
        "level_round": section.level_round,
        "curves": [curve.label for curve in section.curves],
    }


def write_record(path: Path, about: dict[str, Any], runs: Sequence[Record]) -> None:
    """Write ``meta``, and each run on a line; an old file is replaced when the new one is complete."""
    lines = ",\n".join(json.dumps(run, separators=(",", ":"), allow_nan=False) for run in runs)
    whole = f'{{"meta": {json.dumps(about, allow_nan=False)},\n"runs": [\n{lines}\n]}}\n'
    write_whole(path, whole)


def read_record(path: Path, about: dict[str, Any]) -> tuple[dict[str, Any], list[Record]]:
    """The runs of an earlier record, to continue with; none where there is no file.

    Args:
        path: of the record.
        about: ``meta`` of what is to be made: the same, or with more seeds or curves.

    Returns:
        The meta for the record, which is the earlier one where no run is missing, and the earlier runs.

    Raises:
        ValueError: the file is no such record, or its settings differ from ``about``'s.
    """
    if not path.exists():
        return about, []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        there, runs = document["meta"], document["runs"]
        before = {name: dict(part) for name, part in there["sections"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"resume: {path} is not a record of a figure; move it away") from error
    wanted = json.loads(json.dumps(about["sections"]))
    if before.keys() != wanted.keys() or any(_fixed(before[name]) != _fixed(wanted[name]) for name in wanted):
        raise ValueError(f"resume: {path} was made with other settings; choose those, or another folder")
    for name, part in before.items():
        if part["seeds"] > wanted[name]["seeds"] or not set(part["curves"]) <= set(wanted[name]["curves"]):
            raise ValueError(f"resume: {path} has more seeds or curves; choose as many, or another folder")
    whole = len(runs) == sum(part["seeds"] * len(part["curves"]) for part in wanted.values())
    return (there if whole else about), runs


def _fixed(part: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section but its seeds and curves: those may be more than in an earlier record."""
    return {name: value for name, value in part.items() if name not in ("seeds", "curves")}
