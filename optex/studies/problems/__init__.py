"""Problems: what is optimised in comparisons, each under a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Final

from optex.studies.problems.bayesian import BayesianLogistic
from optex.studies.problems.canyon import Canyon
from optex.studies.problems.control import OPTIONS as _CONTROL_OPTIONS
from optex.studies.problems.control import Acrobot, CartPole, MountainCar
from optex.studies.problems.denoise import Denoise
from optex.studies.problems.digits_regularisation import DigitsRegularisation
from optex.studies.problems.forward import DigitsForward
from optex.studies.problems.gaussian_process import GaussianProcessHyperparameters
from optex.studies.problems.heat import HeatConduction
from optex.studies.problems.images import CIFAR10, FashionMNIST
from optex.studies.problems.interface import Problem
from optex.studies.problems.lq_policy import LinearQuadraticPolicy
from optex.studies.problems.moons import TwoMoons
from optex.studies.problems.networks import CLASSIFIERS
from optex.studies.problems.sketched import LogisticSketched
from optex.studies.problems.source_weights import SourceMixture
from optex.studies.problems.synthetic import Ackley, Function, Quadratic, Rosenbrock, Sphere
from optex.studies.problems.tabular import DigitsMLP, LogisticBreastCancer
from optex.studies.problems.text import Shakespeare
from optex.studies.problems.transport import SparseTransport

__all__ = [
    "CIFAR10",
    "PROBLEMS",
    "Ackley",
    "Acrobot",
    "BayesianLogistic",
    "Canyon",
    "CartPole",
    "DigitsForward",
    "Denoise",
    "DigitsMLP",
    "DigitsRegularisation",
    "FashionMNIST",
    "Function",
    "GaussianProcessHyperparameters",
    "HeatConduction",
    "LinearQuadraticPolicy",
    "LogisticBreastCancer",
    "LogisticSketched",
    "MountainCar",
    "Problem",
    "ProblemEntry",
    "Quadratic",
    "Rosenbrock",
    "Shakespeare",
    "SourceMixture",
    "SparseTransport",
    "Sphere",
    "TwoMoons",
    "make_problem",
]


@dataclass(frozen=True)
class ProblemEntry:
    """A problem as the registry knows it.

    Attributes:
        build: makes one start of it, from ``seed`` and the options.
        description: one line.
        options: what can be chosen besides the seed, with the type of each.
        data: the data set that it needs, a key of ``optex.studies.problems.data.DATA_SETS``; None for none.
        test_measure: what its ``test_error`` measures, for the axis of a picture.
        values: the values of those options that are words.
    """

    build: Callable[..., Problem]
    description: str
    options: Mapping[str, type] = field(default_factory=dict)
    data: str | None = None
    test_measure: str = "test error"
    values: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def shown(self, option: str) -> str:
        """An option's default and then its other values; its type where the problem chooses the default."""
        settings = getattr(self.build, "defaults", None)
        parameters = signature(self.build).parameters
        default = parameters[option].default if option in parameters else getattr(settings, option)
        values = tuple(self.values.get(option, ()))
        if self.options[option] is bool:
            values, default = ("true", "false"), str(default).lower()
        if values:
            return "|".join((default, *(value for value in values if value != default)) if default else values)
        if default is None:
            return f"<{self.options[option].__name__}>"
        return default if isinstance(default, str) else f"{default:g}"


_FUNCTION_OPTIONS: Final = {"dim": int, "noise": float}
_IMAGE_OPTIONS: Final = {
    "model": str,
    "width": int,
    "depth": int,
    "batch_size": int,
    "train_size": int,
    "held_size": int,
    "test_size": int,
    "augment": bool,
}
_IMAGE_VALUES: Final = {"model": tuple(CLASSIFIERS)}
_TEXT_OPTIONS: Final = {
    "layers": int,
    "heads": int,
    "width": int,
    "context": int,
    "dropout": float,
    "batch_size": int,
    "held_size": int,
    "test_size": int,
    "start": str,
}

PROBLEMS: Final[dict[str, ProblemEntry]] = {
    "sphere": ProblemEntry(Sphere, "root mean square, with a kink at its minimum", _FUNCTION_OPTIONS),
    "ackley": ProblemEntry(Ackley, "many local minima in a funnel", _FUNCTION_OPTIONS),
    "rosenbrock": ProblemEntry(Rosenbrock, "a curved, narrow valley", _FUNCTION_OPTIONS),
    "quadratic": ProblemEntry(Quadratic, "a bowl, eigenvalues log-spaced from 1/1000 to 1", _FUNCTION_OPTIONS),
    "logistic-breast-cancer": ProblemEntry(
        LogisticBreastCancer, "logistic regression, 31 parameters, full batch"
    ),
    "bayesian-logistic": ProblemEntry(
        BayesianLogistic, "variational inference of it, sampled gradients", {"samples": int}
    ),
    "logistic-sketched": ProblemEntry(
        LogisticSketched,
        "the logistic regression, gradients through random sketches",
        {"sketch_size": int, "kind": str},
        values={"kind": ("gaussian", "srht", "count", "ams")},
    ),
    "gp-hyperparameters": ProblemEntry(
        GaussianProcessHyperparameters, "marginal likelihood of a Gaussian process", {"rows": int}
    ),
    "denoise": ProblemEntry(Denoise, "weights of a denoiser's filters: bilevel, inexact", {"images": int}),
    "heat": ProblemEntry(
        HeatConduction,
        "conductivity of a plate from readings of its warmth",
        {"size": int, "heaters": int, "heaters_at_once": int},
    ),
    "canyon": ProblemEntry(Canyon, "a rippled canyon, by the consensus of samples", {"samples": int}),
    "digits-mlp": ProblemEntry(
        DigitsMLP, "64-64-10 tanh network on 8 × 8 digits, minibatches", {"batch_size": int}
    ),
    "digits-forward": ProblemEntry(
        DigitsForward,
        "the same, by forward passes along random directions",
        {"batch_size": int, "queries": int},
    ),
    "digits-regularisation": ProblemEntry(
        DigitsRegularisation,
        "L2 weight of each class on 8 × 8 digits, by hypergradients",
        {"train_size": int, "held_size": int},
    ),
    "two-moons": ProblemEntry(TwoMoons, "2-16-16-2 network on two half moons, a coordinate at a time"),
    "source-weights": ProblemEntry(
        SourceMixture, "weights of four data sources, two of them noise, by a minimax penalty", {"alpha": float}
    ),
    "fashion-mnist": ProblemEntry(
        FashionMNIST,
        "MLP or CNN on images of clothes",
        _IMAGE_OPTIONS,
        data="fashion-mnist",
        values=_IMAGE_VALUES,
    ),
    "cifar10": ProblemEntry(
        CIFAR10, "residual MLP or ResNet on photographs", _IMAGE_OPTIONS, data="cifar10", values=_IMAGE_VALUES
    ),
    "sparse-transport": ProblemEntry(
        SparseTransport,
        "colours matched between two photographs, semi-dual of sparse transport",
        {"sources": int, "targets": int, "k": int, "gamma": float, "columns": int},
    ),
    "shakespeare": ProblemEntry(
        Shakespeare,
        "transformer on the characters of plays",
        _TEXT_OPTIONS,
        data="shakespeare",
        test_measure="test loss",
        values={"start": ("torch", "gpt2")},
    ),
    "lq-policy": ProblemEntry(
        LinearQuadraticPolicy, "policy of a linear system, by its trajectories", {"trajectories": int}
    ),
    "cartpole": ProblemEntry(CartPole, "deep Q-learning: balance a pole", _CONTROL_OPTIONS),
    "acrobot": ProblemEntry(Acrobot, "deep Q-learning: swing a double pendulum up", _CONTROL_OPTIONS),
    "mountain-car": ProblemEntry(MountainCar, "deep Q-learning: rock a car out of a valley", _CONTROL_OPTIONS),
}


def make_problem(name: str, *, seed: int = 0, **options: Any) -> Problem:
    """One start of the problem of that name.

    Args:
        name: a key of ``PROBLEMS``.
        seed: of the start and the batches.
        options: those of its entry, by their names: ``dim``, ``noise``, ``batch_size``, ``model``, ... None
            stands for the problem's own default.

    Raises:
        ValueError: the name is unknown, or the problem has no such option: ignoring it would leave runs
            labelled with a dimension or a noise that they did not have.
        ModuleNotFoundError: the problem's data needs a package that is not installed.
        FileNotFoundError: the problem's data is not on this machine; the message says how to get it.

    >>> make_problem("sphere", seed=1, dim=4).dimension
    4
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem: {name!r} is not one of {', '.join(PROBLEMS)}")
    entry = PROBLEMS[name]
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in entry.options:
            choices = ", ".join(sorted(entry.options)) or "nothing but the seed"
            raise ValueError(f"make_problem: {name} has no {option} to choose; it takes {choices}")
    return entry.build(seed=seed, **given)
