"""Small real data sets that ship with scikit-learn: logistic regression and a small network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Any, Final, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from optex.checks import check_integer, check_positive
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["DigitsMLP", "LogisticBreastCancer", "breast_cancer", "scikit_learn_arrays"]

_DIGITS_HELD_OUT: Final = 360
_NEWTON_STEPS: Final = 30  # more than enough for convergence to rounding


def scikit_learn_arrays(loader: str, problem: str) -> tuple[NDArray[Any], NDArray[Any]]:  # [n, k], [n]
    """Inputs and labels of a data set that ships with scikit-learn.

    Args:
        loader: name of a function of ``sklearn.datasets``.
        problem: name of the problem that needs the data, for the message.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{problem}: its data ships with scikit-learn, which is not installed; pip install optex[studies]",
            name="sklearn",
        ) from error
    inputs, labels = getattr(datasets, loader)(return_X_y=True)
    return np.asarray(inputs), np.asarray(labels)


@lru_cache(maxsize=1)
def breast_cancer() -> tuple[Tensor, Tensor]:  # [569, 30] standardised, [569] of 0 and 1; float64
    """The Wisconsin breast cancer data.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    inputs, labels = scikit_learn_arrays("load_breast_cancer", LogisticBreastCancer.name)
    standardised = (inputs - inputs.mean(0)) / inputs.std(0)
    return torch.tensor(standardised, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [1437, 64], [1437], [360, 64], [360]; float32, int64
    inputs, labels = scikit_learn_arrays("load_digits", DigitsMLP.name)
    order = np.random.default_rng(0).permutation(len(inputs))  # one split for every seed
    pixels = torch.tensor(inputs[order] / 16.0, dtype=torch.float32)
    digits = torch.tensor(labels[order], dtype=torch.int64)
    return (
        pixels[_DIGITS_HELD_OUT:],
        digits[_DIGITS_HELD_OUT:],
        pixels[:_DIGITS_HELD_OUT],
        digits[:_DIGITS_HELD_OUT],
    )


@final
class LogisticBreastCancer(Problem):
    """Logistic regression on the Wisconsin breast cancer data, all 569 cases in every batch.

    F(w, b) = mean over cases of log(1 + exp(z)) - y z + ½ l2 ‖w‖², z = xᵀw + b, features standardised.
    It is strictly convex; ``minimum`` is computed by Newton's method when it is first asked for.

    Args:
        seed: of the start, uniform in ±1/√30 as for ``torch.nn.Linear``.
        l2: the penalty's weight, positive; the bias has none.
        dtype: of the parameters.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.
    """

    name = "logistic-breast-cancer"

    def __init__(self, seed: int = 0, l2: float = 1e-3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(seed)
        self.l2: float = check_positive("LogisticBreastCancer", "l2", l2)
        inputs, labels = breast_cancer()
        self.inputs: Tensor  # [569, 30]
        self.labels: Tensor  # [569]
        self.register_buffer("inputs", inputs.to(dtype), persistent=False)
        self.register_buffer("labels", labels.to(dtype), persistent=False)
        self.weight: nn.Parameter = nn.Parameter(torch.empty(inputs.shape[1], dtype=dtype))
        self.bias: nn.Parameter = nn.Parameter(torch.empty((), dtype=dtype))
        self.reset()

    def forward(self, batch: None) -> Tensor:
        logits = self.inputs @ self.weight + self.bias
        data_loss = functional.binary_cross_entropy_with_logits(logits, self.labels)
        return data_loss + 0.5 * self.l2 * (self.weight**2).sum()

    def batches(self) -> Iterator[None]:
        return repeat(None)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self(None))

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        bound = 1 / math.sqrt(len(self.weight))
        self.weight.uniform_(-bound, bound, generator=generator)
        self.bias.uniform_(-bound, bound, generator=generator)

    @property
    def deterministic(self) -> bool:
        return True

    @property
    def minimum(self) -> float:
        return _logistic_minimum(self.l2)


@lru_cache(maxsize=8)
def _logistic_minimum(l2: float) -> float:
    inputs, labels = breast_cancer()
    design = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)  # [569, 31], the last column is the bias
    penalty = torch.full_like(design[0], l2)
    penalty[-1] = 0

    def objective(w: Tensor) -> Tensor:
        logits = design @ w
        return functional.binary_cross_entropy_with_logits(logits, labels) + 0.5 * (penalty * w**2).sum()

    w = torch.zeros_like(penalty)
    for _ in range(_NEWTON_STEPS):
        probability = torch.sigmoid(design @ w)
        gradient = design.T @ (probability - labels) / len(labels) + penalty * w
        curvature = (probability * (1 - probability) / len(labels))[:, None] * design
        step = torch.linalg.solve(design.T @ curvature + torch.diag(penalty), gradient)
        length = 1.0
        while length > 1e-8 and objective(w - length * step) > objective(w):
            length /= 2
        w = w - length * step
    return float(objective(w))


@final
class DigitsMLP(Problem):
    """A 64-64-10 tanh network on scikit-learn's handwritten digits (8 × 8 pixels), cross entropy.

    There are 1,437 digits to train on and 360 held out, the same split for every seed. Each epoch is a new
    seeded permutation cut into batches of one size; the few digits left over are not used in that epoch.

    Args:
        seed: of the start (uniform in ±1/√fan-in, as for ``torch.nn.Linear``) and of the permutations.
        batch_size: digits a batch, 1 to 1,437.
        dtype: of the parameters.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.
    """

    name = "digits-mlp"

    def __init__(self, seed: int = 0, batch_size: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed)
        inputs, labels, test_inputs, test_labels = _digits()
        self.batch_size: int = check_integer("DigitsMLP", "batch_size", batch_size, most=len(inputs))
        self.inputs: Tensor  # [1437, 64]
        self.labels: Tensor  # [1437]
        self.test_inputs: Tensor  # [360, 64]
        self.test_labels: Tensor  # [360]
        self.register_buffer("inputs", inputs.to(dtype), persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("test_inputs", test_inputs.to(dtype), persistent=False)
        self.register_buffer("test_labels", test_labels, persistent=False)
        self.hidden: nn.Linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, 64, 64, dtype=dtype))
        self.output: nn.Linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, 64, 10, dtype=dtype))
        self.reset()

    def logits(
        self,
        inputs: Tensor,  # [n, 64]
    ) -> Tensor:  # [n, 10]
        """The network's scores."""
        return self.output(torch.tanh(self.hidden(inputs)))

    def forward(
        self,
        batch: tuple[Tensor, Tensor],  # [n, 64], [n]
    ) -> Tensor:
        inputs, labels = batch
        return functional.cross_entropy(self.logits(inputs), labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = seeded_generator(self.seed, "batches")
        whole = len(self.inputs) - len(self.inputs) % self.batch_size
        while True:
            order = torch.randperm(len(self.inputs), generator=generator)[:whole]
            for rows in order.split(self.batch_size):
                yield self.inputs[rows], self.labels[rows]

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self((self.inputs, self.labels)))

    @torch.no_grad()
    def test_error(self) -> float:
        """Share of the held-out digits that the network gets wrong."""
        wrong = self.logits(self.test_inputs).argmax(1) != self.test_labels
        return float(wrong.double().mean())

    @torch.no_grad()
    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        for layer in (self.hidden, self.output):
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
