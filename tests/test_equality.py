"""AdaSketch-Newton: the twin, the merit gradient, known problems, SciPy's front door, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import (
    LinearConstraint,
    NonlinearConstraint,
    approx_fprime,
    minimize,
    rosen,
    rosen_der,
    rosen_hess,
)

import optex
from optex import NonFiniteError, RankDeficientError, equality_method, minimize_equality
from optex.solvers import Status
from optex.solvers.equality.derivatives import read_form, smooth
from optex.solvers.equality.linear import SOLVERS
from optex.solvers.equality.newton import Merit, Point
from optex.studies.problems.hock_schittkowski import PROBLEMS
from tests.references.equality import Derivatives, merit, newton_iterates, sketched

# The published start of HS61 has dependent gradients of its constraints.
NAMES = [name for name in PROBLEMS if name != "HS61"]


def solved(name, **options):
    problem = PROBLEMS[name]
    return minimize_equality(problem.objective, problem.constraints, problem.start, **options)


def quadratic(x):
    return (x**2).sum()


def plane(x):
    return x.sum()[None] - 1


def at(name, x, lam):
    problem = PROBLEMS[name]
    form, x = read_form(x)
    functions = (problem.objective, problem.constraints)
    f, c = (smooth("f", function, form, None, None, ("", "")).at(x) for function in functions)
    return Point(x, np.asarray(lam, dtype=float), f, c)


# ---------------------------------------------------------------------- the twin


@pytest.mark.parametrize("name", ["HS6", "HS7", "HS27", "HS39", "HS40", "HS42", "HS77", "HS78", "HS100LNP"])
def test_iterates_are_the_twins(name):
    problem = PROBLEMS[name]
    found, steps = [], []

    def told(intermediate_result):
        found.append(np.concatenate([intermediate_result.x, intermediate_result.lam]))
        steps.append(intermediate_result.step)

    result = solved(name, linear_solver="direct", callback=told)
    start = np.array(problem.start)
    of = Derivatives(problem.objective, problem.constraints)
    iterates, lengths, eta1, eta2 = newton_iterates(of, start, np.zeros(of.c(start).size))
    assert steps == lengths
    assert (result.eta1, result.eta2) == pytest.approx((eta1, eta2), rel=1e-12)
    np.testing.assert_allclose(found, iterates[1:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["gv", "rk"])
def test_sketches_are_the_twins(kind):
    random = np.random.default_rng(3)
    K = random.standard_normal((6, 6))
    K, r = K + K.T, random.standard_normal(6)
    solve = SOLVERS[kind](K, r, np.random.default_rng(7))
    solve.reach(0.0, 150)
    assert solve.iterations == 150
    np.testing.assert_allclose(solve.direction, sketched(kind, K, r, 150, 7), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(solve.residual, r - K @ solve.direction, atol=1e-12)


@pytest.mark.parametrize("kind", SOLVERS)
def test_inner_solvers_reach_the_accuracy_and_go_on_from_there(kind):
    random = np.random.default_rng(0)
    B, J = np.diag([1.0, 2.0, -0.5, 3.0]), random.standard_normal((2, 4))
    K, r = np.block([[B, J.T], [J, np.zeros((2, 2))]]), random.standard_normal(6)
    solve = SOLVERS[kind](K, r, random)
    for target in (1e-2, 1e-6):
        solve.reach(target, 100_000)
        assert np.linalg.norm(r - K @ solve.direction) <= target * (1 + 1e-6)
    taken = solve.iterations
    solve.reach(1e-6, 100_000)
    assert solve.iterations == taken
    np.testing.assert_allclose(solve.direction, np.linalg.solve(K, r), atol=1e-5)


# ---------------------------------------------------------------------- the merit function


def test_merit_gradient_has_the_lagrangians_hessian():
    # With the Hessian of f in its place the first component is -102.24.
    point = at("HS6", [-1.2, 1.0], [0.3])
    assert Merit(1.0, 0.1).gradient(point, point.hessian())[0] == pytest.approx(-103.92)


@pytest.mark.parametrize("name", NAMES)
def test_merit_gradient_is_that_of_differences(name):
    problem = PROBLEMS[name]
    of, x = Derivatives(problem.objective, problem.constraints), np.array(problem.start) * 1.01 + 0.01
    lam = np.linspace(0.5, -0.7, of.c(x).size)
    point = at(name, x, lam)
    z = np.concatenate([x, lam])
    slope = np.array(approx_fprime(z, lambda z: merit(of, z[: x.size], z[x.size :], 1.0, 0.1), 1e-7))
    gradient = Merit(1.0, 0.1).gradient(point, point.hessian())
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5 * np.abs(gradient).max() + 1e-5)
    assert Merit(1.0, 0.1).value(point) == pytest.approx(merit(of, x, lam, 1.0, 0.1), rel=1e-12)


# ---------------------------------------------------------------------- known problems


@pytest.mark.parametrize("name", NAMES)
def test_problems_of_hock_and_schittkowski(name):
    problem, result = PROBLEMS[name], solved(name, tol=1e-7)
    assert result.success
    assert result.kkt <= 1e-7
    assert result.constr_violation <= 1e-7
    assert result.fun == pytest.approx(problem.least, abs=2e-6 * max(1, abs(problem.least)))


@pytest.mark.parametrize("name", ["HS28", "HS48", "HS51"])
@pytest.mark.parametrize("linear_solver", ["minres", "direct", "gv", "rk"])
def test_quadratics_with_linear_constraints_take_one_step(name, linear_solver):
    result = solved(name, linear_solver=linear_solver, seed=0)
    assert result.success
    assert result.nit == 1
    assert result.step == 1.0
    assert result.fun == pytest.approx(PROBLEMS[name].least, abs=1e-8)


@pytest.mark.parametrize("linear_solver", ["gv", "rk"])
def test_sketching_solvers_solve_and_are_seeded(linear_solver):
    seeds = (0, np.random.default_rng(0), 1)
    results = [solved("HS40", linear_solver=linear_solver, seed=seed) for seed in seeds]
    assert all(result.success for result in results)
    assert np.array_equal(results[0].x, results[1].x)
    assert not np.array_equal(results[0].x, results[2].x)
    assert results[0].fun == pytest.approx(-0.25, abs=1e-5)


def test_multipliers_and_signs():
    # min x² + y² with x + y = 1: ∇f + λ J' = 0 at (½, ½) with λ = -1.
    result = minimize_equality(quadratic, plane, [3.0, 0.0])
    np.testing.assert_allclose(result.x, [0.5, 0.5], atol=1e-9)
    np.testing.assert_allclose(result.lam, [-1.0], atol=1e-9)
    np.testing.assert_allclose(result.jac, [1.0, 1.0], atol=1e-9)


def test_multipliers_may_be_given_and_a_solution_needs_no_step():
    result = minimize_equality(quadratic, plane, [0.5, 0.5], lam0=[-1.0])
    assert result.success
    assert result.nit == 0
    assert result.step is None


def test_a_bad_region_is_left_by_shorter_steps():
    # log is NaN where a full step would go.
    result = minimize_equality(lambda x: -x.log().sum(), plane, [0.01, 5.0])
    assert result.success
    np.testing.assert_allclose(result.x, [0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_any_shape_come_back_as_they_went_in(dtype):
    start = torch.tensor([[2.0, 0.0], [1.0, -1.0]], dtype=dtype)
    seen = []

    def f(x):
        seen.append((x.shape, x.dtype))
        return (x**2).sum()

    result = minimize_equality(f, lambda x: x.sum(0) - 1, start)
    assert set(seen) == {(start.shape, dtype)}
    assert result.x.shape == start.shape
    assert {result.x.dtype, result.lam.dtype, result.jac.dtype} == {dtype}
    torch.testing.assert_close(result.x, torch.full((2, 2), 0.5, dtype=dtype))


def test_derivatives_may_be_given_for_one_function_or_both():
    def c(x):
        return x @ x - 1

    given: dict[str, Any] = {"jac": rosen_der, "hess": rosen_hess}
    constraint: dict[str, Any] = {
        "constraint_jac": lambda x: 2 * x,
        "constraint_hess": lambda x, v: 2 * v[0] * np.eye(2),
    }
    both = minimize_equality(rosen, c, [0.5, 0.5], **given, **constraint)
    one = minimize_equality(rosen, c, [0.5, 0.5], **given)
    assert both.success
    np.testing.assert_allclose(both.x, one.x, atol=1e-9)
    assert (both.nit, both.nfev, both.ncev) == (one.nit, one.nfev, one.ncev)


def test_a_function_is_called_once_a_point():
    calls = []
    result = minimize_equality(lambda x: calls.append(1) or quadratic(x), plane, [3.0, 0.0])
    assert len(calls) == result.nfev == result.ncev == result.nit + 1
    assert result.nhev == result.nit


# ---------------------------------------------------------------------- how runs end


@pytest.mark.parametrize(
    ("c", "start"),
    [
        (lambda x: x[:1] ** 2 + 1, [2.0, 1.0]),
        (lambda x: (x @ x + 1)[None], [2.0, 1.0]),
        (lambda x: torch.stack([x @ x - 1, x[0] - 3]), [2.0, 1.0]),
        (lambda x: x[:1].exp(), [2.0, 1.0]),
    ],
)
def test_infeasible_constraints_are_said_to_be(c, start):
    result = minimize_equality(quadratic, c, start)
    assert result.status == Status.STALLED
    assert "seem infeasible" in result.message
    assert np.isfinite(result.x).all()
    assert result.constr_violation > 1e-4


def test_rank_lost_on_the_way_is_a_status():
    # The first step is a full one, and ends where the gradient of the constraint is 0.
    def c(x):
        return torch.where(x[:1] > 1.5, x[:1] - 1, 0 * x[:1])

    result = minimize_equality(quadratic, c, [3.0, 1.0])
    assert result.status == Status.BREAKDOWN
    assert result.nit == 1
    assert "full row rank" in result.message


def test_the_callback_stops():
    def stop(x):
        raise StopIteration

    for callback in (stop, lambda x: True, lambda intermediate_result: intermediate_result.nit == 1):
        result = solved("HS6", callback=callback)
        assert result.status == Status.STOPPED
        assert result.nit == 1
    assert solved("HS6", callback=lambda x: None).success


def test_nan_in_a_second_derivative_is_a_status():
    def hess(x):
        return 2 * np.eye(2) * (np.nan if x[0] < 2.9 else 1)

    result = minimize_equality(
        lambda x: x @ x,
        lambda x: np.exp(x.sum()) - np.e,
        [3.0, 0.0],
        jac=lambda x: 2 * x,
        hess=hess,
        constraint_jac=lambda x: np.exp(x.sum()) * np.ones((1, 2)),
        constraint_hess=lambda x, v: v[0] * np.exp(x.sum()) * np.ones((2, 2)),
    )
    assert result.status == Status.NON_FINITE
    assert np.isfinite(result.x).all()


# ---------------------------------------------------------------------- SciPy's front door


def circle(x):
    return x @ x - 1


@pytest.mark.parametrize("jac", [None, rosen_der])
@pytest.mark.parametrize("hess", [None, rosen_hess])
@pytest.mark.parametrize(
    "constraint",
    [
        {"type": "eq", "fun": circle},
        {"type": "eq", "fun": circle, "jac": lambda x: 2 * x},
        {"type": "eq", "fun": circle, "jac": lambda x: 2 * x, "hess": lambda x, v: 2 * v[0] * np.eye(2)},
        [{"type": "eq", "fun": lambda x, r: x @ x - r, "args": (1.0,)}],
        NonlinearConstraint(lambda x: x @ x, 1.0, 1.0),
        NonlinearConstraint(
            lambda x: x @ x,
            1,
            1,
            jac=lambda x: 2 * x,  # pyright: ignore[reportArgumentType] - SciPy takes functions, too
            hess=lambda x, v: 2 * v[0] * np.eye(2),
        ),
    ],
)
def test_scipy_calls_it(jac, hess, constraint):
    given = {"jac": jac, "hess": hess, "constraints": constraint}
    result = minimize(rosen, [0.5, 0.5], method=optex.equality_method, **given)
    assert result.success
    np.testing.assert_allclose(result.x, [0.78641515, 0.61769831], atol=2e-5)


def test_scipy_hands_several_constraints_options_and_arguments_on():
    third = {"type": "eq", "fun": lambda x: x[0] - 0.25}
    bounds: Any = [1, 0]  # SciPy takes arrays, and tells type checkers of numbers alone
    several = [LinearConstraint([[1, 1, 1], [1, -1, 0]], bounds, bounds), third]
    result = minimize(
        lambda x, a: (a * x**2).sum(),
        [1.0, 2.0, 3.0],
        args=(2.0,),
        method=equality_method,
        constraints=several,
        tol=1e-5,
        options={"linear_solver": "direct", "maxiter": 30},
    )
    assert result.success
    np.testing.assert_allclose(result.x, [0.25, 0.25, 0.5], atol=1e-6)
    given = {"method": equality_method, "constraints": {"type": "eq", "fun": circle}}
    stopped = minimize(rosen, [0.5, 0.5], callback=lambda x: True, **given)
    assert stopped.status == Status.STOPPED


def test_scipy_jac_true_is_one_function():
    result = minimize(
        lambda x: (rosen(x), rosen_der(x)),
        [0.5, 0.5],
        jac=True,
        method=equality_method,
        constraints={"type": "eq", "fun": circle},
    )
    assert result.success


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"constraints": {"type": "ineq", "fun": circle}}, ValueError, "type 'eq'.*SLSQP"),
        ({"constraints": NonlinearConstraint(circle, 0, 1)}, ValueError, "lb = ub"),
        ({"constraints": LinearConstraint([1, 1], 0, 1)}, ValueError, "lb = ub"),
        ({"constraints": 3}, TypeError, "dicts"),
        ({"constraints": ()}, ValueError, "no constraints"),
        ({"bounds": [(0, 1), (0, 1)]}, ValueError, "bounds"),
        ({"hessp": lambda x, p: p}, ValueError, "hessp"),
        ({"options": {"constraint_jac": circle}}, TypeError, "constraint_jac"),
    ],
)
def test_scipy_problems_that_cannot_be_solved_are_refused(options, error, words):
    given = {"constraints": {"type": "eq", "fun": circle}, **options}
    with pytest.raises(error, match=words):
        minimize(rosen, [0.5, 0.5], method=equality_method, **given)


# ---------------------------------------------------------------------- what is refused


def test_dependent_constraints_are_refused_by_name():
    with pytest.raises(RankDeficientError, match="full row rank"):
        solved("HS61")
    with pytest.raises(RankDeficientError, match=r"constraints \[1\] do not change"):
        minimize_equality(quadratic, lambda x: torch.stack([x.sum() - 1, 0 * x[0]]), [1.0, 2.0])
    with pytest.raises(RankDeficientError, match="dependent"):
        minimize_equality(quadratic, lambda x: torch.stack([x.sum() - 1, x.sum() - 2]), [1.0, 2.0])


@pytest.mark.parametrize("where", ["f", "c"])
def test_nan_at_the_start_is_refused(where):
    functions = {"f": quadratic, "c": plane}
    functions[where] = lambda x: (x - 5).log().sum()
    with pytest.raises(NonFiniteError, match="x0"):
        minimize_equality(functions["f"], functions["c"], [1.0, 2.0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x0": []}, ValueError, "empty"),
        ({"x0": [[1.0, 2.0]]}, ValueError, "one dimension"),
        ({"x0": [np.nan, 1.0]}, ValueError, "not finite"),
        ({"x0": ["a", "b"]}, TypeError, "real numbers"),
        ({"x0": [[1.0], [1.0, 2.0]]}, TypeError, "real numbers"),
        ({"x0": torch.tensor([1, 2])}, TypeError, "floating-point"),
        ({"lam0": [1.0, 2.0]}, ValueError, "1 finite numbers"),
        ({"lam0": [np.inf]}, ValueError, "1 finite numbers"),
        ({"f": 3}, TypeError, "f must be a function"),
        ({"c": None}, TypeError, "c must be a function"),
        ({"f": lambda x: x}, ValueError, "scalar"),
        ({"f": lambda x: 3.0}, TypeError, "floating-point tensor"),
        ({"f": lambda x: torch.ones(())}, ValueError, "does not depend"),
        ({"f": lambda x: x.detach().sum()}, ValueError, "does not depend"),
        ({"c": lambda x: x[:0]}, ValueError, "no constraint"),
        ({"c": lambda x: torch.cat([x, x])}, ValueError, "4 constraints on 2 variables"),
        ({"jac": lambda x: 2 * x}, TypeError, "hess must be a function"),
        ({"constraint_hess": lambda x, v: x}, TypeError, "constraint_jac must be a function"),
        ({"jac": lambda x: x[:1], "hess": lambda x: np.eye(2)}, ValueError, "jac must have shape"),
        ({"linear_solver": "gmres"}, ValueError, "'minres', 'direct'"),
        ({"linear_solver": None}, ValueError, "linear_solver"),
        ({"eta1": 0.0}, ValueError, "eta1"),
        ({"eta2": -1.0}, ValueError, "eta2"),
        ({"delta": 1.0}, ValueError, "delta"),
        ({"beta": 0.5}, ValueError, "beta"),
        ({"nu": 1.0}, ValueError, "nu"),
        ({"theta": 1.5}, ValueError, "theta"),
        ({"xi_B": 0.0}, ValueError, "xi_B"),
        ({"inner_maxiter": 0}, ValueError, "inner_maxiter"),
        ({"seed": -1}, ValueError, "seed"),
        ({"callback": 3}, TypeError, "callback"),
        ({"x0": torch.ones(2), "tol": 1e-8}, ValueError, "tol"),
    ],
)
def test_what_cannot_work_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        minimize_equality(**{"f": quadratic, "c": plane, "x0": [1.0, 2.0], **change})


def test_a_numpy_function_without_derivatives_is_told_what_to_do():
    with pytest.raises((RuntimeError, TypeError)) as caught:
        minimize_equality(rosen, lambda x: np.dot(x, x), [1.0, 2.0])
    assert any("optex.equality_method" in note for note in caught.value.__notes__)
