"""Transport of one photograph's colours to another's: the semi-dual of sparse optimal transport."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn

from optex.checks import check_integer, check_number
from optex.solvers import sparse_ot
from optex.solvers.transport import semi_dual
from optex.sources import SemiDualSource
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["SparseTransport", "sample_colours"]

_PICTURES: Final = ("china.jpg", "flower.jpg")


@lru_cache(maxsize=4)
def sample_colours(count: int, which: int) -> Tensor:  # [count, 3] float64, 0 to 1
    """Colours of random pixels of one of scikit-learn's two photographs.

    Args:
        count: how many pixels.
        which: photograph, 0 or 1; also the seed of the draw.

    Raises:
        ModuleNotFoundError: scikit-learn or Pillow, which reads its photographs, is not installed.
    """
    try:
        from sklearn.datasets import load_sample_image

        pixels = np.asarray(load_sample_image(_PICTURES[which])).reshape(-1, 3)
    except ImportError as error:
        raise ModuleNotFoundError(
            "sparse-transport: its photographs ship with scikit-learn and are read by Pillow, one of which is "
            "not installed; pip install optex[studies]",
            name="sklearn",
        ) from error
    chosen = np.random.default_rng(which).choice(len(pixels), count, replace=False)
    return torch.tensor(pixels[chosen] / 255.0, dtype=torch.float64)


@final
class SparseTransport(Problem):
    """Match colours of one photograph with those of another, each target with at most k sources.

    The loss is minus the semi-dual of :func:`~optex.sparse_ot` as a function of the potential α [m]. There are
    m colours of ``china.jpg`` and n of ``flower.jpg``, with uniform masses; costs are squared distances in RGB,
    divided by the largest. Adding a constant to α does not change the loss.

    Args:
        seed: of the start, uniform in ±0.1, and of the batches.
        sources, targets: m and n, from 1 to 100,000.
        k: nonzeros in a column of the plan, at most m; None is m, which is quadratic regularisation.
        gamma: γ, the weight of the regularisation, positive.
        columns: targets a batch, at most n; None is all, and gradients are then exact.

    Raises:
        ModuleNotFoundError: scikit-learn or Pillow is not installed.
        ValueError: an argument is out of range.

    Source: Liu, Puigcerver, Blondel, ICLR 2023, arXiv 2209.15466.
    """

    name = "sparse-transport"

    def __init__(
        self,
        seed: int = 0,
        sources: int = 100,
        targets: int = 20,
        k: int | None = None,
        gamma: float = 1.0,
        columns: int | None = None,
    ) -> None:
        super().__init__(seed)
        owner = "SparseTransport"
        check_integer(owner, "sources", sources, most=100_000)
        check_integer(owner, "targets", targets, most=100_000)
        self.k: int = sources if k is None else check_integer(owner, "k", k, most=sources)
        self.gamma: float = check_number(owner, "gamma", gamma, open_below=True)
        self.columns: int | None = (
            columns if columns is None else check_integer(owner, "columns", columns, most=targets)
        )
        costs = torch.cdist(sample_colours(sources, 0), sample_colours(targets, 1)).square()
        self.costs: Tensor  # [m, n]
        self.a: Tensor  # [m]
        self.b: Tensor  # [n]
        self.register_buffer("costs", costs / costs.max(), persistent=False)
        self.register_buffer("a", costs.new_full((sources,), 1 / sources), persistent=False)
        self.register_buffer("b", costs.new_full((targets,), 1 / targets), persistent=False)
        self.alpha: nn.Parameter = nn.Parameter(torch.empty(sources, dtype=torch.float64))
        self.reset()
        self.source()  # refuses what the checks above have let pass

    def source(self) -> SemiDualSource:
        return SemiDualSource(
            self.alpha, self.a, self.b, self.costs, self.gamma, self.k, sampled=not self.deterministic
        )

    def forward(
        self,
        batch: Tensor | None,  # [columns], or None for all
    ) -> Tensor:
        costs, b = self.costs.T, self.b
        if batch is not None:
            costs, b = costs[batch], b[batch]
        # By the envelope theorem the gradient in α is that with the plan held constant.
        plan = semi_dual(self.alpha.detach(), self.a, b, costs, self.gamma, self.k, traced=True).plan
        parts = ((self.alpha - costs) * plan).sum() - self.gamma / 2 * plan.square().sum()
        return parts * (len(self.b) / len(b)) - self.a @ self.alpha

    def batches(self) -> Iterator[Tensor | None]:
        if self.columns is None:
            return repeat(None)
        return self._sampled(self.columns)

    def _sampled(self, size: int) -> Iterator[Tensor]:  # of [size]
        generator = seeded_generator(self.seed, "batches")
        whole = len(self.b) - len(self.b) % size
        while True:
            yield from torch.randperm(len(self.b), generator=generator)[:whole].split(size)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self(None))

    @torch.no_grad()
    def reset(self) -> None:
        self.alpha.uniform_(-0.1, 0.1, generator=seeded_generator(self.seed, "start"))

    @property
    def deterministic(self) -> bool:
        return self.columns is None

    @property
    def minimum(self) -> float | None:
        """None where the limit of k nonzeros is active: the solver then ends near a kink, not at a minimum."""
        found = sparse_ot(self.a, self.b, self.costs, self.gamma, self.k)
        return -float(found.value) if found.success else None
