"""The history: the last T0 pairs of iterate and true gradient, and their inner products."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from optex.linalg import inner_products, squared_distances, squared_norms
from optex.vector_space import Space

__all__ = ["GradientHistory", "Locations"]

FARTHEST_ANCHOR: Final = 3.0  # median distances from the newest iterate


class Locations:
    """Points seen from a history: their inner products with its rows, each computed once, when asked for.

    Several posteriors of one history share them.

    Attributes:
        history: the history.
        points: [n, d].
    """

    def __init__(
        self,
        history: GradientHistory,
        points: Tensor,  # [n, d]
    ) -> None:
        self.history = history
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Locations:
        """One of the points, with what is known of it."""
        if self.history.space.is_split:
            _ = self.on_gradients  # of all points in one message, rather than one for each
        one = Locations(self.history, self.points[index : index + 1])
        for name in ("offsets", "on_gradients"):
            if name in self.__dict__:
                one.__dict__[name] = self.__dict__[name][index : index + 1]
        if "_near" in self.__dict__:
            one.__dict__["_near"] = tuple(products[index : index + 1] for products in self._near)
        return one

    @cached_property
    def offsets(self) -> Tensor:  # [n, d]
        """Displacements from the history's anchor."""
        return self.history.displacement(self.points)

    @property
    def norms(self) -> Tensor:  # [n] float64
        """Squared norms of the offsets."""
        return self._near[0]

    @property
    def on_displacements(self) -> Tensor:  # [n, T0] float64
        """Inner products of the offsets with the stored displacements."""
        return self._near[1]

    @cached_property
    def on_gradients(self) -> Tensor:  # [n, T0] float64
        """Inner products of the offsets with the stored gradients; they bring the others along."""
        products = inner_products(self.offsets, self.history.gradients)
        if "_near" in self.__dict__:
            return self.history.space.total(products)[0]
        products, *near = self.history.space.total(products, *self._near_here())
        self.__dict__["_near"] = tuple(near)  # came along in the same message between processes
        return products

    @cached_property
    def _near(self) -> tuple[Tensor, ...]:  # [n], [n, T0]
        return self.history.space.total(*self._near_here())

    def _near_here(self) -> tuple[Tensor, Tensor]:
        return squared_norms(self.offsets), inner_products(self.offsets, self.history.displacements)

    @property
    def squared_distances(self) -> Tensor:  # [n, T0] float64
        """‖θ - θ_j‖² from each point to each stored iterate."""
        return squared_distances(self.norms, self.history.iterate_gram.diagonal(), self.on_displacements)


class GradientHistory:
    """Ring buffer of the last ``size`` pairs (θ_j, ∇f(θ_j)), with Gram matrices kept up to date.

    Iterates are stored as displacements from an *anchor* that follows the run: iterates of one run differ
    in their last digits, and the difference of two neighbours is exact where their norms would cancel. The
    anchor moves to the newest iterate when that is far from it in units of the distances in the history.

    Pairs at the same iterate are merged: the newest of them stands for all, ``counts`` says for how many and
    ``averaging`` takes the mean of their gradients, which with noise σ² / count is the same posterior and
    keeps kernel matrices regular. The pairs themselves stay, so each is forgotten in its own time.

    Attributes:
        displacements, gradients: [T0, d], the pairs by slot; zeros where a slot is not filled yet.
        counts: [T0] float64, how many pairs a slot stands for; 0 where it is unfilled or merged into another.
        averaging: [T0, T0] float64; ``averaging @ gradients`` are the merged gradients, zero where count is 0.
        representatives: the slots with a count, in order.
        iterate_gram: [T0, T0] float64, inner products of the displacements.
        anchor: [d], None while the history is empty.
        appended: pairs ever appended.
        noisy: whether the gradients are of minibatches; for whoever appends to say.

    Args:
        size: T0, how many pairs are kept, at least 1.
        dimension: d, the length of a flat iterate; or the space that iterates live in.
        dtype: of the stored rows; the small matrices are float64 whatever it is.
        device: of the stored rows.

    Memory: 2 · T0 · d + d numbers of ``dtype`` (the anchor: of the iterates' dtype). In a space
    that is split among processes the rows here are this process's slices, and the Gram matrices are of the whole.

    Raises:
        ValueError: ``size`` is less than 1.
    """

    def __init__(
        self,
        size: int,
        dimension: int | Space,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise ValueError(f"GradientHistory: size must be at least 1, got {size}")
        self.space = dimension if isinstance(dimension, Space) else Space(dimension)
        self.dimension = self.space.dimension
        self.size = size
        self.anchor: Tensor | None = None  # [d]
        self.appended = 0
        self.noisy = False
        width = self.space.width
        self.displacements = torch.zeros(size, width, dtype=dtype, device=device)  # [T0, d]
        self.gradients = torch.zeros(size, width, dtype=dtype, device=device)  # [T0, d]
        self.iterate_gram = torch.zeros(size, size, dtype=torch.float64, device=device)  # [T0, T0]
        self._groups: list[int | None] = [None] * size  # slots of one iterate share a number
        self._merge_groups()
        self._gradient_gram = torch.zeros_like(self.iterate_gram)  # [T0, T0]
        self._cross_gram = torch.zeros_like(self.iterate_gram)  # [T0, T0]
        self._stale: set[int] = set()  # rows of the gradient Gram matrix to bring up to date
        self._cross_stale: set[int] = set()  # rows and columns of the cross Gram matrix, likewise

    def __len__(self) -> int:
        """Pairs held."""
        return min(self.appended, self.size)

    @property
    def active(self) -> Tensor:  # [T0] bool
        """Which slots stand for an iterate."""
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
            products = self.space.inner_products(self.gradients[rows], self.gradients)
            self._gradient_gram[rows] = products
            self._gradient_gram[:, rows] = products.mT
            self._stale.clear()
        return self._gradient_gram

    @property
    def cross_gram(self) -> Tensor:  # [T0, T0] float64
        """Inner products of gradient i with displacement j, brought up to date on demand likewise."""
        if self._cross_stale:
            rows = sorted(self._cross_stale)
            parts = [inner_products(self.gradients[rows], self.displacements)]
            if len(rows) < self.size:
                parts.append(inner_products(self.gradients, self.displacements[rows]))
            self._cross_gram[rows], *others = self.space.total(*parts)
            for columns in others:
                self._cross_gram[:, rows] = columns
            self._cross_stale.clear()
        return self._cross_gram

    @property
    def filled(self) -> Tensor:  # [T0] bool
        """Which slots hold a pair."""
        return torch.arange(self.size, device=self.counts.device) < self.appended

    def pairwise_squared_distances(self) -> Tensor:  # [T0, T0] float64
        """‖θ_i - θ_j‖²; exactly zero for one iterate, meaningless where a slot is not filled."""
        norms = self.iterate_gram.diagonal()
        return squared_distances(norms, norms, self.iterate_gram).masked_fill_(self._same, 0)

    def median_squared_distance(self) -> Tensor:  # [] float64
        """Median of the positive squared distances between the pairs held; NaN where there is none."""
        squared = self.pairwise_squared_distances()
        pairs = self.filled[:, None] & self.filled & (squared > torch.finfo(squared.dtype).tiny)
        return torch.where(pairs, squared, torch.nan).nanmedian()

    def locate(
        self,
        points: Tensor,  # [n, d]
    ) -> Locations:
        """Points as predictions need to know them; good until the next ``append``."""
        return Locations(self, points)

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
        if points.shape != gradients.shape or points.ndim != 2 or points.shape[1] != self.space.width:
            raise ValueError(
                f"GradientHistory.append: points {tuple(points.shape)} and gradients {tuple(gradients.shape)} "
                f"must both be [n, {self.space.width}]"
            )
        if not len(points):
            return
        points, gradients = points[-self.size :], gradients[-self.size :]
        device = self.displacements.device
        if self.anchor is None:
            self.anchor = points[-1].to(device, copy=True)
        slots = [(self.appended + i) % self.size for i in range(len(points))]
        self.displacements[slots] = self.displacement(points).to(self.displacements.dtype)
        self.gradients[slots] = gradients.to(device, self.gradients.dtype)
        products = self.space.inner_products(self.displacements[slots], self.displacements)
        self.iterate_gram[slots] = products
        self.iterate_gram[:, slots] = products.mT
        self._stale.update(slots)
        self._cross_stale.update(slots)
        self.appended += len(points)
        self._find_duplicates(slots)
        self._follow(points[-1])

    def _anchor(self) -> Tensor:
        if self.anchor is None:
            raise RuntimeError("GradientHistory: the history is empty; append a pair first")
        return self.anchor

    def _follow(
        self,
        point: Tensor,  # [d]
    ) -> None:
        """Move the anchor to the newest iterate where inner products with the old one lose digits."""
        distance = self.iterate_gram[self.newest, self.newest]
        if distance <= FARTHEST_ANCHOR**2 * self.median_squared_distance():
            return
        shift = self.displacement(point).to(self.displacements.dtype)
        self.displacements -= torch.where(self.filled[:, None], shift, torch.zeros_like(shift))
        self._anchor().copy_(point)
        self.iterate_gram = self.space.inner_products(self.displacements, self.displacements)
        self._cross_stale.update(range(self.size))

    def _find_duplicates(self, slots: list[int]) -> None:
        # The Gram matrix proposes, a direct difference decides: only rows equal to rounding are merged.
        eps = torch.finfo(self.displacements.dtype).eps
        norms = self.iterate_gram.diagonal()
        gaps = squared_distances(norms[slots], norms, self.iterate_gram[slots])
        close = (gaps <= 4 * eps * (norms[slots][:, None] + norms)).tolist()
        numbers = range(self.appended - len(slots), self.appended)
        for slot, number in zip(slots, numbers, strict=True):
            self._groups[slot] = number
        for slot, row in zip(slots, close, strict=True):
            for other, candidate in enumerate(row):
                group = self._groups[other]
                if candidate and other != slot and group is not None and self._same_iterate(slot, other, eps):
                    self._groups[slot] = group
                    break
        self._merge_groups()

    def _same_iterate(self, left: int, right: int, eps: float) -> bool:
        gap, norm = self.space.norms(
            [self.displacements[left] - self.displacements[right], self.displacements[left]]
        )
        return bool(gap <= 2 * eps * norm)

    def _merge_groups(self) -> None:
        device = self.displacements.device
        # The newest member stands for its group: it is the last to be overwritten.
        newest_first = [(self.newest - age) % self.size for age in range(len(self))]
        members: dict[int | None, list[int]] = {}
        for slot in newest_first:
            members.setdefault(self._groups[slot], []).append(slot)
        averaging = torch.zeros(self.size, self.size, dtype=torch.float64)
        counts = torch.zeros(self.size, dtype=torch.float64)
        same = torch.eye(self.size, dtype=torch.bool)
        self.representatives = sorted(slots[0] for slots in members.values())
        for slots in members.values():
            counts[slots[0]] = len(slots)
            averaging[slots[0], slots] = 1 / len(slots)
            if len(slots) > 1:
                same[torch.tensor(slots)[:, None], slots] = True
        self.averaging, self.counts, self._same = averaging.to(device), counts.to(device), same.to(device)

    def clear(self) -> None:
        """Forget everything."""
        for tensor in (self.displacements, self.gradients, self.iterate_gram, self._gradient_gram):
            tensor.zero_()
        self._cross_gram.zero_()
        self._stale.clear()
        self._cross_stale.clear()
        self.anchor = None
        self.appended = 0
        self._groups = [None] * self.size
        self._merge_groups()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit; tensors are copies."""
        return {
            "displacements": self.space.whole(self.displacements),
            "gradients": self.space.whole(self.gradients),
            "groups": list(self._groups),
            "iterate_gram": self.iterate_gram.clone(),
            "gradient_gram": self.gradient_gram.clone(),
            "cross_gram": self.cross_gram.clone(),
            "anchor": None if self.anchor is None else self.space.whole(self.anchor),
            "appended": self.appended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved history of the same size and dimension.

        Raises:
            ValueError: size or dimension differ.
        """
        shapes = [tuple(state[name].shape) for name in ("displacements", "gradients")]
        wanted = [(self.size, self.dimension)] * 2
        if shapes != wanted:
            raise ValueError(
                f"GradientHistory.load_state_dict: saved iterates are {shapes[0]}, gradients {shapes[1]} "
                f"[T0, d], this history's {wanted[0]} and {wanted[1]}; "
                "build it with the same history_size and parameters"
            )
        self.displacements.copy_(self.space.local(state["displacements"]))
        self.gradients.copy_(self.space.local(state["gradients"]))
        self._groups = list(state["groups"])
        self.iterate_gram.copy_(state["iterate_gram"])
        self._gradient_gram.copy_(state["gradient_gram"])
        self._cross_gram.copy_(state["cross_gram"])
        self._stale.clear()
        self._cross_stale.clear()
        anchor = state["anchor"]
        self.anchor = (
            None if anchor is None else self.space.local(anchor).to(self.displacements.device, copy=True)
        )
        self.appended = state["appended"]
        self._merge_groups()
