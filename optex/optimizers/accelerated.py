"""Accelerated gradient methods with known or estimated curvature: Nesterov's, triple momentum, heavy ball.

M. Parimi, R. Mehra, S. R. Wagh, A. Yerudkar, N. Singh: "On the Dynamics of Acceleration in First order Gradient
Methods", arXiv 2509.18346 (2025), explains the three as one dynamical system. The methods themselves:
Y. Nesterov: "Introductory Lectures on Convex Optimization", Kluwer (2004), section 2.2; B. Van Scoy,
R. A. Freeman, K. M. Lynch: "The fastest known globally convergent first-order method for minimizing strongly
convex functions", IEEE Control Systems Letters 2 (2018) 49-54; B. T. Polyak: "Some methods of speeding up the
convergence of iteration methods", USSR Computational Mathematics and Mathematical Physics 4 (1964) 1-17.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optex.checks import check_number, shown
from optex.optimizers.step_rule import FreezingStepRule

__all__ = ["NAG", "HeavyBall", "TripleMomentum"]

_MARGIN: Final = 1.3  # estimated L over the steepest change seen, which is never above the true one
_FLATTEST: Final = 1e-6  # least mu / L that an estimate may claim
_FIRST: Final = 1e-4  # length of the step before any estimate of L, relative to the parameters'
_COARSEST: Final = 1e-6  # largest machine epsilon of parameters from which L and mu are estimated
_ROUNDING: Final = 100.0  # steps shorter than this, in units in the last place, do not enter the estimates


class _Weights(NamedTuple):
    """Weights of b ← momentum · b + g, y ← y - lr (gradient · g + buffer · b), x = y + lr · output · b."""

    momentum: float | Tensor
    gradient: float | Tensor
    buffer: float | Tensor
    output: float | Tensor


def _defaults(L: float | None, mu: float | None, lr: float | None, maximize: bool) -> dict[str, Any]:
    return {"lr": lr, "L": L, "mu": mu, "maximize": maximize, "train_mode": True}


class _Accelerated(FreezingStepRule):
    """The step that the methods share; a subclass gives its weights, see ``_weights``.

    With g = ∇f(y) and q = mu · lr = mu / L every one of them is

        b ← m b + g,    y ← y - lr (u g + v b),    x = y + lr w b,

    with numbers m, u, v, w that depend on q alone. The momentum b is in units of the gradient: a schedule that
    lowers the rate shortens momentum with it, and with a rate of 0 nothing moves. While drafting, estimates of
    L and mu stay as they are.
    """

    def __init__(
        self,
        params: ParamsT,
        L: float | None = None,
        mu: float | None = None,
        *,
        lr: float | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, _defaults(L, mu, lr, maximize))

    # ------------------------------------------------------------------ settings

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``StepRule`` does; a group that sets ``L`` or ``lr`` does not take the other's default."""
        if isinstance(param_group, dict):
            own = {name: param_group.get(name) for name in ("L", "lr")}
            if own["L"] is None and own["lr"] is None:
                own = {name: self.defaults[name] for name in ("L", "lr")}
            param_group = {**param_group, **self._rate(**own)}
            if self.param_groups:
                param_group["train_mode"] = self.param_groups[0]["train_mode"]
        super().add_param_group(param_group)
        self._complete(self.param_groups[-1], like=self.param_groups[0])

    def _rate(self, L: Any, lr: Any) -> dict[str, float | None]:
        """``L`` and ``lr``, each from the other where one is missing."""
        owner = type(self).__name__
        if L is None and lr is None:
            return {"L": None, "lr": 1.0}
        if L is None:
            rate = check_number(owner, "lr", lr)
            return {"L": 1 / rate if rate else math.inf, "lr": lr}
        if lr is not None and check_number(owner, "lr", lr) == 0:
            return {"L": math.inf, "lr": lr}
        smoothness = check_number(owner, "L", L, open_below=True)
        if lr is not None and not math.isclose(float(lr) * smoothness, 1.0, rel_tol=1e-6):
            raise ValueError(
                f"{owner}: lr={float(lr):g} contradicts L={smoothness:g}, as lr is 1 / L; give one of them"
            )
        return {"L": smoothness, "lr": 1 / smoothness if lr is None else lr}

    def _check(self, group: dict[str, Any]) -> None:
        owner, mu = type(self).__name__, group["mu"]
        check_number(owner, "lr", group["lr"])
        coarse = [p.dtype for p in group["params"] if torch.finfo(p.dtype).eps > _COARSEST]
        if coarse and self._is_estimated(group):
            raise ValueError(f"{owner}: {coarse[0]} is too coarse to estimate L and mu from; give both")
        if mu is None:
            return
        if check_number(owner, "mu", mu) == 0:
            raise ValueError(
                f"{owner}: mu must be above 0, got {shown(mu)}; NAG(rule='convex') is the rule for mu = 0, and "
                "mu=None estimates it"
            )
        if group["L"] is not None and float(mu) * float(group["lr"]) > 1 + 1e-9:
            raise ValueError(
                f"{owner}: mu={float(mu):g} is above L={float(group['L']):g} (lr is 1 / L); the least "
                "curvature cannot exceed the largest"
            )

    def _complete(self, group: dict[str, Any], like: dict[str, Any]) -> None:
        """Add the entries that steps write to, on the device of the group's parameters."""
        first = group["params"][0] if group["params"] else torch.zeros(())
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        new = {"estimated_L": 0.0, "estimated_mu": torch.finfo(dtype).max, "first_step": 0.0}
        new |= {"output_weight": 0.0, **({"t": 1.0, "momentum": 0.0} if "rule" in group else {})}
        for name, value in new.items():
            there = group.get(name, like.get(name, value) if name.startswith("estimated") else value)
            group[name] = torch.as_tensor(there, dtype=dtype, device=first.device).detach().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, saved in ``train()`` or ``eval()``; the parameters come from the model's state."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            self._complete(group, like=self.param_groups[0])

    # ------------------------------------------------------------------ which point the parameters hold

    @torch.no_grad()
    def eval(self) -> None:
        """Move the parameters to the output point x, for which the rates hold; ``train()`` goes back."""
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    state = self.state.get(p, {})
                    if "momentum_buffer" in state:
                        # Kept rather than computed again, so that the way back is exact to the bit.
                        state["query_point"] = p.detach().clone()
                        p.add_(state["momentum_buffer"] * group["output_weight"])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Move the parameters to the query point y, where the next gradient is needed."""
        for group in self.param_groups:
            if not group["train_mode"]:
                for p in group["params"]:
                    if "query_point" in self.state.get(p, {}):
                        p.copy_(self.state[p].pop("query_point"))
                group["train_mode"] = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the query point, with its gradient; as ``StepRule.step``.

        Raises:
            RuntimeError: ``eval()`` was called, and the parameters hold the output point; nothing changed.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: step() after eval(): the parameters hold the output point, and the "
                "gradient is needed at the query point; call train() before the forward pass"
            )
        return super().step(closure)

    # ------------------------------------------------------------------ estimates

    def _is_estimated(self, group: dict[str, Any]) -> bool:
        return group["L"] is None or group["mu"] is None

    def _prepare(self, groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        """Update the estimates from the gradient's change since the last measured one: mu ≤ ‖Δg‖ / ‖Δy‖ ≤ L."""
        if self._frozen or not any(map(self._is_estimated, self.param_groups)):
            return
        points = [p for _, parameters, _ in groups for p in parameters]
        gradients = [g for _, _, found in groups for g in found]
        if not points:
            return
        states = [self.state[p] for p in points]
        here, slope = self._length(points), self._length(gradients)
        if all("previous_point" in state for state in states):
            change = torch._foreach_sub(gradients, [state["previous_gradient"] for state in states])
            moved = torch._foreach_sub(points, [state["previous_point"] for state in states])
            self._learn(self._length(moved), self._length(change), here, torch.finfo(points[0].dtype).eps)
        first = _FIRST * torch.where(here > 0, here, 1.0) / slope
        for group in self.param_groups:
            # Before any estimate, one short step: with it the two gradients make a finite difference.
            group["first_step"].copy_(torch.where(slope > 0, first, 0.0))
        for state, p, g in zip(states, points, gradients, strict=True):
            if "previous_point" not in state:
                state["previous_point"], state["previous_gradient"] = torch.empty_like(p), torch.empty_like(g)
        torch._foreach_copy_([state["previous_point"] for state in states], points)
        torch._foreach_copy_([state["previous_gradient"] for state in states], gradients)

    def _length(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:  # []
        """The Euclidean norm of all together, without a transfer from the device."""
        dtype = self.param_groups[0]["estimated_L"].dtype
        return torch.linalg.vector_norm(torch.stack([n.to(dtype) for n in torch._foreach_norm(tensors)]))

    def _learn(
        self,
        moved: Tensor,  # [], ‖Δy‖
        change: Tensor,  # [], ‖Δg‖
        here: Tensor,  # [], ‖y‖
        unit: float,
    ) -> None:
        ratio = change / moved
        # In shorter steps rounding changes the gradient as much as curvature does.
        tells = (moved > _ROUNDING * unit * here) & ratio.isfinite()
        for group in self.param_groups:
            steepest, flattest = group["estimated_L"], group["estimated_mu"]
            # One step past an inflection, or one inexact gradient, should not set mu for good.
            lower = torch.where(steepest > 0, torch.maximum(ratio, flattest / 2), ratio)
            flattest.copy_(torch.where(tells, torch.minimum(flattest, lower), flattest))
            steepest.copy_(torch.where(tells, torch.maximum(steepest, ratio), steepest))

    # ------------------------------------------------------------------ the step

    def _step_length(self, group: dict[str, Any]) -> float | Tensor:
        """1 / L."""
        lr = float(group["lr"])
        if group["L"] is not None:
            return lr
        steepest = group["estimated_L"]
        return lr * torch.where(steepest > 0, 1 / (_MARGIN * steepest), group["first_step"])

    def _root(self, group: dict[str, Any], length: float | Tensor) -> float | Tensor:
        """√(mu / L), at most 1: with a rate above 1 / mu the step is that of gradient descent."""
        mu = group["mu"]
        if mu is not None and not isinstance(length, Tensor):
            return math.sqrt(min(max(float(mu) * length, 1e-30), 1.0))
        ratio = torch.as_tensor((group["estimated_mu"] if mu is None else float(mu)) * length)
        return ratio.clamp(_FLATTEST, 1.0).sqrt()

    @abstractmethod
    def _weights(
        self,
        group: dict[str, Any],
        root: float | Tensor,  # √(mu / L)
    ) -> _Weights:
        """The rule's weights for the step to come."""

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        buffers = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            buffers.append(state["momentum_buffer"])
        length = self._step_length(group)
        weights = self._weights(group, self._root(group, length))
        torch._foreach_mul_(buffers, weights.momentum)
        torch._foreach_add_(buffers, gradients)
        _subtract(parameters, gradients, length * weights.gradient)
        _subtract(parameters, buffers, length * weights.buffer)
        output = length * weights.output
        if isinstance(output, Tensor):
            group["output_weight"].copy_(output)
        else:
            group["output_weight"].fill_(output)


def _subtract(targets: list[Tensor], others: list[Tensor], factor: float | Tensor) -> None:
    """targets -= factor · others, each of the same shape."""
    if isinstance(factor, Tensor):
        torch._foreach_sub_(targets, torch._foreach_mul(others, factor))
    elif factor:
        torch._foreach_add_(targets, others, alpha=-factor)


@final
class NAG(_Accelerated):
    """Nesterov's accelerated gradient method.

    With x the output point, y the query point, which the parameters hold, and L = 1 / lr:

        x⁺ = y - ∇f(y) / L,    y⁺ = x⁺ + β (x⁺ - x)

    - ``rule="strongly-convex"``: β = (√L - √mu) / (√L + √mu), Nesterov's constant step scheme, and
      f(x_n) - f* ≤ (1 - √(mu / L))ⁿ (f(x_0) - f* + mu/2 ‖x_0 - x*‖²);
    - ``rule="convex"``, for mu = 0: β_k = (t_{k-1} - 1) / t_k, t_0 = 1, t_k = (1 + √(1 + 4 t_{k-1}²)) / 2, and
      f(x_n) - f* ≤ 2 L ‖x_0 - x*‖² / (n + 1)² (Beck and Teboulle, SIAM J. Imaging Sciences 2 (2009) 183-202).

    Rates hold for convex f whose L and mu are known, and at x: ``eval()`` puts it into the parameters,
    ``train()`` puts y back. ``step()`` in between is refused.

    Args:
        params: parameters, or groups of them.
        L: the largest curvature of f, above 0. Give it or ``lr``; without both it is estimated.
        mu: the smallest, above 0 and at most L; estimated where it is None. At mu = L this is gradient descent.
        lr: 1 / L, the groups' live entry: a schedule that lowers it raises the L that steps use, and β with it;
            above 1 / mu, steps are those of gradient descent. With an estimated L it counts in units of 1 / L,
            and is 1 by default.
        rule: ``"strongly-convex"``, or ``"convex"``, which takes no mu.
        maximize: maximise instead.

    Estimates come from the change of the gradient between measured steps, over all parameters together:
    mu ≤ ‖Δg‖ / ‖Δy‖ ≤ L. The largest ratio so far, times 1.3, is the estimate of L; the smallest, but at least
    L / 10⁶ and half the estimate before, that of mu. They need the same objective at every step: with sampled
    gradients give ``lr`` and ``mu``, else noise is taken for curvature, and steps or momentum nearly vanish.
    Without L the first step moves the parameters by 10⁻⁴ of their length. Estimates guarantee no rate.

    Memory: d numbers for b, 2 d more where something is estimated, d more between ``eval()`` and ``train()``.

    Raises:
        ValueError: L and lr contradict each other, mu is 0 or above L, ``rule="convex"`` has a mu, or L or mu
            would have to be estimated in a precision below float32.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = NAG([theta], L=100.0, mu=1.0)
    >>> for _ in range(100):
    ...     theta.grad = torch.tensor([1.0, 100.0]) * theta.detach()
    ...     optimizer.step()
    >>> optimizer.eval()
    >>> bool(theta.norm() < 1e-3)
    True
    >>> optimizer.train()
    """

    def __init__(
        self,
        params: ParamsT,
        L: float | None = None,
        mu: float | None = None,
        *,
        lr: float | None = None,
        rule: Literal["strongly-convex", "convex"] = "strongly-convex",
        maximize: bool = False,
    ) -> None:
        FreezingStepRule.__init__(self, params, {**_defaults(L, mu, lr, maximize), "rule": rule})

    def _check(self, group: dict[str, Any]) -> None:
        if group["rule"] not in ("strongly-convex", "convex"):
            raise ValueError(f"NAG: rule must be 'strongly-convex' or 'convex', got {shown(group['rule'])}")
        if group["rule"] == "convex" and group["mu"] is not None:
            raise ValueError(
                "NAG: rule='convex' is the one for mu = 0 and takes no mu, "
                f"got {shown(group['mu'])}; leave mu out, "
                "or take rule='strongly-convex'"
            )
        super()._check(group)

    def _is_estimated(self, group: dict[str, Any]) -> bool:
        return group["L"] is None or (group["mu"] is None and group["rule"] != "convex")

    def _weights(self, group: dict[str, Any], root: float | Tensor) -> _Weights:
        if group["rule"] == "convex":
            t, last = group["t"], group["momentum"].clone()
            following = (1 + (1 + 4 * t * t).sqrt()) / 2
            momentum = (t - 1) / following
            t.copy_(following)
            group["momentum"].copy_(momentum)
            return _Weights(momentum=last, gradient=1.0, buffer=momentum, output=momentum)
        momentum = (1 - root) / (1 + root)
        return _Weights(momentum=momentum, gradient=1.0, buffer=momentum, output=momentum)


@final
class TripleMomentum(_Accelerated):
    """The triple momentum method, whose guaranteed rate is the fastest known for smooth, strongly convex f.

    With ρ = 1 - √(mu / L), iterate ξ, query point y, which the parameters hold, and output point x
    (Van Scoy, Freeman and Lynch 2018):

        ξ⁺ = (1 + β) ξ - β ξ⁻ - α ∇f(y),    y = (1 + γ) ξ - γ ξ⁻,    x = (1 + δ) ξ - δ ξ⁻,
        α = (1 + ρ) / L,  β = ρ² / (2 - ρ),  γ = ρ² / ((1 + ρ) (2 - ρ)),  δ = ρ² / (1 - ρ²)

    and f(x_n) - f* ≤ ρ²ⁿ (L² / 2 mu) ‖x_0 - x*‖². That is the worst case, where Nesterov's method is proved to
    gain a factor of ρ a step; on a given problem either may take fewer steps.

    Args:
        params, L, mu, lr, maximize: as for ``NAG``, with its estimates, ``eval()`` and ``train()``.

    Raises:
        ValueError: L and lr contradict each other, or mu is 0 or above L.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = TripleMomentum([theta], L=100.0, mu=1.0)
    >>> for _ in range(100):
    ...     theta.grad = torch.tensor([1.0, 100.0]) * theta.detach()
    ...     optimizer.step()
    >>> optimizer.eval()
    >>> bool(theta.norm() < 1e-3)
    True
    """

    def _weights(self, group: dict[str, Any], root: float | Tensor) -> _Weights:
        # With ξ - ξ⁻ = -α b: b⁺ = β b + g and y⁺ - y = -α (1 + γ) b⁺ + γ α b. As γ b = (b⁺ - g) / (1 + ρ) and
        # α / (1 + ρ) = 1 / L, that is y⁺ = y - (g + ((1 + ρ) (1 + γ) - 1) b⁺) / L with (1 + ρ) (1 + γ) - 1 =
        # 2 ρ / (2 - ρ); and x - y = (γ - δ) α b = -ρ² / ((2 - ρ) (1 - ρ)) b / L.
        rho = 1 - root
        return _Weights(
            momentum=rho * rho / (2 - rho),
            gradient=1.0,
            buffer=2 * rho / (2 - rho),
            output=-rho * rho / ((2 - rho) * root),
        )


@final
class HeavyBall(_Accelerated):
    """Polyak's heavy ball, tuned for quadratic functions; without a guarantee on others.

        y⁺ = y - α ∇f(y) + β (y - y⁻),    α = 4 / (√L + √mu)²,    β = ((√L - √mu) / (√L + √mu))²

    It is the fastest of the three on quadratic functions, and may cycle on others: from 3.3, with f' = 25 y
    below 1, y + 24 up to 2 and 25 y - 24 above, it cycles among three points for ever (Lessard, Recht and
    Packard, SIAM J. Optimization 26 (2016) 57-95). Query and output point are the same.

    Args:
        params, L, mu, lr, maximize: as for ``NAG``, with its estimates; the step, α, is up to 4 ``lr``.

    Raises:
        ValueError: L and lr contradict each other, or mu is 0 or above L.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = HeavyBall([theta], L=100.0, mu=1.0)
    >>> for _ in range(100):
    ...     theta.grad = torch.tensor([1.0, 100.0]) * theta.detach()
    ...     optimizer.step()
    >>> bool(theta.norm() < 1e-3)
    True
    """

    def _weights(self, group: dict[str, Any], root: float | Tensor) -> _Weights:
        shrinking = (1 - root) / (1 + root)
        return _Weights(
            momentum=shrinking * shrinking, gradient=0.0, buffer=4 / ((1 + root) * (1 + root)), output=0.0
        )
