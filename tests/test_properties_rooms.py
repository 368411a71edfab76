"""The rooms beside the family's under arguments of all kinds, and that no public callable is left out.

As in ``tests/test_properties_family.py``, whose tables these are beside.
"""

from __future__ import annotations

import importlib
import inspect
import io
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import optex
from optex import batching, optimizers, stepping, theory
from optex import round as rounds
from tests import test_properties, test_properties_family
from tests.arguments import FLAGS, SMALL, Door, merged, sweep, try_together
from tests.models import network, regression_batches, squared_error

F64: Final = torch.float64
BATCHES = regression_batches(2)


def stepped(make):
    """An optimizer of a small network, after two steps by closures."""

    def call(**options):
        model = network(seed=4)
        optimizer = make(model.parameters(), **options)
        for batch in BATCHES:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = squared_error(model)(batch)
                if torch.is_grad_enabled():
                    loss.backward()
                return loss

            optimizer.step(closure)
        return model

    return call


def run(**options):
    """Three batches through OptEx with one of its parts."""
    model = network(seed=4)
    optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=2, **options)
    reports = list(optimizer.rounds(regression_batches(3), squared_error(model)))
    assert sum(report.accepted for report in reports) >= 1
    return model


def vectorized(model, **options):
    model = network(seed=4) if model == "its own" else model
    made = optex.VectorizedEvaluator(model, **options)
    optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=2, evaluator=made)
    list(optimizer.rounds(regression_batches(3), squared_error(model)))
    return model


def stepped_without_backward(**options):
    model = network(seed=4)
    optimizer = optimizers.GNS(model.parameters(), **options)
    optimizer.step(lambda: squared_error(model)(BATCHES[0]))
    return model


def history(**options):
    made = optex.GradientHistory(**options)
    return made.size, made.dimension


def advised(**options):
    model = network(seed=4)
    return optex.advise(
        torch.optim.SGD(model.parameters(), lr=0.05),
        regression_batches(12),
        squared_error(model),
        **merged({"quiet": True}, options),
    ).optimizer


LANGUAGE_MODEL = nn.Module()
LANGUAGE_MODEL.transformer = nn.ModuleDict(
    {"wte": nn.Embedding(5, 4), "h": nn.ModuleList([nn.Linear(4, 4)]), "ln_f": nn.LayerNorm(4)}
)
LANGUAGE_MODEL.lm_head = nn.Linear(4, 5)


def streamer(**options):
    torch.manual_seed(0)
    if options["blocks"] == "its own":
        options["blocks"] = [nn.Linear(3, 3), nn.Linear(3, 3)]
    made = optimizers.BlockStreamer(**options)
    found = made.step(torch.ones(2, 3), lambda out: out.square().mean())
    made.flush()
    return found


def curvature(kind):
    return lambda **options: kind(**options).solve(1.0, torch.ones(2, dtype=F64))


def diagonal(**options):
    x = torch.ones(2, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
    return optimizers.hutchinson_diagonal(**merged({"parameters": [x], "gradients": [gradient]}, options))


class Base:
    """A logger that keeps what it is told."""

    def log(self, numbers: dict[str, Any]) -> None:
        assert numbers


_RATES = (0.01, torch.tensor(0.01))
_RESIDUALS = {"residuals": (np.array([3.0, 4.0]), torch.tensor([3.0, 4.0])), "power": (2.0, 4)}
_JACOBIAN = {"jacobian": (np.eye(2), torch.eye(2))}
_SMALL_KERNELS = ("rbf", "matern-5/2", optex.RBF())

DOORS: dict[str, Door] = {
    # round
    "WithinTolerance": Door(
        lambda **o: run(acceptance=optex.WithinTolerance(**o)),
        {
            "tolerance": (2.0, 0, 8),
            "adaptive": (True, False),
            "error": (0.5, 1),
            "lowest": (0.1, 1),
            "highest": (32.0, 64),
            "absurd": (20.0, 100),
            "lookahead": (None, 2.0),
        },
    ),
    "Last": Door(lambda **o: run(acceptance=optex.Last(**o)), {"evaluate": ("all", "last")}),
    "default_history_size": Door(rounds.default_history_size, {"parallelism": (1, 4, 32)}),
    "read_stride": Door(rounds.read_stride, {"stride": ("auto", 1, 7.5)}),
    "streamed": Door(
        lambda **o: list(optex.streamed(reports=[], **o)),
        {"to": (Base(),), "prefix": ("optex/", "")},
    ),
    # estimators
    "SeparableEstimator": Door(
        lambda **o: run(estimator=optex.SeparableEstimator(**o)),
        {
            "kernel": _SMALL_KERNELS,
            "lengthscale": ("median", "leave-one-out", 2.0),
            "noise_variance": (1e-6, "leave-one-out", 0.1),
            "prior_mean": ("zero", "last"),
        },
    ),
    "CurlFreeEstimator": Door(
        lambda **o: run(estimator=optex.CurlFreeEstimator(**o)),
        {
            "kernel": _SMALL_KERNELS,
            "lengthscale": (None, 2.0),
            "median_multiple": (10.0, 3),
            "noise_variance": (1e-6, 0.1),
            "prior_mean": ("last", "gls", "zero"),
            "solver": ("auto", "dense", "cg"),
        },
    ),
    "CommitteeEstimator": Door(
        lambda **o: run(estimator=optex.CommitteeEstimator(**o)),
        {
            "members": (None, [optex.HoldLast(), optex.SeparableEstimator()]),
            "memory": (0.7, 0.0),
            "interval": (2, 1),
        },
    ),
    "RationalQuadratic": Door(
        lambda **o: run(estimator=optex.SeparableEstimator(optex.RationalQuadratic(**o))), {"alpha": (1.0, 2)}
    ),
    "GradientHistory": Door(
        history,
        {
            "size": (4, 1),
            "dimension": (3, 1),
            "dtype": (F64, torch.float32),
            "device": ("cpu", torch.device("cpu")),
        },
    ),
    # evaluators
    "VectorizedEvaluator": Door(
        vectorized,
        {"model": ("its own",), "chunk_size": (None, 1), "randomness": ("error", "different", "same")},
    ),
    "WorkersEvaluator": Door(
        lambda **o: optex.WorkersEvaluator(**o).close(),
        {"timeout": (None, 5.0), "threads": (None, 1), "rebuild": (None, lambda: None)},
    ),
    # batching
    "NormTest": Door(lambda **o: batching.NormTest(**o).proposal(_STATISTICS), {"eta": (0.1, 0.5)}),
    "CoordinateTest": Door(lambda **o: batching.CoordinateTest(**o).proposal(_STATISTICS), {"eta": (0.1, 0.5)}),
    "InnerProductTest": Door(
        lambda **o: batching.InnerProductTest(**o).proposal(_STATISTICS), {"theta": (0.1, 1)}
    ),
    "AugmentedInnerProductTest": Door(
        lambda **o: batching.AugmentedInnerProductTest(**o).proposal(_STATISTICS),
        {"theta": (0.1, 1), "nu": (0.1, 1)},
    ),
    "variance_of_mean": Door(
        batching.variance_of_mean,
        {"squared_norms": (torch.tensor([1.0, 9.0]),), "squared_norm": (torch.tensor(4.0),)},
    ),
    # optimizers
    "GNS": Door(
        stepped_without_backward,
        {
            "curvature": ("exact", "none"),
            "metric": (None,),
            "smoothness": (1.0, 0.1),
            "least_smoothness": (1e-9, 1e-3),
            "eps": (1e-8,),
            "trials": (5, 1),
            "cg_tolerance": (0.1, 1e-3),
            "cg_iterations": (5, 1),
        },
        ("Metric",),
        functions=("curvature",),
    ),
    "HARPG": Door(
        lambda **o: optimizers.HARPG(network(seed=4).parameters(), **o).param_groups[0]["lr"],
        {"lr": _RATES, "eta0": (1.0, 0.5), "normalized": FLAGS, "maximize": FLAGS},
    ),
    "NIGT": Door(
        stepped(optimizers.NIGT),
        {"lr": _RATES, "eta0": (1.0, 0.5), "rest": ("iterate", "extrapolated"), "maximize": FLAGS},
    ),
    "MeZO": Door(
        stepped(optimizers.MeZO),
        {
            "lr": (1e-3, 0.0),
            "epsilon": (1e-3, 0.1),
            "weight_decay": (0.0, 0.1),
            "queries": (1, 2),
            "exact": FLAGS,
            "log_length": (None, 5),
            "maximize": FLAGS,
        },
    ),
    "BlockStreamer": Door(
        streamer,
        {
            "blocks": ("its own",),
            "device": ("cpu",),
            "lr": (1e-3, 0.0),
            "epsilon": (1e-3, 0.1),
            "weight_decay": (0.0, 0.1),
            "transfer_dtype": (None, torch.bfloat16),
        },
        ("block",),
    ),
    "language_model_blocks": Door(optimizers.language_model_blocks, {"model": (LANGUAGE_MODEL,)}),
    "scale_param_groups": Door(
        lambda **o: optimizers.scale_param_groups(**o)[0]["params"],
        {"model": (network(),), "last": (None, "2"), "tied": (None,)},
    ),
    "hutchinson_diagonal": Door(diagonal, {"probes": (1, 3)}),
    "Metric": Door(
        lambda **o: optimizers.Metric(**o).dual_norm(torch.ones(2, dtype=F64)),
        {"matrix": (None, [4.0, 1.0], np.eye(2))},
    ),
    "DenseCurvature": Door(curvature(optimizers.DenseCurvature), {"matrix": (np.eye(2), torch.eye(2))}),
    "RankOneCurvature": Door(
        curvature(optimizers.RankOneCurvature),
        {"vector": ([1.0, 0.0], torch.ones(2)), "weight": (1.0, -0.1)},
        ("gradient has",),
    ),
    "WindowCurvature": Door(
        curvature(optimizers.WindowCurvature), {"rows": ([[1.0, 0.0]],), "weights": (1.0, [2.0])}
    ),
    "ProductCurvature": Door(
        curvature(optimizers.ProductCurvature),
        {"product": (lambda v: 2 * v,), "tolerance": (0.1, 1e-6), "iterations": (5, 1)},
    ),
    "power_fisher": Door(lambda **o: optimizers.power_fisher(**o).vector, _RESIDUALS | _JACOBIAN),
    "power_gauss_newton": Door(lambda **o: optimizers.power_gauss_newton(**o).rows, _RESIDUALS | _JACOBIAN),
    # stepping
    "base_optimizer": Door(
        lambda **o: stepping.base_optimizer(of=network(), **o).param_groups[0]["lr"],
        {"name": ("adam", "sgd")},
        ("optimizer",),
    ),
    "check_base": Door(stepping.check_base, {"base": (torch.optim.SGD(network().parameters(), lr=0.1),)}),
    "check_name": Door(stepping.check_name, {"name": ("adam",)}, ("optimizer",)),
    "default_rate": Door(stepping.default_rate, {"optimizer": ("adam", "sgd")}),
    # theory
    "error_bound": Door(
        theory.error_bound, {"deviation": (0.1, 0), "dimension": (3, 1), "confidence": (0.95, 0.5)}
    ),
    "information_gain": Door(
        lambda **o: theory.information_gain(**o).total,
        {
            "points": (torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64),),
            "kernel": (None, *_SMALL_KERNELS),
            "lengthscale": (None, 2.0),
            "noise_variance": (1e-6, 0.1),
        },
    ),
    "stationarity_bound": Door(
        theory.stationarity_bound,
        {
            "rounds": (10, 1),
            "parallelism": (2, 1),
            "lr": (0.1, 0.01),
            "gap": (1.0, 0),
            "smoothness": (1.0, 2),
            "noise_variance": (0.0, 1),
            "squared_error": (0.0, 1),
        },
    ),
    # advice: what is odd is refused before anything is measured, or the least time is
    "advise": Door(
        advised,
        {
            "model": (None,),
            "deterministic": (False, True),
            "seconds": (0.01, 0.05),
            "file": (None, io.StringIO()),
            "quiet": (True,),
        },
    ),
}
_STATISTICS = batching.GradientStatistics(8, 2.0, 6.0, 1.0, 0.5)

# ------------------------------------------------------------------ nothing is left out

# Public callables in no table, with the reason.
MADE_BY_THE_LIBRARY: Final = "holds what the library found; nobody is asked to make one"
TO_SUBCLASS: Final = "a base to subclass; its subclasses are in the tables"
OF_NOTHING: Final = "takes no arguments"
INSIDE: Final = "a part of the round, called with what the front doors have checked"
EXCEPTIONS: Final = {
    **dict.fromkeys(
        ("Advice", "Candidate", "RoundReport", "CalibrationSummary", "Comparison"), MADE_BY_THE_LIBRARY
    ),
    **dict.fromkeys(
        ("Evaluation", "EvaluationRequest", "GradientStatistics", "InformationGain"), MADE_BY_THE_LIBRARY
    ),
    **dict.fromkeys(
        ("Leakage", "RitzVectors", "Traffic", "Status", "outcome", "ReportStream"), MADE_BY_THE_LIBRARY
    ),
    **dict.fromkeys(("SeparablePosterior", "CurlFreePosterior"), MADE_BY_THE_LIBRARY),
    **dict.fromkeys(("CommitteePosterior", "RandomDraws"), MADE_BY_THE_LIBRARY),
    "StepRule": TO_SUBCLASS,
    **dict.fromkeys(("FreezesWhileDrafting", "ObservesEvaluations"), "a protocol"),
    **dict.fromkeys(("HoldLast", "RBF", "Matern12", "Matern32", "Matern52", "NoCurvature"), OF_NOTHING),
    **dict.fromkeys(("SequentialEvaluator", "LowestLoss", "SmallestGradient"), OF_NOTHING),
    **dict.fromkeys(("GradientMoments", "Calibration"), OF_NOTHING),
    **dict.fromkeys(
        ("PlannedStep", "Predictor", "Progress", "RoundLoop", "RoundRecord", "RoundRequest"), INSIDE
    ),
    **dict.fromkeys(("Rounds", "alone", "described", "Attributes", "Buffers", "FlatStepper"), INSIDE),
    **dict.fromkeys(("Hyperparameters", "LinearRule", "ParameterVector", "Snapshot", "Stepper"), INSIDE),
    **dict.fromkeys(("check_settings", "GradientMask", "Ranks", "lay_out"), INSIDE),
    "DistributedEvaluator": "needs a process group; tests/test_distributed.py has what it refuses",
    "sketched_hook": "called by DistributedDataParallel, with its bucket",
    "OptExOptimizer": "tests/test_ase.py calls it wrongly in every way",
}
ROOMS: Final = (
    *("advice", "ase", "batching", "distributed", "estimators", "evaluators", "minimizers", "optimizers"),
    *("regularisers", "round", "solvers", "sources", "stepping", "theory"),
)


def public() -> dict[str, Any]:
    """All public callables but errors, warnings and abstract classes, by name."""
    found = {name: getattr(optex, name) for name in optex.__all__}
    for room in ROOMS:
        try:
            module = importlib.import_module(f"optex.{room}")
        except ModuleNotFoundError:  # optex.ase, where ASE is not installed
            if room != "ase":
                raise
            continue
        found |= {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in found.items()
        if callable(value)
        and not inspect.isabstract(value)
        and not (isinstance(value, type) and issubclass(value, Exception))
    }


TABLED: Final = (
    {"OptEx", "minimize", "AdaptiveBatches", "BatchSizeController"}
    | test_properties.HYPERPARAMETERS.keys()
    | test_properties.DOORS.keys()
    | test_properties_family.DOORS.keys()
    | DOORS.keys()
)


def test_every_public_callable_is_in_a_table_or_excepted_with_a_reason():
    names = public().keys()
    assert sorted(names - TABLED - EXCEPTIONS.keys()) == []
    assert sorted(EXCEPTIONS.keys() & TABLED) == []
    assert sorted(EXCEPTIONS.keys() - names - {"OptExOptimizer"}) == []


def test_what_is_excepted_for_taking_nothing_takes_nothing():
    for name, reason in EXCEPTIONS.items():
        if reason == OF_NOTHING:
            assert not inspect.signature(public()[name]).parameters, name


def test_tables_name_arguments_that_there_are():
    for name, door in (test_properties_family.DOORS | DOORS).items():
        taken = inspect.signature(public()[name]).parameters
        unknown = [key for key in door.good if key not in taken]
        options = [p for p in taken.values() if p.kind is p.VAR_KEYWORD]
        assert options or not unknown, f"{name}: {unknown}"


# ------------------------------------------------------------------ the tests

pytestmark = pytest.mark.filterwarnings(
    "ignore::optex.ConvergenceWarning", "ignore::optex.JitterWarning", "ignore::optex.NotDeterministicWarning"
)


@pytest.mark.parametrize("name", DOORS)
def test_every_odd_argument_works_or_is_refused_by_name(name):
    sweep(DOORS[name])


@pytest.mark.parametrize("name", DOORS)
@settings(SMALL, max_examples=8)
@given(data=st.data())
def test_arguments_together_work_or_are_refused_by_name(name, data):
    try_together(DOORS[name], data)
