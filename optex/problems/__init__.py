"""Problems: what is optimised in comparisons, each under a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from optex.problems.interface import Problem
from optex.problems.synthetic import Ackley, Function, Quadratic, Rosenbrock, Sphere
from optex.problems.tabular import DigitsMLP, LogisticBreastCancer

__all__ = [
    "PROBLEMS",
    "Ackley",
    "DigitsMLP",
    "Function",
    "LogisticBreastCancer",
    "Problem",
    "ProblemEntry",
    "Quadratic",
    "Rosenbrock",
    "Sphere",
    "make_problem",
]


@dataclass(frozen=True)
class ProblemEntry:
    """A problem as the registry knows it.

    Attributes:
        build: makes one start of it, from ``seed`` and the options.
        description: one line.
        options: what can be chosen besides the seed.
    """

    build: Callable[..., Problem]
    description: str
    options: frozenset[str]


_FUNCTION_OPTIONS: Final = frozenset({"dim", "noise"})

PROBLEMS: Final[dict[str, ProblemEntry]] = {
    "sphere": ProblemEntry(Sphere, "root mean square, with a kink at its minimum", _FUNCTION_OPTIONS),
    "ackley": ProblemEntry(Ackley, "many local minima in a funnel", _FUNCTION_OPTIONS),
    "rosenbrock": ProblemEntry(Rosenbrock, "a curved, narrow valley", _FUNCTION_OPTIONS),
    "quadratic": ProblemEntry(Quadratic, "a bowl, eigenvalues log-spaced from 1/1000 to 1", _FUNCTION_OPTIONS),
    "logistic-breast-cancer": ProblemEntry(
        LogisticBreastCancer, "logistic regression, 31 parameters, full batch", frozenset()
    ),
    "digits-mlp": ProblemEntry(
        DigitsMLP, "64-64-10 tanh network on 8 × 8 digits, minibatches", frozenset({"batch_size"})
    ),
}


def make_problem(
    name: str,
    *,
    seed: int = 0,
    dim: int | None = None,
    noise: float | None = None,
    batch_size: int | None = None,
) -> Problem:
    """One start of the problem of that name.

    Args:
        name: a key of ``PROBLEMS``.
        seed: of the start and the batches.
        dim, noise: of the functions. None is the problem's own default.
        batch_size: of the data sets that are cut into minibatches.

    Raises:
        ValueError: the name is unknown, or an option is given to a problem that has no such choice: a run
            labelled with a dimension or a noise that it did not have would be misread.
        ModuleNotFoundError: the problem's data needs a package that is not installed.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem: {name!r} is not one of {', '.join(PROBLEMS)}")
    entry = PROBLEMS[name]
    given: dict[str, Any] = {"dim": dim, "noise": noise, "batch_size": batch_size}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given.keys() - entry.options:
        choices = ", ".join(sorted(entry.options)) or "nothing but the seed"
        raise ValueError(f"make_problem: {name} has no {option} to choose; it takes {choices}")
    return entry.build(seed=seed, **given)
