"""Gradients without derivatives: from where the consensus of samples around a point lies.

Riedl, Klock, Geldhauser, Fornasier: *Gradient is All You Need? How Consensus-Based Optimization can be
Interpreted as a Stochastic Relaxation of Gradient Descent*, arXiv 2306.09778.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from optex.checks import check_flag, check_integer, check_parameters, check_positive
from optex.errors import NonFiniteError
from optex.sources.interface import GradientSource, scalar_loss

__all__ = ["Consensus", "ConsensusSource", "values_of"]

# With a smaller effective size the delta method reports less than half of the noise variance, as measured in
# benchmarks/papers/consensus.py.
_TRUSTED: Final = 20.0


@dataclass(frozen=True)
class Consensus:
    """How N samples of energies E_i agree: weights ``w_i = exp(-α E_i) / Σ_j exp(-α E_j)``.

    Attributes:
        weights: [N] float64, summing to 1; 0 where the energy is NaN or infinite.
        effective_sample_size: ``1 / Σ w_i²``, between 1 (one sample decides alone) and N (all count alike).
        soft_minimum: [] float64, ``-log(mean exp(-α E_i)) / α``, between the energies' minimum and their mean.
    """

    weights: Tensor
    effective_sample_size: float
    soft_minimum: Tensor

    @classmethod
    def of(
        cls,
        energies: Tensor,  # [N]
        alpha: float,
        owner: str,
    ) -> Consensus:
        """The consensus of samples with these energies.

        Args:
            energies: the objective at each sample; a sample with NaN or +inf gets no weight.
            alpha: α of the weights, positive.
            owner: the class that error messages name.

        Raises:
            NonFiniteError: no energy is a number, or one is minus infinity.
        """
        values = energies.detach().to(torch.float64)
        usable = values < math.inf
        if not bool(usable.any()):
            raise NonFiniteError(
                f"{owner}: the objective is NaN or infinite at all {len(values)} samples; start where it is "
                "defined, or draw samples closer by (a smaller sigma or spread)"
            )
        least = values[usable].min()
        if not bool(least.isfinite()):
            raise NonFiniteError(f"{owner}: the objective is minus infinity at a sample; it has no minimum")
        exponents = torch.where(usable, -alpha * (values - least), -math.inf)
        total = torch.logsumexp(exponents, 0)
        weights = (exponents - total).exp()
        soft_minimum = least - (total - math.log(len(values))) / alpha
        return cls(weights, float(1 / weights.square().sum()), soft_minimum)

    def mean(
        self,
        rows: Tensor,  # [N, d]
    ) -> Tensor:  # [d]
        """The weighted mean; rows without weight may hold anything."""
        counted = self.weights > 0
        return self.weights[counted].to(rows.dtype) @ rows[counted]


class ConsensusSource(GradientSource):
    """The gradient estimated from the consensus, a weighted mean, of N samples drawn around the point.

    With V_i ~ N(x, σ² I) and the consensus c = Σ w_i V_i, w_i ∝ exp(-α E(V_i)),

        ĝ(x) = (x - c) / (α σ²)  →  ∇E_α(x),   E_α(x) = -log(E_V exp(-α E(V))) / α     for N → ∞

    E_α is the soft minimum of E around x: E itself for small σ, blind to ripples narrower than σ for a larger
    one. For a quadratic E with Hessian A, ĝ → (I + τ A)⁻¹ ∇E(x), τ = α σ²: the gradient at the end of a
    proximal step. ``SGD(lr=source.hopping_rate)`` on it is the paper's consensus hopping, x ← c. Only values of
    E are used: it need be neither smooth nor written in torch, and any first-order optimizer runs on it.

    Args:
        objective: ``objective(batch)``, the loss at the parameters' present values, which are set to each
            sample in turn; with ``vectorized`` instead ``objective(points, batch)``, losses [N] at points
            [N, d], the parameters flattened one after the other. It is called without autograd. A sample where
            it is NaN or infinite has no weight.
        parameters: those that are optimised, d numbers in all.
        samples: N, at least 2.
        alpha: α, positive, in units of one over the objective's.
        sigma: σ, positive: in the parameters' units; how far around x the objective is looked at.
        antithetic: samples come in pairs x ± σ ξ, whose noise cancels where both weigh alike; N is then even.
        vectorized: the objective takes all points at once, as above.

    Attributes:
        effective_sample_size: of the last gradient that was computed in this process, ``1 / Σ w_i²``; None
            before. About ``N exp(-(α σ ‖∇E‖)²)``; near 1 one sample decides, and ĝ is mostly noise and bias:
            lower alpha or sigma.

    The loss that it answers is the sampled soft minimum, whose gradient ĝ estimates. The noise variance is the
    delta method's, ``Σ w_i² ‖V_i - c‖² / (d τ²)``, times n / (n - 1) of the effective size n; None below
    n = 20, where that is not to be trusted. The bias of ĝ against ∇E_α, of order 1 / n, is not in it.

    Memory: ``2 · N · d`` numbers. It draws from torch's global generator, so workers have to be processes.

    Raises:
        TypeError, ValueError: an argument cannot work, the objective answers in a form that cannot, or sigma is
            lost in the rounding of the parameters.
        NonFiniteError: the parameters are not finite, or the objective is NaN or infinite at all samples.

    Source: Riedl, Klock, Geldhauser, Fornasier, arXiv 2306.09778: consensus hopping, and its link to gradient
    descent; the defaults are those of its figure.

    >>> import torch, optex
    >>> x = torch.nn.Parameter(torch.tensor([8.0, 8.0]))
    >>> def rippled(points, batch):                                    # [N, 2] -> [N], least at 0
    ...     return (points**2 + 2.5 * (1 - torch.cos(2 * torch.pi * points))).sum(1)
    >>> source = optex.ConsensusSource(rippled, [x], samples=400, alpha=1.0, vectorized=True)
    >>> optimizer = optex.OptEx(torch.optim.SGD([x], lr=0.2), parallelism=4)
    >>> _ = torch.manual_seed(0)
    >>> for report in optimizer.rounds([None] * 80, source):
    ...     pass
    >>> bool((x.abs() < 0.5).all()), 1 < source.effective_sample_size < 400
    (True, True)
    """

    def __init__(
        self,
        objective: Callable[..., Any],
        parameters: Iterable[Tensor],
        *,
        samples: int = 200,
        alpha: float = 100.0,
        sigma: float = 0.7,
        antithetic: bool = False,
        vectorized: bool = False,
    ) -> None:
        owner = "ConsensusSource"
        if not callable(objective):
            raise TypeError(f"{owner}: objective must be callable, got {type(objective).__name__}")
        self.objective = objective
        self.parameters: list[Tensor] = check_parameters(owner, parameters)
        self.samples: int = check_integer(owner, "samples", samples, least=2)
        self.alpha: float = check_positive(owner, "alpha", alpha)
        self.sigma: float = check_positive(owner, "sigma", sigma)
        self.antithetic: bool = check_flag(owner, "antithetic", antithetic)
        self.vectorized: bool = check_flag(owner, "vectorized", vectorized)
        if antithetic and self.samples % 2:
            raise ValueError(
                f"{owner}: samples must be even with antithetic=True, got {samples}; they are pairs"
            )
        self.evaluations: float = float(self.samples)
        self.module: nn.Module | None = (
            objective if isinstance(objective, nn.Module) and not vectorized else None
        )
        self.effective_sample_size: float | None = None

    @property
    def hopping_rate(self) -> float:
        """τ = α σ²: the rate at which SGD steps onto the consensus."""
        return self.alpha * self.sigma**2

    @torch.no_grad()
    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        if not bool(x.isfinite().all()):
            raise NonFiniteError(
                "ConsensusSource: the parameters are not finite; no samples can be drawn around them"
            )
        points, displacements = self._draw(x)
        values = self._in_one_call if self.vectorized else self._one_by_one
        energies = values(points, batch).to(x.device)
        # A sample that overflowed must not draw the consensus to infinity, whatever the objective says of it.
        energies = torch.where(points.isfinite().all(1), energies, math.nan)
        consensus = Consensus.of(energies, self.alpha, "ConsensusSource")
        shift = consensus.mean(displacements)
        gradient = -shift / self.hopping_rate
        pieces = gradient.split([p.numel() for p in self.parameters])
        for p, piece in zip(self.parameters, pieces, strict=True):
            p.grad = piece.reshape(p.shape).to(p.dtype, copy=True)
        self.effective_sample_size = consensus.effective_sample_size
        return consensus.soft_minimum, self._noise_variance(consensus.weights, displacements - shift)

    def _draw(
        self,
        x: Tensor,  # [d]
    ) -> tuple[Tensor, Tensor]:  # [N, d] of x's kind, [N, d] of float32 at least
        kind = torch.promote_types(x.dtype, torch.float32)
        count = self.samples // 2 if self.antithetic else self.samples
        noise = torch.randn(count, len(x), dtype=kind, device=x.device)
        if self.antithetic:
            noise = torch.cat([noise, -noise])
        points = (x.to(kind) + self.sigma * noise).to(x.dtype)
        # What was evaluated counts, not what was meant: in low precision the two differ.
        displacements = points.to(kind) - x.to(kind)
        if not bool(displacements.any()):
            raise ValueError(
                f"ConsensusSource: sigma = {self.sigma:g} is lost in the rounding of parameters of {x.dtype}, "
                f"the largest {float(x.abs().max()):g}; take a larger sigma, or parameters of more digits"
            )
        return points, displacements

    def _in_one_call(
        self,
        points: Tensor,  # [N, d]
        batch: Any,
    ) -> Tensor:  # [N]
        return values_of(self.objective(points.clone(), batch), len(points), "ConsensusSource: objective")

    def _one_by_one(
        self,
        points: Tensor,  # [N, d]
        batch: Any,
    ) -> Tensor:  # [N]
        before = [p.detach().clone() for p in self.parameters]
        sizes = [p.numel() for p in self.parameters]
        values = []
        try:
            for point in points:
                for p, piece in zip(self.parameters, point.split(sizes), strict=True):
                    p.copy_(piece.reshape(p.shape))
                values.append(scalar_loss(self.objective(batch), "objective").detach().to(torch.float64))
        finally:
            for p, value in zip(self.parameters, before, strict=True):
                p.copy_(value)
        return torch.stack(values)

    def _noise_variance(
        self,
        weights: Tensor,  # [N]
        centred: Tensor,  # [N, d], V_i - c
    ) -> Tensor | None:  # []
        # c = Σ w_i V_i / Σ w_i is a ratio of means over independent draws; its variance is about that of its
        # linear part, a term w_i (V_i - c) a draw. The two of a pair are one draw.
        influences = torch.where(weights[:, None] > 0, weights[:, None] * centred, 0.0)
        if self.antithetic:
            influences = torch.stack(influences.chunk(2)).sum(0)
            weights = torch.stack(weights.chunk(2)).sum(0)
        size = float(1 / weights.square().sum())
        if size < _TRUSTED:
            return None
        variance = influences.square().sum() / (centred.shape[1] * self.hopping_rate**2)
        return variance * (size / (size - 1))


def values_of(answer: Any, count: int, owner: str) -> Tensor:  # [count] float64
    """The answer of a function of ``count`` points as float64, one number a point.

    Raises:
        TypeError, ValueError: it is not one real number a point.
    """
    try:
        values = answer.detach() if isinstance(answer, Tensor) else torch.as_tensor(answer)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{owner} must return one real number a point, got {type(answer).__name__}: {error}"
        ) from error
    if values.is_complex():
        raise TypeError(f"{owner} must return real numbers, got {values.dtype}")
    if values.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"{owner} must return one number for each of {count} points, got shape {tuple(values.shape)}; with "
            "vectorized=True it gets points [N, d] and returns [N]"
        )
    return values.reshape(count).to(torch.float64)
