"""A Gaussian process on the objective itself: its gradients are curl-free, and their components correlated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

from optex import small
from optex.checks import check_number, check_positive, shown
from optex.estimators.history import GradientHistory, Locations
from optex.estimators.interface import Coefficients, Estimator, Posterior
from optex.estimators.kernels import Kernel, Matern52, kernel_named
from optex.estimators.noise import relative_noise
from optex.small import Array, array, tensor

__all__ = ["CurlFreeEstimator", "CurlFreePosterior"]

NOISE_FLOOR: Final = 4.0  # units in the last place
DENSE_LIMIT: Final = 1200  # unknowns up to which the system in the span is factorised


@dataclass(frozen=True)
class CurlFreeEstimator(Estimator):
    """Gaussian process on F with covariance φ(r²), seen through its gradients.

    With δ = θ - θ', the gradients have covariance

        K(θ, θ') = -2 φ'(r²) I - 4 φ''(r²) δ δᵀ,    here in units of -2 φ'(0).

    Where the separable process treats the coordinates as unrelated, this one knows that a gradient field
    has a symmetric derivative: a change observed along one direction informs about others.

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
        noise_variance: σ², in units of the prior variance of a gradient component, used where the history does
            not know the gradients' noise, and else a floor; at least ``NOISE_FLOOR`` units in the last place of
            the history's dtype, which its distances cannot resolve.
        prior_mean: ``"last"`` (the newest gradient, so that what is predicted is the change from it),
            ``"gls"`` (the generalised least-squares mean of the history) or ``"zero"``. Where the history knows
            the gradients' noise, ``"last"`` is ``"gls"``: the newest gradient would bring its noise along.
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
            if value is not None or name != "lengthscale":
                check_positive("CurlFreeEstimator", name, value)
        check_number("CurlFreeEstimator", "noise_variance", self.noise_variance)
        if self.prior_mean not in ("last", "gls", "zero"):
            raise ValueError(
                f"CurlFreeEstimator: prior_mean must be 'last', 'gls' or 'zero', got {shown(self.prior_mean)}"
            )
        if self.solver not in ("auto", "dense", "cg"):
            raise ValueError(
                f"CurlFreeEstimator: solver must be 'auto', 'dense' or 'cg', got {shown(self.solver)}"
            )

    @property
    def assumed_noise_variance(self) -> float:
        return self.noise_variance

    def fit(self, history: GradientHistory) -> CurlFreePosterior:
        return CurlFreePosterior(self, history)

    def profiles(
        self,
        squared: Array,  # [...]
        lengthscale: Array,  # []
    ) -> tuple[Array, Array]:  # [...], [...]
        """The two factors of K(θ, θ') = p₁ I + p₂ δ δᵀ, in units of -2 φ'(0)."""
        return kernel_named(self.kernel).profiles(squared, lengthscale)


@dataclass(frozen=True)
class _Span:
    """What all fits to one history share, whatever kernel and noise. X: its n iterates less the newest one.

    Attributes:
        slots: the n slots that stand for an iterate.
        from_displacements: [n, T0], X = from_displacements @ D.
        newest_products: [n], X · (the newest displacement).
        newest_cross: [T0], G · (the newest displacement).
        gram: [n, n], X Xᵀ.
        squared: [n, n], squared distances.
        basis, scales: [n, r], [r]: U and √λ of the Gram matrix; X = U √λ Qᵀ, Q orthonormal.
        coordinates: [n, r], of X in that basis of its span.
        gaps: [n, n, r], of each row from each.
        onto_span: [T0, r], G onto the basis.
    """

    slots: list[int]
    from_displacements: Array
    newest_products: Array
    newest_cross: Array
    gram: Array
    squared: Array
    basis: Array
    scales: Array
    coordinates: Array
    gaps: Array
    onto_span: Array

    @classmethod
    def of(cls, history: GradientHistory) -> _Span:
        """The span of this history, computed once."""
        return history.derived("span", lambda: cls._found(history))

    @classmethod
    def _found(cls, history: GradientHistory) -> _Span:
        slots, newest = history.representatives, history.newest
        cross, iterates = array(history.cross_gram), array(history.iterate_gram)
        identity = small.eye(history.size, iterates)
        rows = identity[slots] - identity[newest]
        gram = rows @ iterates @ rows.T
        basis, scales = _directions(gram, history.displacements.dtype)
        coordinates = basis * scales
        return cls(
            slots,
            rows,
            rows @ iterates[:, newest],
            small.copy(cross[:, newest]),  # what is derived outlives an append that is taken back
            gram,
            small.select(history.squared_distances, slots),
            basis,
            scales,
            coordinates,
            coordinates[:, None] - coordinates,
            cross @ rows.T @ basis / scales,
        )


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
        self._span = span = _Span.of(history)
        self.lengthscale: Array = self._choose_lengthscale()  # []
        floor = NOISE_FLOOR * torch.finfo(history.displacements.dtype).eps
        first, second = self._profiles_between()
        correlations = first + second * span.squared / history.dimension  # of a component, averaged over them
        noise = relative_noise(history, span.slots, correlations, max(estimator.noise_variance, floor))
        self._first_factor = small.jittered_cholesky(small.plus_diagonal(first, noise))
        self._mean_coefficients = self._mean(noise)  # [T0], m = cᵀ G
        # Y = from_gradients @ G
        self._from_gradients = array(history.averaging)[span.slots] - self._mean_coefficients
        across = small.cholesky_inverse(self._first_factor)  # B
        self._system = _SpanSystem(first, second, noise, span, across, self._dense_part)
        targets = self._from_gradients @ span.onto_span  # of Y, projected
        inside = self._system.solve(targets, estimator.solver)  # [n, r]
        along = (inside - across @ targets) / span.scales @ span.basis.T  # C
        self._own_products = (span.coordinates * inside).sum(1)  # X_i · A_i
        self._across, self._along = across, along
        self._on_g = across @ self._from_gradients  # [n, T0]
        self._on_d = along @ span.from_displacements  # [n, T0]
        self._cross_offset = self._from_gradients @ span.newest_cross  # [n]

    def _profiles_between(self) -> tuple[Array, Array]:  # [n, n], [n, n]
        """The two profiles between the history's iterates, shared by fits that differ only in noise."""
        estimator, span = self._estimator, self._span
        key = ("profiles", estimator.kernel, float(self.lengthscale))
        return self.history.derived(key, lambda: estimator.profiles(span.squared, self.lengthscale))

    def _dense_part(self, build: Callable[[], Array]) -> Array:  # [n r, n r]
        key = ("system", self._estimator.kernel, float(self.lengthscale))
        return self.history.derived(key, build)

    def _mean(self, noise: Array) -> Array:  # [T0]
        """The prior mean's coefficients on the stored gradients."""
        history, kind = self.history, self._estimator.prior_mean
        if kind == "gls" or (kind == "last" and history.tells_noise):
            ones = small.cholesky_solve(small.full(len(noise), 1.0, noise), self._first_factor)
            return array(history.averaging)[self._span.slots].T @ (ones / ones.sum())
        coefficients = small.full(history.size, 0.0, noise)
        if kind == "last":
            coefficients[history.newest] = 1
        return coefficients

    def _choose_lengthscale(self) -> Array:  # []
        median = self.history.median_distance
        if self._estimator.lengthscale is not None:
            return 0 * median + self._estimator.lengthscale
        return self._estimator.median_multiple * median

    def _along_span(self, locations: Locations) -> tuple[Array, Array]:  # [n, m], [n]
        """X·ξ and ‖ξ‖² by algebra from the inner products with the rows as they are stored."""
        newest = self.history.newest
        products = locations.on_displacements
        on_rows = products @ self._span.from_displacements.T - self._span.newest_products
        norm = array(self.history.iterate_gram)[newest, newest]
        return on_rows, small.nonnegative(locations.norms - 2 * products[:, newest] + norm)

    def _profiles(self, on_rows: Array, norms: Array) -> tuple[Array, Array]:  # [n, m], [n, m]
        squared = small.squared_distances(norms, self._span.gram.diagonal(), on_rows)
        return self._estimator.profiles(squared, self.lengthscale)

    def coefficients(self, locations: Locations) -> Coefficients:
        on_gradients = locations.on_gradients @ self._from_gradients.T - self._cross_offset  # Y·ξ
        on_rows, norms = self._along_span(locations)
        first, second = self._profiles(on_rows, norms)
        changes = on_gradients @ self._across + on_rows @ self._along.T - self._own_products  # δ_i·A_i
        slopes = second * changes  # q
        total = slopes.sum(1)
        on_d = first @ self._on_d - slopes @ self._span.from_displacements
        on_d[:, self.history.newest] -= total  # ξ is the offset less the newest displacement
        return Coefficients(first @ self._on_g + self._mean_coefficients, on_d, total)

    def variance(self, point: Tensor) -> Tensor:
        """Posterior variance averaged over the components, which differ in it; in units of the prior's."""
        dimension, span = self.history.dimension, self._span
        on_rows, norms = self._along_span(self.locate(point[None]))
        first, second = (profile[0] for profile in self._profiles(on_rows, norms))
        count, rank = span.coordinates.shape
        # Three kinds of directions: in the span, along what of ξ is outside it, and all the others.
        inside = on_rows[0] @ span.basis / span.scales  # ξ in the span [r]
        outside = small.sqrt(small.nonnegative(norms[0] - (inside * inside).sum()))
        gaps = small.full((count, min(rank + 1, dimension)), 0.0, on_rows)
        gaps[:, :rank] = inside - span.coordinates  # δ_i in the span [m, r]
        gaps[:, rank:] = outside
        explained = 0 * outside
        for column in range(gaps.shape[1]):
            covariances = (second * gaps[:, column])[:, None] * gaps  # of direction `column` with all
            covariances[:, column] += first
            within, across = covariances[:, :rank], covariances[:, rank:]
            if rank:
                explained += (within * self._system.solve(within, self._estimator.solver)).sum()
            explained += (across * small.cholesky_solve(across, self._first_factor)).sum()
        alone = first @ small.cholesky_solve(first, self._first_factor)
        explained += (dimension - gaps.shape[1]) * alone
        return tensor(small.nonnegative(1 - explained / dimension))

    def prior_variance(self) -> Tensor:
        # ⟨Y, A⟩ with A = (K + σ² I)⁻¹ Y: solved in coordinates of the span, and across it B Y.
        centring, span = self._from_gradients, self._span
        inside = centring @ span.onto_span  # of Y, in the span
        across = centring @ array(self.history.gradient_gram) @ centring.T - inside @ inside.T
        total = (inside * self._system.solve(inside, self._estimator.solver)).sum()
        total = total + (self._across * across).sum()
        return self._per_component(total, len(span.slots) - (self._estimator.prior_mean != "zero"))


def _directions(
    gram: Array,  # [n, n], of the rows X
    dtype: torch.dtype,  # that the rows are stored in
) -> tuple[Array, Array]:  # [n, r], [r]
    """U and √λ of the Gram matrix, without the directions that are only rounding."""
    values, vectors = small.eigh(gram)
    eps = torch.finfo(dtype).eps if dtype.itemsize >= 4 else torch.finfo(torch.float32).eps
    kept = values > len(gram) ** 0.5 * eps * small.maximum(values[-1], 0 * values[-1] + small.TINY)
    return vectors[:, kept], small.sqrt(values[kept])


class _SpanSystem:
    """(P₁ ⊗ I + P₂ ∘ δδᵀ + σ²) A = R in coordinates of the span: n points in r dimensions."""

    def __init__(
        self,
        first: Array,  # [n, n], p₁
        second: Array,  # [n, n], p₂
        noise: Array,  # [n]
        span: _Span,
        preconditioner: Array,  # [n, n], (P₁ + σ²)⁻¹
        shared: Callable[[Callable[[], Array]], Array],
    ) -> None:
        self._first, self._second, self._noise = first, second, noise
        self._span = span
        self._preconditioner = preconditioner
        self._shared = shared
        self._factor: Array | None = None

    def product(
        self,
        rows: Array,  # [n, r]
    ) -> Array:  # [n, r]
        """Row i: Σ_j p₁ a_j + p₂ (x_i - x_j) (x_i - x_j)·a_j, in O(n² r)."""
        coordinates = self._span.coordinates
        products = coordinates @ rows.T  # x_i · a_j
        weights = self._second * (products - products.diagonal())
        noisy = self._first @ rows + self._noise[:, None] * rows
        return noisy + weights.sum(1)[:, None] * coordinates - weights @ coordinates

    def _noiseless(self) -> Array:  # [n r, n r]
        gaps = self._span.gaps
        count, _, rank = gaps.shape
        weighted = (self._second[:, :, None] * gaps).swapaxes(1, 2)  # [i, a, j]
        system = weighted[:, :, :, None] * gaps[:, None]  # [i, a, j, b]
        for a in range(rank):
            system[:, a, :, a] += self._first
        return system.reshape(count * rank, count * rank)

    def _dense(self) -> Array:  # [n r, n r]
        """The system matrix; fits that differ only in noise share all but its diagonal."""
        noise = self._noise[:, None] + small.full((1, self._span.coordinates.shape[1]), 0.0, self._noise)
        return small.plus_diagonal(self._shared(self._noiseless), noise.reshape(-1))

    def solve(
        self,
        right: Array,  # [n, r]
        solver: str,
    ) -> Array:  # [n, r]
        """The solution A."""
        size = right.shape[0] * right.shape[1]
        if not size:
            return right
        if solver == "cg" or (solver == "auto" and size > DENSE_LIMIT):
            return small.conjugate_gradients(self.product, right, lambda rows: self._preconditioner @ rows)
        if self._factor is None:
            self._factor = small.jittered_cholesky(self._dense())
        return small.cholesky_solve(right.reshape(-1), self._factor).reshape(right.shape)
