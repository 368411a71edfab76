"""The public surface under arguments of all kinds: it works and its invariants hold, or refuses by name.

Each example takes good values for some arguments and at most one that may be bad. What is refused is refused
with a TypeError, a ValueError, or an error of ``optex.errors``, whose message names an argument of the call.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import optex
from optex import optimizers
from optex.batching import AdaptiveBatches, BatchSizeController, InnerProductTest, NormTest
from tests.arguments import FLAGS, INF, LONG, NAN, SMALL, arguments, finite, refused
from tests.models import network, regression_batches, squared_error

# ------------------------------------------------------------------ OptEx

OPTEX = {
    "parallelism": (1, 2, 3, np.int64(4)),
    "stride": ("auto", 1, 2, 7.5, 16),
    "history_size": (None, 1, 2, 5, 16),
    "estimator": (
        None,
        optex.HoldLast(),
        optex.CurlFreeEstimator(),
        optex.SeparableEstimator(),
        optex.SeparableEstimator("rbf", "leave-one-out", "leave-one-out"),
        optex.CommitteeEstimator(interval=1),
    ),
    "acceptance": (
        None,
        optex.WithinTolerance(0),
        optex.WithinTolerance(0.1, adaptive=False),
        optex.Last(),
        optex.Last("last"),
        optex.LowestLoss(),
        optex.SmallestGradient(),
    ),
    "evaluator": (None, "sequential", "vectorized", optex.SequentialEvaluator()),
    "deterministic": (False, True),
    "on_nonfinite": ("raise", "skip"),
    "gradient_hook": (None, lambda: None),
    "history_dtype": (None, torch.float32, torch.bfloat16),
    "history_device": (None, "cpu"),
    "shard": (None, False, True),
}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "nag": lambda p: optimizers.NAG(p, lr=0.02),
}


@pytest.mark.filterwarnings("ignore::optex.NotDeterministicWarning")
@SMALL
@given(arguments(OPTEX), st.sampled_from(sorted(BASES)))
@example({"history_dtype": torch.int64}, "adam")
@example({"history_device": "nowhere"}, "adam")
@example({"history_size": 10**400}, "adam")
def test_optex_works_or_refuses_by_name(options, base):
    model, batches = network(seed=4), regression_batches(7)
    made = lambda: optex.OptEx(BASES[base](model.parameters()), model=model, **options)  # noqa: E731
    was_refused, optimizer = refused(made, options)
    if was_refused:
        return
    taken = 0
    for number, report in enumerate(optimizer.rounds(batches, squared_error(model))):
        assert report.number == number
        assert math.isfinite(float(report.loss))
        assert report.accepted >= 1
        taken += report.accepted
        assert optimizer.steps_taken == taken
        assert finite(model)
    assert optimizer.batches_drawn == len(batches)
    twin = optex.OptEx(BASES[base](network(seed=4).parameters()), **(options | {"evaluator": None}))
    twin.load_state_dict(optimizer.state_dict())
    assert twin.steps_taken == taken


PAPER = {
    "parallelism": (1, 2, 5),
    "history_size": (1, 4, 20),
    "kernel": ("rbf", "matern-1/2", "matern-3/2", "matern-5/2", "rational-quadratic", optex.RBF()),
    "lengthscale": (0.5, 10.0, "median", "leave-one-out"),
    "noise_variance": (0.0, 1e-6, 0.1, "leave-one-out"),
    "selection": ("last", "lowest-loss", "smallest-gradient"),
    "evaluate": ("all", "last"),
}


@pytest.mark.filterwarnings("ignore::optex.JitterWarning")
@SMALL
@given(arguments(PAPER))
@example({"kernel": []})
@example({"selection": {}})
def test_from_paper_works_or_refuses_by_name(options):
    model = network(seed=4)
    made = lambda: optex.OptEx.from_paper(torch.optim.Adam(model.parameters(), lr=0.01), **options)  # noqa: E731
    was_refused, optimizer = refused(made, options)
    if not was_refused:
        assert all(math.isfinite(r.loss) for r in optimizer.rounds(regression_batches(8), squared_error(model)))
        assert finite(model)


# ------------------------------------------------------------------ minimize

STARTS = (
    [1.0, -1.0],
    2.0,
    (1, 2, 3),
    np.zeros(3, np.float32),
    np.arange(4),
    torch.ones(2, 2),
    torch.ones(3, dtype=torch.float32),
    torch.zeros((), dtype=torch.float64),
)
MINIMIZE = {
    "optimizer": ("adam", "sgd", "momentum", "adamax", "nag", torch.optim.AdamW),
    "lr": (None, 0.01, 0.1),
    "parallelism": (1, 2, 4),
    "stride": ("auto", 1, 4),
    "history_size": (None, 2, 8),
    "evaluator": (None, "sequential", "vectorized"),
    "tol": (None, 0.0, 1e-3),
    "gtol": (None, 1e-2),
    "ftol": (None, 1e-6),
    "maxiter": (1, 3, 8),
    "workers": (None, 1),
    "callback": (None, lambda x: None, lambda intermediate_result: True),
    "scheduler": (None, lambda base: torch.optim.lr_scheduler.ExponentialLR(base, 0.9)),
    "bounds": (None,),
    "options": (None, {"disp": False}),
}


def bowl(x):
    return ((x - 0.5) ** 2).sum() + 0.1 * (x**4).sum()


def slope(x):
    return 2 * (x - 0.5) + 0.4 * x**3


JACS = {"autograd": (bowl, None), "both": (lambda x: (bowl(x), slope(x)), True), "two": (bowl, slope)}


@SMALL
@given(arguments(MINIMIZE), st.sampled_from(STARTS), st.sampled_from(sorted(JACS)))
@example({"workers": torch.tensor([1.0, 2.0])}, [1.0, -1.0], "two")
def test_minimize_works_or_refuses_by_name(options, x0, jac):
    fun, derivative = JACS[jac]
    call = lambda: optex.minimize(fun, x0, jac=derivative, **({"maxiter": 5} | options))  # noqa: E731
    was_refused, result = refused(call, options, "jac")
    if was_refused:
        return
    assert type(result.x) is (torch.Tensor if isinstance(x0, torch.Tensor) else np.ndarray)
    x = torch.as_tensor(result.x)
    assert x.isfinite().all()
    assert torch.as_tensor(result.jac).shape == x.shape
    if isinstance(x0, torch.Tensor):
        assert (x.shape, x.dtype) == (x0.shape, x0.dtype)
    else:
        assert (x.shape, x.dtype) == ((np.size(x0),), torch.float64)
    assert float(result.fun) == pytest.approx(float(bowl(x)), rel=1e-5)
    assert result.success == (result.status == 0)
    assert isinstance(result.message, str)
    assert result.njev >= result.nit >= 1
    assert min(result.nfev, result.nstep) >= 0


@pytest.mark.parametrize("x0", ["x", [], [NAN], [INF], [1j], [[1.0, 2.0]], object(), None, {}])
def test_minimize_refuses_a_start_by_name(x0):
    with pytest.raises((TypeError, ValueError), match="x0"):
        optex.minimize(bowl, x0, maxiter=2)


# ------------------------------------------------------------------ optimizers

RATES = (0.0, 1e-3, 0.1, torch.tensor(0.01))
HYPERPARAMETERS = {
    "NAG": (
        lambda model, o: optimizers.NAG(model.parameters(), **o),
        {"L": (None, 10.0), "mu": (None, 0.0, 0.1), "lr": (None, 0.01), "rule": ("convex",), "maximize": FLAGS},
    ),
    "TripleMomentum": (
        lambda model, o: optimizers.TripleMomentum(model.parameters(), **o),
        {"L": (None, 10.0), "mu": (None, 0.1), "lr": (None, 0.01), "maximize": FLAGS},
    ),
    "HeavyBall": (
        lambda model, o: optimizers.HeavyBall(model.parameters(), **o),
        {"L": (None, 10.0), "mu": (None, 0.1), "lr": (None, 0.01), "maximize": FLAGS},
    ),
    "AdaGradNorm": (
        lambda model, o: optimizers.AdaGradNorm(model.parameters(), **o),
        {"lr": RATES, "initial_accumulator": (1e-2, 1.0), "maximize": FLAGS},
    ),
    "AdaHessian": (
        lambda model, o: optimizers.AdaHessian(model.parameters(), **o),
        {
            "lr": RATES,
            "betas": ((0.9, 0.999), (0.0, 0.0), (1.0, 0.5), (0.9,)),
            "eps": (1e-4, 1e-8),
            "weight_decay": (0.0, 0.1),
            "hessian_power": (0.0, 0.5, 1.0),
            "average": ("absolute", "signed"),
            "block": ("kernels", "rows", "elements", 2),
            "maximize": FLAGS,
        },
    ),
    "MFAC": (
        lambda model, o: optimizers.MFAC(model.parameters(), **({"window_size": 4} | o)),
        {
            "lr": RATES,
            "window_size": (1, 2, 5),
            "damping": (1e-5, 0.1),
            "momentum": (0.0, 0.9),
            "weight_decay": (0.0, 0.1),
            "decoupled_weight_decay": FLAGS,
            "window_dtype": (None, torch.float32),
            "maximize": FLAGS,
        },
    ),
    "SCALE": (
        lambda model, o: optimizers.SCALE.of(model, **o),
        {"lr": RATES, "last": (None, "2"), "tied": (None,)},
    ),
    "MKOR": (
        lambda model, o: optimizers.MKOR.with_sgd(model, **({"lr": 0.01} | o)),
        {
            "lr": (1e-3, 0.1),
            "momentum": (0.0, 0.9),
            "weight_decay": (0.0, 0.1),
            "variant": ("released", "exact"),
            "interval": (1, 3),
            "decay": (0.5, 0.95),
            "threshold": (None, 2.0),
            "reset": (None, 0.5),
            "hybrid": FLAGS,
            "period": (2, 100),
        },
    ),
}


@pytest.mark.filterwarnings("ignore:MKOR. hybrid=True, and no loss was seen:UserWarning")
@pytest.mark.parametrize("name", HYPERPARAMETERS)
@SMALL
@given(data=st.data())
def test_optimizers_work_or_refuse_by_name(name, data):
    make, good = HYPERPARAMETERS[name]
    options, model = data.draw(arguments(good)), network(seed=4)
    was_refused, optimizer = refused(lambda: make(model, options), good)
    if was_refused:
        return
    for batch in regression_batches(3):
        optimizer.zero_grad()
        squared_error(model)(batch).backward(create_graph=name == "AdaHessian")
        was_refused, _ = refused(optimizer.step, good, "parameters")
        assert finite(model)
        model.zero_grad()
        if was_refused:
            return
    optimizer.load_state_dict(optimizer.state_dict())


# ------------------------------------------------------------------ batching

BATCHES = {
    "batch_size": (1, 2, 7),
    "maximum": (None, 7, 20),
    "test": (None, NormTest(), NormTest(0.3), InnerProductTest()),
    "growth": (1.5, 2.0),
    "shuffle": FLAGS,
    "drop_last": FLAGS,
    "seed": (0, 5),
}


@SMALL
@given(arguments(BATCHES), st.sampled_from((20, range(33), 2, 1, 0, -1, 2.5, "", None)))
def test_adaptive_batches_work_or_refuse_by_name(options, data):
    options = {"batch_size": 2} | options
    was_refused, sampler = refused(lambda: AdaptiveBatches(data, **options), options, "data")
    if was_refused:
        return
    count = data if isinstance(data, int) else len(data)
    for _ in range(2):
        drawn = [index for batch in sampler for index in batch]
        assert len(drawn) == len(set(drawn)) <= count
        assert set(drawn) <= set(range(count))
        assert options.get("drop_last") or len(drawn) == count


@SMALL
@given(arguments({name: BATCHES[name] for name in ("batch_size", "maximum", "test", "growth")}))
def test_batch_size_controllers_work_or_refuse_by_name(options):
    options = {"batch_size": 2, "maximum": 20} | options
    was_refused, controller = refused(lambda: BatchSizeController(**options), options)
    if not was_refused:
        assert options["batch_size"] <= controller.batch_size <= options["maximum"]


# ------------------------------------------------------------------ other doors

CBO = {
    "particles": (None, 5, 20),
    "spread": (None, 0.5),
    "alpha": (1.0, 100.0),
    "sigma": (0.1, 1.6),
    "drift": (0.5, 1.0),
    "dt": (0.01, 0.1),
    "noise": ("isotropic", "anisotropic"),
    "vectorized": FLAGS,
    "workers": (None, 1),
    "seed": (None, 0, 3),
    "maxiter": (1, 5),
    "xtol": (0.0, 1e-3),
}
GNS = {
    "curvature": ("exact", "none"),
    "metric": (None,),
    "smoothness": (0.1, 1.0),
    "least_smoothness": (1e-9, 1e-3),
    "eps": (1e-8,),
    "trials": (1, 5),
    "cg_tolerance": (0.1, 1e-6),
    "cg_iterations": (1, 20),
    "parallelism": (None, 1, 3),
    "workers": (None, 1),
    "maxiter": (1, 5),
    "gtol": (0.0, 1e-2),
}
DOORS = {"cbo_minimize": (optex.cbo_minimize, CBO), "minimize_gns": (optex.minimize_gns, GNS)}


@pytest.mark.filterwarnings("ignore:cbo_minimize. isotropic noise:RuntimeWarning")
@pytest.mark.parametrize("name", DOORS)
@SMALL
@given(data=st.data())
def test_other_doors_work_or_refuse_by_name(name, data):
    door, good = DOORS[name]
    options, x0 = data.draw(arguments(good)), data.draw(st.sampled_from(STARTS))
    value = bowl if not options.get("vectorized") else lambda x: ((x - 0.5) ** 2).reshape(len(x), -1).sum(1)
    was_refused, result = refused(lambda: door(value, x0, **({"maxiter": 3} | options)), options, "x0")
    if not was_refused:
        assert torch.as_tensor(result.x).isfinite().all()
        assert math.isfinite(float(result.fun))
        assert result.success == (result.status == 0)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "variant", "hybrid"])
@pytest.mark.parametrize("value", [None, NAN, -1.0, [], "strange"])
def test_mkor_refuses_settings_of_its_own_sgd_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=f"MKOR: {name}"):
        optimizers.MKOR.with_sgd(network(), **{name: value})


@pytest.mark.parametrize("value", [True, torch.ones(2), NAN, "x"])
def test_minimize_refuses_an_option_of_the_optimizer_that_is_no_number_by_name(value):
    with pytest.raises(ValueError, match="minimize: weight_decay"):
        optex.minimize(bowl, [1.0, 2.0], maxiter=2, weight_decay=value)


@pytest.mark.parametrize("name", ["tol", "gtol", "ftol", "weight_decay"])
def test_minimize_takes_integers_of_any_size_that_a_float_holds(name):
    held: dict[str, Any] = {name: 10**20}
    assert np.isfinite(optex.minimize(bowl, [1.0, 2.0], lr=1e-9, maxiter=2, **held).x).all()
    beyond: dict[str, Any] = {name: 10**400}
    with pytest.raises(ValueError, match=name):
        optex.minimize(bowl, [1.0, 2.0], maxiter=2, **beyond)


@pytest.mark.parametrize("name", ["shuffle", "drop_last", "growth"])
def test_adaptive_batches_refuse_tensors_where_they_take_none(name):
    setting: dict[str, Any] = {name: torch.ones(2)}
    with pytest.raises((TypeError, ValueError), match=name):
        AdaptiveBatches(20, 2, **setting)


@pytest.mark.filterwarnings("ignore:cbo_minimize. isotropic noise:RuntimeWarning")
def test_a_sigma_whose_square_is_no_number_any_more_is_warned_of_and_not_an_overflow():
    result = optex.cbo_minimize(bowl, [1.0, 2.0, 3.0], sigma=1e300, maxiter=1, seed=0)
    assert np.isfinite(result.x).all()


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (
            lambda: optex.OptEx(torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1), stride=LONG),
            "stride",
        ),
        (
            lambda: optex.OptEx(torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1), stride=-LONG),
            "stride",
        ),
        (lambda: optex.WorkersEvaluator(2, timeout=LONG), "timeout"),
        (lambda: optex.SeparableEstimator(lengthscale=LONG), "lengthscale"),
        (lambda: optex.SeparableEstimator(noise_variance=LONG), "noise_variance"),
        (lambda: optex.minimize(lambda x: (x**2).sum(), [1.0], lr=LONG), "lr"),
        (
            lambda: optex.minimize(lambda x: (x**2).sum(), [1.0], optimizer="adam", weight_decay=LONG),
            "weight_decay",
        ),
    ],
)
def test_an_integer_too_long_for_a_float_is_refused_by_name(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_a_setting_beyond_the_precision_of_the_start_is_refused_by_name():
    start = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weight_decay=1e\+30 is beyond 65504.*float16.*x0 in float64"):
        optex.minimize(lambda x: (x**2).sum(), start, optimizer="adam", lr=0.1, weight_decay=1e30)


@pytest.mark.parametrize("name", ["tolerance", "error", "lowest", "highest", "absurd", "lookahead"])
@pytest.mark.parametrize("value", [True, "2", [1.0]])
def test_a_tolerance_that_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"WithinTolerance: {name} must be a number, got"):
        optex.WithinTolerance(**{name: value})


def test_whether_a_tolerance_adapts_is_a_flag():
    with pytest.raises(TypeError, match="WithinTolerance: adaptive must be True or False, got 1"):
        optex.WithinTolerance(adaptive=1)  # pyright: ignore[reportArgumentType]


def test_a_learning_rate_below_zero_is_refused_by_name():
    with pytest.raises(ValueError, match="minimize: lr must be a finite number at least 0, got -1"):
        optex.minimize(bowl, [1.0, 2.0], lr=-1, maxiter=2)


def test_a_lookahead_without_end_is_refused_by_name():
    with pytest.raises(ValueError, match="lookahead must be at least 1 and finite, or None, got inf"):
        optex.WithinTolerance(lookahead=INF)


def test_residuals_and_jacobian_of_two_precisions_meet_in_the_higher_one():
    found = optimizers.power_fisher(torch.tensor([1.0, 1.0]), np.diag([1.0, 2.0]), 4)
    torch.testing.assert_close(found.vector, torch.tensor([1.0, 2.0], dtype=torch.float64))
