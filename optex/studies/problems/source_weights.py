"""Weights of four sources of data, two of which are noise: a bilevel problem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Final, final

import torch
from torch import Tensor, nn

from optex.checks import check_positive
from optex.sources import MinimaxPenaltySource, SourceWeights
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["SourceMixture"]

_NAMES: Final = ("clean-1", "clean-2", "random-1", "random-2")
_ROWS: Final = 200  # of each source, and of validation
_DIMENSION: Final = 10
_NOISE: Final = 0.1


@final
class SourceMixture(Problem):
    """Weights of four sources for a linear model: two are clean, the labels of the other two are random.

    Each source has 200 rows x ~ N(0, I) in 10 dimensions. Labels of the clean sources and of validation are
    xᵀθ + 0.1 ε; those of the random sources have the same variance and do not depend on x. The parameters are
    those of ScaleBiO's joint field, logits p [4], a linear model w [10] and its rival u [10], in

        Φ = L1(w) + α Σ_k q_k (l_k(w) - l_k(u)),   q = softmax(p),   l_k and L1 mean squared errors

    ``forward`` is Φ, which the source's field descends in p and w and *ascends* in u: a method that descends
    ``forward`` in all of them diverges in u. ``evaluate`` is L1(u), the validation loss of a model trained on
    the mixture. ``hypergradient`` is exact.

    Args:
        seed: of the data and of the start; p is 0, w and u are equal.
        alpha: α of the penalty, positive.
        dtype: of the parameters and data.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "source-weights"

    def __init__(self, seed: int = 0, alpha: float = 10.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(seed)
        self.alpha: float = check_positive("SourceMixture", "alpha", alpha, "try 10")
        generator = seeded_generator(seed, "batches")

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        slope, inputs = drawn(_DIMENSION), drawn(len(_NAMES) + 1, _ROWS, _DIMENSION)
        labels = inputs @ slope + _NOISE * drawn(len(_NAMES) + 1, _ROWS)
        labels[2:4] = drawn(2, _ROWS) * math.sqrt(float(slope @ slope) + _NOISE**2)
        for name, rows, targets in (
            ("train", inputs[:-1], labels[:-1]),
            ("held", inputs[-1], labels[-1]),
        ):
            self.register_buffer(f"{name}_inputs", rows.clone(), persistent=False)
            self.register_buffer(f"{name}_labels", targets.clone(), persistent=False)
        self.weights: SourceWeights = SourceWeights(_NAMES, dtype=dtype)
        self.model: nn.Linear
        self.rival: nn.Linear
        with torch.random.fork_rng(devices=[]):  # layers draw an initialisation that is replaced below
            self.model, self.rival = (nn.Linear(_DIMENSION, 1, bias=False, dtype=dtype) for _ in range(2))
        self.reset()

    # ------------------------------------------------------------------ the two levels

    def upper(self, network: nn.Module, batch: object = None) -> Tensor:  # []
        """L1."""
        residuals = network(self.get_buffer("held_inputs"))[..., 0] - self.get_buffer("held_labels")
        return residuals.square().mean()

    def lower(self, network: nn.Module, batch: object = None) -> Tensor:  # [K]
        """l_k, for each source k."""
        residuals = network(self.get_buffer("train_inputs"))[..., 0] - self.get_buffer("train_labels")
        return residuals.square().mean(-1)

    def source(self) -> MinimaxPenaltySource:
        """ScaleBiO's joint field."""
        return MinimaxPenaltySource(
            self.upper,
            self.lower,
            self.weights,
            self.model,
            self.rival,
            alpha=self.alpha,
            deterministic=True,
        )

    def forward(self, batch: object = None) -> Tensor:
        excess = self.lower(self.model) - self.lower(self.rival)
        return self.upper(self.model) + self.alpha * (self.weights() @ excess)

    # ------------------------------------------------------------------ in closed form

    @torch.no_grad()
    def solve(self, pull: float = 0.0) -> Tensor:  # [d]
        """The minimiser of Σ_k q_k l_k + pull · L1: that of u with pull 0, that of w with pull 1 / α."""
        hessian, aim = self._normal()
        if pull:
            held, labels = self.get_buffer("held_inputs"), self.get_buffer("held_labels")
            hessian = hessian + pull * (held.T @ held) / _ROWS
            aim = aim + pull * (held.T @ labels) / _ROWS
        return torch.linalg.solve(hessian, aim)

    @torch.no_grad()
    def settle(self) -> None:
        """Set w and u to the joint field's solution at the present p."""
        self.model.weight.copy_(self.solve(1 / self.alpha)[None])
        self.rival.weight.copy_(self.solve()[None])

    @torch.no_grad()
    def hypergradient(self) -> Tensor:  # [K]
        """The gradient of L1(u*(p)) in p, by the implicit function theorem."""
        u, (hessian, _) = self.solve(), self._normal()
        held, inputs = self.get_buffer("held_inputs"), self.get_buffer("train_inputs")
        of_upper = held.T @ (held @ u - self.get_buffer("held_labels")) / _ROWS
        residuals = inputs @ u - self.get_buffer("train_labels")
        of_sources = torch.einsum("knd,kn->kd", inputs, residuals) / _ROWS
        # ∇l_k, ∇L1 and the Hessian are all without their factors 2, of which one remains in the product.
        along = -2 * of_sources @ torch.linalg.solve(hessian, of_upper)  # [K]
        q = self.weights()
        return q * (along - q @ along)

    def _normal(self) -> tuple[Tensor, Tensor]:  # [d, d], [d]
        """Half the Hessian of Σ_k q_k l_k, and the right-hand side of its normal equations."""
        inputs, q = self.get_buffer("train_inputs"), self.weights()
        hessian = torch.einsum("k,kni,knj->ij", q, inputs, inputs) / _ROWS
        return hessian, torch.einsum("k,kni,kn->i", q, inputs, self.get_buffer("train_labels")) / _ROWS

    # ------------------------------------------------------------------ a problem

    def batches(self) -> Iterator[None]:
        return repeat(None)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self.upper(self.rival))

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        start = torch.randn(1, _DIMENSION, generator=generator, dtype=torch.float64)
        self.weights.logits.zero_()
        self.model.weight.copy_(start)
        self.rival.weight.copy_(start)

    @property
    def deterministic(self) -> bool:
        return True
