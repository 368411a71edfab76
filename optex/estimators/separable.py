"""The paper's estimator: one Gaussian process for every component of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

from optex.estimators.history import GradientHistory, Locations
from optex.estimators.interface import Estimator, Posterior
from optex.estimators.kernels import Kernel, Matern52, kernel_named
from optex.estimators.noise import relative_noise
from optex.linalg import combine_rows, jittered_cholesky, one_thread

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
        noise_variance: σ² in units of the kernel's variance (the prior variance of a component), where the
            history does not tell the gradients' noise; or ``"leave-one-out"``.
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
                f"SeparableEstimator: prior_mean must be 'zero', 'last' or 'gls', got {self.prior_mean!r}"
            )

    @property
    def assumed_noise_variance(self) -> float:
        return 0.0 if isinstance(self.noise_variance, str) else self.noise_variance

    def fit(self, history: GradientHistory) -> SeparablePosterior:
        squared = history.pairwise_squared_distances()
        unit = history.median_squared_distance().sqrt().nan_to_num(nan=1.0)
        lengthscales = self._lengthscales(unit)
        noises = self._noise_variances(unit)
        best = 0
        if len(lengthscales) * len(noises) > 1:
            candidates = [(s, n) for s in lengthscales for n in noises]
            best = int(self._leave_one_out_errors(history, squared, candidates).argmin())
        lengthscale, noise = lengthscales[best // len(noises)], noises[best % len(noises)]
        return SeparablePosterior(self, history, squared, lengthscale, noise)

    def _lengthscales(self, unit: Tensor) -> list[Tensor]:
        if self.lengthscale == "median":
            return [unit]
        if self.lengthscale == "leave-one-out":
            return [factor * unit for factor in LENGTHSCALE_FACTORS]
        return [torch.full_like(unit, float(self.lengthscale))]

    def _noise_variances(self, unit: Tensor) -> list[Tensor]:
        values = NOISE_VARIANCES if self.noise_variance == "leave-one-out" else (float(self.noise_variance),)
        return [torch.full_like(unit, value) for value in values]

    def _leave_one_out_errors(
        self,
        history: GradientHistory,
        squared: Tensor,  # [T0, T0]
        candidates: Sequence[tuple[Tensor, Tensor]],  # (lengthscale, noise variance)
    ) -> Tensor:  # [candidates]
        """Sum over the history of ‖g_i - μ_{-i}(θ_i)‖², each from T0 × T0 matrices alone.

        The residual of pair i predicted from the others is [B G]_i / B_ii with B = A⁻¹ for a known mean and
        B = A⁻¹ - A⁻¹1 (1ᵀA⁻¹1)⁻¹ 1ᵀA⁻¹ for the generalised least-squares mean, so its squared norm is
        [B S B]_ii / B_ii² with S = G Gᵀ (centred where the mean is the last gradient).
        """
        active = history.active.to(torch.float64)
        matrices = torch.stack([self.covariance(history, squared, *c) for c in candidates])
        factors, info = torch.linalg.cholesky_ex(matrices)
        identity = torch.eye(history.size, dtype=torch.float64, device=squared.device)
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
        squared: Tensor,  # [T0, T0]
        lengthscale: Tensor,  # []
        noise_variance: Tensor,  # []
    ) -> Tensor:  # [T0, T0]
        """A = K + noise on the slots that stand for an iterate, the identity on the others."""
        active, slots = history.active, history.representatives
        both = active[:, None] & active
        covariance = torch.where(both, self._kernel.value(squared, lengthscale), torch.zeros_like(squared))
        noise = torch.ones_like(history.counts)
        noise[slots] = relative_noise(history, slots, covariance[slots][:, slots], noise_variance)
        return covariance + torch.diag(noise)

    @property
    def _kernel(self) -> Kernel:
        return kernel_named(self.kernel)


def _check_setting(name: str, value: float | str, words: tuple[str, ...], *, zero_allowed: bool) -> None:
    if isinstance(value, str):
        if value in words:
            return
    elif value > 0 or (zero_allowed and value == 0):
        return
    bound = "not negative" if zero_allowed else "positive"
    raise ValueError(
        f"SeparableEstimator: {name} must be a number ({bound}) or one of {', '.join(map(repr, words))}, "
        f"got {value!r}"
    )


class SeparablePosterior(Posterior):
    """``SeparableEstimator`` fitted to a history.

    Every prediction is a combination of the stored gradients, ``μ(θ) = coefficients(θ)ᵀ G``.
    """

    def __init__(
        self,
        estimator: SeparableEstimator,
        history: GradientHistory,
        squared: Tensor,  # [T0, T0]
        lengthscale: Tensor,  # []
        noise_variance: Tensor,  # []
    ) -> None:
        super().__init__(history)
        self.lengthscale = lengthscale
        self.noise_variance = noise_variance
        self._kernel = kernel_named(estimator.kernel)
        self._active = history.active.to(torch.float64)
        self._factor = jittered_cholesky(estimator.covariance(history, squared, lengthscale, noise_variance))
        self._ones = self._solve(self._active)  # A⁻¹ 1
        self._mean_is_estimated = estimator.prior_mean == "gls"
        self._mean_coefficients = torch.zeros_like(self._active)  # m = cᵀ G
        if estimator.prior_mean == "last":
            self._mean_coefficients[history.newest] = 1.0
        elif estimator.prior_mean == "gls":
            self._mean_coefficients = history.averaging.mT @ (self._ones / self._ones.sum())

    def _solve(
        self,
        right: Tensor,  # [T0] or [T0, n]
    ) -> Tensor:  # of that shape
        columns = right if right.ndim == 2 else right[:, None]
        solution = torch.cholesky_solve(columns, self._factor) * self._active[:, None]
        return solution if right.ndim == 2 else solution[:, 0]

    def _covariances(self, locations: Locations) -> Tensor:  # [n, T0]
        return self._kernel.value(locations.squared_distances, self.lengthscale) * self._active

    def coefficients(self, locations: Locations) -> Tensor:  # [n, T0] float64
        """The weights of the stored gradients in the predictions."""
        covariances = self._covariances(locations)
        with one_thread():
            weights = self._solve(covariances.mT).mT
            missing = 1 - weights.sum(1, keepdim=True)
            return weights @ self.history.averaging + missing * self._mean_coefficients

    def means(self, locations: Locations) -> Tensor:
        return self._combine(self.coefficients(locations), locations)

    def differences(self, locations: Locations, origins: Locations) -> Tensor:
        return self._combine(self.coefficients(locations) - self.coefficients(origins), locations)

    def _combine(
        self,
        coefficients: Tensor,  # [n, T0]
        locations: Locations,
    ) -> Tensor:  # [n, d]
        points = locations.points
        return combine_rows(coefficients, self.history.gradients).to(points.device, points.dtype)

    def variance(self, point: Tensor) -> Tensor:
        covariances = self._covariances(self.locate(point[None]))[0]
        weights = self._solve(covariances)
        variance = 1 - covariances @ weights
        if self._mean_is_estimated:
            variance = variance + (1 - weights.sum()) ** 2 / self._ones.sum()
        return variance.clamp_min(0)
