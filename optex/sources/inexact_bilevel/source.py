"""Hypergradients of given accuracy, as a source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from optex.checks import check_flag, check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.sources.inexact_bilevel.implicit import Hypergradient, hypergradient
from optex.sources.inexact_bilevel.levels import SmoothBilevel
from optex.sources.inexact_bilevel.lower import LowerSolution, solve_lower
from optex.sources.interface import GradientSource

__all__ = ["InexactBilevelSource"]


class InexactBilevelSource(GradientSource):
    """The hypergradient of min g(x̂(θ)) from a lower solve within ε and a linear solve within δ.

    A(x) q = ∇g(x), z = -B(x)ᵀ q (section 3 of the paper; ``hypergradient`` has the bound ω). Every answer
    starts its lower solve at ``start``, which only ``accept()`` moves, so answers do not depend on the order
    they are asked in. Deterministic. With ``tell_noise`` ω²/d is reported as the noise variance: the largest
    mean square that the error can have. The error is a bias, and its bound is often far above it; so by
    default no noise is reported, and the estimators interpolate.

    Args:
        problem: the two levels.
        parameters: θ, leaf tensors, as ``lower`` gets them.
        epsilon, delta: accuracies, > 0. The paper begins at 0.1 and adapts them; fixed ones should be smaller.
        max_iterations: of either solve, at least 1.
        tell_noise: report ω²/d as the noise variance.

    Attributes:
        evaluations: gradients of h and products with its Hessian that the last answer took, 1 before the first.
        last: the last answer's ``Hypergradient``.

    Raises:
        TypeError, ValueError: an argument cannot work.
        LowerLevelError: at evaluation: a singular or indefinite Hessian, or one beneath μ; no convergence.
        NonFiniteError: at evaluation: a loss or gradient that is not finite.

    Source: arXiv 2308.10098, theorem on the error of inexact hypergradients; the factor L_g is kept in ω.

    >>> import torch, optex
    >>> theta = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    >>> target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    >>> problem = optex.SmoothBilevel(
    ...     lower=lambda x, theta: (x - theta).square().sum(),          # x̂ = θ
    ...     upper=lambda x: (x - target).square().sum() / 2,
    ...     start=torch.zeros(2, dtype=torch.float64), strong_convexity=2.0, upper_lipschitz=1.0)
    >>> source = optex.InexactBilevelSource(problem, [theta])
    >>> optimizer = optex.OptEx(torch.optim.SGD([theta], lr=0.5), parallelism=2)
    >>> for report in optimizer.rounds([None] * 20, source): pass
    >>> theta.detach().round(decimals=2)
    tensor([ 1., -2.], dtype=torch.float64)
    """

    deterministic = True

    def __init__(
        self,
        problem: SmoothBilevel,
        parameters: Sequence[Tensor],
        *,
        epsilon: float = 1e-3,
        delta: float = 1e-3,
        max_iterations: int = 2000,
        tell_noise: bool = False,
    ) -> None:
        if not isinstance(problem, SmoothBilevel):
            raise TypeError(f"InexactBilevelSource: problem must be a SmoothBilevel, got {shown(problem)}")
        given = [parameters] if isinstance(parameters, Tensor) else parameters
        if not isinstance(given, Iterable):
            raise TypeError(
                f"InexactBilevelSource: parameters must be a list of tensors, got {type(parameters).__name__}"
            )
        self.parameters: list[Tensor] = list(given)
        if not self.parameters or not all(isinstance(p, Tensor) and p.is_leaf for p in self.parameters):
            came = ", ".join(type(p).__name__ for p in self.parameters) or "none"
            raise ValueError(
                f"InexactBilevelSource: parameters must be leaf tensors, at least one, got {came}; "
                "detach() makes a leaf of a tensor that was computed"
            )
        self.problem = problem
        self.epsilon: float = check_number("InexactBilevelSource", "epsilon", epsilon, open_below=True)
        self.delta: float = check_number("InexactBilevelSource", "delta", delta, open_below=True)
        self.max_iterations: int = check_integer("InexactBilevelSource", "max_iterations", max_iterations)
        self.tell_noise: bool = check_flag("InexactBilevelSource", "tell_noise", tell_noise)
        self.start: Tensor = problem.start.detach().clone()
        self.evaluations: float = 1.0
        self.last: Hypergradient | None = None

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        solution = self._solved()
        found = hypergradient(
            self.problem, self.parameters, solution, self.epsilon, self.delta, self.max_iterations
        )
        for parameter, part in zip(self.parameters, found.gradient, strict=True):
            parameter.grad = part
        self.last, self.evaluations = found, float(solution.iterations + found.products + 1)
        if not self.tell_noise:
            return found.loss, None
        dimension = sum(p.numel() for p in self.parameters)
        return found.loss, found.loss.new_tensor(found.error_bound**2 / dimension)

    def accept(self) -> None:
        """Start lower solves at the solution for the present parameters from now on; call it between rounds.

        Answers change within ε. ``start`` is then part of a run's state: save it beside the optimizer's.
        """
        self.start = self._solved().x.detach().clone()

    def replica(self) -> tuple[GradientSource, list[Tensor]]:
        twins = [p.detach().clone().requires_grad_() for p in self.parameters]
        other = InexactBilevelSource(
            self.problem,
            twins,
            epsilon=self.epsilon,
            delta=self.delta,
            max_iterations=self.max_iterations,
            tell_noise=self.tell_noise,
        )
        other.start = self.start
        return other, twins

    def _solved(self) -> LowerSolution:
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise NonFiniteError(
                "InexactBilevelSource: a parameter is not finite; lower the outer learning rate"
            )
        return solve_lower(self.problem, self.parameters, self.start, self.epsilon, self.max_iterations)
