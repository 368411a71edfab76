"""How much to regularise each class of a softmax classifier: a bilevel problem on handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from optex.checks import check_integer
from optex.sources import PenaltyHypergradient
from optex.studies.problems.interface import Problem, seeded_generator
from optex.studies.problems.tabular import scikit_learn_arrays

__all__ = ["DigitsRegularisation"]

_CLASSES: Final = 10
_COMPONENTS: Final = 20
_NEWTON_STEPS: Final = 8  # from 0, to rounding
_LENGTHS: Final = (1.0, 0.5, 0.25, 0.0625)  # of a Newton step; the best one is taken
_LEAST: Final = 1e-3  # weight
_SIGMA: Final = 1e-3


@final
class DigitsRegularisation(Problem):
    """The validation loss of a softmax classifier as a function of its classes' L2 weights.

    The upper variable x [10] has the logarithms of the weights, the lower variable y [10, 21] is the
    classifier, on the first 20 principal components of the 64 pixels and a constant:

        f(x, y) = mean cross entropy over the validation digits
        g(x, y) = mean cross entropy over the training digits + ½ Σ_c (0.001 + exp(x_c)) ‖y_c‖²

    The objective is f(x, y*(x)), with y* by Newton's method and its derivative by the implicit function
    theorem; the source's first-order hypergradient is compared with that. Half of the training labels of 5, 6,
    7, 8 and 9 are wrong, so that classes need different weights; the other labels are right, also those to
    validate and to test on. The least weight, 0.001, keeps the lower level's curvature above the penalty's σ.
    The split is the same for every seed; x is chosen by the validation digits, and only ``test_error`` sees the
    rest.

    Args:
        seed: of the start, uniform in [-4, -1]: weights from 0.02 to 0.37.
        train_size, held_size: digits to train and to validate on, at least 30 and 20; at least 100 of the 1,797
            must be left to test on.
        dtype: of the parameters.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.
    """

    name = "digits-regularisation"

    def __init__(
        self, seed: int = 0, train_size: int = 200, held_size: int = 300, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__(seed)
        images, labels = scikit_learn_arrays("load_digits", self.name)
        most = len(labels) - 100
        self.train_size: int = check_integer(
            "DigitsRegularisation", "train_size", train_size, least=30, most=most - 20
        )
        held = check_integer("DigitsRegularisation", "held_size", held_size, least=20, most=most - train_size)
        order = np.random.default_rng(0).permutation(len(labels))
        ends = (train_size, train_size + held)
        pixels = images[order] / 16.0
        centre = pixels[:train_size].mean(0)
        _, _, components = np.linalg.svd(pixels[:train_size] - centre, full_matrices=False)
        scores = (pixels - centre) @ components[:_COMPONENTS].T
        inputs = torch.tensor(np.hstack([scores, np.ones_like(scores[:, :1])]), dtype=dtype)
        digits = torch.tensor(labels[order], dtype=torch.int64)
        wrong = torch.arange(len(digits)) % 2 == 0
        wrong &= (digits >= _CLASSES // 2) & (torch.arange(len(digits)) < train_size)
        others = torch.tensor(np.random.default_rng(1).integers(1, _CLASSES, len(digits)))
        digits = torch.where(wrong, (digits + others) % _CLASSES, digits)
        names = ("train", "held", "test")
        for name, rows, targets in zip(
            names, inputs.tensor_split(ends), digits.tensor_split(ends), strict=True
        ):
            self.register_buffer(f"{name}_inputs", rows, persistent=False)
            self.register_buffer(f"{name}_labels", targets, persistent=False)
        self.log_weights: nn.Parameter = nn.Parameter(torch.empty(_CLASSES, dtype=dtype))
        self.reset()

    # ------------------------------------------------------------------ the two levels

    def upper(
        self,
        x: Tensor,  # [10]
        y: Tensor,  # [10, 21]
        batch: object = None,
    ) -> Tensor:  # []
        """f."""
        return functional.cross_entropy(self.get_buffer("held_inputs") @ y.T, self.get_buffer("held_labels"))

    def lower(
        self,
        x: Tensor,  # [10]
        y: Tensor,  # [10, 21]
        batch: object = None,
    ) -> Tensor:  # []
        """g."""
        logits = self.get_buffer("train_inputs") @ y.T
        penalty = 0.5 * ((_LEAST + x.exp()) @ y.square().sum(1))
        return functional.cross_entropy(logits, self.get_buffer("train_labels")) + penalty

    def source(self) -> PenaltyHypergradient:
        return PenaltyHypergradient(
            self.upper,
            self.lower,
            self.log_weights,
            torch.zeros_like(self.get_buffer("test_inputs")[:_CLASSES]),
            sigma=_SIGMA,
            deterministic=True,
        )

    # ------------------------------------------------------------------ the exact gradient

    def forward(self, batch: object = None) -> Tensor:
        x = self.log_weights
        with torch.no_grad():
            y = self.solve(x)
            curvature = self._curvature(x, y)
        # y* as a function of x whose derivative is -H⁻¹ ∂∇_y g/∂x; its value is y, where ∇_y g is 0.
        step = torch.linalg.solve(curvature, self._slope(x, y).reshape(-1)).view_as(y)
        return self.upper(x, y - step)

    def solve(
        self,
        x: Tensor,  # [10]
    ) -> Tensor:  # [10, 21]
        """y*(x), by eight Newton steps from 0, without branches on values, so that it can be vectorized."""
        x = x.detach()
        y = x[:, None] * torch.zeros_like(self.get_buffer("test_inputs")[:_CLASSES])
        for _ in range(_NEWTON_STEPS):
            step = torch.linalg.solve(self._curvature(x, y), self._slope(x, y).reshape(-1)).view_as(y)
            trials = torch.stack([y - length * step for length in _LENGTHS])
            values = torch.stack([self.lower(x, trial) for trial in trials])
            best = (values == values.amin(0)).to(y.dtype)  # several are equal where the step is 0 to rounding
            y = (best[:, None, None] * trials).sum(0) / best.sum(0)
        return y

    def _slope(
        self,
        x: Tensor,  # [10]
        y: Tensor,  # [10, 21]
    ) -> Tensor:  # [10, 21]
        """∇_y g."""
        inputs = self.get_buffer("train_inputs")
        wanted = functional.one_hot(self.get_buffer("train_labels"), _CLASSES).to(y.dtype)
        of_data = (torch.softmax(inputs @ y.T, 1) - wanted).T @ inputs / len(inputs)
        return of_data + (_LEAST + x.exp())[:, None] * y

    def _curvature(
        self,
        x: Tensor,  # [10]
        y: Tensor,  # [10, 21]
    ) -> Tensor:  # [210, 210]
        """∇²_y g."""
        inputs = self.get_buffer("train_inputs")
        shares = torch.softmax(inputs @ y.T, 1)  # [n, 10]
        scaled = shares[:, :, None] * inputs[:, None, :]  # [n, 10, 21]
        rows = scaled.reshape(len(inputs), -1)
        own = torch.einsum("ncj,nk->cjk", scaled, inputs)  # [10, 21, 21]
        own = own / len(inputs) + (_LEAST + x.exp())[:, None, None] * torch.eye(y.shape[1], dtype=y.dtype)
        same = torch.eye(_CLASSES, dtype=y.dtype)
        blocks = torch.einsum("cjk,cd->cjdk", own, same).reshape(y.numel(), y.numel())
        return blocks - rows.T @ rows / len(inputs)

    # ------------------------------------------------------------------ a problem

    def batches(self) -> Iterator[None]:
        return repeat(None)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self.upper(self.log_weights, self.solve(self.log_weights)))

    @torch.no_grad()
    def test_error(self) -> float:
        """Share of the test digits that the classifier gets wrong."""
        logits = self.get_buffer("test_inputs") @ self.solve(self.log_weights).T
        return float((logits.argmax(1) != self.get_buffer("test_labels")).double().mean())

    @torch.no_grad()
    def reset(self) -> None:
        self.log_weights.uniform_(-4, -1, generator=seeded_generator(self.seed, "start"))

    @property
    def deterministic(self) -> bool:
        return True
