"""Gradient-normalized smoothness: curvatures, the search, the closure optimizer and ``minimize_gns``."""

import copy
import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import rosen, rosen_der, rosen_hess, rosen_hess_prod
from scipy.special import logsumexp, softmax
from torch import nn

import optex
from optex import ConvergenceWarning, NonFiniteError, OptEx
from optex.evaluators import SequentialEvaluator, WrappingEvaluator
from optex.optimizers import (
    GNS,
    DenseCurvature,
    Metric,
    NoCurvature,
    ProductCurvature,
    RankOneCurvature,
    WindowCurvature,
    power_fisher,
    power_gauss_newton,
)
from optex.optimizers.gns import SearchSettings, StepSearch
from tests.gradients import grad_of
from tests.models import network, regression_batches, same, snapshot, squared_error
from tests.references.gns import gns_iterates

F64 = torch.float64


def log_sum_exp(dimension=12, seed=0):
    """Σ exp in logarithm, minimum at 0: fun, jac, hess, rows and offsets."""
    random = np.random.default_rng(seed)
    rows, b = random.uniform(-1, 1, (dimension, dimension)), random.uniform(-1, 1, dimension)
    rows = rows - softmax(-b) @ rows

    def fun(x) -> Any:
        return logsumexp(rows @ x - b)

    def jac(x):
        return rows.T @ softmax(rows @ x - b)

    def hess(x):
        weights = softmax(rows @ x - b)
        return rows.T @ (weights[:, None] * rows) - np.outer(jac(x), jac(x))

    return fun, jac, hess, rows, b


def torch_rosen(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def iterates_of(fun, jac, start, **options):
    """x0 and every point taken, and the result."""
    found = [np.array(start, dtype=np.float64)]
    result = optex.minimize_gns(fun, start, jac=jac, callback=lambda x: found.append(x.copy()), **options)
    return np.stack(found), result


# ---------------------------------------------------------------------- curvatures


def matrices(dimension, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    square = drawn(dimension, dimension)
    vector, rows, tall = drawn(dimension), drawn(3, dimension), drawn(2 * dimension, dimension)
    symmetric = square @ square.mT
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=F64)
    return {
        "none": (NoCurvature(), torch.zeros(dimension, dimension, dtype=F64)),
        "dense": (DenseCurvature(symmetric), symmetric),
        "rank-one": (RankOneCurvature(vector, 0.7), 0.7 * torch.outer(vector, vector)),
        "rank-one, negative": (RankOneCurvature(vector, -0.01), -0.01 * torch.outer(vector, vector)),
        "window": (WindowCurvature(rows, weights), rows.mT @ (weights[:, None] * rows)),
        "tall window": (WindowCurvature(tall, 0.3), 0.3 * tall.mT @ tall),
        "products": (ProductCurvature(lambda v: symmetric @ v, tolerance=1e-13), symmetric),
    }


def metrics(dimension):
    generator = torch.Generator().manual_seed(5)
    square = torch.randn(dimension, dimension, generator=generator, dtype=F64)
    return {
        "identity": None,
        "diagonal": torch.linspace(0.5, 3, dimension, dtype=F64),
        "matrix": square @ square.mT + torch.eye(dimension, dtype=F64),
    }


@pytest.mark.parametrize("kind", metrics(6))
@pytest.mark.parametrize("name", matrices(6))
def test_every_curvature_solves_what_a_dense_solve_does(name, kind):
    curvature, matrix = matrices(6)[name]
    metric = Metric(metrics(6)[kind])
    right = torch.randn(6, generator=torch.Generator().manual_seed(9), dtype=F64)
    for shift in (3.0, 0.8, 1.7):
        shifted = metric.added(matrix, shift)
        expected = torch.linalg.solve(shifted, right)
        torch.testing.assert_close(curvature.solve(shift, right, metric), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", metrics(4))
def test_a_metric_is_its_matrix(kind):
    given = metrics(4)[kind]
    matrix = torch.eye(4, dtype=F64) if given is None else (given.diag() if given.ndim == 1 else given)
    metric, g = Metric(given), torch.arange(1.0, 5.0, dtype=F64)
    torch.testing.assert_close(metric.inverse(g), torch.linalg.solve(matrix, g))
    torch.testing.assert_close(metric.inverse(torch.stack([g, 2 * g]))[1], 2 * torch.linalg.solve(matrix, g))
    assert metric.dual_norm(g) == pytest.approx(float(g @ torch.linalg.solve(matrix, g)) ** 0.5)
    assert metric.inverse(g.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("curvature", "beyond"),
    [
        (DenseCurvature(-np.eye(3)), [1.0, 2.0, 3.0]),
        (RankOneCurvature([1.0, 0.0, 0.0], -1.0), [1.0, 1.0, 1.5]),
        (ProductCurvature(torch.neg), [1.0, 2.0, 3.0]),
    ],
)
def test_what_is_not_positive_definite_has_no_solution_until_the_shift_is_large(curvature, beyond):
    right = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    assert curvature.solve(0.5, right) is None
    torch.testing.assert_close(curvature.solve(2.0, right), torch.tensor(beyond, dtype=F64))


@pytest.mark.parametrize(
    "curvature", [DenseCurvature(np.full((3, 3), math.nan)), ProductCurvature(lambda v: math.nan * v)]
)
def test_what_is_not_finite_has_no_solution_at_any_shift(curvature):
    right = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    assert curvature.solve(0.5, right) is None
    assert curvature.solve(2.0, right) is None


def test_further_shifts_cost_no_products_unless_they_need_a_larger_basis():
    matrix = torch.diag(torch.linspace(1, 50, 50, dtype=F64))
    curvature = ProductCurvature(lambda v: matrix @ v, tolerance=1e-8)
    right = torch.ones(50, dtype=F64)
    curvature.solve(1.0, right)
    count = curvature.products
    for shift in (2.0, 4.0, 100.0):
        expected = right / (matrix.diagonal() + shift)
        torch.testing.assert_close(curvature.solve(shift, right), expected, rtol=1e-6, atol=1e-9)
    assert curvature.products == count < 50
    curvature.solve(1e-3, right)
    assert curvature.products > count


def test_another_right_side_begins_anew():
    matrix = torch.diag(torch.linspace(1, 50, 50, dtype=F64))
    curvature = ProductCurvature(lambda v: matrix @ v, tolerance=1e-8)
    curvature.solve(1.0, torch.ones(50, dtype=F64))
    count, right = curvature.products, torch.linspace(-1, 1, 50, dtype=F64)
    solution = curvature.solve(1.0, right)
    torch.testing.assert_close(solution, right / (matrix.diagonal() + 1), rtol=1e-6, atol=1e-9)
    assert curvature.products > count


def test_products_end_where_the_space_or_the_limit_does():
    ones = torch.ones(40, dtype=F64)
    nothing = ProductCurvature(torch.clone).solve(1.0, 0 * ones)
    torch.testing.assert_close(nothing, 0 * ones, rtol=0, atol=0)
    single = ProductCurvature(lambda v: 3 * v, tolerance=0.0)
    torch.testing.assert_close(single.solve(1.0, ones), ones / 4)
    assert single.products == 1
    matrix = torch.diag(torch.logspace(0, 6, 40, dtype=F64))
    short = ProductCurvature(lambda v: matrix @ v, tolerance=1e-10, iterations=5)
    step = short.solve(1e-3, ones)
    assert step is not None
    assert short.products == 5
    assert float(step @ ones) > 0  # a descent direction


def test_stand_ins_of_a_power_are_parts_of_its_hessian():
    random = np.random.default_rng(0)
    jacobian, x, b = random.normal(size=(3, 5)), random.normal(size=5), random.normal(size=3)
    for power in (2, 3, 4, 5.5):

        def fun(y, power=power):
            return ((torch.tensor(jacobian) @ y - torch.tensor(b)) ** 2).sum() ** (power / 2) / power

        hess = torch.func.jacrev(torch.func.grad(fun))(torch.tensor(x))
        full = power_gauss_newton(jacobian @ x - b, jacobian, power)
        torch.testing.assert_close(full.rows.mT @ (full.weights[:, None] * full.rows), hess)
        fisher = power_fisher(jacobian @ x - b, jacobian, power)
        u = jacobian @ x - b
        plain = torch.tensor(np.linalg.norm(u) ** (power - 2) * jacobian.T @ jacobian)
        torch.testing.assert_close(fisher.weight * torch.outer(fisher.vector, fisher.vector), hess - plain)
    assert power_fisher(np.zeros(3), jacobian, 3).weight == 0
    assert float(power_gauss_newton(np.zeros(3), jacobian, 3).weights.sum()) == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Metric([[1.0, 2.0]]), ValueError, r"Metric: matrix must be \[d\] or \[d, d\]"),
        (lambda: Metric([1.0, -1.0]), ValueError, "not positive definite"),
        (lambda: Metric(-np.eye(2)), ValueError, "not positive definite"),
        (lambda: Metric([1.0, math.nan]), ValueError, "not positive definite"),
        (lambda: Metric("B"), TypeError, "Metric: matrix must be a real dense array"),
        (lambda: Metric([[1.0], [1.0, 2.0]]), TypeError, "real array"),
        (lambda: DenseCurvature([1.0]), ValueError, r"matrix must be \[d, d\]"),
        (lambda: DenseCurvature(np.eye(2) * 1j), TypeError, "real dense array"),
        (lambda: DenseCurvature(torch.eye(2).to_sparse()), TypeError, "real dense array"),
        (lambda: RankOneCurvature(np.eye(2)), ValueError, r"vector must be \[d\]"),
        (lambda: RankOneCurvature([1.0], math.nan), ValueError, "weight must be a finite number"),
        (lambda: WindowCurvature([1.0]), ValueError, r"rows must be \[m, d\]"),
        (lambda: WindowCurvature(np.eye(2), [1.0, 1.0, 1.0]), ValueError, r"weights must be a number or \[2\]"),
        (lambda: WindowCurvature(np.eye(2), -1.0), ValueError, "must not be negative"),
        (lambda: ProductCurvature(torch.clone, tolerance=1.0), ValueError, "tolerance must be"),
        (lambda: ProductCurvature(torch.clone, iterations=0), ValueError, "iterations must be"),
        (lambda: power_fisher([1.0], np.eye(2), 4), ValueError, r"residuals must be \[m\]"),
        (lambda: power_gauss_newton([1.0], [[1.0]], 1.5), ValueError, "power must be"),
        (lambda: DenseCurvature(np.eye(2)).solve(1.0, torch.ones(3)), ValueError, "the gradient has 3"),
        (lambda: RankOneCurvature([1.0]).solve(1.0, torch.ones(3)), ValueError, "dimension 1"),
        (lambda: WindowCurvature(np.eye(2)).solve(1.0, torch.ones(3)), ValueError, "dimension 2"),
    ],
)
def test_what_is_no_curvature_or_metric_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---------------------------------------------------------------------- the search


def search(curvature, smoothness=1.0, **settings):
    gradient = torch.tensor([3.0, 4.0], dtype=F64)
    return StepSearch(curvature, Metric(), 10.0, gradient, smoothness, SearchSettings(**settings))


def test_trials_halve_and_their_number_is_limited():
    found = search(NoCurvature(), 2.0, trials=5)
    trials = found.next(2) + found.next(10)
    assert [trial.smoothness for trial in trials] == [2.0, 1.0, 0.5, 0.25, 0.125]
    for trial in trials:
        assert trial.shift == pytest.approx(5 / (trial.smoothness + 1e-8))
        torch.testing.assert_close(trial.step, -torch.tensor([3.0, 4.0], dtype=F64) / trial.shift)
    assert found.next(1) == []


def test_trials_that_are_not_positive_definite_are_passed_over():
    # λ = 5 / γ: above 12 from γ = 1/4 on.
    found = search(DenseCurvature(-12 * np.eye(2)))
    assert [trial.smoothness for trial in found.next(2)] == [0.25, 0.125]
    assert found.tried == 4


def test_the_rule_of_acceptance_to_the_boundary():
    found = search(NoCurvature())
    (trial,) = found.next(1)
    gradient = torch.tensor([0.0, 2.0], dtype=F64)
    least = 4 / (8 * trial.shift)
    assert found.accepts(trial, 10 - 1.001 * least, gradient)
    assert not found.accepts(trial, 10 - 0.999 * least, gradient)
    for loss in (math.nan, math.inf, -math.inf):
        assert not found.accepts(trial, loss, gradient)
    assert not found.accepts(trial, 0.0, math.inf * gradient)
    assert not found.accepts(trial, 0.0, 1e200 * gradient)
    assert found.following(trial) == 2.0
    assert found.following(replace(trial, smoothness=1e-12)) == 1e-9


# ---------------------------------------------------------------------- minimize_gns


@pytest.mark.parametrize("with_metric", [False, True])
def test_iterates_are_those_of_the_algorithm_as_written(with_metric):
    fun, jac, hess, rows, b = log_sum_exp()
    start = np.ones(12)
    metric = rows.T @ rows + 0.1 * np.eye(12) if with_metric else None
    stand_in = {
        "hess": (hess, {"hess": hess}),
        "hessp": (hess, {"hessp": lambda x, v: hess(x) @ v, "cg_tolerance": 1e-12}),
        "window": (
            lambda x: rows.T @ (softmax(rows @ x - b)[:, None] * rows),
            {"curvature": lambda x: WindowCurvature(rows, softmax(rows @ x - b))},
        ),
        "none": (lambda x: np.zeros((12, 12)), {"curvature": "none"}),
    }
    for matrix, options in stand_in.values():
        expected, gammas, evaluations = gns_iterates(fun, jac, matrix, start, 6, metric=metric)
        found, result = iterates_of(fun, jac, start, metric=metric, maxiter=6, gtol=0.0, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        assert result.nit == 6
        assert result.smoothness == gammas[-1]
        assert result.nfev == result.njev == result.rounds == evaluations


def test_an_indefinite_start_is_passed_over_as_the_algorithm_has_it():
    def fun(x):
        return float(x[0] ** 4 / 4 - x[0] ** 2 + x[1] ** 2)

    def jac(x):
        return np.array([x[0] ** 3 - 2 * x[0], 2 * x[1]])

    def hess(x):
        return np.diag([3 * x[0] ** 2 - 2, 2.0])

    start = np.array([0.05, 1.0])
    expected, _, evaluations = gns_iterates(fun, jac, hess, start, 20)
    found, result = iterates_of(fun, jac, start, hess=hess, maxiter=20, gtol=1e-10)
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-9)
    assert result.success
    assert result.nfev <= evaluations
    assert abs(result.x[0]) == pytest.approx(2**0.5)


def test_three_ways_to_the_hessian_are_one_trajectory():
    start = [-1.2, 1.0, 0.7]
    runs = [
        iterates_of(rosen, rosen_der, start, hess=rosen_hess),
        iterates_of(rosen, rosen_der, start, hessp=rosen_hess_prod, cg_tolerance=1e-13),
        iterates_of(torch_rosen, None, start, cg_tolerance=1e-13),
        iterates_of(lambda x: (rosen(x), rosen_der(x)), True, start, hess=rosen_hess),
        iterates_of(torch_rosen, None, start, hess=lambda x: rosen_hess(x.numpy())),
    ]
    for found, result in runs:
        assert result.success
        assert result.status == 0
        np.testing.assert_allclose(found[:20], runs[0][0][:20], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(result.x, 1, atol=1e-4)
        np.testing.assert_allclose(result.jac, rosen_der(result.x), atol=1e-9)
    assert runs[0][1].nhev == runs[0][1].nit
    assert runs[1][1].nhev == runs[2][1].nhev > runs[1][1].nit


def test_tensors_of_any_shape_go_in_and_come_out():
    start = torch.tensor([[-1.2, 1.0], [0.7, 0.4]], dtype=torch.float32)

    def fun(x):
        assert x.shape == (2, 2)
        assert x.dtype == torch.float32
        return (x - 3).square().sum() + (x - 3).pow(4).sum()

    result = optex.minimize_gns(fun, start, gtol=1e-3)
    assert result.x.shape == (2, 2)
    assert result.x.dtype == torch.float32
    torch.testing.assert_close(result.x, torch.full((2, 2), 3.0), atol=1e-3, rtol=0)
    given = optex.minimize_gns(
        fun, start, gtol=1e-3, hess=lambda x: torch.diag(2 + 12 * (x - 3).flatten() ** 2).reshape(2, 2, 2, 2)
    )
    torch.testing.assert_close(given.x, result.x, atol=1e-3, rtol=0)


# ---------------------------------------------------------------------- trials at once


@pytest.mark.parametrize("count", [2, 3, 8])
def test_trials_at_once_are_the_same_run_to_the_bit_in_fewer_rounds(count):
    fun, jac, _, rows, b = log_sum_exp()
    cases = [
        (rosen, rosen_der, [-2.0, 2.0], {"hess": rosen_hess}),
        (rosen, rosen_der, [-1.2, 1.0, 0.7], {"hessp": rosen_hess_prod, "maxiter": 12}),
        (torch_rosen, None, [-1.2, 1.0, 0.7], {"maxiter": 12}),
        (fun, jac, np.ones(12), {"curvature": lambda x: WindowCurvature(rows, softmax(rows @ x - b))}),
        (fun, jac, np.ones(12), {"curvature": "none", "smoothness": 100.0}),
    ]
    for function, gradient, start, options in cases:
        turn, one = iterates_of(function, gradient, start, **options)
        once, several = iterates_of(function, gradient, start, parallelism=count, **options)
        assert np.array_equal(turn, once)
        assert (one.nit, one.fun, one.smoothness) == (several.nit, several.fun, several.smoothness)
        assert np.array_equal(one.jac, several.jac)
        assert one.rounds == one.nfev
        trials = one.nfev - 1
        assert several.rounds < one.rounds if trials > one.nit else several.rounds == one.rounds
        assert several.rounds >= several.nit + 1
        assert several.nfev >= one.nfev


def test_workers_compute_the_same_run():
    turn, one = iterates_of(rosen, rosen_der, [-2.0, 2.0], hess=rosen_hess)
    with ThreadPoolExecutor(2) as pool:
        once, several = iterates_of(rosen, rosen_der, [-2.0, 2.0], hess=rosen_hess, workers=pool)
    assert np.array_equal(turn, once)
    assert several.rounds < one.rounds  # four at once unless told otherwise
    mapped, _ = iterates_of(rosen, rosen_der, [-2.0, 2.0], hess=rosen_hess, workers=map, parallelism=4)
    assert np.array_equal(turn, mapped)


def test_vectorized_trials_come_to_the_same_minimum():
    result = optex.minimize_gns(torch_rosen, [-1.2, 1.0], evaluator="vectorized", parallelism=3)
    assert result.success
    np.testing.assert_allclose(result.x, 1, atol=1e-4)


class Losing(WrappingEvaluator):
    """Loses every point but the first of a request."""

    def evaluate(self, request):
        found = self.inner.evaluate(request)
        lost = tuple(range(1, len(request)))
        losses = found.losses.clone()
        losses[1:] = math.nan
        return replace(found, losses=losses, lost=lost)


def test_lost_trials_are_evaluated_again_before_later_ones_are_judged():
    turn, one = iterates_of(rosen, rosen_der, [-2.0, 2.0], hess=rosen_hess)
    once, several = iterates_of(
        rosen, rosen_der, [-2.0, 2.0], hess=rosen_hess, evaluator=Losing(SequentialEvaluator()), parallelism=3
    )
    assert np.array_equal(turn, once)
    assert several.rounds == one.rounds
    assert several.nfev == one.nfev


class Dying(WrappingEvaluator):
    """Answers so many requests."""

    def __init__(self, requests):
        super().__init__(SequentialEvaluator())
        self.left = requests

    def evaluate(self, request):
        self.left -= 1
        if self.left < 0:
            raise optex.WorkerLostError("no worker is left")
        return self.inner.evaluate(request)


def test_workers_that_die_leave_the_best_point():
    result = optex.minimize_gns(rosen, [-2.0, 2.0], jac=rosen_der, hess=rosen_hess, evaluator=Dying(9))
    assert (result.status, result.message) == (3, "no worker is left")
    assert result.fun == rosen(result.x) < rosen([-2.0, 2.0])
    with pytest.raises(optex.WorkerLostError):
        optex.minimize_gns(rosen, [-2.0, 2.0], jac=rosen_der, hess=rosen_hess, evaluator=Dying(0))


# ---------------------------------------------------------------------- how it ends


def test_a_start_at_the_minimum_is_returned_before_anything_else():
    def never(x):
        raise AssertionError("no curvature is needed")

    result = optex.minimize_gns(rosen, [1.0, 1.0], jac=rosen_der, hess=never, gtol=0.0)
    assert (result.status, result.nit, result.nfev, result.nhev) == (0, 0, 1, 0)
    assert np.array_equal(result.x, [1.0, 1.0])


def test_41_rejections_end_the_run_at_the_last_good_point():
    def wrong(x):
        return -rosen_der(x)

    result = optex.minimize_gns(rosen, [-1.2, 1.0], jac=wrong, curvature="none")
    assert (result.status, result.success, result.nit) == (2, False, 0)
    assert result.nfev == 42
    assert "none of 41 trials" in result.message
    assert np.array_equal(result.x, [-1.2, 1.0])
    assert result.fun == rosen(result.x)
    short = optex.minimize_gns(rosen, [-1.2, 1.0], jac=wrong, curvature="none", trials=7, parallelism=4)
    assert (short.status, short.nfev, short.rounds) == (2, 8, 3)


def test_a_matrix_that_is_never_definite_costs_no_evaluations():
    result = optex.minimize_gns(rosen, [-1.2, 1.0], jac=rosen_der, hess=lambda x: np.full((2, 2), math.nan))
    assert (result.status, result.nfev) == (2, 1)


def test_trials_that_are_not_finite_are_rejected():
    def fun(x):
        return -np.log(x[0]) + x[0] if x[0] > 0 else math.nan

    def jac(x):
        return np.array([1 - 1 / x[0]]) if x[0] > 0 else np.array([math.nan])

    with np.errstate(all="ignore"):
        result = optex.minimize_gns(
            fun, [8.0], jac=jac, hess=lambda x: [[1 / x[0] ** 2]], smoothness=100.0, gtol=1e-9
        )
    assert result.success
    assert result.x[0] == pytest.approx(1.0)


def test_a_limit_ends_a_run():
    result = optex.minimize_gns(rosen, [-2.0, 2.0], jac=rosen_der, hess=rosen_hess, maxiter=3)
    assert (result.status, result.nit, result.success) == (1, 3, False)


def test_a_callback_ends_a_run():
    options = {"jac": rosen_der, "hess": rosen_hess}

    def stops(intermediate_result):
        if intermediate_result.nit == 4:
            raise StopIteration

    stopped = optex.minimize_gns(rosen, [-2.0, 2.0], callback=stops, **options)
    assert (stopped.status, stopped.nit) == (99, 4)
    assert optex.minimize_gns(rosen, [-2.0, 2.0], callback=lambda x: True, **options).nit == 1


def test_disp_prints_how_it_went(capsys):
    optex.minimize_gns(rosen, [-2.0, 2.0], jac=rosen_der, hess=rosen_hess, disp=True)
    text = capsys.readouterr().out
    assert "terminated successfully" in text
    assert "Hessian evaluations or products" in text


def test_arguments_of_the_function_reach_all_functions():
    def fun(x, a):
        return float(((x - a) ** 2).sum())

    result = optex.minimize_gns(fun, [0.0, 0.0], 3.0, jac=lambda x, a: 2 * (x - a), hessp=lambda x, v, a: 2 * v)
    np.testing.assert_allclose(result.x, 3.0, atol=1e-5)
    other = optex.minimize_gns(
        fun,
        [0.0, 0.0],
        (3.0,),
        jac=lambda x, a: 2 * (x - a),
        curvature=lambda x, a: DenseCurvature(2 * np.eye(2)),
    )
    np.testing.assert_allclose(other.x, 3.0, atol=1e-5)


class Constant(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x.detach())
        return (x**2).sum()

    @staticmethod
    def backward(ctx, *cotangents):
        return cotangents[0] * ctx.saved_tensors[0]


REFUSALS = {
    "no hessian": ({"jac": rosen_der}, ValueError, "there is no Hessian: pass hess="),
    "hess no function": ({"jac": rosen_der, "hess": "2-point"}, TypeError, "hess must be a function"),
    "hessp no function": ({"jac": rosen_der, "hessp": 3}, TypeError, "hessp must be a function"),
    "curvature unknown": ({"jac": rosen_der, "curvature": "bfgs"}, ValueError, "curvature must be 'exact'"),
    "two curvatures": (
        {"jac": rosen_der, "curvature": "none", "hess": rosen_hess},
        ValueError,
        "both say what H is",
    ),
    "curvature of another kind": (
        {"jac": rosen_der, "curvature": rosen_hess},
        TypeError,
        "curvature must return an optex.optimizers.Curvature",
    ),
    "hess of another size": ({"jac": rosen_der, "hess": lambda x: x}, ValueError, "hess must return 4 numbers"),
    "hess no array": (
        {"jac": rosen_der, "hess": lambda x: "H"},
        TypeError,
        "what hess returns must be a real dense",
    ),
    "hess complex": ({"jac": rosen_der, "hess": lambda x: 1j * np.eye(2)}, TypeError, "real dense array"),
    "hessp of another size": (
        {"jac": rosen_der, "hessp": lambda x, v: 1.0},
        ValueError,
        "hessp must return 2 numbers",
    ),
    "smoothness": ({"jac": rosen_der, "hess": rosen_hess, "smoothness": 0.0}, ValueError, "smoothness must be"),
    "least": ({"jac": rosen_der, "hess": rosen_hess, "least_smoothness": -1}, ValueError, "least_smoothness"),
    "eps": ({"jac": rosen_der, "hess": rosen_hess, "eps": math.nan}, ValueError, "minimize_gns: eps"),
    "trials": ({"jac": rosen_der, "hess": rosen_hess, "trials": 0}, ValueError, "minimize_gns: trials"),
    "parallelism": (
        {"jac": rosen_der, "hess": rosen_hess, "parallelism": 0},
        ValueError,
        "parallelism must be",
    ),
    "maxiter": ({"jac": rosen_der, "hess": rosen_hess, "maxiter": 0}, ValueError, "maxiter must be"),
    "gtol": ({"jac": rosen_der, "hess": rosen_hess, "gtol": -1.0}, ValueError, "gtol must be"),
    "callback": ({"jac": rosen_der, "hess": rosen_hess, "callback": 3}, TypeError, "callback must be callable"),
    "disp": ({"jac": rosen_der, "hess": rosen_hess, "disp": "yes"}, TypeError, "disp must be"),
    "metric": (
        {"jac": rosen_der, "hess": rosen_hess, "metric": np.eye(3)},
        ValueError,
        "metric is of dimension 3",
    ),
    "cg": ({"jac": rosen_der, "hessp": rosen_hess_prod, "cg_tolerance": 2.0}, ValueError, "tolerance must be"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_by_name(case):
    options, error, words = REFUSALS[case]
    with pytest.raises(error, match=words):
        optex.minimize_gns(rosen, [-1.2, 1.0], **options)


def test_functions_that_cannot_be_started_or_differentiated_are_refused():
    with pytest.raises(ValueError, match="at x0 fun is inf"):
        optex.minimize_gns(lambda x: math.inf, [1.0], jac=lambda x: x, curvature="none")
    with pytest.raises(ValueError, match="gradient does not depend on x as far as autograd sees"):
        optex.minimize_gns(Constant.apply, [1.0, 2.0])
    with pytest.raises(TypeError, match="computes in NumPy"):
        optex.minimize_gns(lambda x: np.sum(np.log(x)), [1.0])
    assert optex.minimize_gns(Constant.apply, [1.0, 2.0], hessp=lambda x, v: 2 * v).success


# ---------------------------------------------------------------------- the closure optimizer


def closure_of(model, batch):
    return lambda: squared_error(model)(batch)


def test_steps_are_minimize_gns_own():
    start = [-1.2, 1.0, 0.7]
    found, result = iterates_of(torch_rosen, None, start, gtol=0.0, maxiter=25)
    x = nn.Parameter(torch.tensor(start, dtype=F64))
    optimizer = GNS([x])
    for row in found[:-1]:
        np.testing.assert_allclose(x.detach().numpy(), row, rtol=1e-9, atol=1e-12)
        loss = optimizer.step(lambda: torch_rosen(x))
        assert float(loss) == pytest.approx(rosen(row))
    np.testing.assert_allclose(x.detach().numpy(), found[-1], rtol=1e-9)
    assert float(optimizer.state[x]["smoothness"]) == result.smoothness
    assert float(optimizer.state[x]["step"]) == result.nit == 25
    np.testing.assert_allclose(grad_of(x).numpy(), rosen_der(x.detach().numpy()), rtol=1e-9, atol=1e-10)
    assert not grad_of(x).requires_grad


def pieces(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def dense_gauss_newton(model, batch):
    def outputs(vector):
        return torch.func.functional_call(model, unflatten(model, vector), (batch[0],)).reshape(-1)

    jacobian = torch.autograd.functional.jacobian(outputs, pieces(model))
    return DenseCurvature(2 / len(jacobian) * jacobian.mT @ jacobian)


def unflatten(model, vector):
    named = dict(model.named_parameters())
    parts = vector.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def test_gauss_newton_products_are_the_dense_matrix():
    (batch,) = regression_batches(1)
    model, twin = network(), network()

    def pair():
        outputs = model(batch[0])
        return (outputs - batch[1]).square().mean(), outputs

    own = GNS(model.parameters(), "gauss-newton", cg_tolerance=1e-12)
    dense = GNS(twin.parameters(), lambda: dense_gauss_newton(twin, batch))
    losses = []
    for _ in range(6):
        losses.append(float(own.step(pair)))
        dense.step(closure_of(twin, batch))
        torch.testing.assert_close(pieces(model), pieces(twin), rtol=1e-6, atol=1e-8)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("curvature", ["exact", "none"])
def test_closures_may_backpropagate_as_torchs_do(curvature):
    (batch,) = regression_batches(1)
    model, twin = network(), network()
    optimizer, other = GNS(model.parameters(), curvature), GNS(twin.parameters(), curvature)

    def closure():
        other.zero_grad()
        loss = squared_error(twin)(batch)
        gradients = torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)
        for p, g in zip(twin.parameters(), gradients, strict=True):  # what backward(create_graph=True) leaves
            p.grad = g if curvature == "exact" else g.detach()
        return loss

    for _ in range(4):
        optimizer.step(closure_of(model, batch))
        other.step(closure)
        assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton"])
def test_a_closure_without_the_graph_is_refused_with_the_remedy(curvature):
    (batch,) = regression_batches(1)
    model = network()
    before = snapshot(model)

    def closure():
        outputs = model(batch[0])
        loss = (outputs - batch[1]).square().mean()
        loss.backward()
        return (loss, outputs) if curvature == "gauss-newton" else loss

    with pytest.raises(ValueError, match=r"leave backward\(\) out of the closure"):
        GNS(model.parameters(), curvature).step(closure)
    assert same(before, snapshot(model))


def trained(optimizer, model, count):
    (batch,) = regression_batches(1)
    for _ in range(count):
        optimizer.step(closure_of(model, batch))


def test_runs_repeat_and_the_loss_falls_with_every_step():
    (batch,), runs = regression_batches(1), []
    for _ in range(2):
        model = network()
        optimizer = GNS(model.parameters())
        losses = [float(optimizer.step(closure_of(model, batch))) for _ in range(8)]
        assert losses == sorted(losses, reverse=True)
        runs.append(snapshot(model))
    assert same(*runs)


def test_a_run_goes_on_from_its_state_dict_through_torchs_files():
    model, twin = network(), network(seed=1)
    optimizer, other = GNS(model.parameters()), GNS(twin.parameters())
    trained(optimizer, model, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict()["state"][0]["smoothness"] == optimizer.state_dict()["state"][0]["smoothness"]
    for net, own in ((model, optimizer), (twin, other)):
        trained(own, net, 3)
    assert same(snapshot(model), snapshot(twin))


def test_copies_and_pickles_go_on_alike():
    model = network()
    dimension = sum(p.numel() for p in model.parameters())
    optimizer = GNS(model.parameters(), "none", metric=torch.linspace(1, 2, dimension, dtype=F64))
    trained(optimizer, model, 3)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for net, own in (*copies, (model, optimizer)):
        trained(own, net, 3)
    for net, _ in copies:
        assert same(snapshot(net), snapshot(model))


def test_frozen_and_unused_parameters_stay():
    (batch,) = regression_batches(1)
    model, spare = network(), nn.Parameter(torch.ones(3, dtype=F64))
    weight = model.get_parameter("0.weight").requires_grad_(False)
    frozen = weight.detach().clone()
    optimizer = GNS([*model.parameters(), spare])
    before = snapshot(model)
    for _ in range(3):
        optimizer.step(closure_of(model, batch))
    assert torch.equal(weight, frozen)
    assert torch.equal(spare, torch.ones(3, dtype=F64))
    assert spare.grad is None
    assert not torch.equal(model.get_parameter("2.weight"), before[2])


def test_parameters_of_different_dtypes_step_each_in_its_own():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = GNS([a, b])
    for _ in range(6):
        optimizer.step(lambda: (a.double() - 3).square().sum() + (b * a.double() - 1).square().sum())
    torch.testing.assert_close(a.detach(), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(b.detach(), torch.full((2,), 1 / 3, dtype=F64), atol=1e-3, rtol=0)


def test_a_gradient_of_zero_takes_no_step():
    x = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = GNS([x])
    assert float(optimizer.step(lambda: x.square().sum())) == 0
    assert not optimizer.state_dict()["state"]
    assert torch.equal(grad_of(x), torch.zeros(2, dtype=F64))


def test_a_step_that_cannot_be_taken_warns_and_changes_nothing():
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    optimizer, calls = GNS([x], "none"), []

    def closure():  # rises wherever it goes
        calls.append(1)
        return x.square().sum() + 100 * len(calls)

    with pytest.warns(ConvergenceWarning, match="none of 41 trials lowered the loss"):
        optimizer.step(closure)
    assert len(calls) == 42
    assert torch.equal(x, torch.tensor([1.0, 2.0], dtype=F64))
    assert not optimizer.state_dict()["state"]
    assert torch.equal(grad_of(x), torch.tensor([2.0, 4.0], dtype=F64))


def test_what_is_not_finite_is_named_and_nothing_is_lost():
    model = network()
    optimizer = GNS(model.parameters())
    trained(optimizer, model, 2)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])

    first, last = model.get_parameter("0.weight"), model.get_parameter("2.weight")

    def spoiled():
        return last.sum() * math.inf + first.sum()

    with pytest.raises(NonFiniteError, match=r"gradient of parameter 2 \(3, 5\) is not finite"):
        optimizer.step(spoiled)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        optimizer.step(lambda: last.square().sum() + math.nan)
    assert same(before, snapshot(model))
    assert optimizer.state_dict()["state"] == state


def test_a_closure_that_fails_at_a_trial_leaves_the_start():
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    optimizer, calls = GNS([x]), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x.pow(4).sum()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(x, torch.tensor([1.0, 2.0], dtype=F64))
    assert not optimizer.state_dict()["state"]


def one():
    return [nn.Parameter(torch.ones(2, dtype=F64))]


def test_parameters_that_are_all_frozen_are_refused():
    (x,) = parameters = one()
    optimizer = GNS(parameters)
    x.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        optimizer.step(lambda: x.sum())


STEPS = {
    "no closure": (GNS, None, TypeError, "step needs a closure"),
    "no loss": (GNS, lambda x: None, TypeError, "must return the loss"),
    "a vector": (GNS, lambda x: x * 2, ValueError, "must be a real scalar"),
    "no graph": (GNS, lambda x: 3.0, ValueError, "carries no graph"),
    "linear": (GNS, lambda x: x.sum(), ValueError, "there is no Hessian"),
    "no pair": (lambda p: GNS(p, "gauss-newton"), lambda x: x.sum(), TypeError, r"returns \(loss, outputs\)"),
    "no curvature": (
        lambda p: GNS(p, lambda: np.eye(2)),  # pyright: ignore[reportArgumentType]
        lambda x: x.sum(),
        TypeError,
        "curvature must return an optex.optimizers.Curvature",
    ),
    "another size": (
        lambda p: GNS(p, lambda: DenseCurvature(np.eye(3))),
        lambda x: x.sum(),
        ValueError,
        "dimension 3, and the gradient has 2",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_that_cannot_work_are_refused(case):
    make, loss, error, words = STEPS[case]
    (x,) = parameters = one()
    optimizer = make(parameters)
    with pytest.raises(error, match=words):
        optimizer.step(None if loss is None else lambda: loss(x))
    assert torch.equal(x, torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: GNS(one(), "newton"),  # pyright: ignore[reportArgumentType]
            ValueError,
            "curvature must be one of 'exact', 'gauss-newton', 'none'",
        ),
        (lambda: GNS(one(), metric=np.eye(3)), ValueError, "metric is of dimension 3"),
        (lambda: GNS(one(), smoothness=-1.0), ValueError, "GNS: smoothness"),
        (lambda: GNS(one(), least_smoothness=0.0), ValueError, "GNS: least_smoothness"),
        (lambda: GNS(one(), eps=-1.0), ValueError, "GNS: eps"),
        (lambda: GNS(one(), trials=0), ValueError, "GNS: trials"),
        (lambda: GNS(one(), cg_tolerance=1.0), ValueError, "GNS: cg_tolerance"),
        (lambda: GNS(one(), cg_iterations=0), ValueError, "GNS: cg_iterations"),
        (lambda: GNS([{"params": one()}, {"params": one()}]), ValueError, "one parameter group"),
        (lambda: GNS([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), TypeError, "complex parameters"),
        (
            lambda: OptEx(GNS(one())),
            TypeError,
            "GNS cannot be the base: it evaluates its closure several times",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match="a gradient is sparse"):
        GNS(table.parameters(), "none").step(lambda: table(torch.tensor([1])).sum())
    assert torch.equal(before, table.weight)


def test_losses_linear_in_the_outputs_have_no_gauss_newton():
    x = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = GNS([x], "gauss-newton")

    def pair():
        outputs = x.square()
        return outputs.sum(), outputs

    optimizer.step(pair)  # H = 0: a step of the normalized gradient method
    torch.testing.assert_close(x.detach(), torch.full((2,), 1 - 0.5**0.5, dtype=F64), rtol=1e-6, atol=0)
