"""Differential privacy of what clients send: clip, add Gaussian noise, then sketch; and the account of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from optex.checks import check_integer, check_number, check_positive

__all__ = ["GaussianMechanism"]


@final
@dataclass(frozen=True)
class GaussianMechanism:
    """Vectors clipped to length C, plus N(0, (z C)² I): differentially private, and so is every sketch of them.

    What is computed from it later, such as a sketch, is no less private: noise goes in **before** R, which is
    no secret.
    A release is ρ-zCDP with ``ρ = Δ² / (2 z²)``, Δ the sensitivity in units of C, and k of them are kρ-zCDP:
    their Rényi divergence of order α is at most kρα. That is (ε, δ)-differential privacy with

        ε = min over α > 1 of   k ρ α + log(1 - 1/α) - log(δ α) / (α - 1)

    which is below ``kρ + 2 √(kρ log(1/δ))`` and somewhat above the least that there is (a tenth at ε = 4).
    All clients take part in every round: nothing is claimed for subsampling. Floating-point noise has
    known attacks; this is an account of the ideal mechanism.

    Args:
        clip: C, positive.
        noise_multiplier: z, positive: the noise's standard deviation in units of C.
        sensitivity: Δ, positive. 2: one client's data become any other (whoever sees a message cannot tell);
            1: the client is there or not, in a sum that hides who sent what.

    Raises:
        ValueError: an argument is out of range.

    >>> import optex
    >>> mechanism = optex.GaussianMechanism(clip=1.0, noise_multiplier=20.0)
    >>> round(mechanism.rho(100), 3), round(mechanism.epsilon(100, delta=1e-5), 2)
    (0.5, 4.73)
    >>> round(optex.GaussianMechanism.for_budget(4.73, 1e-5, 100, clip=1.0).noise_multiplier, 1)
    20.0

    Source: Bun, Steinke, TCC 2016, arXiv 1605.02065 (zCDP); Canonne, Kamath, Steinke, NeurIPS 2020, arXiv
    2004.00010 (ε of a Rényi curve); Song, Wang, Yu, Zhang, ICML 2023, arXiv 2210.08371 (before the sketch).
    """

    clip: float
    noise_multiplier: float
    sensitivity: float = 2.0

    def __post_init__(self) -> None:
        check_positive("GaussianMechanism", "clip", self.clip)
        check_positive(
            "GaussianMechanism",
            "noise_multiplier",
            self.noise_multiplier,
            "without noise nothing is private: leave the mechanism out",
        )
        check_positive("GaussianMechanism", "sensitivity", self.sensitivity)

    @classmethod
    def for_budget(
        cls, epsilon: float, delta: float, releases: int, *, clip: float, sensitivity: float = 2.0
    ) -> GaussianMechanism:
        """The mechanism with the least noise that spends at most ε in ``releases`` releases.

        Raises:
            ValueError: an argument is out of range.
        """
        epsilon = check_positive("GaussianMechanism", "epsilon", epsilon)
        low, high = 1e-6, 1e-6

        def spent(multiplier: float) -> float:
            return cls(clip, multiplier, sensitivity).epsilon(releases, delta)

        while spent(high) > epsilon:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
        return cls(clip, high, sensitivity)

    def release(
        self,
        vectors: Tensor,  # [..., d]
        generator: torch.Generator,
    ) -> Tensor:  # [..., d]
        """Clipped and noised, each vector by itself.

        Args:
            vectors: what clients would send.
            generator: of the noise, on the CPU. Where privacy is meant, its seed is the client's secret.
        """
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        # The larger of length and clip: shorter vectors stay as they are, and 0 is not divided by 0.
        clipped = vectors * (self.clip / lengths.clamp_min(self.clip))
        noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype).to(vectors.device)
        return clipped + self.noise_multiplier * self.clip * noise

    def rho(self, releases: int) -> float:
        """ρ of k = ``releases`` releases, kΔ² / (2 z²)."""
        count = check_integer("GaussianMechanism", "releases", releases, least=0)
        return count * (self.sensitivity / self.noise_multiplier) ** 2 / 2

    def epsilon(self, releases: int, delta: float) -> float:
        """ε of k = ``releases`` releases.

        Args:
            releases: k, rounds that one client has taken part in.
            delta: δ, between 0 and 1: well below one over the number of those who are protected.
        """
        check_number("GaussianMechanism", "delta", delta, open_below=True, most=1.0, open_above=True)
        rho = self.rho(releases)
        if rho == 0:
            return 0.0

        def at(logarithm: float) -> float:  # of α - 1
            above = math.exp(logarithm)
            order = 1 + above
            return rho * order + math.log(above / order) - (math.log(delta) + math.log(order)) / above

        best = minimize_scalar(at, bounds=(-30.0, 30.0), method="bounded", options={"xatol": 1e-10})
        return max(float(best.fun), 0.0)
