"""The history: the last T0 pairs of iterate and true gradient, and their inner products."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from optex import small
from optex.checks import check_device, check_integer, shown
from optex.estimators.arrivals import Arrivals
from optex.estimators.gram import fill, joined, merged
from optex.estimators.locations import Locations
from optex.estimators.saved import Overwritten, check_saved
from optex.linalg import inner_products, rows_at
from optex.small import Array, array
from optex.vector_space import VectorSpace

__all__ = ["GradientHistory", "Locations", "Overwritten"]

FARTHEST_ANCHOR: Final = 8.0  # median distances from the newest iterate


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
        appended: pairs appended; of more than ``size`` at once the last ``size`` alone.

    Args:
        size: T0, how many pairs are kept, at least 1.
        dimension: d, the length of a flat iterate; or the vector space of the iterates.
        dtype: of the stored rows; the small matrices are float64 whatever it is.
        device: of the stored rows.

    Memory: 2 · T0 · d + d numbers of ``dtype`` (the anchor: of the iterates' dtype). In a space that is split
    among processes the rows here are this process's slices; the Gram matrices are of whole vectors.

    Raises:
        ValueError: ``size`` is less than 1, ``dimension`` less than 0, or ``device`` none of this machine.
    """

    def __init__(
        self,
        size: int,
        dimension: int | VectorSpace,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size: int = check_integer("GradientHistory", "size", size)
        check_device("GradientHistory", "device", device)
        self.space: VectorSpace = dimension if isinstance(dimension, VectorSpace) else VectorSpace(dimension)
        self.dimension: int = self.space.dimension
        self.anchor: Tensor | None = None  # [d]
        self.appended: int = 0
        width = self.space.width
        self.displacements: Tensor = torch.zeros(size, width, dtype=dtype, device=device)  # [T0, d]
        self.gradients: Tensor = torch.zeros(size, width, dtype=dtype, device=device)  # [T0, d]
        self._spare = self.gradients[:0], self.gradients[:0]  # rows that may have to be put back
        self.iterate_gram: Tensor = torch.zeros(size, size, dtype=torch.float64, device=device)  # [T0, T0]
        self._groups: list[int | None] = [None] * size  # slots of one iterate share a number
        self._derived: dict[Hashable, Any] = {}
        self._noise = [0.0] * size  # variance of one component by slot; NaN where it is not known
        self._merge_groups()
        self._gradient_gram = torch.zeros_like(self.iterate_gram)  # [T0, T0]
        self._cross_gram = torch.zeros_like(self.iterate_gram)  # [T0, T0]
        self._stale: set[int] = set()  # rows of the gradient Gram matrix to bring up to date
        self._cross_stale: set[int] = set()  # rows and columns of the cross Gram matrix, likewise

    def __len__(self) -> int:
        """How many pairs are held."""
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
    def is_sampled(self) -> bool:
        """Whether some gradient carries noise of a size that nobody told."""
        return any(math.isnan(self._noise[slot]) for slot in range(len(self)))

    @property
    def tells_noise(self) -> bool:
        """Whether some gradient carries noise of a known size."""
        return any(self._noise[slot] > 0 for slot in range(len(self)))

    @property
    def noise_variance(self) -> Tensor:  # [T0] float64
        """Variance of one component of a merged gradient's noise; NaN where it is not known, 0 where exact."""
        single = torch.tensor(self._noise, dtype=torch.float64, device=self.counts.device)
        weights = self.averaging.square()  # a mean of n has their variances' sum over n²
        unknown = (weights > 0) & single.isnan()
        return torch.where(unknown.any(1), torch.nan, weights @ single.nan_to_num(nan=0.0))

    @property
    def gradient_gram(self) -> Tensor:  # [T0, T0] float64
        """Inner products of the gradients, brought up to date on demand with one product of new by all."""
        if self._stale:
            rows = sorted(self._stale)
            products = self.space.inner_products(self.gradients[rows], self.gradients)
            fill(self._gradient_gram, rows, array(products), array(products).T)
            self._stale.clear()
        return self._gradient_gram

    @property
    def cross_gram(self) -> Tensor:  # [T0, T0] float64
        """Inner products of gradient i with displacement j, brought up to date on demand, too."""
        if self._cross_stale:
            rows = sorted(self._cross_stale)
            parts = [inner_products(rows_at(self.gradients, rows), self.displacements)]
            if len(rows) < self.size:
                parts.append(inner_products(self.gradients, rows_at(self.displacements, rows)))
            found, *others = map(array, self.space.total(*parts))
            fill(self._cross_gram, rows, found, *others)
            self._cross_stale.clear()
        return self._cross_gram

    @property
    def row_gram(self) -> Array:  # [2 T0, 2 T0] float64
        """Inner products of all rows, the gradients before the displacements."""
        parts = self.gradient_gram, self.cross_gram, self.iterate_gram
        return self.derived("rows", lambda: joined(*map(array, parts)))

    @property
    def filled(self) -> Tensor:  # [T0] bool
        """Which slots hold a pair."""
        return torch.arange(self.size, device=self.counts.device) < self.appended

    def derived(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What ``find`` computes from the pairs held now, kept under ``key`` until they change."""
        if key not in self._derived:
            self._derived[key] = find()
        return self._derived[key]

    @property
    def squared_distances(self) -> Array:  # [T0, T0] float64
        """‖θ_i - θ_j‖²; exactly zero for one iterate, meaningless where a slot is not filled."""
        return self.derived("squared distances", self._find_squared_distances)

    def _find_squared_distances(self) -> Array:
        gram, same = array(self.iterate_gram), array(self._same)
        squared = small.squared_distances(gram.diagonal(), gram.diagonal(), gram)
        squared[same] = 0
        return squared

    @property
    def median_squared_distance(self) -> Array:  # [] float64
        """Median of the positive squared distances between the pairs held; NaN where there is none."""
        return self.derived("median", self._find_median)

    def _find_median(self) -> Array:
        squared = self.squared_distances
        filled = array(self.filled)
        pairs = filled[:, None] & filled & (squared > small.TINY)
        if isinstance(squared, Tensor):
            return torch.where(pairs, squared, torch.nan).nanmedian()
        values = squared[pairs]
        if not len(values):
            return np.float64(np.nan)
        middle = (len(values) - 1) // 2
        return np.partition(values, middle)[middle]

    @property
    def median_distance(self) -> Array:  # [] float64
        """Root of the median squared distance; 1 where there is none."""
        median = small.sqrt(self.median_squared_distance)
        return median.nan_to_num(nan=1.0) if isinstance(median, Tensor) else np.nan_to_num(median, nan=1.0)

    def locate(
        self,
        points: Tensor,  # [n, d]
    ) -> Locations:
        """Inner products of points with the history, for predictions; valid until the next ``append``."""
        return Locations(self, points)

    def locate_stored(
        self,
        slot: int,
        point: Tensor,  # [d]
    ) -> Locations:
        """The iterate in a slot, located without new inner products where it is stored without rounding."""
        if self.displacements.dtype != point.dtype or self.displacements.device != point.device:
            return self.locate(point[None])
        row, gram = slice(slot, slot + 1), array(self.iterate_gram)
        cross = None if self._cross_stale else array(self._cross_gram)[:, row].T
        return Locations.known(self, point[None], self.displacements[row], gram[slot, row], gram[row], cross)

    def displacement(
        self,
        points: Tensor,  # [..., d]
    ) -> Tensor:  # [..., d]
        """Points as displacements from the anchor, subtracted in the wider of the two precisions."""
        dtype = torch.promote_types(points.dtype, self.displacements.dtype)
        return points.to(self.displacements.device, dtype) - self.reference.to(dtype)

    @property
    def reference(self) -> Tensor:  # [d]
        """The anchor itself; do not change it.

        Raises:
            RuntimeError: the history is empty.
        """
        if self.anchor is None:
            raise RuntimeError("GradientHistory: the history is empty; append a pair first")
        return self.anchor

    def append(
        self,
        points: Tensor,  # [n, d]
        gradients: Tensor,  # [n, d]
        noise_variance: Sequence[float] | None = None,  # n
        arrivals: Arrivals | None = None,
    ) -> None:
        """Remember n pairs, oldest first; the oldest ones stored make room.

        Args:
            points, gradients: the pairs.
            noise_variance: of one component of each gradient, in squared units of the gradient: 0 where it is
                exact (the default), NaN where it is noisy and nobody knows how much.
            arrivals: these pairs with the inner products that are known of them.

        Raises:
            ValueError: shapes differ from [n, dimension], or a variance is negative.
        """
        count = len(points)
        if points.shape != gradients.shape or points.ndim != 2 or points.shape[1] != self.space.width:
            raise ValueError(
                f"GradientHistory.append: points {tuple(points.shape)} and gradients {tuple(gradients.shape)} "
                f"must both be [n, {self.space.width}]"
            )
        noise = [0.0] * count if noise_variance is None else [float(v) for v in noise_variance]
        if len(noise) != count or any(variance < 0 for variance in noise):
            raise ValueError(
                f"GradientHistory.append: noise_variance must be {count} numbers that are not negative (NaN "
                f"where it is not known), got {shown(noise)}"
            )
        if not count:
            return
        points, gradients, noise = points[-self.size :], gradients[-self.size :], noise[-self.size :]
        device = self.displacements.device
        if self.anchor is None:
            self.anchor = points[-1].to(device, copy=True)
        slots = self._next_slots(len(points))
        known = arrivals if arrivals is not None and count <= self.size and arrivals.is_exact else None
        if known is not None:
            offsets = known.locations.offsets
            self._take_products(slots, known)
        else:
            offsets = self.displacement(points).to(self.displacements.dtype)
        index = torch.tensor(slots, device=device)
        self.displacements.index_copy_(0, index, offsets)
        self.gradients.index_copy_(0, index, gradients.to(device, self.gradients.dtype))
        for slot, variance in zip(slots, noise, strict=True):
            self._noise[slot] = variance
        if known is None:
            products = array(self.space.inner_products(offsets, self.displacements))
            fill(self.iterate_gram, slots, products, products.T)
            self._stale.update(slots)
            self._cross_stale.update(slots)
        self._derived = {}
        self.appended += len(points)
        self._find_duplicates(slots)
        self._follow(points[-1])

    def _take_products(self, slots: list[int], arrivals: Arrivals) -> None:
        """Gram matrices as they will be with these pairs, from products with the rows as they still are."""
        rows = small.copy(arrivals.locations.on_displacements)
        rows[:, slots] = arrivals.offsets_among
        fill(self.iterate_gram, slots, rows, rows.T)
        if arrivals.knows_cross:
            across, down = small.copy(arrivals.on_displacements), small.copy(arrivals.locations.on_gradients)
            across[:, slots], down[:, slots] = arrivals.mixed_among, arrivals.mixed_among.T
            fill(self._cross_gram, slots, across, down.T)
            self._cross_stale.difference_update(slots)
        else:
            self._cross_stale.update(slots)
        if arrivals.knows_gradients:
            rows = small.copy(arrivals.on_gradients)
            rows[:, slots] = arrivals.gradients_among
            fill(self._gradient_gram, slots, rows, rows.T)
            self._stale.difference_update(slots)
        else:
            self._stale.update(slots)

    def _next_slots(self, count: int) -> list[int]:
        return [(self.appended + i) % self.size for i in range(min(count, self.size))]

    def before_append(self, count: int) -> Overwritten:
        """What appending ``count`` pairs would change, for ``take_back``; valid until the next call.

        Memory: the rows that are overwritten, at most 2 · count · d numbers.
        """
        slots = self._next_slots(count)
        self._copy_rows(slots)
        # What is changed in place is copied; what an append replaces as a whole is kept as it is.
        changed = ("iterate_gram", "_gradient_gram", "_cross_gram")
        attributes: dict[str, Any] = {name: getattr(self, name).clone() for name in changed}
        collections = ("_groups", "_noise", "_stale", "_cross_stale")
        attributes |= {name: getattr(self, name).copy() for name in collections}
        replaced = ("displacements", "anchor", "appended", "averaging", "counts", "_same", "representatives")
        attributes |= {name: getattr(self, name) for name in replaced}
        attributes["_derived"] = self._derived
        return Overwritten(slots, self._spare, attributes)

    def _copy_rows(self, slots: list[int]) -> None:
        """Copy rows into memory that is used every time: fresh pages would cost more than the copies."""
        shape = (len(slots), self.space.width)
        if self._spare[0].shape != shape:
            self._spare = self.gradients.new_empty(shape), self.gradients.new_empty(shape)
        index = torch.tensor(slots, dtype=torch.long, device=self.gradients.device)
        for rows, spare in zip((self.displacements, self.gradients), self._spare, strict=True):
            torch.index_select(rows, 0, index, out=spare)

    def take_back(self, overwritten: Overwritten) -> None:
        """Undo the append that ``before_append`` was called for; may be called again."""
        for name, value in overwritten.attributes.items():
            setattr(self, name, value)
        displacements, gradients = overwritten.rows
        self.displacements[overwritten.slots] = displacements
        self.gradients[overwritten.slots] = gradients

    def _follow(
        self,
        point: Tensor,  # [d]
    ) -> None:
        """Move the anchor to the newest iterate where inner products with the old one lose digits."""
        distance = self.iterate_gram[self.newest, self.newest]
        if distance <= FARTHEST_ANCHOR**2 * float(self.median_squared_distance):
            return
        shift = self.displacement(point).to(self.displacements.dtype)
        # New tensors, not the old ones changed: those may have to be gone back to.
        self.displacements = self.displacements - shift
        self.displacements[len(self) :] = 0
        self.anchor = point.to(self.reference.device, self.reference.dtype, copy=True)
        self.iterate_gram = self.space.inner_products(self.displacements, self.displacements)
        self._cross_stale.update(range(self.size))
        self._derived = {}

    def _find_duplicates(self, slots: list[int]) -> None:
        # The Gram matrix proposes, a direct difference decides: only rows equal to rounding are merged.
        eps = torch.finfo(self.displacements.dtype).eps
        gram = array(self.iterate_gram)
        norms = gram.diagonal()
        gaps = small.squared_distances(norms[slots], norms, gram[slots])
        close = (gaps <= 4 * eps * (norms[slots][:, None] + norms)).tolist()
        numbers = range(self.appended - len(slots), self.appended)
        for slot in slots:
            self._groups[slot] = None
        for slot, number, row in zip(slots, numbers, close, strict=True):
            self._groups[slot] = number
            for other, candidate in enumerate(row):
                group = self._groups[other]
                if candidate and other != slot and group is not None and self._same_iterate(slot, other, eps):
                    self._groups[slot] = group
                    break
        self._merge_groups()

    def _same_iterate(self, left: int, right: int, eps: float) -> bool:
        row, other = self.displacements[left], self.displacements[right]
        gap, norm = self.space.norms([row - other, row])
        return bool(gap <= 2 * eps * norm)

    def _merge_groups(self) -> None:
        # The newest member stands for its group: it is the last to be overwritten.
        newest_first = [(self.newest - age) % self.size for age in range(len(self))]
        slots, counts, averaging, same = merged(self._groups, newest_first)
        device = self.displacements.device
        self.representatives: list[int] = slots
        self.counts: Tensor = torch.from_numpy(counts).to(device)
        self.averaging: Tensor = torch.from_numpy(averaging).to(device)
        self._same = torch.from_numpy(same).to(device)

    def clear(self) -> None:
        """Forget everything."""
        grams = self.iterate_gram, self._gradient_gram, self._cross_gram
        for tensor in (self.displacements, self.gradients, *grams):
            tensor.zero_()
        self._stale.clear()
        self._cross_stale.clear()
        self.anchor = None
        self.appended = 0
        self._groups = [None] * self.size
        self._noise = [0.0] * self.size
        self._derived = {}
        self._merge_groups()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit; tensors are copies."""
        return {
            "displacements": self.space.whole(self.displacements),
            "gradients": self.space.whole(self.gradients),
            "groups": list(self._groups),
            "noise": [None if math.isnan(variance) else variance for variance in self._noise],
            "iterate_gram": self.iterate_gram.clone(),
            "gradient_gram": self.gradient_gram.clone(),
            "cross_gram": self.cross_gram.clone(),
            "anchor": None if self.anchor is None else self.space.whole(self.anchor),
            "appended": self.appended,
        }

    def like(self) -> GradientHistory:
        """An empty history of the same size, space, dtype and device."""
        rows = self.gradients
        return GradientHistory(self.size, self.space, dtype=rows.dtype, device=rows.device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved history of the same size and dimension; it is checked before anything changes.

        Raises:
            ValueError: size or dimension differ, or an entry is missing, of another kind, or not finite.
        """
        saved = check_saved(state, self.size, self.space)
        self.displacements.copy_(saved.displacements)
        self.gradients.copy_(saved.gradients)
        self._groups, self._noise = saved.groups, saved.noise
        self.iterate_gram.copy_(saved.iterate_gram)
        self._gradient_gram.copy_(saved.gradient_gram)
        self._cross_gram.copy_(saved.cross_gram)
        self._stale.clear()
        self._cross_stale.clear()
        self.anchor = None if saved.anchor is None else saved.anchor.to(self.displacements.device, copy=True)
        self.appended = saved.appended
        self._derived = {}
        self._merge_groups()
