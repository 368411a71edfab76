"""What trajectories are sampled in: several episodes at once, in tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from optex.checks import check_integer, check_number, shown

__all__ = ["Environment", "Episodes", "LinearQuadratic"]


class Episodes(ABC):
    """Episodes that run side by side.

    Attributes:
        observations: [n, o], what a policy sees next; of an episode that has ended, anything finite.
    """

    observations: Tensor

    @abstractmethod
    def step(
        self,
        actions: Tensor,  # [n, a], or [n] of integers
    ) -> tuple[Tensor, Tensor]:  # rewards [n], ended [n] of booleans
        """One step of each episode that has not ended; rewards of the others are not looked at."""


class Environment(ABC):
    """Where a policy acts. All that is random comes from the generator that ``begin`` is handed.

    Attributes:
        observation_size: o.
        action_size: a; of ``discrete`` actions, how many there are to choose from.
        discrete: whether actions are integers.
        horizon: most steps of an episode.
    """

    observation_size: int
    action_size: int
    discrete: bool
    horizon: int

    @abstractmethod
    def begin(self, count: int, generator: torch.Generator) -> Episodes:
        """Begin ``count`` episodes; the same ones for the same state of the generator."""


@final
class LinearQuadratic(Environment):
    """A linear system with quadratic costs: noise from a Gaussian, all episodes at once, a known best policy.

        s' = A s + B a + σ n,    r = -(sᵀ Q s + aᵀ R a),    s_0 = σ_0 n_0,    n, n_0 ~ N(0, I)

    Args:
        A: [s, s]; or a number.
        B: [s, a]; or a number.
        noise: σ, at least 0.
        Q, R: [s, s] and [a, a]; numbers are multiples of the identity.
        start: σ_0, at least 0.
        horizon: steps of an episode, at least 1.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.

    >>> import torch, optex
    >>> system = optex.LinearQuadratic()                            # s' = 0.9 s + 0.5 a + 0.1 n
    >>> gain, offset = torch.tensor([[-0.6]]), torch.zeros(1)
    >>> float(system.expected_return(gain, offset, deviation=0.5, discount=0.99)) > float(
    ...     system.expected_return(0 * gain, offset, deviation=0.5, discount=0.99))
    True
    """

    discrete = False

    def __init__(
        self,
        A: Tensor | float = 0.9,
        B: Tensor | float = 0.5,
        noise: float = 0.1,
        Q: Tensor | float = 1.0,
        R: Tensor | float = 1.0,
        *,
        start: float = 1.0,
        horizon: int = 20,
    ) -> None:
        self.A: Tensor = _matrix("A", A)
        self.B: Tensor = _matrix("B", B)
        self.observation_size: int = self.B.shape[0]
        self.action_size: int = self.B.shape[1]
        self.Q: Tensor = _square("Q", Q, self.observation_size)
        self.R: Tensor = _square("R", R, self.action_size)
        if self.A.shape != (self.observation_size, self.observation_size):
            raise ValueError(
                f"LinearQuadratic: A must be [s, s] where B is [s, a], got {tuple(self.A.shape)} and "
                f"{tuple(self.B.shape)}"
            )
        self.noise: float = check_number("LinearQuadratic", "noise", noise)
        self.start: float = check_number("LinearQuadratic", "start", start)
        self.horizon: int = check_integer("LinearQuadratic", "horizon", horizon)

    def begin(self, count: int, generator: torch.Generator) -> Episodes:
        return _Systems(self, count, generator)

    def expected_return(
        self,
        gain: Tensor,  # [a, s]
        offset: Tensor,  # [a]
        deviation: Tensor | float,  # [a] or one number
        discount: float = 0.99,
    ) -> Tensor:  # []
        """The exact mean discounted return of actions ~ N(gain s + offset, deviation² I); differentiable.

        Mean m and covariance P of the state go on as

            m' = (A + B K) m + B k,    P' = (A + B K) P (A + B K)ᵀ + B Σ Bᵀ + σ² I

        and E sᵀ Q s = tr(Q P) + mᵀ Q m.
        """
        like = gain
        A, B, Q, R = (m.to(like) for m in (self.A, self.B, self.Q, self.R))
        eye = torch.eye(self.observation_size).to(like)
        spread = (torch.as_tensor(deviation).to(like).expand(self.action_size) ** 2).diag()
        closed = A + B @ gain
        mean, covariance = torch.zeros(self.observation_size).to(like), self.start**2 * eye
        total = torch.zeros(()).to(like)
        for t in range(self.horizon):
            action = gain @ mean + offset
            of_state = (Q * covariance).sum() + mean @ Q @ mean
            of_action = (R * (gain @ covariance @ gain.T + spread)).sum() + action @ R @ action
            total = total - discount**t * (of_state + of_action)
            mean = closed @ mean + B @ offset
            covariance = closed @ covariance @ closed.T + B @ spread @ B.T + self.noise**2 * eye
        return total


class _Systems(Episodes):
    def __init__(self, system: LinearQuadratic, count: int, generator: torch.Generator) -> None:
        self._system, self._generator, self._taken = system, generator, 0
        self.observations = system.start * self._normal(count)

    def _normal(self, count: int) -> Tensor:  # [count, s]
        return torch.randn(count, self._system.observation_size, generator=self._generator, dtype=torch.float64)

    def step(
        self,
        actions: Tensor,  # [n, a]
    ) -> tuple[Tensor, Tensor]:
        system, states, actions = self._system, self.observations, actions.to(torch.float64)
        rewards = -((states @ system.Q) * states).sum(1) - ((actions @ system.R) * actions).sum(1)
        noise = system.noise * self._normal(len(states))
        self.observations = states @ system.A.T + actions @ system.B.T + noise
        self._taken += 1
        return rewards, torch.full((len(states),), self._taken >= system.horizon)


def _numbers(name: str, value: Any) -> Tensor:  # float64
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"LinearQuadratic: {name} must be a matrix or a number, got {shown(value)}") from error


def _matrix(name: str, value: Tensor | float) -> Tensor:  # [., .] float64
    matrix = _numbers(name, value)
    matrix = matrix.reshape(1, 1) if matrix.ndim == 0 else matrix
    if matrix.ndim != 2 or not matrix.numel() or not bool(matrix.isfinite().all()):
        raise ValueError(
            f"LinearQuadratic: {name} must be a matrix of finite numbers, got "
            f"{tuple(matrix.shape)}: {shown(value)}"
        )
    return matrix


def _square(name: str, value: Tensor | float, size: int) -> Tensor:  # [size, size] float64
    matrix = _numbers(name, value)
    times = torch.eye(size, dtype=torch.float64) if matrix.ndim == 0 else 1.0
    matrix = _matrix(name, matrix) * times
    if matrix.shape != (size, size):
        raise ValueError(f"LinearQuadratic: {name} must be [{size}, {size}], got {tuple(matrix.shape)}")
    return matrix
