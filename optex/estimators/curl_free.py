"""A Gaussian process on the objective itself: its gradients are curl-free and know of each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

from optex.estimators.history import GradientHistory, Locations
from optex.estimators.interface import Estimator, Posterior
from optex.estimators.kernels import Kernel, Matern52, kernel_named
from optex.estimators.noise import relative_noise
from optex.linalg import combine_rows, conjugate_gradients, jittered_cholesky, one_thread

__all__ = ["CurlFreeEstimator", "CurlFreePosterior"]

NOISE_FLOOR: Final = 4.0
DENSE_LIMIT: Final = 1200  # unknowns up to which the system in the span is factorised


@dataclass(frozen=True)
class CurlFreeEstimator(Estimator):
    """Gaussian process on F with covariance φ(r²), seen through its gradients.

    With δ = θ - θ', the gradients have covariance

        K(θ, θ') = -2 φ'(r²) I - 4 φ''(r²) δ δᵀ,    here in units of -2 φ'(0).

    Where the separable process treats the coordinates as unrelated, this one knows that a gradient field
    has a symmetric derivative: a change seen along one direction says something of others.

    The second term acts in the span of the displacements alone, whose dimension is less than T0; across it
    K is the separable -2 φ' I. Solving the two parts apart is exact and never forms a d × d matrix: one
    T0 × T0 solve, and one with at most T0² unknowns in coordinates of the span, by Cholesky or, beyond
    1,200 unknowns, by conjugate gradients on the structured product, O(T0² · rank) each.

    Args:
        kernel: φ, a :class:`~optex.estimators.kernels.Kernel` or the name of one; twice differentiable at 0
            (not Matérn 1/2 and 3/2).
        lengthscale: in units of the iterates; None for ``median_multiple`` times the median distance in
            the history.
        median_multiple: that factor.
        noise_variance: σ², in units of the prior variance of a gradient component, where the history does not
            tell the gradients' noise; at least
            ``NOISE_FLOOR`` units in the last place of the history's dtype, which its distances cannot resolve.
        prior_mean: ``"last"`` (the newest gradient, so that what is predicted is the change from it),
            ``"gls"`` (the generalised least-squares mean of the history) or ``"zero"``. Where the history tells
            the gradients' noise, ``"last"`` is ``"gls"``: the newest gradient would bring its noise with it.
        solver: ``"dense"``, ``"cg"``, or ``"auto"`` by size.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: de Roos, Gessner, Hennig, *High-dimensional Gaussian process inference with derivatives*,
    ICML 2021.

    >>> import torch
    >>> from optex import GradientHistory
    >>> history = GradientHistory(4, 2)
    >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> history.append(points, 2 * points)            # ∇F of ‖θ‖²
    >>> posterior = CurlFreeEstimator(lengthscale=50.0).fit(history)
    >>> posterior.mean(torch.tensor([0.5, 0.5], dtype=torch.float64)).round(decimals=2)
    tensor([1., 1.], dtype=torch.float64)
    """

    kernel: Kernel | str = field(default_factory=Matern52)
    lengthscale: float | None = None
    median_multiple: float = 10.0
    noise_variance: float = 1e-6
    prior_mean: Literal["last", "gls", "zero"] = "last"
    solver: Literal["auto", "dense", "cg"] = "auto"

    def __post_init__(self) -> None:
        kernel = kernel_named(self.kernel)
        zero, one = torch.zeros((), dtype=torch.float64), 1.0
        if not kernel.second_derivative(zero, one).isfinite():
            raise ValueError(
                f"CurlFreeEstimator: kernel {kernel} is not twice differentiable at 0; use 'rbf', 'matern-5/2' "
                "or 'rational-quadratic'"
            )
        object.__setattr__(self, "kernel", kernel)
        for name in ("lengthscale", "median_multiple"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"CurlFreeEstimator: {name} must be positive, got {value}")
        if not self.noise_variance >= 0:
            raise ValueError(
                f"CurlFreeEstimator: noise_variance must not be negative, got {self.noise_variance}"
            )
        if self.prior_mean not in ("last", "gls", "zero"):
            raise ValueError(
                f"CurlFreeEstimator: prior_mean must be 'last', 'gls' or 'zero', got {self.prior_mean!r}"
            )
        if self.solver not in ("auto", "dense", "cg"):
            raise ValueError(f"CurlFreeEstimator: solver must be 'auto', 'dense' or 'cg', got {self.solver!r}")

    @property
    def assumed_noise_variance(self) -> float:
        return self.noise_variance

    def fit(self, history: GradientHistory) -> CurlFreePosterior:
        return CurlFreePosterior(self, history)

    def profiles(
        self,
        squared: Tensor,  # [...]
        lengthscale: Tensor,  # []
    ) -> tuple[Tensor, Tensor]:  # [...], [...]
        """The two factors of K(θ, θ') = p₁ I + p₂ δ δᵀ, in units of -2 φ'(0)."""
        kernel = kernel_named(self.kernel)
        at_zero = kernel.derivative(torch.zeros_like(lengthscale), lengthscale)
        first = kernel.derivative(squared, lengthscale) / at_zero
        return first, 2 * kernel.second_derivative(squared, lengthscale) / at_zero


class CurlFreePosterior(Posterior):
    """``CurlFreeEstimator`` fitted to a history.

    Rows X are the iterates as displacements from the newest, rows Y the gradients less the prior mean. The
    solution of ``(K + σ² I) A = Y`` is ``A = B Y + C X`` with two T0 × T0 matrices: across the span of X it is
    B Y with B = (P₁ + σ²)⁻¹, and inside the span X-combinations make up the difference. With ξ the point's
    displacement and δ_i = ξ - X_i, the prediction

        μ = m + Σ_i p₁(δ_i) A_i + Σ_i q_i δ_i,    q_i = p₂(δ_i) δ_i·A_i

    is then a combination of the stored rows and of ξ, and reads each row twice.
    """

    def __init__(self, estimator: CurlFreeEstimator, history: GradientHistory) -> None:
        super().__init__(history)
        self._estimator = estimator
        cross_gram = history.cross_gram  # products of long rows, before what is small
        with one_thread():
            self._condition(history.representatives, cross_gram)

    def _condition(
        self,
        slots: list[int],
        cross_gram: Tensor,  # [T0, T0]
    ) -> None:
        history, estimator = self.history, self._estimator
        identity = torch.eye(history.size, dtype=torch.float64, device=history.counts.device)
        self._from_displacements = identity[slots] - identity[history.newest]  # X = from_displacements @ D
        squared = history.pairwise_squared_distances()[slots][:, slots]
        self.lengthscale = self._choose_lengthscale()
        self._newest_products = self._from_displacements @ history.iterate_gram[:, history.newest]  # [m]
        self._newest_cross = cross_gram[:, history.newest]  # [T0]
        floor = NOISE_FLOOR * torch.finfo(history.displacements.dtype).eps
        first, second = estimator.profiles(squared, self.lengthscale)
        assumed = torch.full_like(self.lengthscale, max(estimator.noise_variance, floor))
        correlations = first + second * squared / history.dimension  # of a component, averaged over them
        self._noise = relative_noise(history, slots, correlations, assumed)  # [n]
        self._first_factor = jittered_cholesky(first + torch.diag(self._noise))
        self._mean_coefficients = self._mean(slots)  # [T0], m = cᵀ G
        self._from_gradients = history.averaging[slots] - self._mean_coefficients  # Y = from_gradients @ G
        self._gram = self._from_displacements @ history.iterate_gram @ self._from_displacements.mT
        self._solve(first, second)

    def _mean(self, slots: list[int]) -> Tensor:  # [T0]
        """The prior mean's coefficients on the stored gradients."""
        history, kind = self.history, self._estimator.prior_mean
        coefficients = torch.zeros_like(history.counts)
        if kind == "gls" or (kind == "last" and history.tells_noise):
            ones = torch.cholesky_solve(torch.ones_like(self._noise)[:, None], self._first_factor)[:, 0]
            return history.averaging[slots].mT @ (ones / ones.sum())
        if kind == "last":
            coefficients[history.newest] = 1
        return coefficients

    def _choose_lengthscale(self) -> Tensor:  # []
        median = self.history.median_squared_distance().sqrt().nan_to_num(nan=1.0)
        if self._estimator.lengthscale is not None:
            return torch.full_like(median, self._estimator.lengthscale)
        return self._estimator.median_multiple * median

    def _solve(
        self,
        first: Tensor,  # [n, n], p₁
        second: Tensor,  # [n, n], p₂
    ) -> None:
        cross = self._from_gradients @ self.history.cross_gram @ self._from_displacements.mT  # Y Xᵀ
        basis, scales = _span(self._gram, self.history.displacements.dtype)
        coordinates = basis * scales  # of X in an orthonormal basis of its span
        targets = cross @ basis / scales  # of Y, projected
        across = torch.cholesky_inverse(self._first_factor)  # B
        system = _SpanSystem(first, second, self._noise, coordinates, across)
        inside = system.solve(targets, self._estimator.solver)  # [n, r]
        self._basis, self._scales = basis, scales  # [n, r], [r]
        self._coordinates, self._system = coordinates, system
        self._across = across
        self._along = (inside - across @ targets) / scales @ basis.mT  # C
        self._own_products = (coordinates * inside).sum(1)  # X_i · A_i

    def _along_span(self, locations: Locations) -> tuple[Tensor, Tensor]:  # [n, m], [n]
        """X·ξ and ‖ξ‖² by algebra from the inner products with the rows as they are stored."""
        newest = self.history.newest
        products = locations.on_displacements
        on_rows = products @ self._from_displacements.mT - self._newest_products
        norms = locations.norms - 2 * products[:, newest] + self.history.iterate_gram[newest, newest]
        return on_rows, norms.clamp_min(0)

    def _profiles(self, on_rows: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:  # [n, m], [n, m]
        squared = (norms[:, None] + self._gram.diagonal() - 2 * on_rows).clamp_min(0)
        return self._estimator.profiles(squared, self.lengthscale)

    def _weights(self, locations: Locations) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of the predictions on G [n, T0], on D [n, T0] and on the offsets [n]."""
        products = locations.on_gradients  # of long rows, before what is small
        with one_thread():
            return self._weights_of(products, locations)

    def _weights_of(
        self,
        products: Tensor,  # [n, T0]
        locations: Locations,
    ) -> tuple[Tensor, Tensor, Tensor]:
        on_gradients = (products - self._newest_cross) @ self._from_gradients.mT  # Y·ξ
        on_rows, norms = self._along_span(locations)
        first, second = self._profiles(on_rows, norms)
        changes = on_gradients @ self._across + on_rows @ self._along.mT - self._own_products  # δ_i·A_i
        slopes = second * changes  # q
        on_g = first @ self._across @ self._from_gradients + self._mean_coefficients
        on_d = (first @ self._along - slopes) @ self._from_displacements
        on_d[:, self.history.newest] -= slopes.sum(1)  # ξ is the offset less the newest displacement
        return on_g, on_d, slopes.sum(1)

    def means(self, locations: Locations) -> Tensor:
        on_g, on_d, slopes = self._weights(locations)
        return self._combine(
            on_g, on_d, slopes[:, None].to(locations.offsets.dtype) * locations.offsets, locations
        )

    def differences(self, locations: Locations, origins: Locations) -> Tensor:
        here, there = self._weights(locations), self._weights(origins)
        dtype = locations.offsets.dtype
        offsets = here[2][:, None].to(dtype) * locations.offsets - there[2][:, None].to(dtype) * origins.offsets
        return self._combine(here[0] - there[0], here[1] - there[1], offsets, locations)

    def _combine(
        self,
        on_g: Tensor,  # [n, T0]
        on_d: Tensor,  # [n, T0]
        offsets: Tensor,  # [n, d], weighted
        locations: Locations,
    ) -> Tensor:  # [n, d]
        result = combine_rows(on_g, self.history.gradients) + offsets
        result += combine_rows(on_d, self.history.displacements)
        return result.to(locations.points.device, locations.points.dtype)

    def variance(self, point: Tensor) -> Tensor:
        """The posterior variance of a component, averaged over the components: it differs by direction."""
        dimension = self.history.dimension
        on_rows, norms = self._along_span(self.locate(point[None]))
        first, second = (profile[0] for profile in self._profiles(on_rows, norms))
        count, rank = self._coordinates.shape
        # Three kinds of directions: in the span, along what of ξ is outside it, and all the others.
        inside = on_rows[0] @ self._basis / self._scales  # ξ in the span [r]
        outside = (norms[0] - inside.square().sum()).clamp_min(0).sqrt()
        gaps = inside - self._coordinates  # δ_i in the span [m, r]
        if rank < dimension:
            gaps = torch.cat([gaps, outside.expand(count, 1)], dim=1)
        explained = torch.zeros_like(outside)
        for column in range(gaps.shape[1]):
            covariances = (second * gaps[:, column])[:, None] * gaps  # of direction `column` with all
            covariances[:, column] += first
            within, across = covariances[:, :rank], covariances[:, rank:]
            if rank:
                explained += (within * self._system.solve(within, self._estimator.solver)).sum()
            explained += (across * torch.cholesky_solve(across, self._first_factor)).sum()
        alone = first @ torch.cholesky_solve(first[:, None], self._first_factor)[:, 0]
        explained += (dimension - gaps.shape[1]) * alone
        return (1 - explained / dimension).clamp_min(0)


def _span(
    gram: Tensor,  # [n, n], of the rows X
    dtype: torch.dtype,  # that the rows are stored in
) -> tuple[Tensor, Tensor]:  # [n, r], [r]
    """U and √λ of the Gram matrix, without directions that are rounding: X = U √λ Qᵀ, Q orthonormal."""
    values, vectors = torch.linalg.eigh(gram)
    eps = torch.finfo(dtype).eps if dtype.itemsize >= 4 else torch.finfo(torch.float32).eps
    kept = values > len(gram) ** 0.5 * eps * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return vectors[:, kept], values[kept].sqrt()


class _SpanSystem:
    """(P₁ ⊗ I + P₂ ∘ δδᵀ + σ²) A = R in coordinates of the span: n points in r dimensions."""

    def __init__(
        self,
        first: Tensor,  # [n, n]
        second: Tensor,  # [n, n]
        noise: Tensor,  # [n]
        coordinates: Tensor,  # [n, r]
        preconditioner: Tensor,  # [n, n], (P₁ + σ²)⁻¹
    ) -> None:
        self._diagonal = first + torch.diag(noise)
        self._second = second
        self._coordinates = coordinates
        self._preconditioner = preconditioner
        self._factor: Tensor | None = None

    def product(
        self,
        rows: Tensor,  # [n, r]
    ) -> Tensor:  # [n, r]
        """Row i: Σ_j p₁ a_j + p₂ (x_i - x_j) (x_i - x_j)·a_j, in O(n² r)."""
        products = self._coordinates @ rows.mT  # x_i · a_j
        weights = self._second * (products - products.diagonal())
        return self._diagonal @ rows + weights.sum(1)[:, None] * self._coordinates - weights @ self._coordinates

    def _dense(self) -> Tensor:  # [n r, n r]
        count, rank = self._coordinates.shape
        gaps = self._coordinates[:, None] - self._coordinates
        system = torch.einsum("ij,ija,ijb->iajb", self._second, gaps, gaps)
        system += torch.einsum(
            "ij,ab->iajb", self._diagonal, torch.eye(rank, dtype=gaps.dtype, device=gaps.device)
        )
        return system.reshape(count * rank, count * rank)

    def solve(
        self,
        right: Tensor,  # [n, r]
        solver: str,
    ) -> Tensor:  # [n, r]
        """The rows A."""
        if not right.numel():
            return right
        if solver == "cg" or (solver == "auto" and right.numel() > DENSE_LIMIT):
            return conjugate_gradients(self.product, right, lambda rows: self._preconditioner @ rows)
        if self._factor is None:
            self._factor = jittered_cholesky(self._dense())
        return torch.cholesky_solve(right.reshape(-1, 1), self._factor).reshape(right.shape)
