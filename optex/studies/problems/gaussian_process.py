"""Hyperparameters of a Gaussian process, by its marginal likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Final, final

import torch
from torch import Tensor, nn

from optex.checks import check_integer
from optex.studies.problems.interface import Problem, seeded_generator
from optex.studies.problems.tabular import scikit_learn_arrays

__all__ = ["GaussianProcessHyperparameters"]

_CASES: Final = 442
_LEAST_NOISE: Final = 1e-6  # variance; keeps the covariance positive definite


@final
class GaussianProcessHyperparameters(Problem):
    """Length scales, signal and noise of a GP regression on scikit-learn's diabetes data, d = 12.

    Inputs x and targets y are standardised. The covariance of the targets is

        K_ij = s² exp(-½ Σ_k (x_ik - x_jk)² / ℓ_k²) + (σ² + 1e-6) δ_ij

    and the objective of θ = (log ℓ, log s, log σ) minus the log marginal likelihood over the number of cases:

        F = 1/n [ ½ yᵀ K⁻¹ y + ½ log det K + n/2 log 2π ]

    It is deterministic, smooth and not convex. Where K cannot be factorised, F is NaN.

    Args:
        seed: of the start, each component N(0, ½²).
        rows: n, from 2 to 442: the first so many of the cases.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.

    Source: Rasmussen, Williams, *Gaussian Processes for Machine Learning*, 2006, equation 5.8.
    """

    name = "gp-hyperparameters"

    def __init__(self, seed: int = 0, rows: int = 200) -> None:
        super().__init__(seed)
        check_integer("GaussianProcessHyperparameters", "rows", rows, least=2, most=_CASES)
        squares, targets = _diabetes(rows)
        self.squares: Tensor  # [10, n, n], (x_ik - x_jk)²
        self.targets: Tensor  # [n]
        self.register_buffer("squares", squares, persistent=False)
        self.register_buffer("targets", targets, persistent=False)
        self.log_lengthscales: nn.Parameter = nn.Parameter(torch.empty(len(squares), dtype=torch.float64))
        self.log_signal: nn.Parameter = nn.Parameter(torch.empty((), dtype=torch.float64))
        self.log_noise: nn.Parameter = nn.Parameter(torch.empty((), dtype=torch.float64))
        self.reset()

    def forward(self, batch: None) -> Tensor:
        inverse_squares = (-2 * self.log_lengthscales).exp()
        distances = torch.tensordot(inverse_squares, self.squares, dims=1)  # [n, n]
        unit = torch.eye(len(self.targets), dtype=distances.dtype, device=distances.device)
        noise = (2 * self.log_noise).exp() + _LEAST_NOISE
        covariance = (2 * self.log_signal - 0.5 * distances).exp() + noise * unit
        factor, failed = torch.linalg.cholesky_ex(covariance)
        white = torch.linalg.solve_triangular(factor, self.targets[:, None], upper=False)[:, 0]
        constant = 0.5 * math.log(2 * math.pi)
        value = 0.5 * white.square().mean() + factor.diagonal().log().mean() + constant
        return value * torch.where(failed > 0, math.nan, 1.0)

    def batches(self) -> Iterator[None]:
        return repeat(None)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self(None))

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        for parameter in self.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)

    @property
    def deterministic(self) -> bool:
        return True


@lru_cache(maxsize=4)
def _diabetes(rows: int) -> tuple[Tensor, Tensor]:  # [10, rows, rows], [rows]; float64
    inputs, targets = scikit_learn_arrays("load_diabetes", GaussianProcessHyperparameters.name)
    inputs, targets = torch.tensor(inputs[:rows]), torch.tensor(targets[:rows])
    inputs = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    columns = inputs.T
    squares = (columns[:, :, None] - columns[:, None, :]).square()
    return squares, (targets - targets.mean()) / targets.std(correction=0)
