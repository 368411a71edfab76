"""Points seen from a history: inner products that several posteriors share."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from optex.linalg import inner_products, squared_distances, squared_norms
from optex.vector_space import VectorSpace

__all__ = ["Locations", "StoredPairs"]


class StoredPairs(Protocol):
    """What is asked of a history."""

    space: VectorSpace
    displacements: Tensor  # [T0, d]
    gradients: Tensor  # [T0, d]
    iterate_gram: Tensor  # [T0, T0]

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
        self._on_gradients: Tensor | None = None  # [n, T0]
        self._near: tuple[Tensor, Tensor] | None = None  # norms [n] and on_displacements [n, T0]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Locations:
        """One of the points, with what is known of it."""
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
    def norms(self) -> Tensor:  # [n] float64
        """Squared norms of the offsets."""
        return self._products_nearby()[0]

    @property
    def on_displacements(self) -> Tensor:  # [n, T0] float64
        """Inner products of the offsets with the stored displacements."""
        return self._products_nearby()[1]

    @property
    def on_gradients(self) -> Tensor:  # [n, T0] float64
        """Inner products of the offsets with the stored gradients; they bring the others along."""
        if self._on_gradients is None:
            products = inner_products(self.offsets, self.history.gradients)
            if self._near is not None:
                (self._on_gradients,) = self.history.space.total(products)
            else:  # one message between processes for all three
                total = self.history.space.total(products, *self._nearby_here())
                self._on_gradients, self._near = total[0], (total[1], total[2])
        return self._on_gradients

    def _products_nearby(self) -> tuple[Tensor, Tensor]:  # [n], [n, T0]
        if self._near is None:
            norms, products = self.history.space.total(*self._nearby_here())
            self._near = norms, products
        return self._near

    def _nearby_here(self) -> tuple[Tensor, Tensor]:
        return squared_norms(self.offsets), inner_products(self.offsets, self.history.displacements)

    @property
    def squared_distances(self) -> Tensor:  # [n, T0] float64
        """‖θ - θ_j‖² from each point to each stored iterate."""
        return squared_distances(self.norms, self.history.iterate_gram.diagonal(), self.on_displacements)
