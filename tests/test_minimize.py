"""optex.minimize against torch's own loop, SciPy's functions, and every way to call it wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import rosen, rosen_der
from torch import Tensor

import optex
from optex.evaluators import Evaluation, EvaluationRequest, Evaluator, SequentialEvaluator
from optex.stepping import OPTIMIZERS

START = [-1.2, 1.0, 0.7]


def torch_rosen(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rosen_with_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
    return rosen(x), rosen_der(x)


def sphere(x: Any, scale: float = 1.0) -> Any:
    return scale * (x**2).sum()


def sphere_gradient(x: Any, scale: float = 1.0) -> Any:
    return 2 * scale * x


class Recorded:
    """A function that writes down the points it is called at."""

    def __init__(self, fun: Callable[..., Any]) -> None:
        self.fun = fun
        self.points: list[Any] = []

    def __call__(self, x: Any, *args: Any) -> Any:
        self.points.append(x.detach().clone() if isinstance(x, Tensor) else x.copy())
        return self.fun(x, *args)

    @property
    def rows(self) -> np.ndarray:  # [calls, d]
        return np.stack([np.asarray(point) for point in self.points])


# ---------------------------------------------------------------------- the same run, however it is asked for


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum", "rmsprop"])
def test_three_ways_to_the_gradient_make_one_trajectory(optimizer: str) -> None:
    ways = [(rosen_with_gradient, True), (rosen, rosen_der), (torch_rosen, None)]
    runs = []
    for fun, jac in ways:
        recorded = Recorded(fun)
        result = optex.minimize(recorded, START, jac=jac, optimizer=optimizer, lr=1e-4, maxiter=12)
        runs.append((recorded.rows, result))
    for rows, result in runs[1:]:
        np.testing.assert_allclose(rows, runs[0][0], rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(result.x, runs[0][1].x, rtol=1e-7)
        assert (result.nit, result.nfev, result.nstep) == tuple(runs[0][1][k] for k in ("nit", "nfev", "nstep"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "plain", "options"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.99)}),
        ("sgd", torch.optim.SGD, {"weight_decay": 0.01}),
        ("adagrad", torch.optim.Adagrad, {}),
        (torch.optim.NAdam, torch.optim.NAdam, {}),
    ],
)
def test_parallelism_of_one_is_the_plain_loop_bit_for_bit(
    name: Any, plain: Callable[..., torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    start = torch.tensor(START, dtype=dtype)
    theta = torch.nn.Parameter(start.clone())
    base = plain([theta], lr=0.002, **options)
    expected = []
    for _ in range(30):
        expected.append(theta.detach().clone())
        base.zero_grad()
        torch_rosen(theta).backward()
        base.step()
    recorded = Recorded(torch_rosen)
    optex.minimize(recorded, start, optimizer=name, lr=0.002, parallelism=1, stride=1, maxiter=30, **options)
    assert torch.equal(torch.stack(recorded.points), torch.stack(expected))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_named_optimizer_descends(name: str) -> None:
    start = torch.full((2, 2), 1.5, dtype=torch.float64)  # Muon wants matrices
    result = optex.minimize(sphere, start, optimizer=name, lr=0.01, stride=1, maxiter=5)
    assert result.fun < sphere(start)
    assert 5 <= result.nstep <= 20


def test_scheduler_ticks_once_a_step() -> None:
    def halved(base: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(base, 10, 0.5)

    theta = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    base = torch.optim.Adam([theta], lr=0.01)
    schedule = halved(base)
    for _ in range(39):
        base.zero_grad()
        torch_rosen(theta).backward()
        base.step()
        schedule.step()
    options: dict[str, Any] = {"lr": 0.01, "scheduler": halved}
    alone = Recorded(torch_rosen)
    optex.minimize(alone, START, parallelism=1, stride=1, maxiter=40, **options)
    np.testing.assert_array_equal(alone.points[-1], theta.detach().numpy())


def test_vectorized_equals_sequential() -> None:
    evaluators = ["sequential", "vectorized", optex.VectorizedEvaluator(torch.nn.Identity(), chunk_size=2)]
    results = [
        optex.minimize(torch_rosen, START, lr=0.01, maxiter=20, evaluator=evaluator) for evaluator in evaluators
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result.x, results[0].x, rtol=1e-9)
        np.testing.assert_allclose(result.jac, results[0].jac, rtol=1e-6)
        assert (result.nit, result.nstep) == (results[0].nit, results[0].nstep)


def test_vectorized_calls_fun_once_a_round() -> None:
    recorded = Recorded(torch_rosen)
    calls = []

    def fun(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return torch_rosen(x)

    optex.minimize(fun, START, lr=0.01, maxiter=10, evaluator="vectorized")
    assert len(calls) == 11  # one more finds out which parameters get a gradient
    optex.minimize(recorded, START, lr=0.01, maxiter=10)
    assert len(recorded.points) == 37  # nothing to predict from in the first round: one point, not four


def test_an_evaluator_of_ones_own_is_used() -> None:
    calls: list[int] = []

    class Backwards(Evaluator):
        def evaluate(self, request: EvaluationRequest) -> Evaluation:
            calls.append(len(request))
            flipped = SequentialEvaluator().evaluate(replace(request, points=request.points.flip(0)))
            return Evaluation(flipped.losses.flip(0), flipped.gradients.flip(0), flipped.masks)

    for fun, jac in ((rosen, rosen_der), (torch_rosen, None)):
        ours, theirs = (
            optex.minimize(fun, START, jac=jac, lr=0.01, maxiter=10, evaluator=evaluator)
            for evaluator in (Backwards(), None)
        )
        np.testing.assert_array_equal(ours.x, theirs.x)
    assert calls


# ---------------------------------------------------------------------- convergence and what is returned


@pytest.mark.parametrize("jac", [rosen_der, None])
def test_reaches_the_minimum_in_fewer_rounds_than_steps(jac: Any) -> None:
    result = optex.minimize(torch_rosen if jac is None else rosen, [-1.2, 1.0], jac=jac, lr=0.1, parallelism=5)
    assert result.success
    assert result.status == 0
    assert "gtol" in result.message
    assert np.abs(result.jac).max() <= 1e-5
    assert result.nit < 600
    assert result.nstep > 2 * result.nit
    assert result.nfev == result.njev == 5 * result.nit - 4
    np.testing.assert_allclose(result.x, 1.0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    maxiter=st.integers(1, 8),
    parallelism=st.integers(1, 6),
    stride=st.sampled_from([1, 4]),
    lr=st.sampled_from([1e-3, 0.05, 1.0]),
    optimizer=st.sampled_from(["adam", "adamw", "rprop", "adafactor"]),
    start=st.lists(st.floats(-2, 2, width=16), min_size=2, max_size=5),
)
def test_result_is_the_lowest_point_evaluated(
    maxiter: int, parallelism: int, stride: float, lr: float, optimizer: str, start: list[float]
) -> None:
    recorded = Recorded(rosen)
    result = optex.minimize(
        recorded,
        start,
        jac=rosen_der,
        optimizer=optimizer,
        lr=lr,
        parallelism=parallelism,
        stride=stride,
        maxiter=maxiter,
        gtol=0,
    )
    values = [rosen(x) for x in recorded.points]
    assert result.fun == min(values) == rosen(result.x)
    assert np.array_equal(result.jac, rosen_der(result.x))
    assert result.nfev == len(values) <= parallelism * result.nit
    assert result.nit <= result.nstep <= parallelism * stride * result.nit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("way", ["jac=True", "jac", "autograd", "vectorized"])
def test_tensors_in_tensors_out(dtype: torch.dtype, shape: tuple[int, ...], way: str) -> None:
    start = torch.full(shape, 1.5, dtype=dtype)
    seen = set()

    def fun(x: Tensor) -> Any:
        seen.add((x.dtype, x.shape))
        value = (x**2).sum()
        return (value, 2 * x) if way == "jac=True" else value

    jac: Any = {"jac=True": True, "jac": sphere_gradient}.get(way)
    evaluator: Any = "vectorized" if way == "vectorized" else None
    result = optex.minimize(fun, start, jac=jac, lr=0.1, maxiter=6, evaluator=evaluator)
    assert seen == {(dtype, torch.Size(shape))}
    assert (result.x.dtype, result.x.shape) == (result.jac.dtype, result.jac.shape) == (dtype, start.shape)
    assert torch.equal(result.jac, 2 * result.x)
    assert isinstance(result.fun, float)
    assert result.fun < 1.5**2 * max(start.numel(), 1)
    assert torch.equal(start, torch.full(shape, 1.5, dtype=dtype))
    assert not result.x.requires_grad


@pytest.mark.parametrize("start", [3, [1, 2], (1.0, 2.0), np.array([1, 2]), np.array([1, 2], np.float32)])
def test_arrays_in_arrays_out(start: Any) -> None:
    recorded = Recorded(sphere)
    result = optex.minimize(recorded, start, jac=sphere_gradient, lr=0.1, maxiter=3)
    for array in (*recorded.points, result.x, result.jac):
        assert type(array) is np.ndarray
        assert array.dtype == np.float64
        assert array.shape == np.atleast_1d(start).shape


def test_integer_tensors_become_float64() -> None:
    result = optex.minimize(sphere, torch.tensor([1, 2]), lr=0.1, maxiter=3)
    assert result.x.dtype == torch.float64


def test_arguments_reach_fun_and_jac() -> None:
    scaled = optex.minimize(sphere, [1.0], (5.0,), jac=sphere_gradient, maxiter=1)
    assert (scaled.fun, scaled.jac[0]) == (5.0, 10.0)
    assert optex.minimize(sphere, [1.0], 5.0, jac=sphere_gradient, maxiter=1).fun == 5.0
    assert optex.minimize(sphere, [1.0], 5.0, maxiter=1).fun == 5.0


@pytest.mark.parametrize("gradient", [lambda x: [2 * x[0]], lambda x: 2 * x[0], lambda x: torch.tensor(2 * x)])
def test_gradient_may_be_a_list_or_a_number_or_a_tensor(gradient: Callable[..., Any]) -> None:
    result = optex.minimize(lambda x: x**2, [1.0], jac=gradient, maxiter=1)
    assert (result.fun, result.jac[0]) == (1.0, 2.0)


def test_strides_take_more_steps_than_gradients() -> None:
    long, short = (
        optex.minimize(rosen, [-1.2, 1.0], jac=rosen_der, lr=0.02, maxiter=30, stride=stride)
        for stride in ("auto", 1)
    )
    assert long.nstep > 2 * long.nfev
    assert short.nstep <= short.nfev
    assert long.fun < short.fun


# ---------------------------------------------------------------------- fun is a guest


def test_fun_cannot_corrupt_the_run() -> None:
    buffer = np.empty(3)

    def vandal(x: np.ndarray) -> tuple[float, np.ndarray]:
        value = rosen(x)
        buffer[:] = rosen_der(x)
        x[:] = math.nan
        return value, buffer

    def torch_vandal(x: Tensor) -> Tensor:
        value = torch_rosen(x.clone())
        x.mul_(0)
        return value

    clean = optex.minimize(rosen, START, jac=rosen_der, lr=0.01, maxiter=10)
    vandalised = optex.minimize(vandal, START, jac=True, lr=0.01, maxiter=10)
    np.testing.assert_array_equal(vandalised.x, clean.x)
    np.testing.assert_array_equal(vandalised.jac, clean.jac)
    assert vandalised.jac is not buffer
    np.testing.assert_allclose(optex.minimize(torch_vandal, START, lr=0.01, maxiter=10).x, clean.x, rtol=1e-7)


def test_callback_cannot_corrupt_the_run() -> None:
    def vandal(intermediate_result: Any) -> None:
        intermediate_result.x[:] = math.nan
        intermediate_result.jac[:] = math.nan

    def classic_vandal(x: np.ndarray) -> None:
        x[:] = math.nan

    clean = optex.minimize(rosen, START, jac=rosen_der, lr=0.01, maxiter=5)
    for callback in (vandal, classic_vandal):
        result = optex.minimize(rosen, START, jac=rosen_der, lr=0.01, maxiter=5, callback=callback)
        np.testing.assert_array_equal(result.x, clean.x)


def test_autograd_leaves_other_parameters_alone() -> None:
    network = torch.nn.Linear(3, 1).double()
    optex.minimize(lambda x: network(x).square().sum(), START, lr=0.01, maxiter=3)
    assert network.weight.grad is None


# ---------------------------------------------------------------------- how a run ends


def test_a_run_out_of_rounds_is_no_success() -> None:
    result = optex.minimize(rosen, START, jac=rosen_der, maxiter=3)
    assert (result.status, result.success, result.nit) == (1, False, 3)
    assert result.message == "Maximum number of iterations has been exceeded."


def test_a_stationary_start_ends_the_run_at_once() -> None:
    result = optex.minimize(sphere, [0.0, 0.0], jac=sphere_gradient, gtol=0)
    assert (result.status, result.nit, result.nfev, result.fun) == (0, 1, 1, 0.0)


def test_gradient_within_gtol_wins_over_a_step_that_fails() -> None:
    # Adagrad without eps divides zero by zero at a point without gradient.
    result = optex.minimize(sphere, [0.0], jac=sphere_gradient, optimizer="adagrad", eps=0.0, lr=0.1)
    assert (result.status, result.fun, result.x[0]) == (0, 0.0, 0.0)


def test_plateau_above_the_rounds_start_is_not_a_solution() -> None:
    # A step of 20 from the slope leads to a plateau: gradient zero, but higher than where the round began.
    def hill(x: Tensor) -> Tensor:
        return torch.where(x < 1, -x, torch.ones_like(x) * 5.0).sum()

    one, two = (optex.minimize(hill, [0.0], optimizer="sgd", lr=20.0, maxiter=rounds) for rounds in (1, 2))
    assert one.status == 1
    assert two.status == 0  # now the round began there


def test_ftol_ends_a_run_whose_loss_changes_no_more() -> None:
    starts = []

    def fun(x: np.ndarray) -> float:
        starts.append(1 + sphere(x))
        return starts[-1]

    options: dict[str, Any] = {"jac": sphere_gradient, "optimizer": "sgd", "lr": 0.05, "parallelism": 1}
    result = optex.minimize(fun, [1.0], ftol=1e-3, **options)
    changes = -np.diff(starts) / starts[:-1]
    assert result.status == 0
    assert "ftol" in result.message
    assert changes[-1] <= 1e-3 < changes[-2]
    assert optex.minimize(fun, [1.0], ftol=None, gtol=0, maxiter=60, **options).status == 1


@pytest.mark.parametrize("parallelism", [1, 4])
def test_run_that_leaves_the_finite_numbers_keeps_the_best_point(parallelism: int) -> None:
    def cliff(x: Tensor) -> Tensor:
        return torch.where(x < 30, -x, torch.full_like(x, math.nan)).sum()

    result = optex.minimize(cliff, [0.0], optimizer="sgd", lr=1.0, parallelism=parallelism, stride=1)
    assert (result.status, result.success) == (2, False)
    assert "precision loss" in result.message
    assert "not finite" in result.message
    assert (result.fun, result.jac[0]) == (-result.x[0], -1.0)
    assert 30 - parallelism - 1 <= result.x[0] < 30


def test_a_step_that_overflows_keeps_x0() -> None:
    result = optex.minimize(sphere, [1.0], jac=sphere_gradient, optimizer="sgd", lr=1e308, parallelism=1)
    assert (result.status, result.nit, result.fun) == (2, 0, 1.0)


@pytest.mark.parametrize("stop", ["raise", "return"])
@pytest.mark.parametrize("modern", [True, False])
def test_callback_stops(stop: str, modern: bool) -> None:
    seen = []

    def act(entry: Any) -> bool:
        seen.append(entry)
        if len(seen) == 3 and stop == "raise":
            raise StopIteration
        return len(seen) == 3

    def modern_callback(intermediate_result: Any) -> bool:
        return act(intermediate_result)

    def classic_callback(xk: Any) -> bool:
        return act(xk)

    callback = modern_callback if modern else classic_callback
    result = optex.minimize(rosen, START, jac=rosen_der, lr=0.01, callback=callback)
    assert (result.status, result.success, result.nit, len(seen)) == (99, False, 3, 3)
    messages = {"raise": "`callback` raised `StopIteration`.", "return": "`callback` returned True."}
    assert result.message == messages[stop]
    if modern:
        assert [entry.nit for entry in seen] == [1, 2, 3]
        for key in ("fun", "nfev", "njev", "nstep"):
            assert seen[-1][key] == result[key]
        assert all(entry.fun == rosen(entry.x) for entry in seen)
    np.testing.assert_array_equal(seen[-1].x if modern else seen[-1], result.x)


def test_callback_may_be_a_builtin() -> None:
    seen: list[Any] = []
    optex.minimize(rosen, START, jac=rosen_der, maxiter=3, callback=seen.append)
    assert [x.shape for x in seen] == [(3,)] * 3


# ---------------------------------------------------------------------- tol, options, disp, as SciPy has them


def test_tol_is_gtol_where_that_is_not_given() -> None:
    loose = optex.minimize(rosen, START, jac=rosen_der, lr=0.05, tol=1.0)
    assert loose.success
    assert 1e-5 < np.abs(loose.jac).max() <= 1.0
    same = optex.minimize(rosen, START, jac=rosen_der, lr=0.05, gtol=1.0)
    np.testing.assert_array_equal(loose.x, same.x)
    assert optex.minimize(rosen, START, jac=rosen_der, lr=0.05, tol=1e9, gtol=0, maxiter=2).status == 1
    assert (
        optex.minimize(rosen, START, jac=rosen_der, lr=0.05, tol=1e9, options={"gtol": 0}, maxiter=2).nit == 2
    )


def test_options_are_arguments_by_name() -> None:
    inside = optex.minimize(
        rosen,
        START,
        jac=rosen_der,
        options={"lr": 0.02, "maxiter": 7, "optimizer": "adamw", "betas": (0.8, 0.9)},
    )
    outside = optex.minimize(
        rosen, START, jac=rosen_der, lr=0.02, maxiter=7, optimizer="adamw", betas=(0.8, 0.9)
    )
    np.testing.assert_array_equal(inside.x, outside.x)
    assert inside.nit == outside.nit == 7
    assert optex.minimize(rosen, START, jac=rosen_der, lr=0.02, maxiter=7, options={"maxiter": 3}).nit == 3


def test_options_are_left_as_they_came() -> None:
    options = {"maxiter": 2, "lr": 0.1}
    optex.minimize(rosen, START, jac=rosen_der, options=options)
    assert options == {"maxiter": 2, "lr": 0.1}


@pytest.mark.parametrize("through", [optex.minimize, scipy.optimize.minimize])
def test_disp_prints_how_it_went(through: Any, capsys: pytest.CaptureFixture[str]) -> None:
    door = {} if through is optex.minimize else {"method": optex.scipy_method}
    result = through(rosen, START, jac=rosen_der, options={"disp": True, "maxiter": 5}, **door)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == result.message == "Maximum number of iterations has been exceeded."
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    assert float(entries["Current function value"]) == pytest.approx(result.fun, rel=1e-5)
    assert entries["Iterations"].startswith("5 ")
    assert int(entries["Function evaluations"]) == result.nfev
    assert int(entries["Steps of the optimizer"]) == result.nstep
    first, last = entries["Learning rate"].split(", ")
    assert float(first.removesuffix(" at first")) == pytest.approx(result.lr, rel=1e-5)
    assert float(last.removesuffix(" at last")) == pytest.approx(result.lr_final, rel=1e-5)
    optex.minimize(rosen, START, jac=rosen_der, maxiter=2)
    assert capsys.readouterr().out == ""


def test_disp_of_an_optimizer_without_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    class Signs(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(0.01 * p.grad.sign())

    result = optex.minimize(rosen, START, jac=rosen_der, optimizer=Signs, maxiter=3, disp=True)
    assert result.lr is result.lr_final is None
    assert "Learning rate: none" in capsys.readouterr().out


# ---------------------------------------------------------------------- SciPy's front door


@pytest.mark.parametrize(("fun", "jac"), [(rosen_with_gradient, True), (rosen, rosen_der), (torch_rosen, None)])
def test_scipy_method_is_minimize(fun: Any, jac: Any) -> None:
    recorded = Recorded(fun)
    options = {"lr": 0.01, "parallelism": 5, "maxiter": 15, "betas": (0.8, 0.99)}
    through = scipy.optimize.minimize(recorded, START, jac=jac, method=optex.scipy_method, options=options)
    direct = optex.minimize(fun, START, jac=jac, **options)
    np.testing.assert_array_equal(through.x, direct.x)
    assert (through.status, through.nit, through.nfev) == (1, 15, 71)
    assert len(recorded.points) == through.nfev  # SciPy's own cache spares the second call


def test_scipy_hands_workers_on() -> None:
    counts = []

    def counting(function: Callable[..., Any], items: Any) -> Any:
        counts.append(len(items))
        return map(function, items)

    options = {"lr": 0.01, "parallelism": 3, "maxiter": 4}
    here, there = (
        scipy.optimize.minimize(
            rosen, START, jac=rosen_der, method=optex.scipy_method, options={**options, "workers": workers}
        )
        for workers in (1, counting)
    )
    assert counts == [1, 3, 3, 3]
    np.testing.assert_array_equal(there.x, here.x)


def test_scipy_tolerance_callback_and_arguments() -> None:
    seen = []

    def callback(intermediate_result: Any) -> None:
        seen.append(intermediate_result.fun)

    result = scipy.optimize.minimize(
        sphere,
        [1.0],
        args=(3.0,),
        jac=sphere_gradient,
        method=optex.scipy_method,
        tol=0.5,
        callback=callback,
        options={"optimizer": "sgd", "lr": 0.1},
    )
    assert result.success
    assert np.abs(result.jac).max() <= 0.5
    assert len(seen) == result.nit
    assert optex.scipy_method(sphere, [1.0], jac=sphere_gradient, tol=1e9, gtol=0, maxiter=2).status == 1


def test_scipy_finite_differences_are_not_taken_silently() -> None:
    with pytest.raises(TypeError, match="jac is None"):
        scipy.optimize.minimize(lambda x: 1.0, [1.0], jac="2-point", method=optex.scipy_method)


@pytest.mark.parametrize("name", ["hess", "hessp"])
def test_scipy_second_derivatives_are_ignored_with_a_warning(name: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"second derivatives \({name}\)") as caught:
        scipy.optimize.minimize(
            rosen,
            START,
            jac=rosen_der,
            method=optex.scipy_method,
            options={"maxiter": 1},
            **{name: lambda *_: np.eye(3)},
        )
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "constraints", [{"type": "eq", "fun": sum}, [{"type": "eq", "fun": sum}], "LinearConstraint"]
)
def test_scipy_constraints_are_refused(constraints: Any) -> None:
    if constraints == "LinearConstraint":
        constraints = scipy.optimize.LinearConstraint(np.ones((1, 3)), 0, 1)
    with pytest.raises(ValueError, match=r"scipy_method: constraints .*SLSQP"):
        scipy.optimize.minimize(rosen, START, jac=rosen_der, constraints=constraints, method=optex.scipy_method)


def test_scipy_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bounds .*L-BFGS-B"):
        scipy.optimize.minimize(rosen, START, jac=rosen_der, bounds=[(0, 1)] * 3, method=optex.scipy_method)


# ---------------------------------------------------------------------- every error names its argument


def two_parameters(_: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.zeros(2, requires_grad=True)])


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fun": ({"fun": 3}, TypeError, "fun must be callable, got int"),
    "fun is a vector": ({"fun": lambda x: x}, ValueError, r"fun must return a scalar, got shape \(3,\)"),
    "fun is None": ({"fun": lambda x: None}, TypeError, "fun must be a real scalar, got NoneType"),
    "fun is complex": ({"fun": lambda x: 1j}, TypeError, "fun must be a real scalar, got complex"),
    "fun is text": ({"fun": lambda x: "1"}, TypeError, "fun must be a real scalar, got str"),
    "fun is NaN at x0": ({"fun": lambda x: math.nan}, ValueError, "at x0 fun is nan"),
    "x0 text": ({"x0": "abc"}, TypeError, "x0 must be a real array or dense tensor, got str"),
    "x0 ragged": ({"x0": [[1.0], [1.0, 2.0]]}, TypeError, "x0 must be a real array"),
    "x0 complex": ({"x0": [1j, 2.0]}, TypeError, "x0 must be .* complex128"),
    "x0 complex tensor": ({"x0": torch.ones(2) * 1j}, TypeError, "x0 must be .*complex64"),
    "x0 sparse": ({"x0": torch.eye(3).to_sparse()}, TypeError, "x0 must be .*sparse"),
    "x0 NaN": ({"x0": [1.0, math.nan]}, ValueError, "x0 has components that are not finite"),
    "x0 infinite": ({"x0": [1.0, -math.inf]}, ValueError, "x0 has components that are not finite"),
    "x0 empty": ({"x0": []}, ValueError, "x0 is empty"),
    "x0 empty tensor": ({"x0": torch.zeros(0, 3)}, ValueError, r"x0 is empty \(shape \(0, 3\)\)"),
    "x0 two-dimensional": ({"x0": [[1.0, 2.0]]}, ValueError, r"x0 must have one dimension, .* \(1, 2\)"),
    "jac text": ({"jac": "2-point"}, ValueError, "jac must be .* '2-point'; there are no finite differences"),
    "jac False": ({"jac": False}, ValueError, "jac must be .* False"),
    "jac shape": ({"jac": lambda x: x[:2]}, ValueError, r"jac must have the shape of x, \(3,\), got \(2,\)"),
    "jac column": ({"jac": lambda x: x[:, None]}, ValueError, r"jac must have .* got \(3, 1\)"),
    "jac None": ({"jac": lambda x: None}, TypeError, "jac must be a real array of x's shape, got NoneType"),
    "jac complex": ({"jac": lambda x: x * 1j}, TypeError, "jac must be a real array .* complex128"),
    "jac NaN at x0": ({"jac": lambda x: x * math.nan}, ValueError, "at x0 .* gradient nan"),
    "jac True, one value": ({"jac": True}, TypeError, r"jac=True needs fun to return the pair \(f, g\)"),
    "jac True, shape": (
        {"fun": lambda x: (1.0, 2.0), "jac": True},
        ValueError,
        r"the g of fun's \(f, g\) must have the shape of x",
    ),
    "no jac, pair": (
        {"jac": None, "fun": lambda x: (1.0, x)},
        TypeError,
        "jac is None, .* got tuple; .*jac=True",
    ),
    "no jac, number": ({"jac": None, "fun": lambda x: 1.0}, TypeError, "jac is None, .* got float; .*jac="),
    "no jac, detached": ({"jac": None, "fun": lambda x: x.detach().sum()}, ValueError, "carries no autograd"),
    "no jac, constant": (
        {"jac": None, "fun": lambda x: torch.ones(1, requires_grad=True).sum()},
        ValueError,
        "does not depend on x",
    ),
    "no jac, NumPy": (
        {"jac": None, "fun": lambda x: np.sum(x.numpy())},
        TypeError,
        "it computes in NumPy .*pass jac=True",
    ),
    "no jac, vector": ({"jac": None, "fun": lambda x: 2 * x}, ValueError, "fun must return a scalar"),
    "optimizer name": ({"optimizer": "adamm"}, ValueError, "optimizer: 'adamm' is not one of sgd, "),
    "optimizer kind": ({"optimizer": 3}, TypeError, "optimizer must be a name or a function .*got int"),
    "optimizer result": ({"optimizer": lambda p: 3}, TypeError, "optimizer must return .*, got int"),
    "optimizer parameters": (
        {"optimizer": two_parameters},
        ValueError,
        "optimizer must be built over the list",
    ),
    "optimizer refused": ({"optimizer": torch.optim.LBFGS}, TypeError, "LBFGS cannot be the base"),
    "maximize": ({"maximize": True}, ValueError, "maximize=True; minimise -fun"),
    "lr": ({"lr": -1.0}, ValueError, "minimize: lr must be a finite number at least 0, got -1.0"),
    "lr not taken": (
        {"lr": 0.1, "optimizer": lambda p: torch.optim.SGD(p)},
        TypeError,
        "cannot be built with lr",
    ),
    "no jac, SciPy's function": (
        {"jac": None, "fun": rosen},
        TypeError,
        "it computes in NumPy .*pass jac=True",
    ),
    "unknown keyword": (
        {"learning_rate": 0.1},
        TypeError,
        "no argument 'learning_rate'; lr= is the learning rate",
    ),
    "another unknown keyword": (
        {"beta": 0.9},
        TypeError,
        "no argument 'beta'; optimizer 'adam' takes betas, eps",
    ),
    "method of torch": ({"method": "Adam"}, TypeError, "no argument 'method'; .*: optimizer='adam'"),
    "method of SciPy": (
        {"method": "L-BFGS-B"},
        TypeError,
        r"optimizer= names the base .*minimize\(method='L-BFGS-B'\), where method=optex.scipy_method",
    ),
    "tol": ({"tol": -1e-3}, ValueError, "tol must be a number that is not negative, got -0.001"),
    "options kind": ({"options": [3]}, TypeError, "options must be a dict or None, got list"),
    "options unknown": (
        {"options": {"maxfev": 3, "maxcor": 4}},
        TypeError,
        "no option 'maxfev', 'maxcor'; options are optimizer, .*disp, and what optimizer 'adam' takes: betas",
    ),
    "options value": ({"options": {"maxiter": 0}}, ValueError, "maxiter must be an integer of at least 1"),
    "options method": ({"options": {"method": "BFGS"}}, TypeError, "no option 'method'"),
    "disp": ({"disp": "yes"}, TypeError, "disp must be True or False, got 'yes'"),
    "parallelism": ({"parallelism": 0}, ValueError, "parallelism must be an integer of at least 1, got 0"),
    "stride": ({"stride": 0.5}, ValueError, "stride must be 'auto' or a finite number of at least 1, got 0.5"),
    "history_size": ({"history_size": 0}, ValueError, "history_size must be an integer of at least 1"),
    "estimator": ({"estimator": "gp"}, TypeError, "estimator must be"),
    "acceptance": ({"acceptance": "last"}, TypeError, "acceptance must be"),
    "evaluator": ({"evaluator": "threads"}, TypeError, "evaluator must be 'sequential', .* 'threads'"),
    "evaluator and jac": (
        {"evaluator": "vectorized"},
        ValueError,
        "evaluator 'vectorized' .* jac must be None",
    ),
    "workers": ({"workers": 0}, ValueError, "workers must be at least 1, or -1 for all cores, got 0"),
    "workers kind": ({"workers": "ray"}, TypeError, "workers must be an integer, .* 'ray'"),
    "workers and evaluator": (
        {"workers": 2, "evaluator": "sequential"},
        ValueError,
        "evaluator and workers both say",
    ),
    "scheduler": ({"scheduler": 0.9}, TypeError, "scheduler must be a function of the optimizer"),
    "scheduler result": ({"scheduler": lambda base: 0.9}, TypeError, "scheduler must be"),
    "bounds": ({"bounds": [(0, 1)] * 3}, ValueError, "bounds cannot be kept"),
    "callback": ({"callback": 3}, TypeError, "callback must be callable or None, got int"),
    "maxiter": ({"maxiter": 0}, ValueError, "maxiter must be an integer of at least 1, got 0"),
    "maxiter fraction": ({"maxiter": 1.5}, ValueError, "maxiter must be an integer .* got 1.5"),
    "gtol": ({"gtol": -1e-5}, ValueError, "gtol must be a number that is not negative, got -1e-05"),
    "gtol NaN": ({"gtol": math.nan}, ValueError, "gtol must be"),
    "gtol text": ({"gtol": "1e-5"}, ValueError, "gtol must be"),
    "ftol": ({"ftol": -1}, ValueError, "ftol must be"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    change, kind, text = ERRORS[case]
    arguments: dict[str, Any] = {"fun": rosen, "x0": START, "jac": rosen_der} | change
    fun, x0 = arguments.pop("fun"), arguments.pop("x0")
    with pytest.raises(kind, match=text):
        optex.minimize(fun, x0, **arguments)


def test_errors_inside_fun_come_through() -> None:
    def broken(x: Any) -> Any:
        raise KeyError("mesh")

    for jac in (None, True, rosen_der):
        with pytest.raises(KeyError, match="mesh"):
            optex.minimize(broken, START, jac=jac)


def test_where_there_is_no_batch_none_is_blamed() -> None:
    def cliff(x: np.ndarray) -> tuple[float, np.ndarray]:
        value = float(((x - 3) ** 2).sum())
        return value if value > 3 else math.nan, 2 * (x - 3)

    result = optex.minimize(cliff, [0.0, 0.0], jac=True, lr=0.5)
    assert result.status == 2
    assert "Lower the learning rate, or start elsewhere." in result.message
    assert "batch" not in result.message
