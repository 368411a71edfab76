"""Variational inference: a Gaussian in place of the posterior of a logistic regression."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from optex.checks import check_integer, check_positive
from optex.studies.problems.interface import Problem, seeded_generator
from optex.studies.problems.tabular import breast_cancer

__all__ = ["BayesianLogistic"]

# For a smooth integrand on the line the trapezoidal rule converges geometrically: with 256 nodes on ±8.5
# standard deviations of z they are 1 apart where that deviation is 15, and the error is about exp(-2 π²).
_NODES: Final = 256
_REACH: Final = 8.5  # standard deviations
_START: Final = -2.0  # log σ


@final
class BayesianLogistic(Problem):
    """Mean-field variational inference of logistic regression on the Wisconsin breast cancer data.

    q(w) = N(μ, diag σ²) over 30 weights and a bias, prior N(0, s² I); θ = (μ, log σ), d = 62. The objective is
    minus the evidence lower bound, divided by the number of cases:

        F(μ, log σ) = 1/569 [ Σ over cases E_q log(1 + exp(z)) - y z  +  KL(q ‖ prior) ],   z = xᵀw

    A batch is ``samples`` vectors ε ~ N(0, I); its loss takes w = μ + σ ε. F itself needs no draws: z is
    Gaussian with mean xᵀμ and variance (x²)ᵀσ², so that the expectation of each case is an integral over a
    line.

    Args:
        seed: of the start, μ uniform in ±1/√30 and log σ = -2, and of the draws.
        samples: vectors ε a gradient, at least 1.
        prior_deviation: s, positive.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.

    Source: Kingma, Welling, *Auto-encoding variational Bayes*, ICLR 2014 (reparametrised gradients).
    """

    name = "bayesian-logistic"

    def __init__(self, seed: int = 0, samples: int = 4, prior_deviation: float = 1.0) -> None:
        super().__init__(seed)
        self.samples: int = check_integer("BayesianLogistic", "samples", samples)
        self.prior_deviation: float = check_positive("BayesianLogistic", "prior_deviation", prior_deviation)
        inputs, labels = breast_cancer()
        self.design: Tensor  # [569, 31], the last column is the bias
        self.labels: Tensor  # [569]
        self.nodes: Tensor  # [nodes], standard deviations
        self.weights: Tensor  # [nodes], summing to 1
        self.register_buffer("design", torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1), persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        nodes = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64)
        self.register_buffer("nodes", nodes, persistent=False)
        self.register_buffer("weights", torch.softmax(-0.5 * nodes**2, 0), persistent=False)
        self.mean: nn.Parameter = nn.Parameter(torch.empty(self.design.shape[1], dtype=torch.float64))
        self.log_deviation: nn.Parameter = nn.Parameter(torch.empty_like(self.mean))
        self.reset()

    def forward(
        self,
        batch: Tensor,  # [samples, 31]
    ) -> Tensor:
        logits = (self.mean + self.log_deviation.exp() * batch) @ self.design.T  # [samples, 569]
        expected = (functional.softplus(logits) - self.labels * logits).mean()
        return expected + self.divergence() / len(self.labels)

    def divergence(self) -> Tensor:  # []
        """KL(q ‖ prior)."""
        ratio = 2 * (self.log_deviation - math.log(self.prior_deviation))  # log σ²/s²
        return 0.5 * ((self.mean / self.prior_deviation) ** 2 + ratio.exp() - 1 - ratio).sum()

    def batches(self) -> Iterator[Tensor]:
        generator = seeded_generator(self.seed, "batches")
        while True:
            yield torch.randn(self.samples, len(self.mean), generator=generator, dtype=self.mean.dtype)

    @torch.no_grad()
    def evaluate(self) -> float:
        mean = self.design @ self.mean  # [569]
        deviation = (self.design**2 @ (2 * self.log_deviation).exp()).sqrt()
        logits = mean[:, None] + deviation[:, None] * self.nodes  # [569, nodes]
        expected = functional.softplus(logits) @ self.weights - self.labels * mean
        return float(expected.mean() + self.divergence() / len(self.labels))

    @torch.no_grad()
    def reset(self) -> None:
        bound = 1 / math.sqrt(len(self.mean) - 1)
        self.mean.uniform_(-bound, bound, generator=seeded_generator(self.seed, "start"))
        self.log_deviation.fill_(_START)
