"""Policies: modules that say how likely each action is, given what is observed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from optex.checks import check_flag, check_integer, check_positive, shown
from optex.sources.policy.environment import Environment

__all__ = ["GaussianPolicy", "SoftmaxPolicy", "policy_for", "sample"]


class _Network(nn.Sequential):
    """Linear layers with tanh between them."""

    def __init__(self, owner: str, sizes: Sequence[int], *, bias: bool, dtype: torch.dtype | None) -> None:
        check_flag(owner, "bias", bias)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after, bias=bias, dtype=dtype), nn.Tanh()]
        super().__init__(*layers[:-1])


def _sizes(owner: str, observations: int, hidden: Sequence[int], actions: int) -> tuple[int, ...]:
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise TypeError(f"{owner}: hidden must be a list of sizes, () for none, got {shown(hidden)}")
    return (
        check_integer(owner, "observations", observations),
        *(check_integer(owner, "every size of hidden", size) for size in hidden),
        check_integer(owner, "actions", actions),
    )


@final
class GaussianPolicy(nn.Module):
    """Actions ~ N(μ(s), diag σ²), with μ a network of tanh layers and σ the same everywhere.

    Args:
        observations, actions: how many numbers each has.
        hidden: sizes of the hidden layers; () is linear. (32, 32) is the paper's.
        deviation: σ, positive; where it starts if it is learned.
        learn_deviation: log σ is a parameter, one an action. A σ that stays keeps the policy
            Fisher-non-degenerate, which is what the paper's rates are for; a learned one may go to 0.
        bias: of all layers.
        dtype: of the parameters.

    Raises:
        TypeError: ``hidden`` is no list, or a flag neither True nor False.
        ValueError: a size is no positive integer, or the deviation not positive.

    >>> policy = GaussianPolicy(3, 1, deviation=0.5)
    >>> policy(torch.zeros(7, 3)).sample().shape
    torch.Size([7, 1])
    """

    def __init__(
        self,
        observations: int,
        actions: int,
        hidden: Sequence[int] = (32, 32),
        *,
        deviation: float = 1.0,
        learn_deviation: bool = False,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = _sizes("GaussianPolicy", observations, hidden, actions)
        self.mean: nn.Sequential = _Network("GaussianPolicy", sizes, bias=bias, dtype=dtype)
        logarithm = math.log(check_positive("GaussianPolicy", "deviation", deviation))
        start = torch.full((actions,), logarithm, dtype=dtype)
        self.log_deviation: Tensor  # [a]
        if check_flag("GaussianPolicy", "learn_deviation", learn_deviation):
            self.log_deviation = nn.Parameter(start)
        else:
            self.register_buffer("log_deviation", start)

    def forward(
        self,
        observations: Tensor,  # [..., o]
    ) -> Distribution:  # of actions [..., a]
        mean = self.mean(observations)
        normal = Normal(mean, self.log_deviation.exp().expand_as(mean), validate_args=False)
        return Independent(normal, 1, validate_args=False)


@final
class SoftmaxPolicy(nn.Module):
    """One of several actions, with probabilities softmax(h(s)), h a network of tanh layers.

    Args:
        observations: how many numbers each has.
        actions: how many there are to choose from.
        hidden: sizes of the hidden layers; () is linear. (32, 32) is the paper's.
        bias: of all layers.
        dtype: of the parameters.

    Raises:
        TypeError: ``hidden`` is no list, or ``bias`` neither True nor False.
        ValueError: a size is no positive integer.

    >>> policy = SoftmaxPolicy(4, 2)
    >>> policy(torch.zeros(7, 4)).sample().shape
    torch.Size([7])
    """

    def __init__(
        self,
        observations: int,
        actions: int,
        hidden: Sequence[int] = (32, 32),
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = _sizes("SoftmaxPolicy", observations, hidden, actions)
        self.logits: nn.Sequential = _Network("SoftmaxPolicy", sizes, bias=bias, dtype=dtype)

    def forward(
        self,
        observations: Tensor,  # [..., o]
    ) -> Distribution:  # of actions [...]
        return Categorical(logits=self.logits(observations), validate_args=False)


def policy_for(environment: Environment, **options: Any) -> nn.Module:
    """A policy that fits: ``SoftmaxPolicy`` for discrete actions, else ``GaussianPolicy``."""
    kind = SoftmaxPolicy if environment.discrete else GaussianPolicy
    return kind(environment.observation_size, environment.action_size, **options)


def sample(distribution: Distribution, generator: torch.Generator) -> Tensor:
    """Actions drawn with this generator; torch's distributions draw from the global one alone."""
    if isinstance(distribution, Categorical):
        probabilities = distribution.probs
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        chosen = torch.multinomial(rows.cpu(), 1, generator=generator)
        return chosen.reshape(probabilities.shape[:-1]).to(rows.device)
    inner = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if isinstance(inner, Normal):
        noise = torch.randn(inner.loc.shape, generator=generator, dtype=inner.loc.dtype)
        return inner.loc + inner.scale * noise.to(inner.loc.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        return distribution.sample()
