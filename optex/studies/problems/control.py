"""Deep Q-learning on gymnasium's classic control tasks; between rounds the agent acts, and its data grows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from optex.checks import shown
from optex.errors import NonFiniteError
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["OPTIONS", "Acrobot", "AgentSettings", "CartPole", "DeepQLearning", "MountainCar", "ReplayBatch"]


@dataclass(frozen=True)
class AgentSettings:
    """How an agent acts and learns.

    Args:
        batch_size: transitions in a replay batch, at least 1.
        hidden: units in each of the network's two hidden layers, at least 1.
        discount: γ, in (0, 1).
        env_steps: steps in the environment after each round, at least 1.
        warm_up: steps with random actions before the first round, at least 1; the last episode of the warm-up
            is played to its end.
        capacity: transitions remembered, at least 1; a new one replaces the oldest.
        target_interval: rounds from one update of the target network to the next, at least 1.
        target_rate: how far an update moves the target network towards the present network, in (0, 1]; 1 copies
            that. An interval of 1 and a small rate make soft updates, a long interval and a rate of 1 hard
            ones.
        epsilon_start, epsilon_end: ε, the share of steps with random actions, at the start and at the end of
            its decay, in [0, 1].
        epsilon_steps: environment steps, after the warm-up, in which ε changes linearly from one to the other.
        held_actions: for how many steps a random action is repeated on average, at least 1. With 1 exploration
            is ε-greedy; larger numbers explore where a single action has no effect.

    Raises:
        ValueError: a number is out of range; the message names it.

    Source: Mnih et al., *Human-level control through deep reinforcement learning*, 2015; held actions: Dabney,
    Ostrovski, Barreto, *Temporally-extended ε-greedy exploration*, ICLR 2021 (geometric durations here).
    """

    batch_size: int = 64
    hidden: int = 64
    discount: float = 0.99
    env_steps: int = 8
    warm_up: int = 500
    capacity: int = 50_000
    target_interval: int = 1
    target_rate: float = 0.02
    epsilon_start: float = 1.0
    epsilon_end: float = 0.05
    epsilon_steps: int = 2_000
    held_actions: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            kind, accepts, range_ = _RANGES.get(name, (int, lambda n: n >= 1, "an integer of at least 1"))
            if isinstance(value, bool) or not isinstance(value, kind) or not accepts(value):
                raise ValueError(f"AgentSettings: {name} must be {range_}, got {shown(value)}")


_NUMBER: Final = (int, float)
_SHARE: Final = (_NUMBER, lambda x: 0 <= x <= 1, "in [0, 1]")
_RANGES: Final[dict[str, tuple[Any, Any, str]]] = {
    "discount": (_NUMBER, lambda x: 0 < x < 1, "in (0, 1)"),
    "target_rate": (_NUMBER, lambda x: 0 < x <= 1, "in (0, 1]"),
    "epsilon_start": _SHARE,
    "epsilon_end": _SHARE,
    "held_actions": (_NUMBER, lambda x: 1 <= x < math.inf, "finite and at least 1"),
}

OPTIONS: Final[dict[str, type]] = {name: type(value) for name, value in asdict(AgentSettings()).items()}


class ReplayBatch(NamedTuple):
    """What one step learns from.

    Attributes:
        observations: [n, o], of the states that the agent acted in.
        actions: [n], int64, that it took.
        targets: [n], y, by the target network at the time when the batch was drawn.
    """

    observations: Tensor
    actions: Tensor
    targets: Tensor


class _Replay:
    """The last ``capacity`` transitions, in ring buffers."""

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity = capacity
        self.pushed = 0
        self.observations = np.zeros((capacity, width), np.float32)
        self.actions = np.zeros(capacity, np.int64)
        self.rewards = np.zeros(capacity, np.float32)
        self.next_observations = np.zeros((capacity, width), np.float32)
        self.terminated = np.zeros(capacity, np.float32)

    def __len__(self) -> int:
        return min(self.pushed, self.capacity)

    def push(
        self,
        observation: NDArray[np.float32],  # [o]
        action: int,
        reward: float,
        next_observation: NDArray[np.float32],  # [o]
        terminated: bool,
    ) -> None:
        row = self.pushed % self.capacity
        self.observations[row] = observation
        self.actions[row] = action
        self.rewards[row] = reward
        self.next_observations[row] = next_observation
        self.terminated[row] = terminated
        self.pushed += 1


class DeepQLearning(Problem):
    """A Q-network that learns a control task from the replay of what its agent did.

    The loss of a step is Huber's, of ``Q(s, a) - y`` over the transitions (s, a, r, s') of its replay batch,

        y = r + γ max_a' Q⁻(s', a'),        or y = r where the task ended at s',

    with Q⁻ the target network. An episode that is cut off at its maximal length does not count as ended.
    Between rounds the agent acts ``env_steps`` times with the present network, the transitions go into the
    replay, and the target network is updated: at equal rounds all methods have acted equally often, whatever
    the number of their optimizer's steps. More steps are not more experience, so ``target`` is not N times as
    fast here.

    A batch gets its targets y when it is drawn. From then on the step's loss is a function of the parameters
    alone: a gradient that was measured for it remains valid when the target network changes, and evaluators in
    other processes need not know of that. It makes no difference to methods that draw a batch when they step. A
    batch that is drawn ahead has older transitions and targets; the defaults of ``OptEx`` keep some batches for
    a round or two.

    The objective is minus the mean return of all episodes ended so far, the warm-up's among them:
    what the OptEx paper plots as cumulative average reward, negated so that less is better. It is a mean over
    past episodes, so it changes when an episode ends, not when the parameters change.

    Args:
        seed: of the network's start, the batches, the environment and the exploration.
        settings: fields of ``AgentSettings`` that are to differ from the task's ``defaults``.

    Attributes:
        settings: all settings of the agent.
        network: Q, with two hidden tanh layers; it has all the parameters.
        target_network: Q⁻; its weights are buffers.
        episode_returns: total reward of each episode ended so far, in order.
        env_steps_taken: since the warm-up.

    Raises:
        ModuleNotFoundError: gymnasium is not installed.
        TypeError, ValueError: a setting is unknown or out of range.

    Source: Mnih et al. 2015, as in the OptEx paper, section 6.2.

    >>> problem = CartPole(seed=0)
    >>> optimizer = torch.optim.Adam(problem.parameters(), lr=1e-3)
    >>> for _, batch in zip(range(10), problem.batches()):
    ...     optimizer.zero_grad()
    ...     problem(batch).backward()
    ...     optimizer.step()
    ...     problem.between_rounds()
    >>> problem.env_steps_taken
    80
    """

    environment: ClassVar[str]
    # The network's input is (observation - centre) / spread.
    centre: ClassVar[tuple[float, ...]]
    spread: ClassVar[tuple[float, ...]]
    actions: ClassVar[int]
    defaults: ClassVar[AgentSettings]

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        super().__init__(seed)
        self.settings: AgentSettings = replace(self.defaults, **settings)
        self._environment = _make_environment(self.environment, self.name)
        width, hidden = len(self.spread), self.settings.hidden
        self.network: nn.Sequential = nn.Sequential(
            nn.utils.skip_init(nn.Linear, width, hidden),
            nn.Tanh(),
            nn.utils.skip_init(nn.Linear, hidden, hidden),
            nn.Tanh(),
            nn.utils.skip_init(nn.Linear, hidden, self.actions),
        )
        self.target_network: nn.Module = _frozen(self.network)
        self.reset()

    @property
    def batch_size(self) -> int:
        """Transitions in a replay batch."""
        return self.settings.batch_size

    @property
    def epsilon(self) -> float:
        """ε, the present share of steps with random actions."""
        settings = self.settings
        passed = min(1.0, self.env_steps_taken / settings.epsilon_steps)
        return (1 - passed) * settings.epsilon_start + passed * settings.epsilon_end

    def forward(self, batch: ReplayBatch) -> Tensor:
        values = self.network(batch.observations).gather(1, batch.actions[:, None])
        return functional.huber_loss(values[:, 0], batch.targets)

    def batches(self) -> Iterator[ReplayBatch]:
        generator = seeded_generator(self.seed, "batches")
        while True:
            rows = torch.randint(len(self._replay), (self.batch_size,), generator=generator)
            yield self._replay_batch(rows.numpy())

    @torch.no_grad()
    def _replay_batch(
        self,
        rows: NDArray[np.int64],  # [n]
    ) -> ReplayBatch:
        replay = self._replay
        ahead = self.target_network(self._tensor(replay.next_observations[rows])).amax(1)
        going_on = 1 - self._tensor(replay.terminated[rows])
        targets = self._tensor(replay.rewards[rows]) + self.settings.discount * going_on * ahead
        actions = torch.from_numpy(replay.actions[rows]).to(targets.device)
        return ReplayBatch(self._tensor(replay.observations[rows]), actions, targets)

    def _tensor(self, values: NDArray[np.float32]) -> Tensor:
        """The values as a tensor of the parameters' dtype and device."""
        return torch.from_numpy(values).to(next(self.parameters()))

    def evaluate(self) -> float:
        return -self.average_reward()

    def average_reward(self) -> float:
        """Cumulative average reward: mean return of all episodes ended so far, the warm-up's among them."""
        return sum(self.episode_returns) / len(self.episode_returns)

    @torch.no_grad()
    def between_rounds(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters()):
            raise NonFiniteError(
                f"{self.name}: the Q-network's parameters are not finite; lower the learning rate"
            )
        for _ in range(self.settings.env_steps):
            self._act(self.epsilon)
            self.env_steps_taken += 1
        self._rounds += 1
        if self._rounds % self.settings.target_interval == 0:
            for old, new in zip(self.target_network.buffers(), self.network.parameters(), strict=True):
                old.lerp_(new, self.settings.target_rate)

    def _act(self, epsilon: float) -> bool:
        """Take one step in the environment; returns whether an episode ended with it."""
        observation = self._observation
        action = self._choose_action(epsilon)
        seen, reward, terminated, truncated, _ = self._environment.step(action)
        self._observation = self._normalised(seen)
        self._replay.push(observation, action, float(reward), self._observation, terminated)
        self._return += float(reward)
        if ended := terminated or truncated:
            self.episode_returns.append(self._return)
            self._return = 0.0
            self._hold = 0
            self._observation = self._normalised(self._environment.reset()[0])
        return ended

    def _choose_action(self, epsilon: float) -> int:
        # A random action begins with probability p and lasts m steps on average, a greedy one lasts one step.
        # The share of random steps, p m / (p m + 1 - p), is ε at p = ε / (ε + m (1 - ε)).
        mean = self.settings.held_actions
        if not self._hold and self._random.random() < epsilon / (epsilon + mean * (1 - epsilon)):
            self._held_action = int(self._random.integers(self.actions))
            self._hold = int(self._random.geometric(1 / mean))
        if self._hold:
            self._hold -= 1
            return self._held_action
        return int(self.network(self._tensor(self._observation)).argmax())

    def _normalised(self, observation: NDArray[Any]) -> NDArray[np.float32]:  # [o] -> [o]
        return ((observation - np.array(self.centre)) / np.array(self.spread)).astype(np.float32)

    @torch.no_grad()
    def reset(self) -> None:
        """Put network, target network, environment and replay back to the start, bit for bit."""
        generator = seeded_generator(self.seed, "start")
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
        for old, new in zip(self.target_network.buffers(), self.network.parameters(), strict=True):
            old.copy_(new)
        self._random = np.random.default_rng(seeded_generator(self.seed, "acting").initial_seed())
        self._replay = _Replay(self.settings.capacity, len(self.spread))
        self._rounds = 0
        self.env_steps_taken: int = 0
        self._hold = self._held_action = 0  # steps for which a random action is still repeated, and that action
        self._return = 0.0  # of the episode so far
        self.episode_returns: list[float] = []
        start = self._environment.reset(seed=int(self._random.integers(2**31)))[0]
        self._observation = self._normalised(start)
        ended = False
        while not ended or self._replay.pushed < self.settings.warm_up:
            ended = self._act(1.0)


def _make_environment(environment: str, problem: str) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{problem}: gymnasium, which provides the task, is not installed; pip install optex[rl]",
            name="gymnasium",
        ) from error
    return gymnasium.make(environment, disable_env_checker=True)


def _frozen(network: nn.Module) -> nn.Module:
    """A copy without parameters: its weights are buffers, which move with the module and are not saved."""
    frozen = copy.deepcopy(network)
    for module in frozen.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone(), persistent=False)
    return frozen


@final
class CartPole(DeepQLearning):
    """Balance a pole on a cart, CartPole-v1: reward 1 a step, at most 500; with actions at random 22.

    ``minimum`` is minus 500, as for an agent whose episodes all last 500 steps.
    """

    name = "cartpole"
    environment = "CartPole-v1"
    centre: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0, 0.0)
    spread: ClassVar[tuple[float, ...]] = (2.4, 2.0, 0.21, 2.0)
    actions = 2
    defaults: ClassVar[AgentSettings] = AgentSettings()

    @property
    def minimum(self) -> float:
        return -500.0


@final
class Acrobot(DeepQLearning):
    """Swing a double pendulum up, Acrobot-v1: -1 a step until it is up, at most 500; at random -500."""

    name = "acrobot"
    environment = "Acrobot-v1"
    centre: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    spread: ClassVar[tuple[float, ...]] = (1.0, 1.0, 1.0, 1.0, 4.0, 9.0)
    actions = 3
    defaults: ClassVar[AgentSettings] = AgentSettings(batch_size=128, epsilon_steps=4_000)


@final
class MountainCar(DeepQLearning):
    """Rock a car out of a valley, MountainCar-v0: -1 a step until it is out, at most 200; at random -200.

    ε-greedy exploration hardly ever gets out, and so finds nothing to learn from. Random actions are therefore
    repeated, for 20 steps on average: one random episode in eight gets out.
    """

    name = "mountain-car"
    environment = "MountainCar-v0"
    centre: ClassVar[tuple[float, ...]] = (-0.3, 0.0)
    spread: ClassVar[tuple[float, ...]] = (0.9, 0.07)
    actions = 3
    defaults: ClassVar[AgentSettings] = AgentSettings(
        hidden=128,
        env_steps=16,
        warm_up=2_000,
        target_rate=0.05,
        epsilon_steps=10_000,
        held_actions=20.0,
    )
