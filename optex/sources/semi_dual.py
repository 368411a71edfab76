"""Gradients of sparsity-constrained optimal transport's semi-dual, of all columns or of minibatches of them.

Liu, Puigcerver, Blondel: *Sparsity-Constrained Optimal Transport*, ICLR 2023, arXiv 2209.15466.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from optex.checks import check_flag, check_integer
from optex.errors import NonFiniteError
from optex.solvers.transport import semi_dual
from optex.solvers.transport.arguments import TransportProblem
from optex.sources.interface import GradientSource

__all__ = ["SemiDualSource"]

_OWNER: Final = "SemiDualSource"


class SemiDualSource(GradientSource):
    """Minus the semi-dual of :func:`~optex.sparse_ot`, to be minimised over its potential α.

        F(α) = -a·α + Σ_j b_j h_j(α),   h_j(α) = max_p ⟨α - C_j, p⟩ - γ b_j/2 ‖p‖²,   p k-sparse in the simplex
        ∇F(α) = Σ_j b_j p_j - a

    Without ``sampled`` a gradient is of all n columns, and exact. With it a batch is a tensor of column
    numbers, all different, and the gradient is ``(n / B) Σ_j∈batch b_j p_j - a``: unbiased where columns are
    drawn uniformly. From two columns on the spread S² of its terms gives its noise variance,
    ``S² / B · (1 - B / n)``.

    α is a potential: adding a constant to it changes nothing. ``source.plan()`` is the plan at the present α.

    Args:
        alpha: the parameter, [m], floating-point.
        a, b, C, gamma, k: one problem, as :func:`~optex.sparse_ot` takes it: [m], [n], [m, n].
        sampled: gradients come from batches of columns.

    Raises:
        TypeError, ValueError: an argument cannot work; in a call, a batch is no tensor of different column
            numbers.
        NonFiniteError: in a call, α is not finite.

    >>> import torch, optex
    >>> x, y = torch.linspace(0, 1, 6).double(), torch.linspace(0, 1, 3).double()
    >>> alpha = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    >>> a, b, C = torch.full((6,), 1 / 6), torch.full((3,), 1 / 3), (x[:, None] - y).square()
    >>> source = optex.SemiDualSource(alpha, a, b, C, gamma=0.1, k=3)
    >>> optimizer = optex.OptEx(torch.optim.SGD([alpha], lr=0.04), parallelism=4)
    >>> for report in optimizer.rounds([None] * 60, source):
    ...     pass
    >>> bool((source.plan().sum(1) - 1 / 6).abs().max() < 1e-3)
    True

    Source: Liu, Puigcerver, Blondel, ICLR 2023, arXiv 2209.15466, its semi-dual; minibatches of columns and
    their noise are ours.
    """

    def __init__(
        self, alpha: Tensor, a: Any, b: Any, C: Any, gamma: float, k: int, *, sampled: bool = False
    ) -> None:
        if not isinstance(alpha, Tensor) or not alpha.is_floating_point() or alpha.ndim != 1:
            came = f"{alpha.dtype} {list(alpha.shape)}" if isinstance(alpha, Tensor) else type(alpha).__name__
            raise TypeError(f"{_OWNER}: alpha must be a floating-point tensor [m], got {came}")
        problem = TransportProblem.read(_OWNER, a, b, C, gamma, k)
        if problem.shape:
            raise ValueError(f"{_OWNER}: C must be one problem [m, n], got a batch {list(problem.shape)}")
        if len(alpha) != problem.a.shape[1]:
            raise ValueError(f"{_OWNER}: alpha must be [{problem.a.shape[1]}], got {list(alpha.shape)}")
        self.alpha: Tensor = alpha
        self.a: Tensor = problem.a[0].to(alpha)
        self.b: Tensor = problem.b[0].to(alpha)
        self.costs: Tensor = problem.costs[0].to(alpha)
        self.gamma: float = problem.gamma
        self.k: int = problem.k
        self.sampled: bool = check_flag(_OWNER, "sampled", sampled)
        self.deterministic: bool = not sampled

    @torch.no_grad()
    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        alpha = self._finite_alpha()
        columns = self._columns(batch) if self.sampled else None
        if columns is None:
            found = semi_dual(alpha, self.a, self.b, self.costs, self.gamma, self.k)
            self.alpha.grad = found.plan.sum(0) - self.a
            return -found.value, torch.zeros_like(found.value)
        n, count = len(self.b), len(columns)
        found = semi_dual(alpha, self.a, self.b[columns], self.costs[columns], self.gamma, self.k)
        self.alpha.grad = found.plan.mean(0) * n - self.a
        part = found.value - self.a @ alpha  # minus the columns' sum
        loss = -(self.a @ alpha) - part * (n / count)
        if count < 2:
            return loss, None
        return loss, (found.plan * n).var(0).mean() / count * (1 - count / n)

    @torch.no_grad()
    def plan(self) -> Tensor:  # [m, n]
        """The plan at the parameter's present values; its columns carry their masses."""
        alpha = self._finite_alpha()
        return semi_dual(alpha, self.a, self.b, self.costs, self.gamma, self.k).plan.T.contiguous()

    def batches(self, size: int, seed: int = 0) -> Iterator[Tensor]:  # of [size]
        """Endless batches: every epoch permutes the columns anew, and drops those that do not fill a batch.

        Raises:
            ValueError: ``size`` is not an integer from 1 to n.
        """
        check_integer(_OWNER, "size", size, most=len(self.b))
        return self._permuted(size, torch.Generator().manual_seed(seed))

    def _permuted(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        whole = len(self.b) - len(self.b) % size
        while True:
            yield from torch.randperm(len(self.b), generator=generator)[:whole].split(size)

    def _finite_alpha(self) -> Tensor:  # [m]
        alpha = self.alpha.detach()
        if not bool(alpha.isfinite().all()):
            raise NonFiniteError(f"{_OWNER}: the potential alpha is not finite; lower the rate, or start anew")
        return alpha

    def _columns(self, batch: Any) -> Tensor:  # [B]
        if not isinstance(batch, Tensor) or batch.dtype != torch.int64 or batch.ndim != 1 or not len(batch):
            came = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else repr(batch)[:60]
            raise TypeError(f"{_OWNER}: with sampled=True a batch is an int64 tensor of columns, got {came}")
        if len(batch.unique()) < len(batch):
            raise ValueError(f"{_OWNER}: a batch has different columns; got one twice in {batch.tolist()[:20]}")
        if int(batch.min()) < 0 or int(batch.max()) >= len(self.b):
            raise ValueError(
                f"{_OWNER}: a batch has columns from 0 to {len(self.b) - 1}, got {int(batch.min())} to "
                f"{int(batch.max())}; source.batches(size) draws them"
            )
        return batch.to(self.costs.device)
