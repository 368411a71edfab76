"""How wrong predictions were, without the noise of the gradients they are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from optex.checks import saved_entry, saved_integer, shown
from optex.vector_space import VectorSpace

__all__ = ["Surprises"]

MEMORY: Final = 0.8  # of the averages, a round
FEWEST: Final = 3  # rounds before averages of sampled gradients say anything


@dataclass(frozen=True)
class _Averages:
    """Of ‖μ‖², ⟨μ, g⟩, ⟨g_i, g_{i+1}⟩ and ‖g‖² over recent rounds, up to one factor; and their number."""

    predicted: float = 0.0
    both: float = 0.0
    successive: float = 0.0
    measured: float = 0.0
    rounds: int = 0


@dataclass(frozen=True)
class Surprises:
    """What measured gradients said of their predictions; a round replaces it as a whole.

    A gradient g that is sampled differs from the true one, ∇F, by noise: every single relative error
    ‖μ - g‖ / ‖g‖ is then about 1 and says nothing. But the noise of a minibatch that the history has not seen
    is unrelated to the prediction μ and to other minibatches, so that on average

        ⟨μ, g⟩ = ⟨μ, ∇F⟩,    ⟨g_i, g_{i+1}⟩ = ‖∇F‖²  (neighbours with different minibatches),

    and ‖μ - ∇F‖² / ‖∇F‖² = (‖μ‖² - 2 ⟨μ, g⟩ + ⟨g_i, g_{i+1}⟩) / ⟨g_i, g_{i+1}⟩ contains the error of the
    prediction, due to the model or to noise of remembered gradients, and none of the noise of the gradient
    that it is compared with. Deterministic gradients are compared directly.

    Attributes:
        relative_error: ‖μ - ∇F‖ / ‖∇F‖ at the points last predicted and measured; NaN where there were none,
            infinite where ⟨g_i, g_{i+1}⟩ shows no common gradient.
        relative_noise: E‖g - ∇F‖² / ‖∇F‖², 0 for a deterministic source; NaN where it is not known.
    """

    relative_error: float = math.nan
    relative_noise: float = math.nan
    averages: _Averages = field(default_factory=_Averages)

    def compared(
        self,
        gaps: Tensor,  # [n], ‖μ - g‖
        norms: Tensor,  # [n], ‖g‖
    ) -> Surprises:
        """Updated by predictions of gradients that carry no noise."""
        wrong, length = float(gaps.sum()), float(norms.sum())
        return replace(self, relative_error=wrong / length if length else math.inf, relative_noise=0.0)

    def averaged(
        self,
        space: VectorSpace,
        predicted: Tensor,  # [n, d]
        measured: Tensor,  # [m, d]
        places: list[int],
    ) -> Surprises:
        """Updated by predictions of sampled gradients.

        Args:
            space: of the vectors.
            predicted: from a history without these minibatches.
            measured: at least two gradients of different minibatches, neighbours next to each other.
            places: which of ``measured`` each prediction was made for.
        """
        n, old = len(places), self.averages
        rows = torch.cat([predicted, measured])
        products = space.inner_products(rows, rows).to("cpu")
        own = [n + place for place in places]
        new = [
            float(products.diagonal()[:n].mean()),
            float(products[range(n), own].mean()),
            float(products[n:, n:].diagonal(1).mean()),
            float(products[own, own].mean()),
        ]
        if not all(map(math.isfinite, new)):
            return self
        values = (old.predicted, old.both, old.successive, old.measured)
        mixed = [MEMORY * a + (1 - MEMORY) * b for a, b in zip(values, new, strict=True)]
        return _known(_Averages(*mixed, rounds=old.rounds + 1))

    @property
    def usual_length(self) -> float:
        """‖μ‖ of recent predictions of sampled gradients; infinite where there were none."""
        weight = 1 - MEMORY**self.averages.rounds
        return math.sqrt(self.averages.predicted / weight) if weight else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The averages, from which the other attributes follow."""
        averages = self.averages
        return {
            "products": [averages.predicted, averages.both, averages.successive, averages.measured],
            "rounds": averages.rounds,
        }

    @classmethod
    def loaded(cls, state: dict[str, Any]) -> Surprises:
        """What ``state_dict`` saved.

        Raises:
            ValueError: it is not that.
        """
        owner = "Surprises.loaded"
        products = saved_entry(owner, state, "products")
        four = isinstance(products, (list, tuple)) and len(products) == 4
        if not four or not all(isinstance(value, float) and math.isfinite(value) for value in products):
            raise ValueError(f"{owner}: saved products must be four finite numbers, got {shown(products)}")
        return _known(_Averages(*products, rounds=saved_integer(owner, state, "rounds")))


def _known(averages: _Averages) -> Surprises:
    if averages.rounds < FEWEST:
        return Surprises(averages=averages)
    signal = averages.successive
    if not signal > 0:
        return Surprises(math.inf, math.inf, averages)
    wrong = max(averages.predicted - 2 * averages.both + signal, 0.0)
    return Surprises(math.sqrt(wrong / signal), max(averages.measured - signal, 0.0) / signal, averages)
