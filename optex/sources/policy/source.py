"""The policy gradient of sampled trajectories, and products with the return's Hessian.

Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement learning*, Machine
Learning 8 (1992): REINFORCE. Baxter, Bartlett, *Infinite-horizon policy-gradient estimation*, JAIR 15 (2001):
GPOMDP. Products: Fatkhullin, Barakat, Kireeva, He, ICML 2023, arXiv 2302.01734.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from optex.batching import variance_of_mean
from optex.checks import check_flag, check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.sources.interface import GradientSource
from optex.sources.policy.environment import Environment
from optex.sources.policy.trajectories import Trajectories, roll_out

__all__ = ["TrajectorySource"]

_HELD: Final = 2**24  # numbers of single trajectories' gradients at once


class TrajectorySource(GradientSource):
    """Minus the policy gradient, estimated from n trajectories of the present policy.

        ∇J = E Σ_t Ψ_t ∇ log π(a_t | s_t),    J = E Σ_t γ^t r_t
        Ψ_t = Σ_{h ≥ t} γ^h r_h   ("gpomdp"),    Ψ_t = Σ_h γ^h r_h   ("reinforce")

    A call samples anew; no estimate is kept from call to call. The loss is minus the mean discounted return,
    and the noise that of the mean of n trajectories' gradients, from their spread; None for n = 1.

    Args:
        policy: a module that answers observations [..., o] with a ``torch.distributions.Distribution`` of
            actions; its trainable parameters are what is optimised. Its answer has to depend on its
            weights alone: no dropout, no BatchNorm.
        environment: to act in, :class:`~optex.LinearQuadratic`, :class:`~optex.GymnasiumEnvironment` or your
            own.
        trajectories: n, at least 1.
        discount: γ, in (0, 1]; 0.99 is the paper's.
        estimator: Ψ, as above; "gpomdp" has less variance and the same mean.
        baseline: subtract from Ψ_t what the other trajectories' Ψ_t are on average, which leaves the mean as it
            is and lowers the variance; n is then at least 2. An episode that has ended counts as 0.

    Attributes:
        environment_steps: taken so far by this object; workers have copies of their own.
        mean_return: not discounted, of the trajectories last sampled here; NaN before.

    A call draws one number from torch's global generator, and all else that is random, the environment's seeds
    included, follows from it. So evaluations are repeated exactly, wherever they run.

    Raises:
        TypeError, ValueError: an argument cannot work; or, in a call, the policy answers no distribution.
        NonFiniteError: in a call, parameters, observations, rewards or the gradient are not finite.

    Source: Fatkhullin et al., ICML 2023, arXiv 2302.01734.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> policy = optex.GaussianPolicy(1, 1, hidden=(), deviation=0.5)
    >>> source = optex.TrajectorySource(policy, optex.LinearQuadratic(), trajectories=50, baseline=True)
    >>> optimizer = optex.OptEx(torch.optim.SGD(policy.parameters(), lr=0.005), parallelism=4)
    >>> for report in optimizer.rounds([None] * 60, source):
    ...     pass
    >>> bool(-0.8 < policy.mean[0].weight < -0.3)
    True
    """

    def __init__(
        self,
        policy: nn.Module,
        environment: Environment,
        trajectories: int = 10,
        discount: float = 0.99,
        *,
        estimator: Literal["gpomdp", "reinforce"] = "gpomdp",
        baseline: bool = False,
    ) -> None:
        if not isinstance(policy, nn.Module):
            raise TypeError(
                f"TrajectorySource: policy must be a torch.nn.Module that answers a distribution of actions, "
                f"got {type(policy).__name__}; optex.GaussianPolicy or optex.SoftmaxPolicy, for one"
            )
        if not isinstance(environment, Environment):
            raise TypeError(
                f"TrajectorySource: environment must be an optex.Environment, got "
                f"{type(environment).__name__}; optex.GymnasiumEnvironment(name) has those of Gymnasium"
            )
        if estimator not in ("gpomdp", "reinforce"):
            raise ValueError(
                f"TrajectorySource: estimator must be 'gpomdp' or 'reinforce', got {shown(estimator)}"
            )
        self.policy: nn.Module = policy
        self.environment: Environment = environment
        self.estimator: Literal["gpomdp", "reinforce"] = estimator
        self.baseline: bool = check_flag("TrajectorySource", "baseline", baseline)
        self.trajectories: int = check_integer("TrajectorySource", "trajectories", trajectories)
        if self.baseline and self.trajectories < 2:
            raise ValueError(
                "TrajectorySource: baseline=True is the other trajectories' mean, and there is one trajectory; "
                "raise trajectories"
            )
        self.discount: float = check_number("TrajectorySource", "discount", discount, most=1.0, open_below=True)
        self.parameters: list[nn.Parameter] = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("TrajectorySource: no parameter of the policy requires a gradient")
        self.module: nn.Module | None = policy
        self.evaluations: float = float(self.trajectories)
        self.environment_steps: int = 0
        self.mean_return: float = float("nan")

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        found, weights = self._sampled()
        with torch.enable_grad():
            # A loss for each trajectory, whose gradient is its term of the estimate.
            losses = -(weights * self._log_probabilities(found)).sum(0)
            rows = self._rows(losses)
            total, squares = next(rows)
            for gradients, norms in rows:
                total = torch._foreach_add(total, gradients)
                squares = torch.cat([squares, norms])
        mean = torch._foreach_div(total, self.trajectories)
        if not all(bool(g.isfinite().all()) for g in mean):
            raise NonFiniteError(
                "TrajectorySource: the gradient is not finite; parameters are as before. An action is all but "
                "impossible where it was taken: keep the policy's deviation away from 0, or lower the rate"
            )
        for p, gradient in zip(self.parameters, mean, strict=True):
            p.grad = gradient
        return -found.discounted(self.discount).sum(0).mean(), self._noise(squares, mean)

    def hessian_vector(
        self,
        vector: Sequence[Tensor],  # a parameter each, in its shape
    ) -> list[Tensor]:  # the same
        """An unbiased estimate of the Hessian of -J times a vector, from n trajectories of its own.

            ∇²J v = E[ ∇⟨g(τ, θ), v⟩ + g(τ, θ) ⟨∇ log p(τ | θ), v⟩ ],    g(τ, θ) = Σ_t Ψ_t ∇ log π(a_t | s_t)

        the first term with τ held; ∇ log p(τ | θ) = Σ_t ∇ log π(a_t | s_t). A released code has a minus between
        the terms, an error of twice the second.

        Args:
            vector: as above, in the order of ``source.parameters``.

        Raises:
            ValueError: the shapes are not the parameters'.
            NonFiniteError: as ``gradient``.
        """
        shapes = [tuple(v.shape) for v in vector]
        if shapes != [tuple(p.shape) for p in self.parameters]:
            raise ValueError(
                "TrajectorySource: hessian_vector needs one tensor a parameter, of shapes "
                f"{[tuple(p.shape) for p in self.parameters]}, got {shapes}"
            )
        found, weights = self._sampled()
        with torch.enable_grad():
            each = self._log_probabilities(found)
            surrogates, whole = -(weights * each).sum(0), each.sum(0)  # [n] both
            # ⟨∇ log p_i, v⟩ for all i at once: a vector-Jacobian product is linear in u, so that its derivative
            # in u is the Jacobian-vector product.
            u = torch.zeros_like(whole, requires_grad=True)
            pulled = torch.autograd.grad(whole, self.parameters, u, create_graph=True, materialize_grads=True)
            (slopes,) = torch.autograd.grad(_inner(pulled, vector), u, retain_graph=True)  # [n]
            gradients = torch.autograd.grad(
                surrogates.mean(), self.parameters, create_graph=True, materialize_grads=True
            )
            target = _inner(gradients, vector) + (slopes.detach() * surrogates).mean()
            product = torch.autograd.grad(target, self.parameters, materialize_grads=True)
        return [part.detach() for part in product]

    def _sampled(self) -> tuple[Trajectories, Tensor]:  # and weights [T, n]
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise NonFiniteError(
                "TrajectorySource: the policy's parameters are not finite; lower the rate, and start again "
                "from ones that are"
            )
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        like = self.parameters[0]
        found = roll_out(self._distribution, self.environment, self.trajectories, generator, like)
        self.environment_steps += found.steps
        self.mean_return = float(found.returns.mean())
        return found, found.weights(self.discount, self.estimator, baseline=self.baseline)

    def _distribution(self, observations: Tensor) -> Distribution:
        answer = self.policy(observations)
        if not isinstance(answer, Distribution):
            raise TypeError(
                "TrajectorySource: the policy must answer a torch.distributions.Distribution of actions, got "
                f"{type(answer).__name__}"
            )
        return answer

    def _log_probabilities(self, found: Trajectories) -> Tensor:  # [T, n]; 0 behind an episode's end
        each = self._distribution(found.observations).log_prob(found.actions)
        if each.shape != found.rewards.shape:
            raise ValueError(
                "TrajectorySource: the policy's distribution must have one log-probability an action, of shape "
                f"{tuple(found.rewards.shape)}, got {tuple(each.shape)}; wrap it in "
                "torch.distributions.Independent(distribution, 1)"
            )
        return torch.where(found.running, each, 0.0)

    def _rows(
        self,
        losses: Tensor,  # [n]
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Gradients summed over some of the trajectories, and each one's squared norm."""
        count = len(losses)
        if count == 1:  # without vmap, which not every policy can do
            found = torch.autograd.grad(losses[0], self.parameters, materialize_grads=True)
            yield list(found), torch.zeros(1, dtype=losses.dtype)
            return
        size = max(1, _HELD // sum(p.numel() for p in self.parameters))
        for start in range(0, count, size):
            rows = torch.eye(count, dtype=losses.dtype, device=losses.device)[start : start + size]
            found = torch.autograd.grad(
                losses, self.parameters, rows, retain_graph=True, is_grads_batched=True, materialize_grads=True
            )
            squares = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0)
            yield [g.sum(0) for g in found], squares

    def _noise(self, squares: Tensor, mean: Sequence[Tensor]) -> Tensor | None:  # []
        if self.trajectories < 2:
            return None
        squared = torch.stack([g.square().sum() for g in mean]).sum()
        return variance_of_mean(squares, squared) / sum(p.numel() for p in self.parameters)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:  # []
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
