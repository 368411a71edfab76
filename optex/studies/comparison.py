"""Methods × problems × seeds: runs, their record as JSON, acceleration, break-even."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from optex.checks import check_integer
from optex.round import read_stride
from optex.stepping import ObservesEvaluations, base_optimizer, check_name, default_rate
from optex.studies.baselines import Setting, Trace, make_method
from optex.studies.measures import VANILLA, Outcome, Spread, Summary, acceleration, rounds_to_level
from optex.studies.problems import PROBLEMS, Problem, make_problem
from optex.studies.records import finite_or_null, null_to_nan, write_whole

__all__ = [
    "Case",
    "Comparison",
    "Row",
    "Run",
    "describe",
    "measurable",
    "read_runs",
    "run_case",
    "summarise",
    "write_json",
]

_LISTS: Final = ("loss", "gradients", "seconds", "accepted")  # of a trace, an entry a round
_BEYOND: Final = (
    4  # vanilla's rounds over the target's steps, where a method with strides may take more of them
)


@dataclass(frozen=True)
class Case:
    """One run to make."""

    problem: str
    method: str
    seed: int


@dataclass(frozen=True)
class Comparison:
    """Which runs to make: every method on every start of every problem.

    Args:
        problems: names of ``optex.studies.problems.PROBLEMS``.
        methods: names of ``optex.studies.baselines.METHODS``; vanilla, which the others are measured against,
            is added first where it is missing.
        optimizer: name of the base optimizer, as in ``optex list``.
        lr: its learning rate; None is ``default_rate(optimizer)``.
        parallelism: N.
        stride: of ``optex`` and ``optex-alone``: ``"auto"``, the largest, or 1 for none.
        history_size: T0 of every method that has a history; None is each method's own default.
        rounds: of every method but vanilla, which is run for ``reach · rounds``.
        seeds: how many starts of each problem: seeds 0, 1, ...
        dim, noise: of the problems that are functions.
        batch_size: of the problems with minibatches; None is each problem's own.
        problem_options: further options, such as ``{"model": "cnn"}``; each goes to the problems that have it,
            and at least one problem must have it.

    Raises:
        ValueError: a name is unknown or a number out of range; the message says which.
    """

    problems: tuple[str, ...]
    methods: tuple[str, ...] = ("vanilla", "target", "optex-paper", "optex")
    optimizer: str = "adam"
    lr: float | None = None
    parallelism: int = 5
    stride: float | Literal["auto"] = "auto"
    history_size: int | None = None
    rounds: int = 60
    seeds: int = 5
    dim: int = 10_000
    noise: float = 0.0
    batch_size: int | None = None
    problem_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("parallelism", "history_size", "rounds", "seeds", "dim", "batch_size"):
            value = getattr(self, name)
            if name in ("history_size", "batch_size") and value is None:
                continue
            check_integer(None, name, value)
        read_stride(self.stride)
        if not self.problems:
            raise ValueError(f"problems: none given; choose from {', '.join(PROBLEMS)}")
        for name in self.problems:
            if name not in PROBLEMS:
                raise ValueError(f"problem: {name!r} is not one of {', '.join(PROBLEMS)}")
        for option in self.problem_options:
            self._check_option(option)
        for name in self.methods:
            make_method(name)
        check_name(self.optimizer)
        if self.lr is None:
            object.__setattr__(self, "lr", default_rate(self.optimizer))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"lr: must be positive and finite, got {self.lr}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise: must be finite and not negative, got {self.noise}")
        object.__setattr__(self, "problems", tuple(dict.fromkeys(self.problems)))
        object.__setattr__(self, "methods", tuple(dict.fromkeys((VANILLA, *self.methods))))

    def _check_option(self, option: str) -> None:
        if option in ("dim", "noise", "batch_size"):
            raise ValueError(f"problem_options: {option} is an argument of its own; set {option}= instead")
        if not any(option in PROBLEMS[name].options for name in self.problems):
            choices = [f"{name} takes {', '.join(PROBLEMS[name].options) or 'none'}" for name in self.problems]
            raise ValueError(f"problem_options: nothing here has {option}; {'; '.join(choices)}")

    @property
    def reach(self) -> int:
        """Rounds of vanilla for each round of the methods: N, and more where a method may take more steps."""
        strides = read_stride(self.stride) > 1 and any(make_method(name).strides for name in self.methods)
        return self.parallelism * (_BEYOND if strides else 1)

    @property
    def learning_rate(self) -> float:
        """``lr``, the default filled in."""
        return self.lr if self.lr is not None else math.nan

    def problem(self, name: str, seed: int) -> Problem:
        """A start of a problem, with the options that apply to it."""
        choices = {"dim": self.dim, "noise": self.noise, "batch_size": self.batch_size, **self.problem_options}
        return make_problem(
            name, seed=seed, **{key: choices[key] for key in choices if key in PROBLEMS[name].options}
        )

    def setting(self, method: str) -> Setting:
        """What a method runs with."""

        def base(problem: Problem) -> torch.optim.Optimizer:
            return base_optimizer(self.optimizer, problem, lr=self.learning_rate)

        rounds = self.rounds * self.reach if method == VANILLA else self.rounds
        return Setting(base, self.parallelism, self.history_size, rounds, self.stride, of_module=True)

    def check(self) -> None:
        """Build every problem and base optimizer once, so that no mistake shows up after hours of runs.

        Raises:
            ValueError, ImportError, FileNotFoundError: as the problem or the optimizer says.
            ValueError: a method needs a deterministic objective and a problem has sampled gradients; or a
                method has nothing but gradients for an optimizer that needs more of an evaluation.
        """
        for name in self.problems:
            start = self.problem(name, seed=0)
            try:
                base = self.setting(VANILLA).base_optimizer(start)
            except (ValueError, TypeError) as error:
                raise ValueError(f"optimizer: {self.optimizer} cannot optimise {name}: {error}") from error
            if isinstance(base, ObservesEvaluations) and (blind := self._blind()):
                raise ValueError(
                    f"methods: {', '.join(blind)} step with gradients alone, and {self.optimizer} needs more "
                    "of an evaluation; leave them out, or take another optimizer"
                )
            if not start.deterministic and (refusing := self._refusing_noise()):
                raise ValueError(
                    f"methods: {', '.join(refusing)} need a deterministic objective, and {name} has sampled "
                    "gradients; leave them out, or take lbfgs"
                )

    def _refusing_noise(self) -> list[str]:
        return [name for name in self.methods if make_method(name).deterministic_only]

    def _blind(self) -> list[str]:
        return [name for name in self.methods if make_method(name).gradients_alone]

    def cases(self) -> list[Case]:
        """The runs to make, all methods of one start next to each other."""
        return [
            Case(problem, method, seed)
            for problem in self.problems
            for seed in range(self.seeds)
            for method in self.methods
        ]


@dataclass(frozen=True)
class Run:
    """One run made.

    Attributes:
        problem, method: as in the case.
        optimizer: what took the steps: the base optimizer, or the method's own.
        lr: its learning rate; data-parallel tunes it.
        parallelism: N.
        seed: as in the case.
        rounds: that the run is compared over; vanilla's lists are longer.
        trace: what happened.
    """

    problem: str
    method: str
    optimizer: str
    lr: float
    parallelism: int
    seed: int
    rounds: int
    trace: Trace

    @property
    def case(self) -> Case:
        """The case that it is a run of."""
        return Case(self.problem, self.method, self.seed)

    def record(self) -> dict[str, Any]:
        """The run as compare's JSON has it."""
        return {
            **{name: getattr(self, name) for name in ("problem", "method", "optimizer")},
            **{name: getattr(self, name) for name in ("lr", "parallelism", "seed")},
            "rounds": list(range(self.trace.rounds + 1)),
            **{name: getattr(self.trace, name) for name in (*_LISTS, "overhead_seconds", "stopped")},
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any], rounds: int) -> Run:
        """The run that ``record()`` was made of.

        Args:
            record: as compare's JSON has it.
            rounds: that the run is compared over.

        Raises:
            KeyError, TypeError, ValueError: it is no such record, or its lists differ in length.
        """
        lists = {name: list(record[name]) for name in _LISTS}
        lists["loss"] = null_to_nan(lists["loss"])
        if {len(values) for values in lists.values()} != {len(record["rounds"])}:
            raise ValueError("the lists of a run differ in length")
        overhead = null_to_nan([record["overhead_seconds"]])[0]
        trace = Trace(**lists, lr=record["lr"], overhead_seconds=overhead, stopped=record["stopped"])
        names = ("problem", "method", "optimizer", "lr", "parallelism", "seed")
        return cls(**{name: record[name] for name in names}, rounds=rounds, trace=trace)


def run_case(comparison: Comparison, case: Case) -> Run:
    """Make one run; a method that diverges leaves a run that stopped, not an error."""
    method = make_method(case.method)
    problem = comparison.problem(case.problem, case.seed)
    with torch.random.fork_rng(devices=[]):  # dropout and random probes repeat, whatever ran before
        torch.manual_seed(case.seed)
        trace = method.run(problem, comparison.setting(case.method))
    return Run(
        problem=case.problem,
        method=case.method,
        optimizer=method.own_optimizer or comparison.optimizer,
        lr=trace.lr,
        parallelism=comparison.parallelism,
        seed=case.seed,
        rounds=comparison.rounds,
        trace=trace,
    )


@dataclass(frozen=True)
class Row:
    """A method on a problem, over all seeds.

    Attributes:
        problem, method: names.
        lr: learning rates of the runs, each once.
        summary: of the runs; ``rounds_to_vanilla`` counts to vanilla's loss after the runs' number of rounds.
        overhead_seconds: of a round beyond its gradients, mean; NaN where a method does not measure it.
        break_even_seconds: the method pays if a gradient takes longer than this, where N of them at once take
            the time of one: overhead / (acceleration - 1); infinite at acceleration ≤ 1.
    """

    problem: str
    method: str
    lr: tuple[float, ...]
    summary: Summary
    overhead_seconds: float
    break_even_seconds: float

    def record(self) -> dict[str, Any]:
        """The row as compare's JSON has it, the summary's numbers beside the others."""
        row = asdict(self)
        return {**row, **row.pop("summary")}


def measurable(runs: Sequence[Run]) -> list[Run]:
    """Those runs whose start has a vanilla run among them, by which ``summarise`` measures the others."""
    starts = {(run.problem, run.seed) for run in runs if run.method == VANILLA}
    return [run for run in runs if (run.problem, run.seed) in starts]


def summarise(runs: Iterable[Run]) -> list[Row]:
    """One row for every problem and method, in the order of the runs.

    Raises:
        ValueError: a start has no vanilla run to measure by.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    vanilla: dict[tuple[str, int], Run] = {}
    for run in runs:
        groups.setdefault((run.problem, run.method), []).append(run)
        if run.method == VANILLA:
            vanilla[run.problem, run.seed] = run
    for group in groups.values():
        for run in group:
            if (run.problem, run.seed) not in vanilla:
                raise ValueError(f"summarise: no vanilla run of {run.problem}, seed {run.seed}, to measure by")
    return [_row(group, vanilla) for group in groups.values()]


def _row(group: Sequence[Run], vanilla: dict[tuple[str, int], Run]) -> Row:
    summary = Summary.over([_outcome(run, vanilla[run.problem, run.seed].trace.loss) for run in group])
    overhead = Spread.over(run.trace.overhead_seconds for run in group).mean
    return Row(
        problem=group[0].problem,
        method=group[0].method,
        lr=tuple(sorted({run.lr for run in group})),
        summary=summary,
        overhead_seconds=overhead,
        break_even_seconds=_break_even(overhead, summary.acceleration.mean),
    )


def _outcome(run: Run, vanilla: Sequence[float]) -> Outcome:
    loss = run.trace.loss[: run.rounds + 1]
    return Outcome(
        final_loss=loss[-1],
        rounds_to_vanilla=rounds_to_level(loss, vanilla[run.rounds]),
        acceleration=acceleration(loss, vanilla, (len(vanilla) - 1) // run.rounds),
        accepted=float(np.mean(run.trace.accepted[1 : run.rounds + 1])),
        gradients=run.trace.gradients[run.rounds],
        seconds=run.trace.seconds[run.rounds],
        stopped=run.trace.stopped is not None,
    )


def _break_even(overhead_seconds: float, gained: float) -> float:
    if math.isnan(overhead_seconds):
        return math.nan
    return overhead_seconds / (gained - 1) if gained > 1 else math.inf


def describe(comparison: Comparison) -> dict[str, Any]:
    """What was run and where: the ``meta`` of compare's JSON."""
    starts = {name: comparison.problem(name, seed=0) for name in comparison.problems}
    return {
        "optex": version("optex"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dimension": {name: start.dimension for name, start in starts.items()},
        "minimum": {name: start.minimum for name, start in starts.items()},
        "batch_size": {name: getattr(start, "batch_size", None) for name, start in starts.items()},
        "noise": comparison.noise,
        "history_size": comparison.history_size,
        "options": asdict(comparison),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, meta: dict[str, Any], runs: Sequence[Run]) -> None:
    """Write meta, with a summary of the measurable runs, and all runs; what is not finite becomes null."""
    summary = [row.record() for row in summarise(measurable(runs))]
    document = {"meta": {**meta, "summary": summary}, "runs": [run.record() for run in runs]}
    write_whole(path, json.dumps(finite_or_null(document), allow_nan=False) + "\n")


def read_runs(path: Path, comparison: Comparison) -> list[Run]:
    """The runs of an earlier comparison that belong to this one; none where there is no file.

    Args:
        path: of the earlier comparison's JSON.
        comparison: the one to be made, with the same settings; problems, methods and seeds may differ.

    Raises:
        ValueError: the file is no such record, or its settings differ.
    """
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        before = dict(document["meta"]["options"])
        runs = [Run.of_record(record, comparison.rounds) for record in document["runs"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"resume: {path} is not a record of compare; move it away") from error
    wanted = json.loads(json.dumps(asdict(comparison)))
    for name in wanted:
        if name not in ("problems", "methods", "seeds") and before.get(name) != wanted[name]:
            raise ValueError(
                f"resume: {path} was made with {name} = {before.get(name)!r}, not {wanted[name]!r}; choose that"
                ", or another file"
            )
    cases = set(comparison.cases())
    # How long vanilla is run depends on the other methods: one that is too short now is made again.
    return [
        run for run in runs if run.case in cases and run.trace.rounds == comparison.setting(run.method).rounds
    ]
