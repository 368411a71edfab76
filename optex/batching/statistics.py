"""The noise of a mean gradient, estimated from the gradients of several samples; in this file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optex.checks import check_integer

__all__ = ["GradientMoments", "GradientStatistics", "variance_of_mean"]


def variance_of_mean(
    squared_norms: Tensor,  # [n], n at least 2
    squared_norm: Tensor,  # []
) -> Tensor:  # []
    """Unbiased ``E‖ḡ - E ḡ‖²`` of the mean ḡ of n independent gradients, from ``‖g_k‖²`` and ``‖ḡ‖²``.

    Args:
        squared_norms: ‖g_k‖², of two gradients at least.
        squared_norm: ‖ḡ‖².

    Raises:
        TypeError: one is no tensor.
        ValueError: there are fewer than two squared norms, or ``squared_norm`` is not one number.

    It is the sum over the coordinates; divided by their number it is the noise variance that a
    ``GradientSource`` answers. Where the gradients hardly differ it is mostly rounding; it is never below 0.

    >>> variance_of_mean(torch.tensor([1.0, 9.0]), torch.tensor(4.0))    # of 1 and 3
    tensor(1.)
    """
    for name, value in (("squared_norms", squared_norms), ("squared_norm", squared_norm)):
        if not isinstance(value, Tensor):
            raise TypeError(f"variance_of_mean: {name} must be a tensor, got {type(value).__name__}")
    if squared_norms.ndim != 1 or len(squared_norms) < 2 or squared_norm.ndim:
        raise ValueError(
            "variance_of_mean: squared_norms must be [n] with n at least 2, squared_norm [], got "
            f"{tuple(squared_norms.shape)} and {tuple(squared_norm.shape)}"
        )
    count = len(squared_norms)
    # Σ‖g_k - ḡ‖² = Σ‖g_k‖² - n ‖ḡ‖², over n - 1 for one gradient's variance, over n for the mean's.
    return ((squared_norms.sum() - count * squared_norm) / (count * (count - 1))).clamp_min(0)


@dataclass(frozen=True)
class GradientStatistics:
    """The noise of the mean gradient ḡ of a batch, over the whole gradient, all parameters flattened into one.

    Attributes:
        batch_size: b, samples in ḡ.
        squared_norm: ``‖ḡ‖²``.
        variance: V, the variance of one sample's gradient, summed over the coordinates; unbiased.
        inner_product_variance: ``Var_i ⟨g_i, ḡ⟩``; NaN where it was not asked for.
        coordinate_ratio: ``max_j Var_i(g_ij) / ḡ_j²`` over the coordinates that have a variance; NaN where it
            was not asked for.

    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 2.0]])      # gradients of two samples in two coordinates
    >>> found = GradientStatistics.of_gradients([rows])    # ḡ is (2, 2), the variances are 2 and 0
    >>> found.squared_norm, found.variance, found.inner_product_variance, found.coordinate_ratio
    (8.0, 2.0, 8.0, 0.5)
    """

    batch_size: float
    squared_norm: float
    variance: float
    inner_product_variance: float = math.nan
    coordinate_ratio: float = math.nan

    @classmethod
    def of_gradients(
        cls,
        gradients: Sequence[Tensor],  # one tensor a parameter, [n, ...]
        samples_each: int = 1,
    ) -> GradientStatistics:
        """Of n gradients at one point, each a sample's or the mean over a micro-batch of ``samples_each``.

        A mean over s samples has 1 / s of a sample's variance; the statistics are those of one sample.
        Variances are NaN where n is 1.

        Raises:
            ValueError: there is no tensor, their first dimensions differ or are 0, or ``samples_each`` is no
                integer of at least 1.
        """
        check_integer("GradientStatistics", "samples_each", samples_each)
        moments = GradientMoments()
        moments.add(gradients)
        return moments.statistics(samples_each, inner_products=moments.inner_products(gradients))

    @classmethod
    def of_noise(
        cls, noise_variance: float, dimension: int, gradient_norm: float, batch_size: float
    ) -> GradientStatistics:
        """From what a source answers, the variance of one component of ḡ: that is ``V / (b d)``."""
        return cls(batch_size, gradient_norm**2, noise_variance * dimension * batch_size)

    def noise_variance(self, dimension: int) -> float:
        """Of one component of ḡ, averaged over the d of them: what a ``GradientSource`` answers."""
        return self.variance / (self.batch_size * dimension)

    @property
    def orthogonal_variance(self) -> float:
        """The variance of the g_i orthogonal to ḡ: ``V - Var_i ⟨g_i, ḡ⟩ / ‖ḡ‖²``."""
        # g_i - ⟨g_i, ḡ⟩/‖ḡ‖² ḡ has mean 0, and its square is ‖g_i‖² - ⟨g_i, ḡ⟩²/‖ḡ‖².
        if not self.squared_norm:
            return self.variance
        return max(0.0, self.variance - self.inner_product_variance / self.squared_norm)


class GradientMoments:
    """Mean and spread of gradients that come in chunks, coordinate by coordinate (Chan, Golub, LeVeque, 1983).

    Attributes:
        count: n, gradients so far.
        mean: their mean, one tensor a parameter.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.mean: list[Tensor] = []
        self._spread: list[Tensor] = []  # Σ_i (g_ij - ḡ_j)²

    def add(
        self,
        gradients: Sequence[Tensor],  # one tensor a parameter, [n, ...]
    ) -> None:
        """Take in n more.

        Raises:
            ValueError: there is no tensor, or their first dimensions differ or are 0.
        """
        counts = {len(rows) if rows.ndim else 0 for rows in gradients}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "GradientMoments: gradients must be tensors [n, ...] with one n of at least 1, got "
                f"{[tuple(rows.shape) for rows in gradients]}"
            )
        (count,) = counts
        gradients = [rows.detach().float() if rows.element_size() < 4 else rows.detach() for rows in gradients]
        means = [rows.mean(0) for rows in gradients]
        spreads = [(rows - mean).square().sum(0) for rows, mean in zip(gradients, means, strict=True)]
        if not self.count:
            self.count, self.mean, self._spread = count, means, spreads
            return
        total = self.count + count
        gaps = [new - old for new, old in zip(means, self.mean, strict=True)]
        for spread, added, gap in zip(self._spread, spreads, gaps, strict=True):
            spread += added + gap.square() * (self.count * count / total)
        self.mean = [old + gap * (count / total) for old, gap in zip(self.mean, gaps, strict=True)]
        self.count = total

    def inner_products(
        self,
        gradients: Sequence[Tensor],  # one tensor a parameter, [n, ...]
    ) -> Tensor:  # [n]
        """Inner products of gradients with the mean, over all parameters together."""
        like = self._widest()
        parts = [
            (rows.detach().reshape(len(rows), -1).to(mean) @ mean.reshape(-1)).to(like)
            for rows, mean in zip(gradients, self.mean, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _widest(self) -> Tensor:
        return max(self.mean, key=Tensor.element_size)

    def statistics(self, samples_each: int = 1, inner_products: Tensor | None = None) -> GradientStatistics:
        """The statistics of the gradients so far; all variances are NaN where there is but one gradient.

        Args:
            samples_each: samples in each of the gradients.
            inner_products: [n], of the gradients with their mean; None leaves that variance out.
        """
        count, like = self.count, self._widest()
        scale = samples_each / (count - 1) if count > 1 else math.nan
        along = like.new_tensor(math.nan) if inner_products is None or count < 2 else inner_products.var()
        squares = [mean.square().sum() for mean in self.mean]
        spreads = [spread.sum() for spread in self._spread]
        ratios = [_largest_ratio(*parts) for parts in zip(self._spread, self.mean, strict=True)]
        # One transfer for all of them; sums over the parameters are Python's, in float64.
        numbers = torch.stack([part.to(like) for part in (along, *squares, *spreads, *ratios)]).tolist()
        width = len(squares)
        return GradientStatistics(
            batch_size=count * samples_each,
            squared_norm=sum(numbers[1 : 1 + width]),
            variance=scale * sum(numbers[1 + width : 1 + 2 * width]),
            inner_product_variance=samples_each * numbers[0],
            coordinate_ratio=scale * max(numbers[1 + 2 * width :]),
        )


def _largest_ratio(spread: Tensor, mean: Tensor) -> Tensor:  # []
    # A coordinate in which no sample has a gradient is 0 / 0, and does not count.
    ratio = spread / mean.square()
    return torch.where(spread > 0, ratio, 0).amax() if ratio.numel() else ratio.new_zeros(())
