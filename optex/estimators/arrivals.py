"""New pairs on their way into a history: their inner products with it, each computed once."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from torch import Tensor

from optex.estimators.locations import Locations, StoredPairs
from optex.small import Array, array

__all__ = ["Arrivals"]


class _History(StoredPairs, Protocol):
    def locate(self, points: Tensor) -> Locations:
        """Points as predictions need to know them."""
        ...


class Arrivals:
    """Pairs that a history does not hold yet, and their inner products with its rows and with each other.

    Judging predictions of the pairs and remembering the pairs takes the same products, and drafting has
    computed some of them already: each is computed once.

    Attributes:
        points, gradients: [n, d].
        locations: the points, seen from the history.
    """

    def __init__(
        self,
        history: _History,
        points: Tensor,  # [n, d]
        gradients: Tensor,  # [n, d]
        locations: Locations | None = None,
    ) -> None:
        self.history = history
        self.points = points
        self.gradients = gradients
        self.locations: Locations = history.locate(points) if locations is None else locations

    def __len__(self) -> int:
        return len(self.points)

    def _products(self, left: Tensor, right: Tensor) -> Array:
        return array(self.history.space.inner_products(left, right))

    @cached_property
    def on_displacements(self) -> Array:  # [n, T0]
        """Inner products of the gradients with the stored displacements."""
        return self._products(self._rows, self.history.displacements)

    @cached_property
    def on_gradients(self) -> Array:  # [n, T0]
        """Inner products of the gradients with the stored gradients."""
        return self._products(self._rows, self.history.gradients)

    @cached_property
    def offsets_among(self) -> Array:  # [n, n]
        """Inner products of the offsets with each other."""
        return self._products(self.locations.offsets, self.locations.offsets)

    @cached_property
    def mixed_among(self) -> Array:  # [n, n]
        """Inner products of the gradients with the offsets."""
        return self._products(self._rows, self.locations.offsets)

    @cached_property
    def gradients_among(self) -> Array:  # [n, n]
        """Inner products of the gradients with each other."""
        return self._products(self._rows, self._rows)

    @property
    def _rows(self) -> Tensor:
        offsets = self.locations.offsets
        return self.gradients.to(offsets.device, offsets.dtype)

    @property
    def is_exact(self) -> bool:
        """Whether the history stores these numbers as they are, in the same dtype and on the same device."""
        stored = self.history.displacements
        exact = self.locations.offsets.dtype == stored.dtype == self.gradients.dtype
        return exact and self.gradients.device == stored.device

    @property
    def knows_cross(self) -> bool:
        """Whether the offsets' products with the stored gradients, half of the cross products, are known."""
        return self.locations.knows_gradients

    @property
    def knows_gradients(self) -> bool:
        """Whether the gradients' products with the stored gradients are known."""
        return "on_gradients" in self.__dict__
