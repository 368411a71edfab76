"""MAID (arXiv 2308.10098): inexact hypergradients, their bound, and the descent that chooses accuracies."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optex
from optex import InexactBilevelSource, LowerLevelError, NonFiniteError, SmoothBilevel, maid
from optex.sources.inexact_bilevel import hypergradient, solve_lower
from optex.studies.problems import Denoise, make_problem
from tests.references.maid import dense_quadratic, error_bound, exact_descent

DENSE = dense_quadratic(6, 3)
THETA = torch.ones(3, dtype=torch.float64)


def levels(dense=DENSE, **changes):
    given_ = {"start": torch.zeros(len(dense.linear), dtype=torch.float64), **dense.constants(), **changes}
    return SmoothBilevel(dense.lower, dense.upper, **given_)


def gradient_of(theta):
    assert theta.grad is not None
    return theta.grad


def found_at(theta, problem=None, epsilon=1e-3, delta=1e-3):
    problem = problem or levels()
    solution = solve_lower(problem, [theta], problem.start, epsilon)
    return solution, hypergradient(problem, [theta], solution, epsilon, delta)


# ------------------------------------------------------------------ closed forms


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 8),
    m=st.integers(1, 5),
    seed=st.integers(0, 99),
    epsilon=st.floats(1e-8, 10),
    delta=st.floats(1e-8, 10),
)
def test_solve_and_hypergradient_are_within_their_bounds(n, m, seed, epsilon, delta):
    dense = dense_quadratic(n, m, seed)
    theta = torch.linspace(-1, 1, m, dtype=torch.float64)
    solution, found = found_at(theta, levels(dense), epsilon, delta)
    assert (solution.x - dense.solution(theta)).norm() <= solution.error_bound + 1e-12
    assert solution.error_bound <= epsilon
    error = float((found.gradient[0] - dense.gradient(theta)).norm())
    assert error <= found.error_bound + 1e-12
    assert found.error_bound == pytest.approx(error_bound(dense, epsilon, delta), rel=1e-6)


def test_measured_constants_of_a_quadratic_are_zero():
    _, exact = found_at(THETA)
    _, measured = found_at(THETA, levels(hessian_lipschitz=None, cross_lipschitz=None))
    assert measured.error_bound == pytest.approx(exact.error_bound, rel=1e-4)


def test_bound_of_a_lower_level_that_is_not_quadratic():
    # h = Σ ½ e^{θ} x² + ¼ x⁴ - x has a Hessian that changes; its solution is found to rounding for comparison.
    def lower(x, theta):
        return (theta.exp() * x.square() / 2 + x**4 / 4 - x).sum()

    problem = SmoothBilevel(
        lower,
        lambda x: (x - 0.3).square().sum() / 2,
        torch.zeros(3, dtype=torch.float64),
        strong_convexity=lambda theta: float(theta.exp().min()),
        upper_lipschitz=1.0,
    )
    theta = torch.tensor([-0.5, 0.0, 0.7], dtype=torch.float64)
    _, exact = found_at(theta, problem, 1e-12, 1e-13)
    for epsilon in (1e-1, 1e-2, 1e-3):
        _, found = found_at(theta, problem, epsilon, epsilon)
        error = float((found.gradient[0] - exact.gradient[0]).norm())
        assert 0 < error <= found.error_bound <= 500 * error


def test_lower_solves_find_the_largest_curvature_themselves():
    solution = solve_lower(levels(lower_lipschitz=None), [THETA], torch.zeros(6, dtype=torch.float64), 1e-9)
    torch.testing.assert_close(solution.x, DENSE.solution(THETA), rtol=0, atol=1e-8)


# ------------------------------------------------------------------ the source


def test_accept_moves_the_start_and_answers_stay_within_the_bound():
    theta = torch.nn.Parameter(THETA.clone())
    source = InexactBilevelSource(levels(), [theta], epsilon=1e-4, delta=1e-4)
    source.gradient(None)
    cold, first = source.evaluations, gradient_of(theta).clone()
    source.accept()
    source.gradient(None)
    assert source.evaluations < cold
    assert source.last is not None
    assert (gradient_of(theta) - first).norm() <= 2 * source.last.error_bound
    assert torch.equal(source.problem.start, torch.zeros(6, dtype=torch.float64))


def test_told_noise_is_the_square_of_the_bound_over_the_dimension():
    theta = torch.nn.Parameter(THETA.clone())
    loss, noise = InexactBilevelSource(levels(), [theta], tell_noise=True).gradient(None)
    bound = error_bound(DENSE, 1e-3, 1e-3)
    assert noise is not None
    assert float(noise) == pytest.approx(bound**2 / 3, rel=1e-6)
    assert float(loss) == pytest.approx(DENSE.value(THETA), rel=1e-2)


def test_a_replica_answers_the_same_at_a_point_of_its_own():
    theta = torch.nn.Parameter(THETA.clone())
    source = InexactBilevelSource(levels(), [theta])
    source.accept()
    twin, (point,) = source.replica()
    source.gradient(None)
    twin.gradient(None)
    assert point is not theta
    assert torch.equal(gradient_of(point), gradient_of(theta))


def test_several_parameters_and_one_that_lower_does_not_use():
    parts = [torch.nn.Parameter(THETA[:1].clone()), torch.nn.Parameter(THETA[1:].clone())]
    unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    problem = replace(levels(), lower=lambda x, a, b, _: DENSE.lower(x, torch.cat([a, b])))
    InexactBilevelSource(problem, [*parts, unused], epsilon=1e-9, delta=1e-9).gradient(None)
    found = torch.cat([gradient_of(p) for p in parts])
    torch.testing.assert_close(found, DENSE.gradient(THETA), rtol=1e-6, atol=0)
    assert gradient_of(unused).count_nonzero() == 0


# ------------------------------------------------------------------ the descent


def test_fine_accuracies_are_the_twin_in_lock_step():
    dense = dense_quadratic(4, 2, 1)
    twin = exact_descent(dense, torch.ones(2, dtype=torch.float64), 15)
    path = []
    maid(
        levels(dense),
        torch.ones(2, dtype=torch.float64),
        epsilon=1e-10,
        delta=1e-10,
        nu=1.0,
        maxiter=16,
        max_backtracks=200,
        callback=lambda result: path.append(result.x) and False,
    )
    for here, there in zip(path, twin[1:], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("changes", [{}, {"epsilon": 1e-5, "delta": 1e-5}, {"beta": 1e-6}, {"beta": 1e2}])
def test_f_falls_at_every_step_and_the_end_is_certain(changes):
    dense, values = dense_quadratic(5, 2, 3), []
    result = maid(
        levels(dense),
        [1.0, 1.0],
        gtol=1e-3,
        maxiter=3000,
        callback=lambda result: values.append(dense.value(torch.tensor(result.x))) and False,
        **changes,
    )
    assert result.success, result.message
    assert values == sorted(values, reverse=True)
    assert float(dense.gradient(torch.tensor(result.x)).norm()) <= 1e-3


def test_trials_at_once_take_the_same_steps():
    one = maid(levels(), THETA, maxiter=12)
    with ThreadPoolExecutor(2) as pool:
        four = maid(levels(), THETA, maxiter=12, trials=4, workers=pool.map)
    assert torch.equal(one.x, four.x)
    assert one.history["step"][1:] == four.history["step"][1:]
    assert four.nfev >= one.nfev


def test_what_ends_a_run():
    assert maid(levels(), THETA, maxiter=3).status == 1
    assert maid(levels(), THETA, max_evaluations=10).status == 3
    stopped = maid(levels(), THETA, callback=lambda result: result.nit == 2)
    assert (stopped.status, stopped.nit) == (99, 2)
    at_minimum = replace(levels(), upper=lambda x: 0 * x.sum() + 1)
    flat = maid(at_minimum, THETA)
    assert (flat.status, flat.nit) == (2, 0)
    assert torch.equal(flat.x, THETA)


def test_a_callback_that_raises_stop_iteration_ends_the_descent():
    def enough(result):
        raise StopIteration

    stopped = maid(levels(), THETA, callback=enough)
    assert (stopped.nit, stopped.status, stopped.success) == (1, 99, False)


def test_an_upper_level_that_is_not_convex_has_a_stricter_test():
    coarse = {"epsilon": 0.5, "delta": 0.01, "maxiter": 2}
    convex, other = maid(levels(), THETA, **coarse), maid(levels(convex_upper=False), THETA, **coarse)
    # The first steps are one, and from the same point and rate the second has to be shorter.
    assert other.history["step"][1] == convex.history["step"][1]
    assert other.history["step"][2] < convex.history["step"][2]
    assert other.history["loss"][2] < other.history["loss"][0]


def test_arrays_come_back_as_arrays():
    result = maid(levels(), np.ones(3), maxiter=2)
    assert isinstance(result.x, np.ndarray)
    assert isinstance(result.jac, np.ndarray)
    assert len(result.history["loss"]) == 3


def test_a_trial_without_a_finite_answer_fails_the_trial_alone():
    def lower(x, theta):
        return DENSE.lower(x, theta) + torch.where((theta - THETA).norm() > 0.01, torch.nan, 0.0) * x.sum()

    result = maid(replace(levels(), lower=lower), THETA, maxiter=1)
    assert result.nit == 1
    assert (result.x - THETA).norm() <= 0.01


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"strong_convexity": 0}, ValueError, "strong_convexity must be a finite number above 0, got 0"),
        ({"lower_lipschitz": float("nan")}, ValueError, "lower_lipschitz must be a finite number above 0"),
        ({"cross_lipschitz": -1.0}, ValueError, "cross_lipschitz must be a finite number at least 0"),
        ({"start": torch.zeros(0)}, ValueError, "start must have components"),
        ({"start": torch.full((2,), torch.inf)}, ValueError, "start must have components, all finite"),
        ({"start": [0.0]}, TypeError, "start must be a floating-point tensor"),
    ],
)
def test_levels_that_cannot_be(changes, error, words):
    with pytest.raises(error, match=words):
        levels(**changes)


def test_functions_that_cannot_be_called():
    with pytest.raises(TypeError, match="upper must be callable"):
        SmoothBilevel(DENSE.lower, None, torch.zeros(1), 1.0, 1.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0}, "epsilon must be a finite number above 0, got 0"),
        ({"delta": -1.0}, "delta must be a finite number above 0"),
        ({"max_iterations": 0}, "max_iterations must be an integer of at least 1"),
    ],
)
def test_settings_of_a_source_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        InexactBilevelSource(levels(), [torch.nn.Parameter(THETA)], **changes)


def test_sources_without_parameters_or_levels():
    with pytest.raises(ValueError, match="leaf tensors, at least one"):
        InexactBilevelSource(levels(), [])
    with pytest.raises(TypeError, match="problem must be a SmoothBilevel"):
        InexactBilevelSource(DENSE, [THETA])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0}, "epsilon must be a finite number above 0"),
        ({"rho": 1.0}, "rho must be a finite number above 0 and below 1"),
        ({"nu": 0.9}, "nu must be a finite number at least 1"),
        ({"trials": 0}, "trials must be an integer of at least 1"),
        ({"max_iterations": 0}, "max_iterations must be an integer of at least 1"),
        ({"max_evaluations": 0}, "max_evaluations must be an integer of at least 1"),
        ({"gtol": np.nan}, "gtol must be a finite number at least 0, got nan"),
        ({"theta0": [np.nan]}, r"theta0 must be real and finite, .* got one of torch.float64 and shape \(1,\)"),
        ({"theta0": torch.tensor([1])}, "got one of torch.int64"),
    ],
)
def test_descents_that_cannot_be(changes, words):
    arguments = {"theta0": THETA, **changes}
    with pytest.raises(ValueError, match=words):
        maid(levels(), **arguments)
    with pytest.raises(TypeError, match="callback must be callable or None, got int"):
        maid(levels(), THETA, callback=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("diagonal", "kind"), [((1.0, 0.0), "singular"), ((1.0, -1.0), "indefinite"), ((1.0, 0.2), "flatter")]
)
def test_hessians_that_cannot_be_inverted_are_named(diagonal, kind):
    curvatures = torch.tensor(diagonal, dtype=torch.float64)
    problem = SmoothBilevel(
        lambda x, theta: (curvatures * x.square()).sum() / 2 + (x * theta).sum() * 0,
        lambda x: (x * torch.tensor([0.0, 1.0], dtype=x.dtype)).sum(),
        torch.zeros(2, dtype=torch.float64),
        strong_convexity=0.5,
        upper_lipschitz=0.0,
        lower_lipschitz=1.0,
    )
    theta = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(LowerLevelError, match=f"Hessian is {kind}.*strong_convexity"):
        InexactBilevelSource(problem, [theta]).gradient(None)


def test_a_lower_level_that_is_linear_or_takes_too_long():
    start = torch.zeros(2, dtype=torch.float64)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    linear = SmoothBilevel(lambda x, t: 0 * x.sum(), torch.sum, start, 1.0, 0.0, 1.0)
    with pytest.raises(LowerLevelError, match="linear in x"):
        InexactBilevelSource(linear, [theta]).gradient(None)
    with pytest.raises(LowerLevelError, match="after 2 iterations"):
        solve_lower(levels(), [THETA], torch.zeros(6, dtype=torch.float64), 1e-9, 2)
    with pytest.raises(ValueError, match="lower: its value does not depend on x"):
        solve_lower(replace(linear, lower=lambda x, t: torch.ones(())), [theta], start, 1.0)
    with pytest.raises(ValueError, match="upper: its value does not depend on x"):
        InexactBilevelSource(replace(levels(), upper=lambda x: torch.ones(())), [THETA]).gradient(None)


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_numbers_that_are_not_finite_are_named_and_move_nothing(level):
    problem = replace(levels(), **{level: lambda x, *_: x.sum() * torch.nan})
    theta = torch.nn.Parameter(THETA.clone())
    optimizer = optex.OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=2)
    with pytest.raises(NonFiniteError, match=level):
        next(optimizer.rounds([None] * 4, InexactBilevelSource(problem, [theta])))
    assert torch.equal(theta.detach(), THETA)


# ------------------------------------------------------------------ the problem


def test_the_denoiser_has_the_gradient_of_its_objective():
    problem = make_problem("denoise", seed=1, images=3)
    assert isinstance(problem, Denoise)
    source = problem.source()
    source.epsilon = source.delta = 1e-7
    source.gradient(None)
    gradient, weights = gradient_of(problem.log_weights), problem.log_weights.detach()
    for k in (0, 5):
        values = []
        for shift in (1e-3, -1e-3):
            moved = weights.clone()
            moved[k] += shift
            solved = solve_lower(problem.levels, [moved], problem.levels.start, 1e-9)
            values.append(float(problem.levels.upper(solved.x)))
        assert float(gradient[k]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3, abs=1e-7)


def test_the_denoisers_forward_has_the_sources_loss_and_gradient():
    problem = make_problem("denoise", images=2)
    assert isinstance(problem, Denoise)
    loss, _ = problem.source().gradient(None)
    told = gradient_of(problem.log_weights).clone()
    problem.log_weights.grad = None
    value = problem(None)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(loss), rel=1e-3)
    torch.testing.assert_close(gradient_of(problem.log_weights), told, rtol=0.01, atol=1e-3)
