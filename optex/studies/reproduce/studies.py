"""What each figure of the paper runs and draws, at a small scale and at the paper's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from optex.checks import check_integer, shown
from optex.optimizer import OptEx
from optex.studies.baselines import METHODS, Method, Setting, Trace
from optex.studies.baselines.with_optex import history_choice, optex, run_rounds
from optex.studies.comparison import Comparison
from optex.studies.measures import VANILLA
from optex.studies.problems import PROBLEMS, Problem

__all__ = [
    "FIGURES",
    "FITTED",
    "LAST_ONLY",
    "SCALES",
    "Choice",
    "Curve",
    "Figure",
    "Section",
    "View",
    "make_figure",
]

SCALES: Final = ("small", "paper")
LAST_ONLY: Final = "evaluating the last only"
FITTED: Final = "optex-paper, fitted"  # Algorithm 1 with length scale and noise by leave-one-out
_HISTORY: Final = 20  # T0 of the paper, as far as we know
_USUAL: Final = (VANILLA, "target", "data-parallel", "optex-paper", "optex")


@dataclass(frozen=True)
class Choice:
    """What a user may choose about a figure; None stands for the figure's own.

    Attributes:
        scale: ``"small"`` takes minutes on 2 cores, ``"paper"`` has the paper's sizes as far as we know them.
        seeds: how many starts of each problem, seeds 0, 1, ...; at least 1.
        rounds: of every method but vanilla, whose rounds are in proportion; at least 1.
        dim: of the functions (fig2, fig6), at least 2.

    Raises:
        ValueError: one of them is out of range.
    """

    scale: str = "small"
    seeds: int | None = None
    rounds: int | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale: must be one of {', '.join(SCALES)}, got {shown(self.scale)}")
        for name, least in (("seeds", 1), ("rounds", 1), ("dim", 2)):
            value = getattr(self, name)
            if value is not None:
                check_integer(None, name, value, least=least)


@dataclass(frozen=True)
class Curve:
    """A line of a figure: a method, and its settings where they differ from the section's.

    Attributes:
        label: its name, unique in its section.
        run: runs a problem from its start for a setting's rounds.
        parallelism, history_size: N and T0; None for the section's.
    """

    label: str
    run: Method
    parallelism: int | None = None
    history_size: int | None = None


@dataclass(frozen=True)
class Section:
    """A problem and the methods that are run on it.

    Attributes:
        name: unique in its figure.
        comparison: one problem, the base optimizer, N, T0, rounds and seeds.
        curves: vanilla first.
        vanilla_rounds: for how many rounds vanilla is run.
        level_round: vanilla's loss after so many rounds is the level that all methods are timed to.
        tests: after how many rounds the test error is measured, the start not counted; 0 for none.
    """

    name: str
    comparison: Comparison
    curves: tuple[Curve, ...]
    vanilla_rounds: int
    level_round: int
    tests: int = 0

    @property
    def problem(self) -> str:
        """The problem's name."""
        return self.comparison.problems[0]

    def setting(self, curve: Curve) -> Setting:
        """The setting that a curve is run with."""
        usual = self.comparison.setting(curve.label)
        return replace(
            usual,
            parallelism=curve.parallelism or usual.parallelism,
            history_size=curve.history_size or usual.history_size,
            rounds=self.vanilla_rounds if curve.label == VANILLA else self.comparison.rounds,
        )


@dataclass(frozen=True)
class View:
    """A panel of the picture.

    Attributes:
        title: above it.
        section: whose runs it shows.
        labels: of the curves that it shows.
        values: ``"loss"``, its gap to the minimum where that is known; ``"test"`` error; ``"reward"``, minus
            the loss; or ``"steps"`` kept so far.
        against: ``"rounds"`` or ``"gradients"``.
        last_round: where vanilla's line ends; None for all of it.
        family: where the labels are values of one quantity, in order: the legend's name for the section's own
            value; the lines are then coloured in order. None where they are not.
    """

    title: str
    section: str
    labels: tuple[str, ...]
    values: Literal["loss", "test", "reward", "steps"] = "loss"
    against: Literal["rounds", "gradients"] = "rounds"
    last_round: int | None = None
    family: str | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    Attributes:
        name: ``"fig2"``, ...
        title: one line.
        sections: what is run.
        views: what is drawn, row by row.
        columns: panels a row.
        judged_by: what its page compares the methods by: ``"loss"``, or ``"reward"``, which is minus the loss.
    """

    name: str
    title: str
    sections: tuple[Section, ...]
    views: tuple[View, ...]
    columns: int
    judged_by: Literal["loss", "reward"] = "loss"

    def section(self, name: str) -> Section:
        """The section of that name."""
        return next(section for section in self.sections if section.name == name)


def make_figure(name: str, choice: Choice) -> Figure:
    """The figure of that name.

    Raises:
        ValueError: the name is unknown, or a choice does not go with the figure.
    """
    if name not in FIGURES:
        raise ValueError(f"figure: {name!r} is not one of {', '.join(FIGURES)}")
    figure = FIGURES[name](choice)
    if choice.dim is not None and not any("dim" in PROBLEMS[part.problem].options for part in figure.sections):
        raise ValueError(
            f"dim: got {choice.dim}, but the problems of {name} have their own; it is for fig2 and fig6"
        )
    return figure


def _usual(*names: str) -> tuple[Curve, ...]:
    return tuple(Curve(name, METHODS[name].run) for name in names or _USUAL)


def _labels(curves: Iterable[Curve]) -> tuple[str, ...]:
    return tuple(curve.label for curve in curves)


def _paper(
    label: str, *, parallelism: int | None = None, history_size: int | None = None, **choices: Any
) -> Curve:
    """Algorithm 1 with one setting changed."""

    def run(problem: Problem, setting: Setting) -> Trace:
        base = setting.base_optimizer(problem)
        optimizer = OptEx.from_paper(base, setting.parallelism, **history_choice(setting), **choices)
        return run_rounds(problem, setting, optimizer)

    return Curve(label, run, parallelism, history_size)


_FITTED: Final = _paper(FITTED, lengthscale="leave-one-out", noise_variance="leave-one-out")


def _fig2(choice: Choice) -> Figure:
    """Functions in closed form, N = 5, T0 = 20, 5 seeds. Both learning rates: we do not know the paper's."""
    rounds = choice.rounds or 40  # the authors' published example
    sections = [
        Section(
            f"{problem}, lr {lr:g}",
            Comparison(
                (problem,),
                lr=lr,
                rounds=rounds,
                seeds=choice.seeds or 5,
                dim=choice.dim or (10_000 if choice.scale == "small" else 100_000),
                stride=1,
                history_size=_HISTORY,
            ),
            _usual(),
            vanilla_rounds=5 * rounds,
            level_round=rounds,
        )
        for lr in (0.01, 0.1)
        for problem in ("sphere", "ackley", "rosenbrock")
    ]
    views = tuple(View(part.name, part.name, _labels(part.curves), last_round=rounds) for part in sections)
    return Figure("fig2", "Synthetic functions", tuple(sections), views, columns=3)


def _fig3(choice: Choice) -> Figure:
    """Deep Q-learning, N = 4; 10 seeds where runs are short, the paper's 3 where they are long."""
    small = choice.scale == "small"
    seeds = choice.seeds or (10 if small else 3)

    def section(problem: str, usual: int) -> Section:
        rounds = choice.rounds or (usual if small else 5_000)
        comparison = Comparison(
            (problem,), lr=1e-3, parallelism=4, stride=1, history_size=_HISTORY, rounds=rounds, seeds=seeds
        )
        return Section(problem, comparison, (*_usual(), _FITTED), vanilla_rounds=rounds, level_round=rounds)

    sections = [section("cartpole", 500), section("acrobot", 500), section("mountain-car", 1_500)]
    views = tuple(View(part.name, part.name, _labels(part.curves), "reward") for part in sections)
    return Figure("fig3", "Deep Q-learning", tuple(sections), views, columns=3, judged_by="reward")


# The paper does not give the sizes of its residual MLP and its transformer: these are ours and nanoGPT's.
_LARGE: Final[dict[str, dict[str, Any]]] = {
    "cifar10": {"width": 512, "depth": 6, "augment": True},
    "shakespeare": {"layers": 6, "heads": 6, "width": 384, "context": 256, "dropout": 0.2, "batch_size": 64},
}


def _fig4(choice: Choice) -> Figure:
    """Networks on images and text, N = 4; and N = 16 on the text."""
    small = choice.scale == "small"

    def section(
        name: str, problem: str, parallelism: int, rounds: int, seeds: int, curves: tuple[Curve, ...]
    ) -> Section:
        options = {} if small else dict(_LARGE[problem])
        vanilla_rounds = rounds if parallelism == 16 else -(-5 * rounds // 3)
        return Section(
            name,
            Comparison(
                (problem,),
                lr=1e-3,
                parallelism=parallelism,
                stride=1,
                history_size=_HISTORY if parallelism <= 8 else 32,
                rounds=rounds,
                seeds=choice.seeds or seeds,
                batch_size=options.pop("batch_size", None),
                problem_options=options,
            ),
            curves,
            vanilla_rounds=vanilla_rounds,
            level_round=vanilla_rounds,
            tests=0 if parallelism == 16 else 6,
        )

    # Methods get 60 % of vanilla's rounds to reach its last loss.
    rounds = choice.rounds or (144 if small else 3_000)
    sixteen = _usual(VANILLA, "target", "optex-paper", "optex")
    short = min(rounds, 30 if small else 240)
    sections = (
        section("cifar10", "cifar10", 4, rounds, 5, (*_usual(), _FITTED)),
        section("shakespeare", "shakespeare", 4, rounds, 3, (*_usual(), _FITTED)),
        section("shakespeare, N = 16", "shakespeare", 16, short, 3, (*sixteen, _FITTED)),
    )
    return Figure("fig4", "Neural networks", sections, _network_views(*sections), columns=3)


def _network_views(images: Section, text: Section, many: Section) -> tuple[View, ...]:
    """A row for each section: loss against rounds, test error or steps kept, loss against gradients."""
    views = []
    for part in (images, text, many):
        shown = (part.name, _labels(part.curves))
        test = PROBLEMS[part.problem].test_measure
        middle = View(f"{part.name}: steps", *shown, "steps")
        views.append(View(f"{part.name}: training loss", *shown))
        views.append(View(f"{part.name}: {test}", *shown, "test") if part.tests else middle)
        views.append(View(f"{part.name}: training loss", *shown, "loss", "gradients"))
    return tuple(views)


def _fig6(choice: Choice) -> Figure:
    """Ablations of Algorithm 1 on Rosenbrock's function, N = 5, T0 = 20 unless they are what varies."""
    rounds = choice.rounds or 40
    widths, sizes = (2, 5, 10, 16), (2, 5, 10, 20, 40)
    usual = _usual()
    last = _paper(LAST_ONLY, evaluate="last")
    selections = tuple(_paper(f"keep {name}", selection=name) for name in ("lowest-loss", "smallest-gradient"))
    histories = tuple(_paper(f"T0 = {size}", history_size=size) for size in sizes if size != _HISTORY)
    parallel = tuple(_paper(f"N = {width}", parallelism=width) for width in widths if width != 5)
    ours = tuple(Curve(f"optex, N = {width}", optex, width) for width in widths if width != 5)
    kernels = tuple(
        _paper(f"{kernel} kernel", kernel=kernel)
        for kernel in ("matern-1/2", "matern-3/2", "rbf", "rational-quadratic")
    )
    section = Section(
        "rosenbrock",
        Comparison(
            ("rosenbrock",),
            lr=0.1,
            rounds=rounds,
            seeds=choice.seeds or 5,
            dim=choice.dim or (10_000 if choice.scale == "small" else 100_000),
            stride=1,
            history_size=_HISTORY,
        ),
        (*usual, last, *selections, *histories, *parallel, *ours, *kernels),
        vanilla_rounds=max(widths) * rounds,
        level_round=rounds,
    )

    def view(title: str, *labels: str, family: str | None = None) -> View:
        return View(title, section.name, labels, last_round=rounds, family=family)

    def in_order(own: str, others: tuple[Curve, ...], before: int) -> tuple[str, ...]:
        """Labels: vanilla, then the section's own value, with ``before`` of the others before it."""
        return (VANILLA, *_labels(others[:before]), own, *_labels(others[before:]))

    own_history, own_width = f"T0 = {_HISTORY} (optex-paper)", "N = 5 (optex-paper)"
    views = (
        view("(a) which proxies are evaluated", *_labels((*usual, last))),
        view("(b) which result is kept", VANILLA, "optex-paper", *_labels(selections)),
        view("(c) history T0", *in_order("optex-paper", histories, 3), family=own_history),
        view("(d) parallelism N", *in_order("optex-paper", parallel, 1), family=own_width),
        view("(e) kernel", VANILLA, "optex-paper", *_labels(kernels)),
        view("(f) parallelism N, verified", *in_order("optex", ours, 1), family="optex, N = 5"),
    )
    return Figure("fig6", "Ablations on Rosenbrock's function", (section,), views, columns=3)


FIGURES: Final[dict[str, Callable[[Choice], Figure]]] = {
    "fig2": _fig2,
    "fig3": _fig3,
    "fig4": _fig4,
    "fig6": _fig6,
}
