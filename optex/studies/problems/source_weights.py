"""How much each of four sources of data should weigh, two of which are noise: a bilevel problem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Final, final

import torch
from torch import Tensor, nn

from optex.checks import check_positive
from optex.sources import GradientSource, MinimaxPenaltySource, SourceWeights
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["SourceMixture"]

NAMES: Final = ("clean-1", "clean-2", "random-1", "random-2")
ROWS: Final = 200  # of each source, and of validation
DIMENSION: Final = 10
_NOISE: Final = 0.1


@final
class SourceMixture(Problem):
    """Weights of four sources for a linear model: two are clean, the labels of the other two are random.

    Rows x ~ N(0, I) [200, 10] a source; labels of clean ones and of validation are xᵀθ + 0.1 ε, those of random
    ones have their variance and nothing to do with x. Parameters are those of ScaleBiO's joint field: logits p
    [4], a linear model w [10] and its rival u [10]:

        Φ = L1(w) + α Σ_k q_k (l_k(w) - l_k(u)),   q = softmax(p),   l_k and L1 mean squared errors

    ``forward`` is Φ, which the source's field descends in p and w and *ascends* in u: a method that
    differentiates ``forward`` itself runs away in u. ``evaluate`` is L1(u): what a model that is trained on the
    mixture does on the validation rows. ``hypergradient`` is the exact one.

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

        slope, inputs = drawn(DIMENSION), drawn(len(NAMES) + 1, ROWS, DIMENSION)
        labels = inputs @ slope + _NOISE * drawn(len(NAMES) + 1, ROWS)
        labels[2:4] = drawn(2, ROWS) * math.sqrt(float(slope @ slope) + _NOISE**2)
        for name, rows, targets in (
            ("train", inputs[:-1], labels[:-1]),
            ("held", inputs[-1], labels[-1]),
        ):
            self.register_buffer(f"{name}_inputs", rows.clone(), persistent=False)
            self.register_buffer(f"{name}_labels", targets.clone(), persistent=False)
        self.weights: SourceWeights = SourceWeights(NAMES, dtype=dtype)
        self.model: nn.Linear
        self.rival: nn.Linear
        with torch.random.fork_rng(devices=[]):  # layers draw an initialisation that is replaced below
            self.model, self.rival = (nn.Linear(DIMENSION, 1, bias=False, dtype=dtype) for _ in range(2))
        self.reset()

    # ------------------------------------------------------------------ the two levels

    def upper(self, network: nn.Module, batch: object = None) -> Tensor:  # []
        """L1."""
        residuals = network(self.get_buffer("held_inputs"))[..., 0] - self.get_buffer("held_labels")
        return residuals.square().mean()

    def lower(self, network: nn.Module, batch: object = None) -> Tensor:  # [K]
        """Each l_k."""
        residuals = network(self.get_buffer("train_inputs"))[..., 0] - self.get_buffer("train_labels")
        return residuals.square().mean(-1)

    def source(self) -> GradientSource:
        """The joint field."""
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
        """The minimiser of L2(p, ·) + pull · L1: u's at 0, w's at 1 / α."""
        hessian, aim = self._normal()
        if pull:
            held, labels = self.get_buffer("held_inputs"), self.get_buffer("held_labels")
            hessian = hessian + pull * (held.T @ held) / ROWS
            aim = aim + pull * (held.T @ labels) / ROWS
        return torch.linalg.solve(hessian, aim)

    @torch.no_grad()
    def settle(self) -> None:
        """Put w and u where the field leaves them at the present p."""
        self.model.weight.copy_(self.solve(1 / self.alpha)[None])
        self.rival.weight.copy_(self.solve()[None])

    @torch.no_grad()
    def hypergradient(self) -> Tensor:  # [K]
        """Of L1(w*(p)), by the implicit function theorem."""
        u, (hessian, _) = self.solve(), self._normal()
        held, inputs = self.get_buffer("held_inputs"), self.get_buffer("train_inputs")
        of_upper = held.T @ (held @ u - self.get_buffer("held_labels")) / ROWS
        residuals = inputs @ u - self.get_buffer("train_labels")
        of_sources = torch.einsum("knd,kn->kd", inputs, residuals) / ROWS
        # ∇l_k, ∇L1 and the Hessian all have a factor 2 left out here; one of them is left over.
        along = -2 * of_sources @ torch.linalg.solve(hessian, of_upper)  # [K]
        q = self.weights()
        return q * (along - q @ along)

    def _normal(self) -> tuple[Tensor, Tensor]:  # [d, d], [d]
        """½ of L2's Hessian, and the right-hand side of its normal equations."""
        inputs, q = self.get_buffer("train_inputs"), self.weights()
        hessian = torch.einsum("k,kni,knj->ij", q, inputs, inputs) / ROWS
        return hessian, torch.einsum("k,kni,kn->i", q, inputs, self.get_buffer("train_labels")) / ROWS

    # ------------------------------------------------------------------ a problem

    def batches(self) -> Iterator[None]:
        return repeat(None)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self.upper(self.rival))

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        start = torch.randn(1, DIMENSION, generator=generator, dtype=torch.float64)
        self.weights.logits.zero_()
        self.model.weight.copy_(start)
        self.rival.weight.copy_(start)

    @property
    def deterministic(self) -> bool:
        return True
