"""Deep Q-learning on CartPole
===========================

The agent acts between rounds, and each step has a replay batch of its own::

    python examples/train_dqn.py --optex 1      # the plain loop
    python examples/train_dqn.py --optex 4      # several steps of Adam between two spells of acting

Here acting and learning wait for each other: after every round the agent takes ``--act`` steps in
its environment. The plain loop's round is one step of Adam, that of optex several: more learning for as much
acting. So the two are compared at equal rounds. They are not one trajectory, not even at tolerance 0: optex
draws its replay batches up to N - 1 steps before it takes their steps.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import optex

Batch = tuple[Tensor, Tensor, Tensor]  # observations [n, 4], actions [n], the values they should have [n]

SCALE = np.array([2.4, 2.0, 0.21, 2.0], dtype=np.float32)  # brings the four observations to about 1


class Agent:
    """Acts ε-greedily by its network's values, remembers what came of it, and deals out replay batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.environment = gymnasium.make("CartPole-v1")
        self.random = np.random.default_rng(args.seed)
        torch.manual_seed(args.seed)
        self.network, self.target = self.build(), self.build()
        self.target.load_state_dict(self.network.state_dict())
        self.replay: deque[tuple[Any, ...]] = deque(maxlen=20_000)
        self.returns: list[float] = []  # of the episodes that have ended
        self.steps = 0
        self.sum = 0.0
        self.observation = self.environment.reset(seed=args.seed)[0] / SCALE

    @staticmethod
    def build() -> nn.Module:
        """Four observations in, the values of two actions out."""
        return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    @torch.no_grad()
    def act(self, count: int) -> None:
        """So many steps in the environment; at random first, less and less so later."""
        for _ in range(count):
            epsilon = max(0.05, 1 - max(0, self.steps - self.args.warm_up) / self.args.explore)
            if self.random.random() < epsilon:
                action = int(self.random.integers(2))
            else:
                action = int(self.network(torch.from_numpy(self.observation)).argmax())
            seen, reward, terminated, truncated, _ = self.environment.step(action)
            seen = seen / SCALE
            self.replay.append((self.observation, action, float(reward), seen, float(terminated)))
            self.observation, self.sum, self.steps = seen, self.sum + float(reward), self.steps + 1
            if terminated or truncated:
                self.returns.append(self.sum)
                self.observation, self.sum = self.environment.reset()[0] / SCALE, 0.0

    def batches(self) -> Iterator[Batch]:
        """Drawn from what is remembered at that moment, with the values that the target network sees then.

        A step keeps its batch for good. Values computed in the objective would change under it whenever the
        target network does, and what was measured for the step would no longer be its gradient.
        """
        while True:
            rows = self.random.integers(len(self.replay), size=self.args.batch_size)
            columns = zip(*(self.replay[row] for row in rows), strict=True)
            before, actions, rewards, after, ended = (torch.from_numpy(np.array(column)) for column in columns)
            with torch.no_grad():
                ahead = self.target(after).amax(1)
            yield before, actions, (rewards + 0.99 * (1 - ended) * ahead).float()

    def objective(self, batch: Batch) -> Tensor:
        """How far the values are from what they should be."""
        observations, actions, wanted = batch
        return functional.smooth_l1_loss(self.network(observations).gather(1, actions[:, None])[:, 0], wanted)

    @torch.no_grad()
    def move_target(self) -> None:
        """Let the target network follow."""
        for slow, fast in zip(self.target.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast, self.args.target_rate)

    def recent(self) -> float:
        """The mean return of the last 20 episodes."""
        return float(np.mean(self.returns[-20:]))


def plain(
    base: torch.optim.Optimizer, batches: Iterator[Batch], objective: Callable[[Batch], Tensor]
) -> Iterator[int]:
    """The loop as it is without optex. Yields the steps taken since it last did."""
    for batch in batches:
        base.zero_grad()
        objective(batch).backward()
        base.step()
        yield 1


def with_optex(
    optimizer: optex.OptEx, batches: Iterator[Batch], objective: Callable[[Batch], Tensor]
) -> Iterator[int]:
    """The loop with optex. Acting between two rounds is safe: the network is as the last step kept left it."""
    for report in optimizer.rounds(batches, objective):
        yield report.accepted


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optex", type=int, default=4, metavar="N", help="gradients at once; 1 is the plain loop (default 4)")
    add("--rounds", type=int, default=1500, help="(default 1500)")
    add("--act", type=int, default=8, help="steps in the environment after every round (default 8)")
    add("--warm-up", type=int, default=500, help="steps at random before the first round (default 500)")
    add("--explore", type=int, default=2000, help="steps until few are random (default 2000)")
    add("--batch-size", type=int, default=64, help="(default 64)")
    add("--lr", type=float, default=1e-3, help="(default 0.001)")
    add("--target-rate", type=float, default=0.02, help="the target network follows so far (default 0.02)")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, and say how it went."""
    args = arguments(argv)
    agent = Agent(args)
    base = torch.optim.Adam(agent.network.parameters(), lr=args.lr)
    if args.optex > 1:
        loop = with_optex(optex.OptEx(base, parallelism=args.optex), agent.batches(), agent.objective)
    else:
        loop = plain(base, agent.batches(), agent.objective)
    agent.act(args.warm_up)
    steps, curve = 0, []
    for rounds in range(1, args.rounds + 1):
        steps += next(loop)
        agent.act(args.act)
        agent.move_target()
        curve.append(agent.recent())
        if rounds % 100 == 0 or rounds == args.rounds:
            print(
                f"round {rounds:5d}   steps {steps:5d}   episodes {len(agent.returns):4d}   "
                f"mean return of the last 20 {curve[-1]:5.1f}",
                flush=True,
            )
    agent.environment.close()
    return {"network": agent.network, "steps": steps, "curve": curve, "returns": agent.returns}


if __name__ == "__main__":
    main()
