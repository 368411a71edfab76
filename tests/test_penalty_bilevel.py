"""Penalty hypergradients against a quadratic in closed form, and the loops against their twins."""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

import optex
from optex import (
    ConvergenceWarning,
    LowerLevelWarning,
    NonFiniteError,
    NonFiniteWarning,
    OptEx,
    PenaltyHypergradient,
    WorkersEvaluator,
    solve_bilevel,
)
from optex.minimizers.single_loop import SingleLoop
from optex.sources.descent import gradient_descent, limited_memory_bfgs
from optex.sources.levels import Levels
from tests.references.penalty_bilevel import QuadraticBilevel, double_loop, single_loop

PROBLEM = QuadraticBilevel()
START = np.linspace(-1.0, 2.0, PROBLEM.outer)
ZEROS = torch.zeros(PROBLEM.inner, dtype=torch.float64)


def parameter(values: ArrayLike = START):
    return torch.nn.Parameter(torch.from_numpy(np.array(values)))


def source_at(x, problem=PROBLEM, **options):
    options = {"sigma": 0.01, "deterministic": True, **options}
    return PenaltyHypergradient(
        problem.upper, problem.lower, x, torch.zeros(problem.inner, dtype=torch.float64), **options
    )


def gradient_of(x):
    assert x.grad is not None
    return x.grad.numpy()


def error(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


class TestClosedForm:
    @pytest.mark.parametrize("sigma", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
    @pytest.mark.parametrize("rate", [None, 0.25])
    def test_loss_and_gradient_are_those_of_the_penalty(self, sigma, rate):
        x = parameter()
        loss, noise = source_at(x, sigma=sigma, rate=rate, tolerance=1e-8).gradient(None)
        assert noise is None
        assert float(loss) == pytest.approx(PROBLEM.penalty(START, sigma), rel=1e-9)
        assert error(gradient_of(x), PROBLEM.penalty_gradient(START, sigma)) < 1e-7

    def test_the_twins_gradient_is_that_of_its_value(self):
        h = 1e-6
        steps = h * np.eye(PROBLEM.outer)
        slopes = [(PROBLEM.penalty(START + e, 0.1) - PROBLEM.penalty(START - e, 0.1)) / (2 * h) for e in steps]
        assert error(np.array(slopes), PROBLEM.penalty_gradient(START, 0.1)) < 1e-8

    def test_bias_falls_with_sigma(self):
        sigmas, errors = [1e-1, 1e-2, 1e-3, 1e-4], []
        for sigma in sigmas:
            x = parameter()
            source_at(x, sigma=sigma, tolerance=1e-9).gradient(None)
            errors.append(error(gradient_of(x), PROBLEM.hypergradient(START)))
        assert np.polyfit(np.log(sigmas), np.log(errors), 1)[0] == pytest.approx(1, abs=0.1)

    def test_several_tensors_are_handed_as_tuples(self):
        parts = [torch.nn.Parameter(torch.from_numpy(part.copy())) for part in (START[:2], START[2:])]

        def upper(x, y, batch):
            assert isinstance(x, tuple)
            assert [tuple(piece.shape) for piece in y] == [(3,), (5, 1)]
            return PROBLEM.upper(torch.cat(x), torch.cat([y[0], y[1][:, 0]]), batch)

        def lower(x, y, batch):
            return PROBLEM.lower(torch.cat(x), torch.cat([y[0], y[1][:, 0]]), batch)

        y0 = (ZEROS[:3], ZEROS[3:, None])
        PenaltyHypergradient(upper, lower, parts, y0, tolerance=1e-8).gradient(None)
        found = np.concatenate([gradient_of(part) for part in parts])
        assert error(found, PROBLEM.penalty_gradient(START, 0.01)) < 1e-7

    def test_a_batch_has_a_lower_level_of_its_own(self):
        (batch,) = PROBLEM.batches(1)
        x = parameter()
        source = source_at(x, deterministic=False, tolerance=1e-9)
        source.gradient(batch)
        f_x, f_y, _, g_y = (part.numpy() for part in batch)
        sigma, A, off = 0.01, PROBLEM.A, PROBLEM.B @ START
        z = off - np.linalg.solve(A, g_y)
        y = np.linalg.solve(sigma * np.eye(PROBLEM.inner) + A, sigma * (PROBLEM.a - f_y) + A @ off - g_y)
        expected = PROBLEM.ridge * START + f_x - PROBLEM.B.T @ A @ (y - z) / sigma
        assert error(gradient_of(x), expected) < 1e-7
        source.accept(batch)
        np.testing.assert_allclose(source.state_dict()["z"], z, atol=1e-8)

    def test_solve_returns_both_levels(self):
        solved = source_at(parameter(), tolerance=1e-9).solve()
        np.testing.assert_allclose(solved.z, PROBLEM.B @ START, atol=1e-8)
        np.testing.assert_allclose(solved.y, PROBLEM.mixed(START, 0.01), atol=1e-8)
        true = PROBLEM.upper(torch.from_numpy(START), torch.from_numpy(PROBLEM.B @ START), None)
        assert solved.upper == pytest.approx(float(true))
        assert solved.penalty == pytest.approx(PROBLEM.penalty(START, 0.01))
        assert max(solved.y_residual, solved.z_residual) < 1e-8

    def test_an_upper_level_without_y_has_its_own_gradient(self):
        x = parameter()
        PenaltyHypergradient(lambda x, y, _: x.square().sum(), PROBLEM.lower, x, ZEROS).gradient(None)
        np.testing.assert_allclose(gradient_of(x), 2 * START, atol=1e-5)

    def test_a_lower_level_with_many_solutions_is_no_error_where_the_bound_holds(self):
        # g = ½ (y_1 - x)²: y_2 is free, f settles it, and the paper's formula still holds.
        x = parameter([2.0])
        source = PenaltyHypergradient(
            lambda x, y, _: 0.5 * (y[0] - 1) ** 2 + 0.5 * y[1] ** 2,
            lambda x, y, _: 0.5 * (y[0] - x[0]) ** 2,
            x,
            torch.zeros(2, dtype=torch.float64),
            sigma=1e-3,
            tolerance=1e-8,
        )
        source.gradient(None)
        assert gradient_of(x) == pytest.approx(1 / 1.001)


class TestWarmStarts:
    def test_answers_do_not_depend_on_order(self):
        x = parameter()
        source = source_at(x)
        answers = {}
        for order in ([0, 1, 2], [2, 0, 1]):
            for shift in order:
                with torch.no_grad():
                    x.copy_(torch.from_numpy(START + shift))
                source.gradient(None)
                answers.setdefault(shift, []).append(gradient_of(x).copy())
        assert answers.keys() == {0, 1, 2}
        assert all(np.array_equal(first, second) for first, second in answers.values())

    def test_accept_makes_the_next_solves_short(self):
        x = parameter()
        source = source_at(x, tolerance=1e-8)
        source.gradient(None)
        cold = source.lower_gradients
        source.accept()
        assert source.lower_gradients == cold  # it had just answered here
        source.gradient(None)
        assert source.lower_gradients - cold < cold / 3

    def test_accept_solves_where_nothing_was_asked(self):
        x = parameter()
        asked, unasked = source_at(x), source_at(x)
        asked.gradient(None)
        asked.accept()
        unasked.accept()
        assert asked.state_dict().keys() == {"y", "z"}
        for one, other in zip(asked.state_dict().values(), unasked.state_dict().values(), strict=True):
            assert torch.equal(one, other)

    def test_the_pair_is_saved_and_put_back(self):
        x = parameter()
        source = source_at(x)
        source.accept()
        other = source_at(x)
        other.load_state_dict(source.state_dict())
        for one in (source, other):
            one.gradient(None)
        assert other.lower_gradients < source.lower_gradients
        assert torch.equal(source.state_dict()["y"], other.state_dict()["y"])
        with pytest.raises(ValueError, match="saved y must be a floating-point tensor"):
            other.load_state_dict({"y": torch.zeros(3), "z": torch.zeros(3)})
        assert torch.equal(source.state_dict()["y"], other.state_dict()["y"])

    def test_accept_at_a_lost_point_keeps_the_pair(self):
        x = parameter()
        source = source_at(x)
        source.accept()
        before = source.state_dict()
        with torch.no_grad():
            x[0] = math.nan
        with pytest.raises(NonFiniteError, match="no finite solution"):
            source.accept()
        assert torch.equal(source.state_dict()["z"], before["z"])

    def test_workers_get_the_accepted_pair(self):
        # Of fixed steps the answer shows where they started.
        ends = []
        with WorkersEvaluator(2) as workers:
            for evaluator in (None, workers):
                x = parameter()
                source = source_at(x, rate=0.2, inner_steps=2, tolerance=None)
                optimizer = OptEx(torch.optim.SGD([x], lr=0.2), parallelism=2, evaluator=evaluator)
                for _ in itertools.islice(optimizer.rounds(itertools.repeat(None), source), 4):
                    source.accept()
                ends.append(x.detach().clone())
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)

    def test_copies_have_a_pair_of_their_own_and_threads_share_it(self):
        x = parameter()
        source = source_at(x)
        copied, through = copy.deepcopy(source), pickle.loads(pickle.dumps(source))
        replica, _ = source.replica()
        assert isinstance(replica, PenaltyHypergradient)
        source.accept()
        assert torch.equal(replica.state_dict()["y"], source.state_dict()["y"])
        assert not copied.state_dict()["y"].any()
        assert not through.state_dict()["y"].any()


class TestLoops:
    def test_the_double_loop_is_its_twin(self):
        sigma, rate, alpha = 0.01, PROBLEM.inner_rate(0.01), 0.2
        x = parameter()
        source = source_at(x, sigma=sigma, rate=rate, inner_steps=10, tolerance=None)
        base = torch.optim.SGD([x], lr=alpha)
        for expected in double_loop(PROBLEM, START, sigma, 40, 10, rate, alpha):
            source.gradient(None)
            source.accept()
            base.step()
            np.testing.assert_allclose(x.detach(), expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("sampled", [False, True])
    def test_the_single_loop_is_its_twin(self, sampled):
        batches = PROBLEM.batches(50, scale=0.05 if sampled else 0.0)
        x, sigma, rate, alpha = parameter(), 0.1, PROBLEM.inner_rate(0.1), 0.02
        loop = SingleLoop(
            Levels("test", PROBLEM.upper, PROBLEM.lower, x, ZEROS, sigma), alpha, rate, sampled=sampled
        )
        fade = (lambda k: (k + 1) ** (-1 / 3)) if sampled else (lambda k: 1.0)
        twin = single_loop(
            PROBLEM,
            START,
            sigma,
            lambda k: rate * fade(k),
            lambda k: alpha * fade(k),
            [tuple(part.numpy() for part in batch) for batch in batches],
            (lambda k: (k + 1) ** (-2 / 3)) if sampled else (lambda k: 1.0),
        )
        for batch, expected in zip(batches, twin, strict=True):
            loop.step(batch)
            np.testing.assert_allclose(x.detach(), expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("solver", ["gradient", "lbfgs"])
    def test_descents_find_the_minimum(self, solver):
        hessian = torch.diag(torch.linspace(0.1, 2.0, 6, dtype=torch.float64))

        def function(y):
            return 0.5 * (y - 1) @ hessian @ (y - 1), hessian @ (y - 1)

        start = torch.zeros(6, dtype=torch.float64)
        if solver == "gradient":
            found = gradient_descent(function, start, 1e-12, 1000, 0.5)
        else:
            found = limited_memory_bfgs(function, start, 1e-12, 1000)
        assert found.residual <= 1e-12
        torch.testing.assert_close(found.point, torch.ones(6, dtype=torch.float64), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("slope", [1.0, 1e-30])
    def test_calls_are_those_of_the_function(self, slope):
        # A slope so small that no step changes the point: the line search ends at its first trial.
        calls = []

        def function(y):
            calls.append(1)
            return slope * y.square().sum(), slope * 2 * y

        found = limited_memory_bfgs(function, torch.ones(3, dtype=torch.float64), 0.0, 50)
        assert found.calls == len(calls)

    def test_lbfgs_minimises_what_is_no_quadratic(self):
        def function(y):
            leaf = y.detach().requires_grad_()
            value = 100 * (leaf[1] - leaf[0] ** 2) ** 2 + (1 - leaf[0]) ** 2
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        found = limited_memory_bfgs(function, torch.tensor([-1.2, 1.0], dtype=torch.float64), 1e-10, 200)
        torch.testing.assert_close(found.point, torch.ones(2, dtype=torch.float64))


class TestBadInput:
    @pytest.mark.parametrize("sigma", [0, -1.0, math.nan, math.inf, True, "1"])
    def test_sigma_has_to_be_positive_and_finite(self, sigma):
        with pytest.raises(ValueError, match="PenaltyHypergradient: sigma must be positive and finite"):
            source_at(parameter(), sigma=sigma)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rate": 0.0}, "rate must be positive"),
            ({"tolerance": -1.0}, "tolerance must be positive"),
            ({"inner_steps": 0}, "inner_steps must be an integer"),
        ],
    )
    def test_settings_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            source_at(parameter(), **options)

    def test_functions_and_tensors_of_other_kinds(self):
        x = parameter()
        with pytest.raises(TypeError, match="lower must be a function"):
            PenaltyHypergradient(PROBLEM.upper, 3, x, ZEROS)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="start must be a tensor or a sequence"):
            PenaltyHypergradient(PROBLEM.upper, PROBLEM.lower, x, 0.0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="parameters is empty"):
            PenaltyHypergradient(PROBLEM.upper, PROBLEM.lower, [], ZEROS)
        with pytest.raises(TypeError, match="one dtype"):
            PenaltyHypergradient(PROBLEM.upper, PROBLEM.lower, x, [ZEROS, ZEROS.float()])
        with pytest.raises(ValueError, match="not finite"):
            PenaltyHypergradient(PROBLEM.upper, PROBLEM.lower, x, ZEROS + math.nan)

    def test_a_lower_level_that_does_not_see_y(self):
        source = PenaltyHypergradient(PROBLEM.upper, lambda x, y, _: x.sum(), parameter(), ZEROS)
        with pytest.raises(ValueError, match="lower does not depend on y"):
            source.gradient(None)

    def test_levels_that_are_no_scalar(self):
        source = PenaltyHypergradient(lambda x, y, _: y, PROBLEM.lower, parameter(), ZEROS)
        with pytest.raises(ValueError, match="upper: the loss must be a scalar"):
            source.gradient(None)

    def test_small_sigma_wants_float64(self):
        x, y = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
        with pytest.warns(LowerLevelWarning, match=r"eps / sigma = 1e-04"):
            PenaltyHypergradient(PROBLEM.upper, PROBLEM.lower, x, y, sigma=1e-3)
        with pytest.raises(ValueError, match="Use float64"):
            PenaltyHypergradient(PROBLEM.upper, PROBLEM.lower, x, y, sigma=1e-7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PenaltyHypergradient(PROBLEM.upper, PROBLEM.lower, x, y, sigma=1e-2)
            source_at(parameter(), sigma=1e-6)


class TestHardLowerLevels:
    def test_too_few_steps_say_by_how_much(self):
        source = source_at(parameter(), inner_steps=2)
        with pytest.warns(ConvergenceWarning, match=r"left at a gradient of .* after 2 and 2 steps"):
            source.gradient(None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source.gradient(None)  # once
            source_at(parameter(), inner_steps=2, tolerance=None).gradient(None)  # as many as were asked for

    def test_a_lower_level_without_a_least_value(self):
        x = parameter([1.0])
        source = PenaltyHypergradient(
            lambda x, y, _: y.sum(), lambda x, y, _: (x[0] * 1e-3 * y).sum(), x, ZEROS[:2], inner_steps=20
        )
        with pytest.warns(ConvergenceWarning, match="no least value"):
            source.gradient(None)

    def test_a_nearly_singular_lower_level_says_how_much_curvature_there_is(self):
        problem = QuadraticBilevel(scale=1e-5)
        source = source_at(parameter(), problem, sigma=1e-2)
        with pytest.warns(LowerLevelWarning, match=r"changes by \d+%; .* curvature along the way is \d"):
            source.gradient(None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source_at(parameter(), problem, sigma=1e-6).gradient(None)

    def test_values_that_are_not_finite_are_named(self):
        x = parameter()
        source = PenaltyHypergradient(
            lambda x, y, _: PROBLEM.upper(x, y, None) / 0.0, PROBLEM.lower, x, ZEROS, deterministic=True
        )
        with pytest.warns(NonFiniteWarning, match="upper is inf"):
            loss, _ = source.gradient(None)
        assert not loss.isfinite()

    def test_a_level_that_breaks_in_the_middle_loses_nothing(self):
        x, calls = parameter(), itertools.count()

        def lower(x, y, batch):
            value = PROBLEM.lower(x, y, None)
            return value * math.nan if next(calls) > 150 else value

        source = PenaltyHypergradient(PROBLEM.upper, lower, x, ZEROS, deterministic=True)
        optimizer = OptEx(torch.optim.SGD([x], lr=0.1), parallelism=2)
        rounds, path = optimizer.rounds(itertools.repeat(None), source), []
        with pytest.warns(NonFiniteWarning), pytest.raises(NonFiniteError):
            path.extend(x.detach().clone() for _ in rounds)
        assert path
        assert torch.equal(x.detach(), path[-1])
        assert "lower is nan" in source.levels.blame


class TestSolveBilevel:
    def test_finds_the_minimiser(self):
        seen = []
        result = solve_bilevel(
            PROBLEM.upper,
            PROBLEM.lower,
            START,
            np.zeros(PROBLEM.inner),
            sigma=1e-4,
            tolerance=1e-6,
            callback=lambda intermediate_result: seen.append(intermediate_result.z),
        )
        assert result.success, result.message
        np.testing.assert_allclose(result.x, PROBLEM.minimiser(), atol=1e-3)
        np.testing.assert_allclose(result.z, PROBLEM.B @ result.x, atol=1e-4)
        upper = PROBLEM.upper(torch.tensor(result.x), torch.tensor(result.z), None)
        assert result.fun == pytest.approx(float(upper))
        assert len(seen) == result.nit
        assert result.nlower > 0

    def test_the_single_loop_finds_it_too(self):
        result = solve_bilevel(
            PROBLEM.upper,
            PROBLEM.lower,
            torch.from_numpy(START),
            ZEROS,
            sigma=0.01,
            method="single-loop",
            lr=0.02,
            rate=PROBLEM.inner_rate(0.01),
            maxiter=8000,
        )
        assert result.success, result.message
        assert isinstance(result.x, torch.Tensor)
        np.testing.assert_allclose(result.x, PROBLEM.minimiser(), atol=0.05)

    def test_batches_end_the_single_loop(self):
        result = solve_bilevel(
            PROBLEM.upper,
            PROBLEM.lower,
            START,
            ZEROS.numpy(),
            method="single-loop",
            lr=0.01,
            rate=0.3,
            batches=PROBLEM.batches(7),
        )
        assert (result.nit, result.status) == (7, 1)
        assert "no batches left" in result.message

    def test_a_single_loop_that_diverges_says_so(self):
        result = solve_bilevel(
            PROBLEM.upper,
            PROBLEM.lower,
            START,
            ZEROS.numpy(),
            method="single-loop",
            lr=0.01,
            rate=30.0,
            maxiter=5000,
        )
        assert result.status == 2
        assert "not finite" in result.message

    @pytest.mark.parametrize("method", ["double-loop", "single-loop"])
    def test_a_callback_stops(self, method):
        result = solve_bilevel(
            PROBLEM.upper,
            PROBLEM.lower,
            START,
            ZEROS.numpy(),
            method=method,
            lr=0.01,
            rate=0.2,
            callback=lambda x: len(x) == PROBLEM.outer,
        )
        assert (result.nit, result.status) == (1, 99)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "triple-loop"}, "method must be"),
            ({"batches": [1]}, "looks at no batches"),
            ({"method": "single-loop"}, "needs lr and rate"),
            ({"method": "single-loop", "lr": 0.1, "rate": 0.1, "workers": 2}, "is sequential"),
            ({"method": "single-loop", "lr": -0.1, "rate": 0.1}, "lr must be positive"),
            ({"sigma": 0.0}, "sigma must be positive"),
            ({"maxiter": 0}, "maxiter must be"),
            ({"gtol": -1.0}, "gtol must be"),
            (
                {"method": "single-loop", "lr": 0.1, "rate": 0.1, "batches": []},
                "batches must hold",
            ),
            ({"evaluator": "vectorized"}, "solve_bilevel: evaluator must not be vectorized"),
            (
                {"optimizer": "adam", "evaluator": optex.SequentialEvaluator(), "workers": 2},
                "solve_bilevel: evaluator and",
            ),
        ],
    )
    def test_arguments_that_do_not_fit_the_method(self, options, message):
        with pytest.raises(ValueError, match=message):
            solve_bilevel(PROBLEM.upper, PROBLEM.lower, START, ZEROS.numpy(), **options)

    def test_mixed_dtypes_and_a_callback_that_is_no_function(self):
        with pytest.raises(TypeError, match="one dtype"):
            solve_bilevel(PROBLEM.upper, PROBLEM.lower, START, ZEROS.float())
        with pytest.raises(TypeError, match="callback must be callable"):
            solve_bilevel(PROBLEM.upper, PROBLEM.lower, START, ZEROS.numpy(), callback=3)  # pyright: ignore[reportArgumentType]


def test_optex_follows_in_fewer_rounds():
    x, paths = parameter(), {}
    for parallelism in (1, 4):
        with torch.no_grad():
            x.copy_(torch.from_numpy(START))
        source = source_at(x, tolerance=1e-6)
        stride = 1 if parallelism == 1 else "auto"
        optimizer = OptEx(torch.optim.SGD([x], lr=0.1), parallelism=parallelism, stride=stride)
        path = []
        for _ in itertools.islice(optimizer.rounds(itertools.repeat(None), source), 40 // parallelism):
            source.accept()
            path.append(PROBLEM.penalty(x.detach().numpy(), source.sigma))
        paths[parallelism] = path
    assert min(paths[4]) <= paths[1][-1]


def test_exported():
    assert {"PenaltyHypergradient", "LowerLevelWarning", "solve_bilevel"} <= set(optex.__all__)
