"""Points seen from a history: inner products that several posteriors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from optex import small
from optex.linalg import inner_products, squared_norms
from optex.small import Array, array
from optex.vector_space import VectorSpace

__all__ = ["Locations", "StoredPairs"]


class StoredPairs(Protocol):
    """What points need of a history to be located in it."""

    space: VectorSpace
    displacements: Tensor  # [T0, d]
    gradients: Tensor  # [T0, d]
    iterate_gram: Tensor  # [T0, T0]
    representatives: list[int]

    def displacement(self, points: Tensor) -> Tensor:  # [..., d]
        """Points as displacements from the anchor."""
        ...


class Locations:
    """Points seen from a history: their inner products with its rows, each computed once, when asked for.

    Several posteriors of one history share them.

    Attributes:
        history: the history.
        points: [n, d].
    """

    def __init__(
        self,
        history: StoredPairs,
        points: Tensor,  # [n, d]
    ) -> None:
        self.history = history
        self.points = points
        self._offsets: Tensor | None = None  # [n, d]
        self._on_gradients: Array | None = None  # [n, T0]
        self._near: tuple[Array, Array] | None = None  # norms [n] and on_displacements [n, T0]

    @classmethod
    def known(
        cls,
        history: StoredPairs,
        points: Tensor,  # [n, d]
        offsets: Tensor | None,  # [n, d]
        norms: Array,  # [n]
        on_displacements: Array,  # [n, T0]
        on_gradients: Array | None,  # [n, T0]
    ) -> Locations:
        """Locations whose inner products are known already; None for those that are not."""
        found = cls(history, points)
        found._offsets, found._on_gradients, found._near = offsets, on_gradients, (norms, on_displacements)
        return found

    @classmethod
    def joined(cls, parts: Sequence[Locations], points: Tensor) -> Locations:
        """Several locations in one history as one; ``points`` are their points, in this order."""
        found = cls(parts[0].history, points)
        if any(part._on_gradients is not None for part in parts):
            found._on_gradients = small.concatenate([part.on_gradients for part in parts])
        if any(part._near is not None for part in parts):
            norms, products = zip(*(part._products_nearby() for part in parts), strict=True)
            found._near = small.concatenate(norms), small.concatenate(products)
        return found

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Locations:
        """One of the points, with the inner products known of it."""
        if self.history.space.is_split:
            _ = self.on_gradients  # of all points in one message, rather than one for each
        row = slice(index, index + 1)
        one = Locations(self.history, self.points[row])
        one._offsets = None if self._offsets is None else self._offsets[row]
        one._on_gradients = None if self._on_gradients is None else self._on_gradients[row]
        one._near = None if self._near is None else (self._near[0][row], self._near[1][row])
        return one

    @property
    def offsets(self) -> Tensor:  # [n, d]
        """Displacements from the history's anchor."""
        if self._offsets is None:
            self._offsets = self.history.displacement(self.points)
        return self._offsets

    @property
    def norms(self) -> Array:  # [n]
        """Squared norms of the offsets."""
        return self._products_nearby()[0]

    @property
    def on_displacements(self) -> Array:  # [n, T0]
        """Inner products of the offsets with the stored displacements."""
        return self._products_nearby()[1]

    @property
    def on_gradients(self) -> Array:  # [n, T0]
        """Inner products of the offsets with the stored gradients; computes the other two kinds, too."""
        if self._on_gradients is None:
            products = inner_products(self.offsets, self.history.gradients)
            if self._near is not None:
                self._on_gradients = array(self.history.space.total(products)[0])
            else:  # one message between processes for all three
                total = self.history.space.total(products, *self._nearby_here())
                self._on_gradients, self._near = array(total[0]), (array(total[1]), array(total[2]))
        return self._on_gradients

    @property
    def knows_gradients(self) -> bool:
        """Whether ``on_gradients`` is computed already."""
        return self._on_gradients is not None

    def _products_nearby(self) -> tuple[Array, Array]:  # [n], [n, T0]
        if self._near is None:
            norms, products = self.history.space.total(*self._nearby_here())
            self._near = array(norms), array(products)
        return self._near

    def _nearby_here(self) -> tuple[Tensor, Tensor]:
        return squared_norms(self.offsets), inner_products(self.offsets, self.history.displacements)

    @property
    def squared_distances(self) -> Array:  # [n, T0]
        """‖θ - θ_j‖² from each point to each stored iterate."""
        diagonal = array(self.history.iterate_gram).diagonal()
        return small.squared_distances(self.norms, diagonal, self.on_displacements)
