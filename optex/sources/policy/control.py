"""Gymnasium's environments as several episodes side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optex.checks import check_integer, shown
from optex.sources.policy.environment import Environment, Episodes

__all__ = ["GymnasiumEnvironment"]


@final
class GymnasiumEnvironment(Environment):
    """An environment of Gymnasium, made as often as there are episodes at once.

    Discrete actions are chosen by number. Continuous ones are in units of half the action space's range, around
    its middle, and clipped to it: a policy's -1 and 1 are its ends.

    Args:
        name: as ``gymnasium.make`` has it, ``"CartPole-v1"``; or a function that makes one. Functions that can
            be pickled can go to worker processes.
        horizon: most steps of an episode; None is the environment's own limit.

    Raises:
        ModuleNotFoundError: Gymnasium is not installed; ``pip install "optex[rl]"``.
        ValueError: observations are no Box, actions neither Discrete nor a Box with finite ends, or there is no
            horizon.

    >>> import optex
    >>> task = optex.GymnasiumEnvironment("CartPole-v1")
    >>> task.observation_size, task.action_size, task.discrete, task.horizon
    (4, 2, True, 500)
    """

    def __init__(self, name: str | Callable[[], Any], horizon: int | None = None) -> None:
        self.name = name
        self._made: list[Any] = []
        first = self._environment(0)
        self.observation_size: int = _flat_size(first.observation_space)
        self.discrete: bool = type(first.action_space).__name__ == "Discrete"
        space = first.action_space
        self.action_size: int = int(space.n) if self.discrete else _flat_size(space)
        self.middle: NDArray[np.float64] | None
        self.half: NDArray[np.float64] | None
        self.middle, self.half = (None, None) if self.discrete else _range(space)
        limit = horizon if horizon is not None else getattr(first.spec, "max_episode_steps", None)
        if limit is None:
            raise ValueError("GymnasiumEnvironment: the environment has no limit of steps; give horizon")
        self.horizon: int = check_integer("GymnasiumEnvironment", "horizon", limit)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": []}  # made anew where they are needed: not all can be pickled

    def _environment(self, number: int) -> Any:
        while number >= len(self._made):
            self._made.append(_make(self.name))
        return self._made[number]

    def begin(self, count: int, generator: torch.Generator) -> Episodes:
        environments = [self._environment(i) for i in range(count)]
        return _GymnasiumEpisodes(self, environments, generator)


class _GymnasiumEpisodes(Episodes):
    def __init__(self, task: GymnasiumEnvironment, environments: list[Any], generator: torch.Generator) -> None:
        self._task, self._environments = task, environments
        seeds = torch.randint(2**31, (len(environments),), generator=generator).tolist()
        self._seen = np.stack(
            [np.ravel(env.reset(seed=seed)[0]) for env, seed in zip(environments, seeds, strict=True)]
        ).astype(np.float64)
        self._ended = np.zeros(len(environments), bool)
        self._taken = 0
        self.observations = torch.from_numpy(self._seen.copy())

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rewards = self._actions(actions), np.zeros(len(self._environments))
        for i, environment in enumerate(self._environments):
            if not self._ended[i]:
                seen, rewards[i], terminated, truncated, _ = environment.step(chosen[i])
                self._seen[i] = np.ravel(seen)
                self._ended[i] = terminated or truncated
        self._taken += 1
        if self._taken >= self._task.horizon:
            self._ended[:] = True
        self.observations = torch.from_numpy(self._seen.copy())
        return torch.from_numpy(rewards), torch.from_numpy(self._ended.copy())

    def _actions(self, actions: Tensor) -> Any:  # n of what an environment takes
        task = self._task
        if task.discrete:
            return actions.tolist()
        assert task.middle is not None
        assert task.half is not None
        scaled = task.middle + task.half * np.clip(actions.detach().to(torch.float64).numpy(), -1, 1)
        return scaled.reshape(len(scaled), *self._environments[0].action_space.shape).astype(np.float32)


def _make(name: str | Callable[[], Any]) -> Any:
    if callable(name):
        return name()
    if not isinstance(name, str):
        raise TypeError(
            "GymnasiumEnvironment: name must be one of Gymnasium's, or a function that makes one, "
            f"got {shown(name)}"
        )
    try:
        import gymnasium
    except ImportError as error:
        raise ModuleNotFoundError(
            'GymnasiumEnvironment: gymnasium is not installed; pip install "optex[rl]"', name="gymnasium"
        ) from error
    try:
        return gymnasium.make(name, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv as error:
        raise ValueError(f"GymnasiumEnvironment: name {name!r} is not one of Gymnasium's: {error}") from error


def _flat_size(space: Any) -> int:
    if type(space).__name__ != "Box":
        raise ValueError(
            f"GymnasiumEnvironment: a {type(space).__name__} space is neither observations nor actions that "
            "policies here can have; wrap the environment so that observations are a Box, actions a Box or "
            "Discrete"
        )
    return int(np.prod(space.shape))


def _range(space: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # [a], [a]
    low, high = np.ravel(space.low).astype(np.float64), np.ravel(space.high).astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(
            "GymnasiumEnvironment: actions have no finite range; wrap the environment in "
            "gymnasium.wrappers.RescaleAction or ClipAction"
        )
    return (high + low) / 2, (high - low) / 2
