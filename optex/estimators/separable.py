"""The paper's estimator: one Gaussian process for every component of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Final, Literal

import torch
from torch import Tensor

from optex import small
from optex.checks import as_float, shown
from optex.estimators.history import GradientHistory, Locations
from optex.estimators.interface import Coefficients, Estimator, Posterior
from optex.estimators.kernels import Kernel, Matern52, kernel_named
from optex.estimators.noise import relative_noise
from optex.small import Array, array, tensor

__all__ = ["SeparableEstimator", "SeparablePosterior"]

PriorMean = Literal["zero", "last", "gls"]
LENGTHSCALE_FACTORS: Final = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
NOISE_VARIANCES: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class SeparableEstimator(Estimator):
    """Gaussian process ``∇F ~ GP(m, k(·,·) I)``: paper, section 4.1 and Proposition 4.1.

    With K_ij = k(θ_i, θ_j), k(θ)_j = k(θ, θ_j) and the gradients as rows of G,

        μ(θ) = m + k(θ)ᵀ (K + σ² I)⁻¹ (G - 1 mᵀ)
        Σ(θ) = [k(θ, θ) - k(θ)ᵀ (K + σ² I)⁻¹ k(θ)] I

    One T0 × T0 solve in float64 whatever d is; a prediction reads the history twice.

    Args:
        kernel: a :class:`~optex.estimators.kernels.Kernel` or the name of one.
        lengthscale: in units of the iterates; ``"median"`` of the distances in the history; or
            ``"leave-one-out"``, the multiple of that median with the least closed-form leave-one-out error.
        noise_variance: σ² in units of the kernel's variance (the prior variance of a component), used where the
            history does not know the gradients' noise, and else a floor; or ``"leave-one-out"``.
        prior_mean: m. ``"zero"`` (the paper), ``"last"`` (the newest gradient) or ``"gls"`` (the
            generalised least-squares mean ``(1ᵀA⁻¹1)⁻¹ 1ᵀA⁻¹G``, A = K + σ²I, whose own uncertainty
            enters the variance: universal kriging).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Sources: Shu et al., NeurIPS 2024, Proposition 4.1; Dubrule, *Cross validation of kriging in a unique
    neighborhood*, 1983, for the leave-one-out residuals.

    >>> import torch
    >>> from optex import GradientHistory
    >>> history = GradientHistory(4, 2)
    >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> history.append(points, 2 * points)            # ∇F of ‖θ‖²
    >>> posterior = SeparableEstimator("rbf", lengthscale=2.0, noise_variance=1e-8).fit(history)
    >>> posterior.mean(torch.tensor([0.9, 0.1], dtype=torch.float64)).round(decimals=2)
    tensor([1.8200, 0.1800], dtype=torch.float64)
    """

    kernel: Kernel | str = field(default_factory=Matern52)
    lengthscale: float | Literal["median", "leave-one-out"] = "median"
    noise_variance: float | Literal["leave-one-out"] = 1e-6
    prior_mean: PriorMean = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", kernel_named(self.kernel))
        _check_setting("lengthscale", self.lengthscale, ("median", "leave-one-out"), zero_allowed=False)
        _check_setting("noise_variance", self.noise_variance, ("leave-one-out",), zero_allowed=True)
        if self.prior_mean not in ("zero", "last", "gls"):
            raise ValueError(
                f"SeparableEstimator: prior_mean must be 'zero', 'last' or 'gls', got {shown(self.prior_mean)}"
            )

    @property
    def assumed_noise_variance(self) -> float:
        return 0.0 if isinstance(self.noise_variance, str) else self.noise_variance

    def fit(self, history: GradientHistory) -> SeparablePosterior:
        unit = history.median_distance
        lengthscales = self._lengthscales(unit)
        noises = NOISE_VARIANCES if self.noise_variance == "leave-one-out" else (float(self.noise_variance),)
        best = 0
        if len(lengthscales) * len(noises) > 1:
            candidates = [(s, n) for s in lengthscales for n in noises]
            best = int(self._leave_one_out_errors(history, candidates).argmin())
        lengthscale, noise = lengthscales[best // len(noises)], noises[best % len(noises)]
        return SeparablePosterior(self, history, lengthscale, noise)

    def _lengthscales(self, unit: Array) -> list[Array]:
        if self.lengthscale == "median":
            return [unit]
        if self.lengthscale == "leave-one-out":
            return [factor * unit for factor in LENGTHSCALE_FACTORS]
        return [0 * unit + float(self.lengthscale)]

    def _leave_one_out_errors(
        self,
        history: GradientHistory,
        candidates: Sequence[tuple[Array, float]],  # (lengthscale, noise variance)
    ) -> Tensor:  # [candidates]
        """Sum over the history of ‖g_i - μ_{-i}(θ_i)‖², each from T0 × T0 matrices alone.

        The residual of pair i predicted from the others is [B G]_i / B_ii with B = A⁻¹ for a known mean and
        B = A⁻¹ - A⁻¹1 (1ᵀA⁻¹1)⁻¹ 1ᵀA⁻¹ for the generalised least-squares mean, so its squared norm is
        [B S B]_ii / B_ii² with S = G Gᵀ (centred where the mean is the last gradient).
        """
        active = history.active.to(torch.float64)
        matrices = torch.stack([tensor(self.covariance(history, *candidate)) for candidate in candidates])
        factors, info = torch.linalg.cholesky_ex(matrices)
        identity = torch.eye(history.size, dtype=torch.float64, device=matrices.device)
        inverse = torch.cholesky_solve(identity.expand_as(matrices), factors)
        centring = history.averaging.clone()
        if self.prior_mean == "last":
            centring[:, history.newest] -= active
        gram = centring @ history.gradient_gram @ centring.mT
        if self.prior_mean == "gls":
            ones = inverse @ active
            inverse = inverse - ones[:, :, None] * ones[:, None] / (ones @ active)[:, None, None]
        residual = (inverse @ gram @ inverse).diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2) ** 2
        errors = torch.where(history.active, residual, torch.zeros_like(residual)).sum(1)
        return torch.where((info == 0) & errors.isfinite(), errors, torch.inf)

    def covariance(
        self,
        history: GradientHistory,
        lengthscale: Array,  # []
        noise_variance: float,
    ) -> Array:  # [T0, T0]
        """A = K + noise on the slots that stand for an iterate, the identity on the others."""
        slots = history.representatives
        active = array(history.counts) > 0
        both = active[:, None] & active
        values = kernel_named(self.kernel).value(history.squared_distances, lengthscale)
        covariance = small.where(both, values, 0 * values)
        noise = small.full(history.size, 1.0, covariance)
        noise[slots] = relative_noise(history, slots, small.select(covariance, slots), noise_variance)
        return small.plus_diagonal(covariance, noise)


def _check_setting(name: str, value: float | str, words: tuple[str, ...], *, zero_allowed: bool) -> None:
    if isinstance(value, str):
        if value in words:
            return
    else:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else as_float(value)
        if 0 < number < math.inf or (zero_allowed and number == 0):
            return
    bound = "not negative" if zero_allowed else "positive"
    raise ValueError(
        f"SeparableEstimator: {name} must be a number ({bound}) or one of {', '.join(map(repr, words))}, "
        f"got {shown(value)}"
    )


class SeparablePosterior(Posterior):
    """``SeparableEstimator`` fitted to a history.

    Every prediction is a combination of the stored gradients, ``μ(θ) = coefficients(θ)ᵀ G``.
    """

    def __init__(
        self,
        estimator: SeparableEstimator,
        history: GradientHistory,
        lengthscale: Array,  # []
        noise_variance: float,
    ) -> None:
        super().__init__(history)
        self.lengthscale = lengthscale
        self.noise_variance = noise_variance
        self._kernel = kernel_named(estimator.kernel)
        counts = array(history.counts)
        self._active = small.where(counts > 0, 0 * counts + 1, 0 * counts)
        self._averaging = array(history.averaging)
        self._factor = small.jittered_cholesky(estimator.covariance(history, lengthscale, noise_variance))
        self._ones = self._solve(self._active)  # A⁻¹ 1
        self._mean_is_estimated = estimator.prior_mean == "gls"
        self._mean_is_zero = estimator.prior_mean == "zero"
        self._mean_coefficients = 0 * counts  # m = cᵀ G
        if estimator.prior_mean == "last":
            self._mean_coefficients[history.newest] = 1.0
        elif estimator.prior_mean == "gls":
            self._mean_coefficients = self._averaging.T @ (self._ones / self._ones.sum())

    def _solve(
        self,
        right: Array,  # [T0] or [T0, n]
    ) -> Array:  # of that shape
        mask = self._active if right.ndim == 1 else self._active[:, None]
        return small.cholesky_solve(right, self._factor) * mask

    def _covariances(self, locations: Locations) -> Array:  # [n, T0]
        return self._kernel.value(locations.squared_distances, self.lengthscale) * self._active

    def coefficients(self, locations: Locations) -> Coefficients:
        weights = self._solve(self._covariances(locations).T).T
        missing = 1 - weights.sum(1)[:, None]
        return Coefficients(weights @ self._averaging + missing * self._mean_coefficients)

    def variance(self, point: Tensor) -> Tensor:
        covariances = self._covariances(self.locate(point[None]))[0]
        weights = self._solve(covariances)
        variance = 1 - covariances @ weights
        if self._mean_is_estimated:
            variance = variance + (1 - weights.sum()) ** 2 / self._ones.sum()
        return tensor(small.nonnegative(variance))

    def prior_variance(self) -> Tensor:
        # Σ_c y_cᵀ A⁻¹ y_c is the trace of A⁻¹ Y Yᵀ, Y = centring @ G
        centring = self._averaging - self._active[:, None] * self._mean_coefficients
        gram = centring @ array(self.history.gradient_gram) @ centring.T
        freedom = len(self.history.representatives) - (not self._mean_is_zero)
        return self._per_component(self._solve(gram).diagonal().sum(), freedom)
