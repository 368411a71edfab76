"""The history: the last T0 pairs of iterate and true gradient, and their inner products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optex.linalg import inner_products, squared_distances

__all__ = ["GradientHistory"]


class GradientHistory:
    """Ring buffer of the last ``size`` pairs (θ_j, ∇f(θ_j)), with Gram matrices kept up to date.

    Iterates are stored as displacements from an *anchor* that follows the run: iterates of one run differ
    in their last digits, and the difference of two neighbours is exact where their norms would cancel. The
    anchor moves to the newest iterate each time the ring has been filled anew.

    Pairs at the same iterate are merged: their gradients are averaged and ``counts`` says how many, which
    for a Gaussian process with noise σ² / count is the same posterior. A merged or unfilled slot has count
    0, zeros for its row, and takes no part in anything.

    Args:
        size: T0, how many pairs are kept, at least 1.
        dimension: d, the length of a flat iterate.
        dtype: of the stored rows; the small matrices are float64 whatever it is.
        device: of the stored rows.

    Memory: 2 · T0 · d + d numbers of ``dtype`` (the anchor: of the iterates' dtype).
    """

    def __init__(
        self,
        size: int,
        dimension: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise ValueError(f"GradientHistory: size must be at least 1, got {size}")
        self.size = size
        self.dimension = dimension
        self.displacements = torch.zeros(size, dimension, dtype=dtype, device=device)  # [T0, d]
        self.gradients = torch.zeros(size, dimension, dtype=dtype, device=device)  # [T0, d]
        self.counts = torch.zeros(size, dtype=torch.float64, device=device)  # [T0]
        self.iterate_gram = torch.zeros(size, size, dtype=torch.float64, device=device)  # [T0, T0]
        self._gradient_gram = torch.zeros_like(self.iterate_gram)  # [T0, T0]
        self._stale: set[int] = set()  # rows of the gradient Gram matrix to bring up to date
        self.anchor: Tensor | None = None  # [d]
        self.appended = 0
        self._since_anchored = 0

    def __len__(self) -> int:
        """Slots in use (merged pairs count as the slots they took)."""
        return min(self.appended, self.size)

    @property
    def active(self) -> Tensor:  # [T0] bool
        """Which slots hold a pair."""
        return self.counts > 0

    @property
    def newest(self) -> int:
        """The slot of the last pair appended."""
        return (self.appended - 1) % self.size

    @property
    def gradient_gram(self) -> Tensor:  # [T0, T0] float64
        """Inner products of the gradients, brought up to date on demand with one product of new by all."""
        if self._stale:
            rows = sorted(self._stale)
            products = inner_products(self.gradients[rows], self.gradients)
            self._gradient_gram[rows] = products
            self._gradient_gram[:, rows] = products.mT
            self._stale.clear()
        return self._gradient_gram

    def pairwise_squared_distances(self) -> Tensor:  # [T0, T0] float64
        """‖θ_i - θ_j‖²; zero on the diagonal, meaningless where a slot is not active."""
        norms = self.iterate_gram.diagonal()
        return squared_distances(norms, norms, self.iterate_gram).fill_diagonal_(0)

    def squared_distances_to(
        self,
        points: Tensor,  # [n, d]
    ) -> Tensor:  # [n, T0] float64
        """‖θ - θ_j‖² from each point to each stored iterate."""
        offsets = self.displacement(points)
        norms = torch.stack([inner_products(row[None], row[None])[0, 0] for row in offsets])
        products = inner_products(offsets, self.displacements)
        return squared_distances(norms, self.iterate_gram.diagonal(), products)

    def displacement(
        self,
        points: Tensor,  # [..., d]
    ) -> Tensor:  # [..., d]
        """Points as displacements from the anchor, subtracted in the wider of the two precisions."""
        dtype = torch.promote_types(points.dtype, self.displacements.dtype)
        return points.to(self.displacements.device, dtype) - self._anchor().to(dtype)

    def append(
        self,
        points: Tensor,  # [n, d]
        gradients: Tensor,  # [n, d]
    ) -> None:
        """Remember n pairs, oldest first; the oldest ones stored make room.

        Raises:
            ValueError: shapes differ from [n, dimension].
        """
        if points.shape != gradients.shape or points.ndim != 2 or points.shape[1] != self.dimension:
            raise ValueError(
                f"GradientHistory.append: points {tuple(points.shape)} and gradients {tuple(gradients.shape)} "
                f"must both be [n, {self.dimension}]"
            )
        if not len(points):
            return
        points, gradients = points[-self.size :], gradients[-self.size :]
        device = self.displacements.device
        if self.anchor is None:
            self.anchor = points[-1].to(device, copy=True)
        elif self._since_anchored >= self.size:
            self._move_anchor(points[-1])
        slots = [(self.appended + i) % self.size for i in range(len(points))]
        self.displacements[slots] = self.displacement(points).to(self.displacements.dtype)
        self.gradients[slots] = gradients.to(device, self.gradients.dtype)
        self.counts[slots] = 1.0
        products = inner_products(self.displacements[slots], self.displacements)
        self.iterate_gram[slots] = products
        self.iterate_gram[:, slots] = products.mT
        self._stale.update(slots)
        self.appended += len(points)
        self._since_anchored += len(points)
        self._merge_duplicates(slots)

    def _anchor(self) -> Tensor:
        if self.anchor is None:
            raise RuntimeError("GradientHistory: the history is empty; append a pair first")
        return self.anchor

    def _move_anchor(self, point: Tensor) -> None:
        shift = self.displacement(point).to(self.displacements.dtype)
        self.displacements -= torch.where(self.active[:, None], shift, torch.zeros_like(shift))
        self._anchor().copy_(point)
        self.iterate_gram = inner_products(self.displacements, self.displacements)
        self._since_anchored = 0

    def _merge_duplicates(self, slots: list[int]) -> None:
        # The Gram matrix proposes, a direct difference decides: only rows equal to rounding are merged.
        eps = torch.finfo(self.displacements.dtype).eps
        norms = self.iterate_gram.diagonal()
        bound = 4 * eps * (norms[slots][:, None] + norms)
        close = (self.pairwise_squared_distances()[slots] <= bound) & self.active
        for slot, row in zip(slots, close.tolist(), strict=True):
            for other, candidate in enumerate(row):
                if candidate and other != slot and self._same_iterate(slot, other, eps):
                    self._merge(other, into=slot)

    def _same_iterate(self, left: int, right: int, eps: float) -> bool:
        if not self.counts[left] or not self.counts[right]:
            return False
        gap = (self.displacements[left] - self.displacements[right]).norm()
        return bool(gap <= 2 * eps * self.displacements[left].norm())

    def _merge(self, other: int, *, into: int) -> None:
        # The later slot wins, so that the pair is forgotten when its newest observation would be.
        if self._age(other) < self._age(into):
            other, into = into, other
        total = self.counts[into] + self.counts[other]
        share = self.counts[other] / total
        self.gradients[into] += share.to(self.gradients.dtype) * (self.gradients[other] - self.gradients[into])
        self.counts[into] = total
        self.gradients[other] = 0.0
        self.displacements[other] = 0.0
        self.counts[other] = 0.0
        self.iterate_gram[other] = 0.0
        self.iterate_gram[:, other] = 0.0
        self._stale.update((into, other))

    def _age(self, slot: int) -> int:
        return (self.newest - slot) % self.size

    def clear(self) -> None:
        """Forget everything."""
        for tensor in (self.displacements, self.gradients, self.counts, self.iterate_gram, self._gradient_gram):
            tensor.zero_()
        self._stale.clear()
        self.anchor = None
        self.appended = 0
        self._since_anchored = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit; tensors are copies."""
        return {
            "displacements": self.displacements.clone(),
            "gradients": self.gradients.clone(),
            "counts": self.counts.clone(),
            "iterate_gram": self.iterate_gram.clone(),
            "gradient_gram": self.gradient_gram.clone(),
            "anchor": None if self.anchor is None else self.anchor.clone(),
            "appended": self.appended,
            "since_anchored": self._since_anchored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved history of the same size and dimension.

        Raises:
            ValueError: size or dimension differ.
        """
        if state["displacements"].shape != self.displacements.shape:
            raise ValueError(
                f"GradientHistory.load_state_dict: saved rows are {tuple(state['displacements'].shape)} "
                f"[T0, d], this history's {tuple(self.displacements.shape)}; build it with the same "
                "history_size and parameters"
            )
        self.displacements.copy_(state["displacements"])
        self.gradients.copy_(state["gradients"])
        self.counts.copy_(state["counts"])
        self.iterate_gram.copy_(state["iterate_gram"])
        self._gradient_gram.copy_(state["gradient_gram"])
        self._stale.clear()
        anchor = state["anchor"]
        self.anchor = None if anchor is None else anchor.to(self.displacements.device, copy=True)
        self.appended = state["appended"]
        self._since_anchored = state["since_anchored"]
