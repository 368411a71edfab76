"""Trajectories, how they are sampled, and what each of their actions is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from optex.errors import NonFiniteError
from optex.sources.policy.environment import Environment
from optex.sources.policy.policies import sample

__all__ = ["Trajectories", "roll_out"]


@dataclass(frozen=True)
class Trajectories:
    """n episodes of at most T steps.

    Attributes:
        observations: [T, n, o].
        actions: [T, n, a], or [T, n] of integers.
        rewards: [T, n]; 0 from where an episode has ended.
        running: [T, n], whether the episode had not ended before that step.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    running: Tensor

    @property
    def steps(self) -> int:
        """The number of steps of all episodes together."""
        return int(self.running.sum())

    @property
    def returns(self) -> Tensor:  # [n]
        """Sums of rewards, not discounted."""
        return self.rewards.sum(0)

    def discounted(self, discount: float) -> Tensor:  # [T, n]
        """γ^t r_t."""
        powers = discount ** torch.arange(len(self.rewards), dtype=self.rewards.dtype)
        return powers[:, None] * self.rewards

    def weights(
        self,
        discount: float,
        estimator: Literal["gpomdp", "reinforce"],
        *,
        baseline: bool,
    ) -> Tensor:  # [T, n]
        """Ψ_t, the weight of ∇ log π(a_t | s_t) in the gradient of the discounted return."""
        found = self.discounted(discount)
        to_go = estimator == "gpomdp"
        worth = found.flip(0).cumsum(0).flip(0) if to_go else found.sum(0).expand_as(found)
        if baseline:
            # The others' mean does not depend on the trajectory's own actions, so it adds no bias.
            count = found.shape[1]
            worth = worth - (worth.sum(1, keepdim=True) - worth) / (count - 1)
        return worth * self.running


@torch.no_grad()
def roll_out(
    policy: Callable[[Tensor], Distribution],
    environment: Environment,
    count: int,
    generator: torch.Generator,
    like: Tensor,
) -> Trajectories:
    """Act until all episodes have ended.

    Args:
        policy: of observations [n, o].
        environment: to act in.
        count: n.
        generator: where all that is random comes from.
        like: observations get its dtype and device.

    Raises:
        NonFiniteError: an observation or a reward is not.
    """
    episodes = environment.begin(count, generator)
    running = torch.ones(count, dtype=torch.bool)
    seen, done, earned, alive = [], [], [], []
    while len(seen) < environment.horizon and bool(running.any()):
        observations = episodes.observations.to(like)
        actions = sample(policy(observations), generator)
        rewards, ended = episodes.step(actions.cpu())
        seen.append(observations)
        done.append(actions)
        earned.append(torch.where(running, rewards, 0.0).to(like))
        alive.append(running.to(like.device))
        running = running & ~ended
    found = Trajectories(torch.stack(seen), torch.stack(done), torch.stack(earned), torch.stack(alive))
    if not bool(found.rewards.isfinite().all() & found.observations.isfinite().all()):
        raise NonFiniteError(
            "TrajectorySource: observations or rewards are not finite: the policy has left where the "
            "environment is defined. Parameters are as before; lower the rate, or start from a stable policy"
        )
    return found
