"""Policy gradients: against slow twins, closed forms, and what a user may get wrong."""

import copy
import math
import pickle
import sys

import gymnasium
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

import optex
from optex import NonFiniteError
from optex.optimizers import HARPG, NIGT
from optex.sources.policy import policy_for
from optex.sources.policy.policies import sample
from optex.sources.policy.trajectories import roll_out
from optex.stepping import bases
from optex.studies.problems import make_problem
from tests.gradients import grad_of
from tests.references import policy as twin

SYSTEM = optex.LinearQuadratic(horizon=6)


def linear(gain=-0.2, offset=0.1, deviation=0.5, **options):
    policy = optex.GaussianPolicy(1, 1, hidden=(), deviation=deviation, dtype=torch.float64, **options)
    with torch.no_grad():
        policy.mean.get_parameter("0.weight").fill_(gain)
        policy.mean.get_parameter("0.bias").fill_(offset)
    return policy


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def sampled_again(source, seed):
    """The trajectories that a call at this seed has."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
    return roll_out(source.policy, source.environment, source.trajectories, generator, source.parameters[0])


class Corridor(optex.Environment):
    """Walk right to the end; episodes end at different times."""

    observation_size, action_size, discrete, horizon = 1, 2, True, 8

    def __init__(self, reward=-1.0):
        self.reward = reward

    def begin(self, count, generator):
        return _Walks(self, torch.randint(3, (count, 1), generator=generator))


class _Walks(optex.Episodes):
    def __init__(self, corridor, places):
        self.corridor, self.places = corridor, places
        self.observations = places.double()

    def step(self, actions):
        self.places = self.places + actions[:, None]
        self.observations = self.places.double()
        return torch.full((len(actions),), self.corridor.reward), self.places[:, 0] >= 4


class TestLinearQuadratic:
    def test_the_exact_return_is_the_mean_of_many(self):
        A = torch.tensor([[0.9, 0.2], [0.0, 0.8]])
        system = optex.LinearQuadratic(A, torch.tensor([[0.0], [0.5]]), 0.2, Q=2.0, R=0.5, horizon=8)
        policy = optex.GaussianPolicy(2, 1, hidden=(), deviation=0.4, dtype=torch.float64)
        source = optex.TrajectorySource(policy, system, 60_000)
        torch.manual_seed(0)
        found = sampled_again(source, 0)
        gain, offset = (p.detach() for p in source.parameters)
        exact = system.expected_return(gain, offset, 0.4)
        assert float(found.discounted(0.99).sum(0).mean()) == pytest.approx(float(exact), rel=0.01)

    def test_one_step_by_hand(self):
        system = optex.LinearQuadratic(Q=3.0, R=2.0, start=2.0, horizon=1)
        gain, offset = torch.tensor([[0.5]]), torch.tensor([1.0])
        # E s² = 4, E a² = 0.25 · 4 + 1 + 0.09
        assert float(system.expected_return(gain, offset, 0.3)) == pytest.approx(-(12 + 2 * 2.09), rel=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"A": torch.eye(2)}, r"A must be \[s, s\]"),
            ({"A": torch.zeros(2)}, "A must be a matrix"),
            ({"B": math.nan}, "B must be a matrix of finite"),
            ({"Q": torch.eye(2)}, r"Q must be \[1, 1\]"),
            ({"noise": -1.0}, "noise must be"),
            ({"start": math.inf}, "start must be"),
            ({"horizon": 0}, "horizon must be"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            optex.LinearQuadratic(**arguments)


class TestTrajectorySource:
    @pytest.mark.parametrize("estimator", ["gpomdp", "reinforce"])
    @pytest.mark.parametrize("baseline", [False, True])
    @pytest.mark.parametrize("environment", [SYSTEM, Corridor()], ids=["linear", "corridor"])
    def test_is_the_twin(self, estimator, baseline, environment):
        torch.manual_seed(0)
        policy = policy_for(environment, hidden=(3,), dtype=torch.float64)
        source = optex.TrajectorySource(policy, environment, 5, 0.9, estimator=estimator, baseline=baseline)
        found = sampled_again(source, 1)
        torch.manual_seed(1)
        loss, noise = source.gradient(None)
        rows = twin.gradients(policy, found, 0.9, estimator, baseline=baseline)
        torch.testing.assert_close(flat([grad_of(p) for p in source.parameters]), -rows.mean(0))
        assert noise is not None
        assert float(noise) == pytest.approx(float(rows.var(0).mean() / 5), rel=1e-9)
        discounted = 0.9 ** torch.arange(len(found.rewards), dtype=torch.float64) @ found.rewards.double()
        assert float(loss) == pytest.approx(-float(discounted.mean()), rel=1e-12)
        assert source.environment_steps == found.steps
        assert source.mean_return == pytest.approx(float(found.rewards.sum(0).mean()))

    def test_products_are_the_twins(self):
        torch.manual_seed(0)
        policy = optex.GaussianPolicy(1, 1, (3,), learn_deviation=True, dtype=torch.float64)
        source = optex.TrajectorySource(policy, SYSTEM, 4, 0.9)
        found, vector = sampled_again(source, 2), [torch.randn_like(p) for p in source.parameters]
        torch.manual_seed(2)
        product = flat(source.hessian_vector(vector))
        torch.testing.assert_close(product, -twin.hessian(policy, found, 0.9) @ flat(vector))

    def test_the_mean_product_is_the_hessians(self):
        policy = linear()
        source = optex.TrajectorySource(policy, SYSTEM, 20_000, baseline=True)
        vector = [torch.ones(1, 1).double(), torch.full((1,), -0.5).double()]
        points = gain, offset = tuple(p.detach().clone().requires_grad_() for p in source.parameters)
        gradient = torch.autograd.grad(SYSTEM.expected_return(gain, offset, 0.5), points, create_graph=True)
        inner = flat(vector) @ torch.cat([g.flatten() for g in gradient])
        exact = -flat(torch.autograd.grad(inner, points))
        torch.manual_seed(0)
        total = torch.stack([flat(source.hessian_vector(vector)) for _ in range(10)]).mean(0)
        assert (total - exact).norm() < 0.15 * exact.norm()  # three standard errors

    def test_episodes_that_have_ended_neither_act_nor_earn(self):
        source = optex.TrajectorySource(optex.SoftmaxPolicy(1, 2, (), dtype=torch.float64), Corridor(), 30)
        found = sampled_again(source, 0)
        lengths = found.running.sum(0)
        assert lengths.min() < lengths.max()
        torch.testing.assert_close(found.returns, -lengths.double())
        assert found.steps == int(lengths.sum())

    def test_one_trajectory_has_no_noise_to_tell(self):
        source = optex.TrajectorySource(linear(), SYSTEM, 1)
        assert source.gradient(None)[1] is None
        assert source.evaluations == 1

    def test_the_baseline_lowers_the_noise(self):
        noises = []
        for baseline in (False, True):
            torch.manual_seed(0)
            source = optex.TrajectorySource(linear(), SYSTEM, 200, baseline=baseline)
            _, noise = source.gradient(None)
            assert noise is not None
            noises.append(float(noise))
        assert noises[1] < 0.7 * noises[0]

    def test_it_draws_one_number(self):
        source = optex.TrajectorySource(linear(), SYSTEM, 3)
        torch.manual_seed(5)
        source.gradient(None)
        after = torch.rand(())
        torch.manual_seed(5)
        torch.randint(1 << 62, ())
        assert torch.equal(after, torch.rand(()))

    def test_any_distribution_is_sampled_from_the_generator(self):
        for distribution in (
            Independent(Bernoulli(torch.full((4, 2), 0.5)), 1),
            Independent(Normal(torch.zeros(4, 2), torch.ones(4, 2)), 1),
        ):
            before = torch.get_rng_state()
            one, two = (sample(distribution, torch.Generator().manual_seed(3)) for _ in range(2))
            assert torch.equal(one, two)
            assert torch.equal(before, torch.get_rng_state())

    def test_copies_and_pickles_answer_alike(self):
        source = optex.TrajectorySource(linear(), SYSTEM, 3)
        answers = []
        for other in (source, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
            torch.manual_seed(0)
            other.gradient(None)
            answers.append(flat([p.grad for p in other.policy.parameters()]))
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (
                lambda: optex.TrajectorySource(lambda x: x, SYSTEM),  # pyright: ignore[reportArgumentType]
                TypeError,
                "policy must be",
            ),
            (
                lambda: optex.TrajectorySource(linear(), "CartPole-v1"),  # pyright: ignore[reportArgumentType]
                TypeError,
                "environment must be",
            ),
            (lambda: optex.TrajectorySource(linear(), SYSTEM, 0), ValueError, "trajectories must be"),
            (lambda: optex.TrajectorySource(linear(), SYSTEM, discount=0), ValueError, "discount must be"),
            (
                lambda: optex.TrajectorySource(
                    linear(),
                    SYSTEM,
                    estimator="q",  # pyright: ignore[reportArgumentType]
                ),
                ValueError,
                "estimator must be",
            ),
            (
                lambda: optex.TrajectorySource(linear(), SYSTEM, 1, baseline=True),
                ValueError,
                "raise trajectories",
            ),
            (
                lambda: optex.TrajectorySource(linear().requires_grad_(False), SYSTEM),
                ValueError,
                "no parameter",
            ),
            (lambda: optex.GaussianPolicy(1, 1, deviation=0), ValueError, "deviation must be"),
            (lambda: optex.SoftmaxPolicy(0, 1), ValueError, "observations must be an integer of at least 1"),
        ],
    )
    def test_bad_arguments_are_named(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_a_policy_without_distribution_is_named(self):
        with pytest.raises(TypeError, match=r"must answer a torch\.distributions\.Distribution"):
            optex.TrajectorySource(nn.Linear(1, 1).double(), SYSTEM).gradient(None)

    def test_a_distribution_of_the_wrong_shape_is_named(self):
        class Loose(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(1, 1).double()

            def forward(self, observations):
                return Normal(self.layer(observations), 1.0)

        with pytest.raises(ValueError, match="one log-probability an action"):
            optex.TrajectorySource(Loose(), SYSTEM).gradient(None)

    def test_products_of_other_shapes_are_named(self):
        with pytest.raises(ValueError, match="hessian_vector needs one tensor a parameter"):
            optex.TrajectorySource(linear(), SYSTEM).hessian_vector([torch.zeros(3)])

    def test_parameters_that_are_not_finite_are_named(self):
        source = optex.TrajectorySource(linear(gain=math.inf), SYSTEM)
        with pytest.raises(NonFiniteError, match="parameters are not finite"):
            source.gradient(None)
        assert all(p.grad is None for p in source.parameters)

    def test_rewards_that_are_not_finite_are_named(self):
        source = optex.TrajectorySource(
            optex.SoftmaxPolicy(1, 2, (), dtype=torch.float64), Corridor(reward=math.nan)
        )
        with pytest.raises(NonFiniteError, match="rewards are not finite"):
            source.gradient(None)
        assert all(p.grad is None for p in source.parameters)


class TestGymnasium:
    def test_continuous_actions_are_in_units_of_half_the_range(self):
        taken = []

        class Recording(gymnasium.Wrapper):
            def step(self, action):
                taken.append(action.tolist())
                return super().step(action)

        task = optex.GymnasiumEnvironment(lambda: Recording(gymnasium.make("Pendulum-v1")))
        task.begin(2, torch.Generator().manual_seed(0)).step(torch.tensor([[0.5], [-7.0]]))
        assert taken == [[1.0], [-2.0]]

    def test_episodes_end_at_the_horizon(self):
        task = optex.GymnasiumEnvironment("Pendulum-v1", horizon=2)
        assert (task.observation_size, task.action_size, task.discrete, task.horizon) == (3, 1, False, 2)
        episodes = task.begin(2, torch.Generator().manual_seed(0))
        _, ended = episodes.step(torch.zeros(2, 1))
        assert not ended.any()
        _, ended = episodes.step(torch.zeros(2, 1))
        assert ended.all()

    def test_episodes_repeat_from_their_seed(self):
        task, seen = optex.GymnasiumEnvironment("CartPole-v1"), []
        for _ in range(2):
            episodes = task.begin(3, torch.Generator().manual_seed(4))
            episodes.step(torch.tensor([0, 1, 1]))
            seen.append(episodes.observations)
        assert torch.equal(*seen)
        assert len(seen[0].unique(dim=0)) == 3

    def test_a_function_makes_one_too(self):
        task = optex.GymnasiumEnvironment(lambda: gymnasium.make("CartPole-v1"))
        assert task.horizon == 500

    def test_spaces_that_cannot_be_are_named(self):
        with pytest.raises(ValueError, match="Discrete space is neither"):
            optex.GymnasiumEnvironment("FrozenLake-v1")

    def test_without_gymnasium_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gymnasium", None)
        with pytest.raises(ModuleNotFoundError, match=r"optex\[rl\]"):
            optex.GymnasiumEnvironment("CartPole-v1")


HESSIAN = torch.diag(torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def slope(point):
    return HESSIAN @ point + 0.3 * torch.sin(2 * point)


def curvature(point, vector):
    return HESSIAN @ vector + 0.6 * torch.cos(2 * point) * vector


class TestNIGT:
    @pytest.mark.parametrize("rest", ["iterate", "extrapolated"])
    @pytest.mark.parametrize("eta0", [1.0, 0.5])
    def test_is_the_twin(self, rest, eta0):
        path = twin.nigt(slope, START, 30, 0.3, eta0)
        parameters = [nn.Parameter(START[:2].clone()), nn.Parameter(START[2:].clone())]
        optimizer = NIGT(parameters, 0.3, eta0, rest=rest)
        for point in path:
            with optimizer.extrapolate():
                for p, g in zip(parameters, slope(flat(parameters)).split([2, 1]), strict=True):
                    p.grad = g.clone()
            optimizer.step()
            with optimizer.iterate():
                torch.testing.assert_close(flat(parameters), point, rtol=1e-12, atol=1e-13)

    def test_a_closure_is_called_at_the_extrapolated_point(self):
        p, seen = nn.Parameter(START.clone()), []
        optimizer = NIGT([p], 0.3)

        def closure():
            seen.append(p.detach().clone())
            p.grad = slope(p.detach())
            return p.sum()

        for _ in range(3):
            optimizer.step(closure)
        assert not torch.equal(seen[2], twin.nigt(slope, START, 2, 0.3, 1.0)[-1])
        torch.testing.assert_close(p.detach(), twin.nigt(slope, START, 3, 0.3, 1.0)[-1])

    def test_it_has_no_bias_on_a_quadratic(self):
        # d is the gradient at the present iterate, wherever the gradients were taken.
        p = nn.Parameter(START.clone())
        optimizer = NIGT([p], 0.3)
        for _ in range(20):
            here = p.detach().clone()
            with optimizer.extrapolate():
                p.grad = HESSIAN @ p.detach()
            optimizer.step()
            torch.testing.assert_close(optimizer.state[p]["direction"], HESSIAN @ here)

    def test_a_gradient_from_elsewhere_is_refused_and_nothing_moves(self):
        p = nn.Parameter(START.clone())
        optimizer = NIGT([p], 0.3)
        p.grad = slope(p.detach())
        optimizer.step()
        before = p.detach().clone()
        with pytest.raises(ValueError, match="extrapolated point"):
            optimizer.step()
        assert torch.equal(before, p)
        with optimizer.extrapolate():
            pass
        assert torch.equal(before, p)
        optimizer.step()
        assert not torch.equal(before, p)

    def test_under_optex_the_iterates_are_the_plain_loops(self):
        p = nn.Parameter(START.clone())
        base = NIGT([p], 0.1, rest="extrapolated")
        optimizer = optex.OptEx(base, parallelism=2, stride=1, acceptance=optex.WithinTolerance(0))
        source = optex.ObjectiveSource(lambda _: 0.5 * p @ HESSIAN @ p, deterministic=True)
        for _ in optimizer.rounds([None] * 9, source):
            pass
        with base.iterate():
            torch.testing.assert_close(
                p.detach(), twin.nigt(lambda x: HESSIAN @ x, START, optimizer.steps_taken, 0.1, 1.0)[-1]
            )

    def test_it_is_a_base_by_name(self):
        assert "n-igt" in bases.OPTIMIZERS

    def test_a_gradient_of_zero_stands_still(self):
        p = nn.Parameter(START.clone())
        optimizer = NIGT([p], 0.3)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.equal(p, START)

    def test_a_direction_too_long_is_named(self):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.full((2,), 3e38)
        with pytest.raises(NonFiniteError, match="direction is not finite in length"):
            NIGT([p]).step()
        assert torch.equal(p, torch.ones(2))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"lr": -1.0}, "lr"), ({"eta0": 0.0}, "eta0"), ({"eta0": 1.1}, "eta0"), ({"rest": "here"}, "rest")],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=f"NIGT: {message} must be"):
            NIGT([nn.Parameter(torch.ones(1))], **arguments)


class TestHARPG:
    def run(self, steps, *, normalized, eta0=1.0):
        parameters = [nn.Parameter(START[:2].clone()), nn.Parameter(START[2:].clone())]
        optimizer, path = HARPG(parameters, 0.1, eta0, normalized=normalized), []
        for t in range(steps):
            for p, g in zip(parameters, slope(flat(parameters)).split([2, 1]), strict=True):
                p.grad = g.clone()
            torch.manual_seed(t)
            with optimizer.between() as moved:
                products = curvature(flat(parameters), flat(moved))
            optimizer.correct(list(products.split([2, 1])))
            optimizer.step()
            path.append(flat(parameters))
        return path

    @pytest.mark.parametrize("normalized", [False, True])
    @pytest.mark.parametrize("eta0", [1.0, 0.5])
    def test_is_the_twin(self, normalized, eta0):
        shares = []
        for t in range(20):
            torch.manual_seed(t)
            shares.append(1 - float(torch.rand(())))
        path = twin.harpg(slope, curvature, START, 20, 0.1, eta0, shares, normalized=normalized)
        for found, wanted in zip(self.run(20, normalized=normalized, eta0=eta0), path, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)

    def test_parameters_come_back_to_the_bit(self):
        p = nn.Parameter(torch.rand(50))
        optimizer = HARPG([p])
        p.grad = torch.rand(50)
        optimizer.step()
        before = p.detach().clone()
        with optimizer.between() as moved:
            assert not torch.equal(before, p)
            assert moved[0].shape == p.shape
        assert torch.equal(before, p)

    def test_maximising_is_minimising_the_negative(self):
        ends = []
        for sign in (1, -1):
            p = nn.Parameter(START.clone())
            optimizer = HARPG([p], maximize=sign < 0)
            for t in range(5):
                torch.manual_seed(t)
                p.grad = sign * slope(p.detach())
                with optimizer.between() as moved:
                    optimizer.correct([sign * curvature(p.detach(), moved[0])])
                optimizer.step()
            ends.append(p.detach())
        assert torch.equal(*ends)

    def test_a_step_without_product_is_refused_and_nothing_moves(self):
        p = nn.Parameter(START.clone())
        optimizer = HARPG([p])
        p.grad = slope(p.detach())
        optimizer.step()
        before = p.detach().clone()
        with pytest.raises(ValueError, match=r"optimizer\.correct"):
            optimizer.step()
        optimizer.correct([torch.full((3,), math.nan, dtype=torch.float64)])
        with pytest.raises(NonFiniteError, match="product with the Hessian is not finite"):
            optimizer.step()
        assert torch.equal(before, p)

    def test_bad_arguments_are_named(self):
        p = nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match="normalized must be"):
            HARPG([p], normalized="yes")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="one product a parameter"):
            HARPG([p]).correct([torch.ones(3)])

    def test_it_cannot_be_a_base(self):
        with pytest.raises(TypeError, match="product with the Hessian"):
            optex.OptEx(HARPG([nn.Parameter(torch.ones(2))]))


class TestFrontDoor:
    @pytest.mark.parametrize("method", ["n-pg-igt", "harpg", "n-harpg", "pg", "reinforce"])
    def test_returns_rise_and_steps_are_counted(self, method):
        policy = linear(0.0, 0.8)
        result = optex.policy_gradient(
            policy,
            optex.LinearQuadratic(horizon=5),
            method,
            steps=30,
            trajectories=20,
            lr=0.2 if method.startswith("n-") else 0.02,
            seed=0,
        )
        assert result.success
        assert result.nit == len(result.returns) == len(result.env_steps) == 30
        assert result.nenv == 30 * 20 * 5 * (2 if "harpg" in method else 1)
        assert sum(result.returns[-5:]) > sum(result.returns[:5])
        assert result.policy is policy
        assert result.fun == -result.discounted[-1]

    def test_a_seed_repeats_the_run_and_leaves_the_generator(self):
        one, two = linear(), linear()
        before = torch.get_rng_state()
        runs = [optex.policy_gradient(policy, SYSTEM, steps=3, seed=7).returns for policy in (one, two)]
        assert runs[0] == runs[1]
        assert torch.equal(before, torch.get_rng_state())

    def test_a_run_that_diverges_ends_with_the_last_policy(self):
        policy = linear()
        result = optex.policy_gradient(policy, optex.LinearQuadratic(), "pg", lr=5.0, steps=50, seed=0)
        assert (result.success, result.status) == (False, 2)
        assert all(p.isfinite().all() for p in policy.parameters())

    def test_the_budget_of_the_environment_ends_it(self):
        result = optex.policy_gradient(linear(), SYSTEM, steps=50, environment_steps=150, seed=0)
        assert (result.nit, result.nenv) == (3, 180)

    def test_it_prints_when_asked(self, capsys):
        optex.policy_gradient(linear(), SYSTEM, steps=2, seed=0, disp=True)
        assert "Environment steps: 120" in capsys.readouterr().out

    def test_the_callback_stops_it(self):
        result = optex.policy_gradient(linear(), SYSTEM, steps=9, seed=0, callback=lambda found: found.nit == 2)
        assert (result.nit, result.status) == (2, 99)

        def raises(_):
            raise StopIteration

        assert optex.policy_gradient(linear(), SYSTEM, steps=9, callback=raises).nit == 1

    def test_gymnasium_by_name(self):
        torch.manual_seed(0)
        policy = optex.SoftmaxPolicy(4, 2, (4,))
        result = optex.policy_gradient(policy, "CartPole-v1", "reinforce", steps=2, trajectories=2, seed=0)
        assert result.nenv == result.env_steps[-1] == pytest.approx(2 * sum(result.returns))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "ppo"}, "method must be one of"),
            ({"steps": 0}, "steps must be"),
            ({"environment_steps": 0}, "environment_steps must be"),
            ({"lr": -1.0}, "lr must be"),
            ({"eta0": 2.0}, "eta0 must be"),
            ({"seed": -1}, "seed must be"),
            ({"method": "pg", "optimizer": "adamm"}, "adamm"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            optex.policy_gradient(linear(), SYSTEM, **arguments)

    def test_a_callback_that_is_none_is_refused(self):
        with pytest.raises(TypeError, match="callback must be"):
            optex.policy_gradient(linear(), SYSTEM, callback=3)  # pyright: ignore[reportArgumentType]


class TestProblem:
    def test_its_losses_mean_is_its_objective(self):
        problem = make_problem("lq-policy", trajectories=20_000)
        loss = float(problem(next(problem.batches())).detach())
        assert loss == pytest.approx(problem.evaluate(), rel=0.02)

    def test_the_minimum_is_the_least(self):
        problem = make_problem("lq-policy")
        assert problem.minimum is not None
        with torch.no_grad():
            problem.get_parameter("policy.mean.0.bias").zero_()
            for gain in (-0.7, -0.6005, -0.5):
                problem.get_parameter("policy.mean.0.weight").fill_(gain)
                assert problem.evaluate() >= problem.minimum
        assert problem.minimum == pytest.approx(9.2314, abs=1e-3)
