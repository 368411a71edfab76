"""Deep Q-learning: what the agent does is what the environment saw, and methods meet it on equal terms."""

import copy
import json
import math
import pickle
import sys
from collections import deque
from dataclasses import replace
from functools import partial
from itertools import islice

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from optex import NonFiniteError, OptEx, WithinTolerance
from optex.studies import cli
from optex.studies.baselines import METHODS, Recorder, Setting
from optex.studies.baselines.with_optex import run_rounds
from optex.studies.problems import PROBLEMS, Acrobot, CartPole, MountainCar, Sphere, make_problem
from optex.studies.problems.control import OPTIONS, AgentSettings, DeepQLearning, _Replay

TASKS = [CartPole, Acrobot, MountainCar]
ADAM = partial(torch.optim.Adam, lr=1e-3)


def small(task, seed=0, **changes):
    return task(seed, **{"warm_up": 30, "env_steps": 5, "epsilon_steps": 100, "hidden": 8, **changes})


def setting(parallelism=3, rounds=12):
    return Setting(ADAM, parallelism, 8, rounds)


def train(problem, rounds):
    optimizer = ADAM(problem.parameters())
    for batch in islice(problem.batches(), rounds):
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()
        problem.between_rounds()


def snapshot(problem):
    """All that a run changes, as numbers that can be compared."""
    replay = problem._replay
    arrays = [replay.observations, replay.actions, replay.rewards, replay.next_observations, replay.terminated]
    return [
        *(tensor.detach().clone().numpy() for tensor in (*problem.parameters(), *problem.buffers())),
        *(array.copy() for array in arrays),
        np.array(
            [replay.pushed, problem._rounds, problem.env_steps_taken, problem._hold, problem._held_action]
        ),
        np.array([*problem.episode_returns, problem._return]),
        problem._observation.copy(),
        np.frombuffer(pickle.dumps(problem._random.bit_generator.state), np.uint8),
        np.frombuffer(pickle.dumps(problem._environment.unwrapped.np_random.bit_generator.state), np.uint8),
        np.array(problem._environment.unwrapped.state),
    ]


def same(first, second):
    return len(first) == len(second) and all(map(np.array_equal, first, second))


@pytest.mark.parametrize("task", TASKS)
class TestEveryTask:
    def test_reset_restores_everything_bit_for_bit(self, task):
        problem = small(task, held_actions=3.0)
        start = snapshot(problem)
        train(problem, 20)
        trained = snapshot(problem)
        assert not same(trained, start)
        problem.reset()
        assert same(snapshot(problem), start)
        train(problem, 20)
        assert same(snapshot(problem), trained)

    def test_same_seed_same_run_another_seed_another(self, task):
        runs = []
        for seed in (3, 3, 4):
            problem = small(task, seed)
            train(problem, 20)
            runs.append(snapshot(problem))
        assert same(runs[0], runs[1])
        assert not same(runs[0], runs[2])

    def test_a_copy_leads_its_own_life(self, task):
        problem = small(task)
        train(problem, 5)
        other, before = copy.deepcopy(problem), snapshot(problem)
        assert same(snapshot(other), before)
        train(other, 5)
        assert same(snapshot(problem), before)
        train(problem, 5)
        assert same(snapshot(problem), snapshot(other))

    def test_looking_changes_nothing(self, task):
        problem = small(task)
        train(problem, 5)
        before = snapshot(problem)
        problem.evaluate()
        problem.average_reward()
        for batch in islice(problem.batches(), 3):
            problem(batch)
        assert same(snapshot(problem), before)

    def test_the_replay_is_what_the_environment_did(self, task):
        """Twin: the recorded actions, played again in an environment of its own."""
        problem = small(task, seed=5)
        train(problem, 30)
        replay = problem._replay
        environment = gymnasium.make(problem.environment)
        seed = int(np.random.default_rng(_acting_seed(5)).integers(2**31))
        observation, returns, total = environment.reset(seed=seed)[0], [], 0.0
        for row in range(replay.pushed):
            np.testing.assert_array_equal(replay.observations[row], _scaled(problem, observation))
            observation, reward, terminated, truncated, _ = environment.step(int(replay.actions[row]))
            np.testing.assert_array_equal(replay.next_observations[row], _scaled(problem, observation))
            assert (replay.rewards[row], replay.terminated[row]) == (reward, terminated)
            total += float(reward)
            if terminated or truncated:
                returns.append(total)
                observation, total = environment.reset()[0], 0.0
        assert problem.episode_returns == returns
        assert problem.average_reward() == pytest.approx(np.mean(returns))
        assert problem.evaluate() == -problem.average_reward()

    def test_what_the_network_sees_is_of_order_one(self, task):
        seen = task(warm_up=2_000)._replay.observations[:2_000]
        assert np.abs(seen).mean(0).min() > 0.02
        assert np.abs(seen).max() < 3

    def test_the_loss_is_hubers_of_one_step_ahead(self, task):
        """Twin: transition by transition, in plain numbers."""
        problem = small(task, seed=2, batch_size=40, warm_up=300)
        train(problem, 3)  # or the target network would be the present one
        batch, replay, losses = next(problem.batches()), problem._replay, []
        chosen = torch.randint(len(replay), (40,), generator=_batches_generator(2))
        with torch.no_grad():
            for i, row in enumerate(chosen.tolist()):
                assert torch.equal(batch.observations[i], torch.tensor(replay.observations[row]))
                assert int(batch.actions[i]) == replay.actions[row]
                wanted = float(replay.rewards[row])
                if not replay.terminated[row]:
                    ahead = problem.target_network(torch.tensor(replay.next_observations[row]))
                    wanted += 0.99 * max(ahead.tolist())
                value = problem.network(torch.tensor(replay.observations[row])).tolist()[replay.actions[row]]
                gap = abs(value - wanted)
                losses.append(gap**2 / 2 if gap <= 1 else gap - 0.5)
        assert problem(batch).item() == pytest.approx(np.mean(losses), rel=1e-5)

    def test_only_the_network_is_trained(self, task):
        problem = small(task)
        names = {name for name, _ in problem.named_parameters()}
        assert all(name.startswith("network.") for name in names)
        assert set(problem.state_dict()) == names
        assert not any(buffer.requires_grad for buffer in problem.buffers())

    def test_every_method_acts_as_often_at_equal_rounds(self, task):
        for name, entry in METHODS.items():
            if entry.deterministic_only:
                continue
            problem = small(task)
            trace = entry.run(problem, setting(rounds=4))
            assert trace.stopped is None, name
            assert problem.env_steps_taken == 4 * 5, name

    def test_a_network_that_is_not_finite_ends_the_run(self, task):
        trace = METHODS["vanilla"].run(small(task), Setting(partial(torch.optim.SGD, lr=math.inf), 2, 8, 6))
        assert trace.stopped is not None
        assert "parameters are not finite; lower the learning rate" in trace.stopped
        assert math.isnan(trace.loss[-1])


def _acting_seed(seed):
    return _generator(seed, 2).initial_seed()


def _batches_generator(seed):
    return _generator(seed, 1)


def _generator(seed, stream):
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _scaled(problem, observation):
    columns = zip(observation.tolist(), problem.centre, problem.spread, strict=True)
    return np.array([(value - centre) / spread for value, centre, spread in columns], np.float32)


class TestReplay:
    @given(st.integers(1, 9), st.integers(0, 30))
    @settings(max_examples=30, deadline=None)
    def test_keeps_the_last_ones(self, capacity, count):
        replay, kept = _Replay(capacity, 2), deque(maxlen=capacity)
        for i in range(count):
            replay.push(np.full(2, i, np.float32), i, -i, np.full(2, i + 1, np.float32), i % 3 == 0)
            kept.append((i, i, -i, i + 1, i % 3 == 0))
        columns = (
            replay.observations[:, 1],
            replay.actions,
            replay.rewards,
            replay.next_observations[:, 0],
            replay.terminated,
        )
        found = sorted(zip(*(column[: len(replay)].tolist() for column in columns), strict=True))
        assert found == sorted(kept)

    def test_a_small_one_forgets_the_warm_up(self):
        problem = small(CartPole, capacity=10)
        assert len(problem._replay) == 10
        assert problem._replay.pushed >= 30
        train(problem, 3)
        assert len(problem._replay) == 10


class TestActing:
    def test_without_exploration_it_is_greedy(self):
        problem = small(CartPole, epsilon_start=0.0, epsilon_end=0.0)
        before = problem._replay.pushed
        train(problem, 1)
        with torch.no_grad():  # the network that acted is the one after the step
            seen = torch.tensor(problem._replay.observations[before : before + 5])
            best = problem.network(seen).argmax(1)
        assert best.tolist() == problem._replay.actions[before : before + 5].tolist()

    def test_epsilon_falls_linearly_with_the_environment_steps(self):
        problem = small(CartPole, env_steps=10, epsilon_steps=40, epsilon_start=0.8, epsilon_end=0.2)
        found = [problem.epsilon]
        for _ in range(6):
            problem.between_rounds()
            found.append(problem.epsilon)
        assert found == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2, 0.2, 0.2])

    @pytest.mark.parametrize("held", [1.0, 6.0])
    def test_the_share_of_random_steps_is_epsilon(self, held):
        problem = small(CartPole, held_actions=held)
        last = problem.network[-1]
        assert isinstance(last, torch.nn.Linear)
        with torch.no_grad():  # prefers action 0 everywhere, so every 1 is random
            last.weight.zero_()
            last.bias.copy_(torch.tensor([1.0, 0.0]))
        actions = np.array([problem._choose_action(0.4) for _ in range(6_000)])
        assert actions.mean() == pytest.approx(0.4 / 2, abs=0.03)

    def test_held_actions_last_as_long_as_asked(self):
        actions = MountainCar(warm_up=8_000, held_actions=20.0)._replay.actions[:8_000]
        changes = np.count_nonzero(np.diff(actions))
        # Two thirds of the draws are of another action; episodes of at most 200 steps cut some short.
        assert changes == pytest.approx(8_000 / 20 * 2 / 3, rel=0.2)

    def test_holding_actions_is_what_gets_the_car_out(self):
        out = {held: max(MountainCar(warm_up=8_000, held_actions=held).episode_returns) for held in (1.0, 20.0)}
        assert out[1.0] == -200
        assert out[20.0] > -200

    def test_the_warm_up_ends_with_an_episode(self):
        problem = small(CartPole)
        assert sum(problem.episode_returns) == problem._replay.pushed >= 30
        assert problem._replay.pushed - problem.episode_returns[-1] < 30
        assert problem.env_steps_taken == 0


class TestTargetNetwork:
    @pytest.mark.parametrize(("interval", "rate"), [(1, 0.1), (3, 1.0), (2, 0.5)])
    def test_follows_as_often_and_as_far_as_asked(self, interval, rate):
        problem = small(CartPole, target_interval=interval, target_rate=rate)
        expected = [p.detach().clone() for p in problem.parameters()]
        for rounds in range(1, 8):
            train(problem, 1)
            if rounds % interval == 0:
                present = [p.detach() for p in problem.parameters()]
                expected = [(1 - rate) * e + rate * p for e, p in zip(expected, present, strict=True)]
            for found, wanted in zip(problem.target_network.buffers(), expected, strict=True):
                torch.testing.assert_close(found, wanted)

    def test_a_batch_keeps_its_targets(self):
        problem = small(CartPole)
        batches = problem.batches()
        batch = next(batches)
        value = problem(batch).item()
        for _ in range(5):
            problem.between_rounds()
        with torch.no_grad():
            for buffer in problem.target_network.buffers():
                buffer.add_(1)
        assert problem(batch).item() == value

    def test_being_cut_off_is_not_the_end(self):
        problem = small(MountainCar, warm_up=200)  # nothing but a -200, cut off
        assert problem.episode_returns == [-200]
        assert not problem._replay.terminated.any()


class TestBetweenRounds:
    def test_does_nothing_by_default(self):
        problem = Sphere(dim=3)
        before = problem.theta.detach().clone()
        assert problem.between_rounds() is None
        assert torch.equal(problem.theta, before)

    @pytest.mark.parametrize("name", METHODS)
    def test_is_called_once_after_each_round(self, name, monkeypatch):
        problem, calls, seen = Sphere(dim=6), [], []
        evaluate = problem.evaluate
        monkeypatch.setattr(problem, "between_rounds", lambda: calls.append(1))
        monkeypatch.setattr(problem, "evaluate", lambda: seen.append(len(calls)) or evaluate())
        METHODS[name].run(problem, setting(rounds=5))
        runs = len(seen) // 6  # data-parallel tunes its rate in several runs
        assert runs >= 1
        assert seen == [run * 5 + r for run in range(runs) for r in range(6)]

    def test_what_it_raises_ends_the_run_as_a_divergence_does(self, monkeypatch):
        def failing():
            raise NonFiniteError("gone")

        problem = Sphere(dim=3)
        monkeypatch.setattr(problem, "between_rounds", failing)
        with Recorder(problem, 2) as recorder:
            recorder.round(gradients=1, accepted=1)
        assert recorder.trace(0.1).stopped == "gone"


class TestMethods:
    def test_vanilla_is_the_plain_loop(self):
        problem = small(CartPole)
        trace = METHODS["vanilla"].run(problem, setting(rounds=30))
        problem.reset()
        losses = [problem.evaluate()]
        optimizer = ADAM(problem.parameters())
        for batch in islice(problem.batches(), 30):
            optimizer.zero_grad()
            problem(batch).backward()
            optimizer.step()
            problem.between_rounds()
            losses.append(problem.evaluate())
        assert trace.loss == losses
        assert len(set(losses)) > 3

    @pytest.mark.parametrize("name", ["target", "hold-last", "picard", "optex-paper"])
    def test_one_gradient_a_round_is_vanilla_bit_for_bit(self, name):
        ends = []
        for method in ("vanilla", name):
            problem = small(CartPole)
            METHODS[method].run(problem, setting(parallelism=1, rounds=20))
            ends.append(snapshot(problem))
        assert same(*ends)

    def test_with_tolerance_zero_it_is_the_plain_loop_on_batches_drawn_ahead(self):
        problem = small(CartPole)
        optimizer = OptEx(ADAM(problem.parameters()), parallelism=3, acceptance=WithinTolerance(0.0))
        trace = run_rounds(problem, setting(parallelism=3, rounds=20), optimizer)
        end = snapshot(problem)
        problem.reset()
        base, batches, waiting = ADAM(problem.parameters()), problem.batches(), deque()
        for accepted in trace.accepted[1:]:
            waiting.extend(islice(batches, 3 - len(waiting)))
            for _ in range(accepted):
                base.zero_grad()
                problem(waiting.popleft()).backward()
                base.step()
            problem.between_rounds()
        assert same(snapshot(problem), end)

    def test_learns_to_balance(self):
        problem = CartPole(seed=0)
        trace = METHODS["target"].run(problem, Setting(ADAM, 4, 20, 300))
        assert -trace.loss[0] < 30
        assert np.mean(problem.episode_returns[-5:]) > 80


def test_the_best_return_is_cart_poles_minimum():
    longest = gymnasium.spec("CartPole-v1").max_episode_steps
    assert longest is not None
    assert CartPole().minimum == -longest
    assert Acrobot().minimum is None


def test_options_are_the_settings():
    assert all(PROBLEMS[task.name].options == OPTIONS for task in TASKS)
    problem = make_problem("cartpole", seed=1, batch_size=7, held_actions=2.0)
    assert problem.settings == replace(CartPole.defaults, batch_size=7, held_actions=2.0)
    assert problem.batch_size == len(next(problem.batches()).targets) == 7


def test_computes_in_the_parameters_dtype():
    problem = small(Acrobot).double()
    train(problem, 3)
    batch = next(problem.batches())
    assert {batch.observations.dtype, batch.targets.dtype, problem(batch).dtype} == {torch.float64}


REFUSALS = {
    "batch_size": 0,
    "hidden": 1.5,
    "env_steps": True,
    "warm_up": 0,
    "capacity": -1,
    "target_interval": 0,
    "target_rate": 0.0,
    "discount": 1.0,
    "epsilon_start": 1.1,
    "epsilon_end": -0.1,
    "epsilon_steps": 0,
    "held_actions": 0.5,
}


@pytest.mark.parametrize(("name", "value"), REFUSALS.items())
def test_refuses_with_a_reason(name, value):
    with pytest.raises(ValueError, match=f"AgentSettings: {name} must be .*, got {value}"):
        CartPole(**{name: value})
    assert set(REFUSALS) == set(OPTIONS)
    assert AgentSettings() == CartPole.defaults


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="gamma"):
        CartPole(gamma=0.9)


def test_without_gymnasium_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError, match=r"acrobot: .* pip install optex\[rl\]"):
        make_problem("acrobot")


def test_compares_from_the_command_line(tmp_path):
    arguments = ["compare", "cartpole", "mountain-car", "--lr", "1e-3", "--parallelism", "2", "--rounds", "8"]
    arguments += ["--seeds", "1", "--set", "warm_up=40", "--set", "hidden=8", "--set", "env_steps=40"]
    records = []
    for run in range(2):
        path = tmp_path / f"{run}.json"
        result = CliRunner().invoke(cli.app, [*arguments, "--json", str(path)])
        assert result.exit_code == 0, result.output
        records.append([(r["method"], r["seed"], r["loss"]) for r in json.loads(path.read_text())["runs"]])
    assert records[0] == records[1]
    assert {len(losses) for _, _, losses in records[0]} == {9, 65}


def test_every_task_is_a_problem_with_its_own_name():
    assert [PROBLEMS[task.name].build for task in TASKS] == TASKS
    assert all(issubclass(task, DeepQLearning) for task in TASKS)
