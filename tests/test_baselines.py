"""One suite over every method, and each method against a slow, obvious twin."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from optex import HoldLast, NonFiniteError, OptEx, WithinTolerance
from optex.round.acceptance import Last
from optex.studies.baselines import METHODS, Recorder, Setting, make_method
from optex.studies.baselines.data_parallel import data_parallel, tuned_data_parallel
from optex.studies.baselines.line_search import line_search, step_factors
from optex.studies.baselines.nowcast import dynamic_modes, linear
from optex.studies.measures import acceleration
from optex.studies.problems import Problem, Quadratic, Rosenbrock, Sphere, make_problem

PROBLEMS = {
    "deterministic": lambda: Quadratic(dim=20, seed=1),
    "noisy": lambda: Rosenbrock(dim=20, seed=1, noise=0.01),
    "minibatches": lambda: make_problem("digits-mlp", seed=1),
}
BASES = {
    "sgd": partial(torch.optim.SGD, lr=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.005, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def setting(
    base: str | Callable[..., torch.optim.Optimizer] = "adam",
    parallelism: int = 3,
    rounds: int = 6,
    history_size: int | None = 8,
) -> Setting:
    return Setting(BASES[base] if isinstance(base, str) else base, parallelism, history_size, rounds)


def counted(problem: Problem) -> list[Any]:
    """The batches that the problem is going to be asked for a loss with."""
    calls = []
    problem.register_forward_pre_hook(lambda _, batch: calls.append(batch))
    return calls


@pytest.fixture(params=PROBLEMS)
def problem(request) -> Problem:
    made = PROBLEMS[request.param]()
    method = request.node.callspec.params.get("name")
    if method in METHODS and METHODS[method].deterministic_only and not made.deterministic:
        pytest.skip("refuses sampled gradients, as a test of its own says")
    return made


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_leaves_a_whole_trace(self, name, problem):
        start = problem.evaluate()
        trace = METHODS[name].run(problem, setting())
        assert trace.stopped is None
        assert len(trace.loss) == len(trace.gradients) == len(trace.seconds) == len(trace.accepted) == 7
        assert trace.rounds == 6
        assert (trace.loss[0], trace.gradients[0], trace.seconds[0], trace.accepted[0]) == (start, 0, 0.0, 0)
        assert np.isfinite(trace.loss).all()
        assert all(0 < step <= 3 for step in np.diff(trace.gradients))
        assert all(seconds > 0 for seconds in np.diff(trace.seconds))
        most = {"optex": 3 * 16, "optex-alone": 16}.get(name, 3)  # strides go up to 16
        assert all(0 <= accepted <= most for accepted in trace.accepted)

    def test_ends_where_its_last_loss_says(self, name, problem):
        trace = METHODS[name].run(problem, setting())
        assert problem.evaluate() == trace.loss[-1]

    def test_starts_from_the_start_again(self, name, problem):
        first = METHODS[name].run(problem, setting())
        again = METHODS[name].run(problem, setting())
        assert first.loss == again.loss
        assert first.accepted == again.accepted

    def test_makes_progress(self, name):
        trace = METHODS[name].run(Quadratic(dim=20), setting(base="sgd", rounds=10))
        assert trace.loss[-1] < trace.loss[0]

    def test_has_one_line_of_description(self, name):
        assert 10 < len(METHODS[name].description) < 80
        assert "\n" not in METHODS[name].description


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.own_optimizer is None])
def test_a_run_that_diverges_is_filled_up(name):
    trace = METHODS[name].run(Rosenbrock(dim=5), setting(partial(torch.optim.SGD, lr=1e4), rounds=12))
    assert trace.stopped
    assert len(trace.loss) == len(trace.gradients) == len(trace.seconds) == len(trace.accepted) == 13
    assert math.isnan(trace.loss[-1])
    end = int(np.isnan(trace.loss).argmax())
    assert np.isfinite(trace.loss[:end]).all()
    assert np.isnan(trace.loss[end:]).all()
    assert set(trace.gradients[end:]) == {trace.gradients[end - 1]}
    assert set(trace.accepted[end:]) == {0}


class TestInTurn:
    def test_vanilla_is_the_plain_loop(self, problem):
        trace = METHODS["vanilla"].run(problem, setting())
        problem.reset()
        optimizer, losses = BASES["adam"](problem.parameters()), [problem.evaluate()]
        for batch in islice(problem.batches(), 6):
            optimizer.zero_grad()
            problem(batch).backward()
            optimizer.step()
            losses.append(problem.evaluate())
        assert trace.loss == losses

    def test_target_is_vanilla_seen_at_every_nth_step(self, problem):
        vanilla = METHODS["vanilla"].run(problem, setting(rounds=18))
        target = METHODS["target"].run(problem, setting(rounds=6))
        assert target.loss == vanilla.loss[::3]
        assert target.gradients == vanilla.gradients[::3]

    @pytest.mark.parametrize("parallelism", [1, 2, 5, 16])
    def test_acceleration_of_target_is_n_and_of_vanilla_one(self, parallelism):
        problem, rounds = Sphere(dim=50), 12
        vanilla = METHODS["vanilla"].run(problem, setting("sgd", parallelism, parallelism * rounds)).loss
        target = METHODS["target"].run(problem, setting("sgd", parallelism, rounds)).loss
        assert acceleration(target, vanilla, parallelism) == parallelism
        assert acceleration(vanilla[: rounds + 1], vanilla, parallelism) == 1


class TestOneAtATime:
    """With one gradient a round and no strides there is nothing to predict: this is the base optimizer."""

    @pytest.mark.parametrize("name", ["target", "hold-last", "picard", "optex-paper"])
    @pytest.mark.parametrize("base", BASES)
    def test_is_vanilla_bit_for_bit(self, name, base, problem):
        vanilla = METHODS["vanilla"].run(problem, setting(base, parallelism=1))
        assert METHODS[name].run(problem, setting(base, parallelism=1)).loss == vanilla.loss


OPTEX_TWINS = {
    "hold-last": lambda base: OptEx(base, parallelism=3, estimator=HoldLast(), acceptance=Last()),
    "picard": lambda base: OptEx(
        base, parallelism=3, stride=1, estimator=HoldLast(), acceptance=WithinTolerance(1.0, adaptive=False)
    ),
    "optex-paper": lambda base: OptEx.from_paper(base, 3, 8),
    "optex-alone": lambda base: OptEx(base, parallelism=1, history_size=8),
    "optex": lambda base: OptEx(base, parallelism=3, history_size=8),
}


@pytest.mark.parametrize("name", OPTEX_TWINS)
def test_is_the_optex_it_says(name, problem):
    trace = METHODS[name].run(problem, setting())
    problem.reset()
    optimizer = OPTEX_TWINS[name](BASES["adam"](problem.parameters()))
    losses, accepted = [problem.evaluate()], [0]
    for report in islice(optimizer.rounds(problem.batches(), problem.source()), 6):
        losses.append(problem.evaluate())
        accepted.append(report.accepted)
    assert trace.loss == losses
    assert trace.accepted == accepted
    assert 0 < trace.overhead_seconds < trace.seconds[-1]


class TestOptExAlone:
    def test_a_round_is_one_gradient_and_soon_more_than_a_step(self):
        trace = METHODS["optex-alone"].run(Quadratic(dim=20), setting(parallelism=5, rounds=12))
        assert trace.gradients == list(range(13))
        assert max(trace.accepted) > 1

    def test_has_the_history_of_one_gradient_a_round(self):
        problem, wide = Quadratic(dim=20), setting(parallelism=16, rounds=12, history_size=None)
        narrow = replace(wide, parallelism=1)
        assert METHODS["optex-alone"].run(problem, wide).loss == METHODS["optex"].run(problem, narrow).loss

    @pytest.mark.parametrize("base", BASES)
    def test_without_strides_is_vanilla_bit_for_bit(self, base, problem):
        vanilla = METHODS["vanilla"].run(problem, setting(base))
        alone = METHODS["optex-alone"].run(problem, replace(setting(base), stride=1))
        assert alone.loss == vanilla.loss

    def test_those_that_stride_are_those_whose_rounds_keep_more_than_their_gradients(self):
        for name in ("picard", "optex-paper", "optex-alone", "optex"):
            trace = METHODS[name].run(Quadratic(dim=20), setting(parallelism=2, rounds=12))
            evaluated = np.diff(trace.gradients)
            assert METHODS[name].strides == any(trace.accepted[1:] > evaluated), name


class TestDataParallel:
    @pytest.mark.parametrize("base", BASES)
    def test_without_noise_and_factor_one_is_vanilla(self, base):
        problem = Quadratic(dim=20)
        vanilla = METHODS["vanilla"].run(problem, setting(base))
        np.testing.assert_allclose(data_parallel(problem, setting(base), 1.0).loss, vanilla.loss, rtol=1e-12)

    def test_steps_with_the_mean_gradient_of_its_own_batches(self):
        problem = Sphere(dim=20, noise=0.1)
        data_parallel(problem, setting("sgd", rounds=2), 2.0)
        end = problem.theta.detach().clone()
        problem.reset()
        batches = problem.batches()
        for _ in range(2):
            (exact,) = torch.autograd.grad(problem(None), problem.theta)
            drawn = [batch for batch in islice(batches, 3) if batch is not None]
            assert len(drawn) == 3
            noise = torch.stack(drawn).mean(0)
            with torch.no_grad():
                problem.theta.sub_(2.0 * 0.01 * (exact + noise))
        torch.testing.assert_close(end, problem.theta.detach())

    def test_tuning_keeps_the_best_factor_and_says_which(self, problem):
        traces = {f: data_parallel(problem, setting(parallelism=4), f) for f in (1.0, 2.0, 4.0)}
        best = min(traces, key=lambda factor: traces[factor].loss[-1])
        tuned = tuned_data_parallel(problem, setting(parallelism=4))
        assert tuned.loss == traces[best].loss
        assert tuned.lr == pytest.approx(best * 0.01)
        assert tuned.gradients == [4 * r for r in range(7)]

    def test_tuning_passes_over_rates_that_diverge(self):
        # One step of 1 solves it; 9 overflows, which is not a best loss.
        problem = Quadratic(dim=3, condition=1.0)
        tuned = tuned_data_parallel(problem, setting(partial(torch.optim.SGD, lr=1.0), 9, rounds=200))
        assert data_parallel(problem, setting(partial(torch.optim.SGD, lr=1.0), 9, rounds=200), 9.0).stopped
        assert (tuned.lr, tuned.loss[-1]) == (1.0, 0.0)


class TestLineSearch:
    @pytest.mark.parametrize(
        ("parallelism", "factors"),
        [(1, [1]), (2, [1, 2]), (3, [0.5, 1, 2]), (4, [0.5, 1, 2, 4]), (5, [0.25, 0.5, 1, 2, 4])],
    )
    def test_factors_are_powers_of_two_about_one(self, parallelism, factors):
        assert step_factors(parallelism).tolist() == factors

    @pytest.mark.parametrize("base", BASES)
    def test_alone_is_vanilla_one_round_late(self, base, problem):
        vanilla = METHODS["vanilla"].run(problem, setting(base, parallelism=1))
        searched = line_search(problem, setting(base, parallelism=1, rounds=7))
        if problem.name == "quadratic":
            np.testing.assert_allclose(searched.loss[1:], vanilla.loss, rtol=1e-10)
        assert searched.loss[1] == searched.loss[0]
        assert searched.accepted == [0, 0, 1, 1, 1, 1, 1, 1]

    def test_a_round_is_never_worse_than_the_base_optimizers_step(self):
        problem = Rosenbrock(dim=10)
        trace = line_search(problem, setting("sgd", parallelism=5, rounds=10))
        for rounds in range(1, 10):
            line_search(problem, setting("sgd", parallelism=5, rounds=rounds))
            (gradient,) = torch.autograd.grad(problem(None), problem.theta)
            with torch.no_grad():
                problem.theta.sub_(0.01 * gradient)
            assert trace.loss[rounds + 1] <= problem.evaluate() * (1 + 1e-12)

    def test_the_base_state_advances_by_kept_gradients_once_a_round(self):
        made = []

        def base(parameters):
            made.append(BASES["momentum"](parameters))
            return made[-1]

        problem = Quadratic(dim=4)
        line_search(problem, setting(base, parallelism=3, rounds=3))
        # Twin: the same three rounds by hand.
        problem.reset()
        momentum = torch.zeros(4, dtype=torch.float64)
        point: torch.Tensor = problem.theta.detach().clone()
        for _ in range(2):
            momentum = 0.9 * momentum + problem.eigenvalues * point
            tried = [point - factor * 0.005 * momentum for factor in (0.5, 1.0, 2.0)]
            point = tried[int(np.argmin([float(problem.value(theta)) for theta in tried]))]
        (state,) = made[-1].state.values()
        torch.testing.assert_close(state["momentum_buffer"], momentum)


class TestLBFGS:
    def test_every_evaluation_is_a_round(self):
        problem = Quadratic(dim=10)
        calls = counted(problem)
        trace = METHODS["lbfgs"].run(problem, setting(rounds=15))
        assert len(calls) == 15
        assert trace.gradients == list(range(16))
        assert trace.lr == 1.0
        assert trace.loss[-1] < 1e-3 * trace.loss[0]

    def test_is_not_stopped_by_a_gradient_of_zero(self):
        problem = Quadratic(dim=2, condition=1.0)
        trace = METHODS["lbfgs"].run(problem, setting(rounds=10))
        assert trace.loss[-1] == pytest.approx(0.0, abs=1e-20)
        assert len(trace.loss) == 11


@pytest.mark.usefixtures("made_up_data")
class TestRunningStatistics:
    """BatchNorm's go from the point that is kept to the next one, as in the plain loop."""

    @staticmethod
    def problem():
        return make_problem("cifar10", model="resnet", width=2, depth=8, batch_size=20, held_size=40)

    def run(self, method, parallelism, rounds=4):
        problem = self.problem()
        trace = method(problem, setting("sgd", parallelism, rounds))
        return trace, [buffer.clone() for buffer in problem.buffers()]

    def test_data_parallel_with_one_gradient_is_vanilla(self):
        vanilla, expected = self.run(METHODS["vanilla"].run, 1)
        found, buffers = self.run(partial(data_parallel, factor=1.0), 1)
        assert found.loss == pytest.approx(vanilla.loss, rel=1e-5)
        for buffer, value in zip(buffers, expected, strict=True):
            torch.testing.assert_close(buffer, value)

    @pytest.mark.parametrize("name", ["nowcast", "nowcast-dmd"])
    def test_nowcast_is_vanilla_until_it_jumps(self, name):
        vanilla, expected = self.run(METHODS["vanilla"].run, 3, 8)
        found, buffers = self.run(METHODS[name].run, 3, 8)
        assert found.loss == pytest.approx(vanilla.loss, rel=1e-5)
        for buffer, value in zip(buffers, expected, strict=True):
            torch.testing.assert_close(buffer, value)

    @pytest.mark.parametrize("name", ["data-parallel", "line-search", "nowcast", "nowcast-dmd"])
    @pytest.mark.parametrize("parallelism", [1, 3])
    def test_runs_with_points_beside(self, name, parallelism):
        trace, _ = self.run(METHODS[name].run, parallelism, 12)
        assert trace.stopped is None
        assert trace.loss[-1] < trace.loss[0]


SCIPY = {"lbfgs-scipy": "L-BFGS-B", "lbfgs-scipy-50": "L-BFGS-B", "nonlinear-cg": "CG"}


class TestSciPy:
    @pytest.mark.parametrize("name", SCIPY)
    def test_every_evaluation_is_a_round_and_the_points_are_scipys(self, name):
        problem = Rosenbrock(dim=10)
        seen = []

        def loss_and_gradient(x):
            theta = torch.tensor(x, requires_grad=True)
            value = problem.value(theta)
            seen.append(float(value.detach()))
            return seen[-1], torch.autograd.grad(value, theta)[0].numpy()

        options = {"maxiter": 8, "gtol": 0.0}
        if name != "nonlinear-cg":
            options |= {"maxcor": 50 if name == "lbfgs-scipy-50" else 10, "ftol": 0.0}
        start = problem.theta.detach().numpy().copy()
        minimize(loss_and_gradient, start, jac=True, method=SCIPY[name], options=options)
        count = len(seen) - 1
        trace = METHODS[name].run(problem, setting(rounds=count))
        np.testing.assert_allclose(trace.loss, seen, rtol=1e-12)
        assert trace.gradients == list(range(count + 1))
        assert 0 < sum(trace.accepted) <= count
        assert trace.lr == 1.0

    @pytest.mark.parametrize("name", SCIPY)
    def test_goes_on_where_scipy_is_done(self, name):
        trace = METHODS[name].run(Quadratic(dim=2, condition=1.0), setting(rounds=10))
        assert trace.stopped is None
        assert trace.loss[-1] == pytest.approx(0.0, abs=1e-20)

    def test_a_longer_history_is_another_run(self):
        problem = Rosenbrock(dim=30)
        short, long = (METHODS[name].run(problem, setting(rounds=60)).loss for name in list(SCIPY)[:2])
        assert short[:5] == long[:5]
        assert short[-1] != long[-1]

    @pytest.mark.parametrize("name", SCIPY)
    def test_sampled_gradients_are_refused(self, name):
        with pytest.raises(ValueError, match=r"digits-mlp has sampled gradients.*deterministic objective, or"):
            METHODS[name].run(PROBLEMS["minibatches"](), setting())


class TestNowcast:
    def test_is_the_base_optimizer_until_the_first_jump(self, problem):
        vanilla = METHODS["vanilla"].run(problem, setting(rounds=8))
        for name in ("nowcast", "nowcast-dmd"):
            trace = METHODS[name].run(problem, setting(rounds=8))
            assert trace.loss == vanilla.loss
            assert trace.gradients == vanilla.gradients

    @pytest.mark.parametrize("name", ["nowcast", "nowcast-dmd"])
    @pytest.mark.parametrize("parallelism", [1, 2, 5, 8])
    def test_jumps_are_counted(self, name, parallelism):
        problem = Quadratic(dim=10)
        calls = counted(problem)
        trace = METHODS[name].run(problem, setting("sgd", parallelism, rounds=20))
        assert trace.gradients[-1] == len(calls)
        spent, accepted = np.diff(trace.gradients).tolist(), trace.accepted[1:]
        jump = [parallelism] if parallelism > 1 else [1, 1]  # with the present point
        steps = [1] * len(jump) if parallelism > 1 else [0, 1]
        assert spent[:16] == ([1] * 8 + jump + [1] * 7)[:16]
        assert accepted[:16] == ([1] * 8 + steps + [1] * 7)[:16]

    @pytest.mark.parametrize("name", ["nowcast", "nowcast-dmd"])
    def test_a_slow_smooth_run_is_cut_short(self, name):
        problem = Quadratic(dim=10, condition=10.0)
        vanilla = METHODS["vanilla"].run(problem, setting("sgd", rounds=40))
        for parallelism in (1, 8):
            trace = METHODS[name].run(problem, setting("sgd", parallelism, rounds=40))
            assert trace.loss[-1] < 0.8 * vanilla.loss[-1]
            assert all(after <= before for before, after in pairwise(trace.loss))

    def test_the_loss_has_the_last_word(self, monkeypatch):
        # Eight steps end before a cliff, every jump behind it.
        problem = Sphere(dim=4)
        reference = METHODS["vanilla"].run(problem, setting("sgd", rounds=10))
        edge, root_of = reference.loss[9] - 1e-9, problem.value

        def cliff(theta):
            root = root_of(theta)
            return root + 1e3 * (edge - root).clamp_min(0)

        monkeypatch.setattr(problem, "value", cliff)
        trace = METHODS["nowcast"].run(problem, setting("sgd", 2, rounds=9))
        assert trace.loss == reference.loss[:10]
        assert trace.gradients[-1] == 10

    def test_dynamic_modes_follow_linear_dynamics(self):
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0][:, :3]
        rates = torch.tensor([0.9, 0.5, -0.3], dtype=torch.float64)
        rest = torch.randn(30, generator=generator, dtype=torch.float64)

        def path(time):
            return rest + basis @ rates**time

        iterates = torch.stack([path(time) for time in range(8)])
        expected = torch.stack([path(7 + ahead) for ahead in (1, 4, 20)])
        torch.testing.assert_close(dynamic_modes(iterates, [1, 4, 20]), expected, atol=1e-6, rtol=0)

    def test_a_run_at_rest_stays_there(self):
        still = torch.ones(8, 5)
        assert torch.equal(dynamic_modes(still, [1, 8]), still[:2])
        assert torch.equal(linear(still, [1, 8]), still[:2])


class TestRecorder:
    def test_time_of_the_evaluations_is_not_counted(self, monkeypatch):
        problem = Sphere(dim=3)
        evaluate = problem.evaluate
        monkeypatch.setattr(problem, "evaluate", lambda: time.sleep(0.05) or evaluate())
        trace = METHODS["vanilla"].run(problem, setting(rounds=5))
        assert 0 < trace.seconds[-1] < 5 * 0.05

    def test_swallows_only_what_a_diverging_run_raises(self):
        with Recorder(Sphere(dim=3), 2) as recorder:
            raise NonFiniteError("too far")
        assert recorder.trace(0.1).stopped == "too far"
        with pytest.raises(KeyError), Recorder(Sphere(dim=3), 2):
            raise KeyError

    def test_a_loss_that_is_not_finite_ends_the_run(self):
        problem = Sphere(dim=3)
        with Recorder(problem, 2) as recorder:
            with torch.no_grad():
                problem.theta.fill_(math.inf)
            recorder.round(gradients=1, accepted=1)
        trace = recorder.trace(0.1)
        assert trace.stopped == "sphere: the objective after round 1 is inf"
        assert trace.gradients == [0, 0, 0]


def test_an_unknown_method_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'nope' is not one of vanilla, target, data-parallel"):
        make_method("nope")
