"""New pairs on their way into a history: what they have in common with it, computed once."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from optex.estimators.locations import Locations, StoredPairs
from optex.linalg import inner_products
from optex.small import Array, array

__all__ = ["Arrivals"]


class _History(StoredPairs, Protocol):
    def locate(self, points: Tensor) -> Locations:
        """Points as predictions need to know them."""
        ...


class Arrivals:
    """Pairs that a history does not hold yet, and their inner products with its rows and with each other.

    To judge predictions of them and to remember them takes the same products; what drafting has found of the
    points is not looked for again.

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
        self.locations = history.locate(points) if locations is None else locations

    def __len__(self) -> int:
        return len(self.points)

    def _products(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Array, ...]:
        """Inner products of each pair of rows, in one message between processes."""
        here = [inner_products(left, right) for left, right in pairs]
        return tuple(array(products) for products in self.history.space.total(*here))

    @cached_property
    def on_displacements(self) -> Array:  # [n, T0]
        """Inner products of the gradients with the stored displacements."""
        return self._products((self._rows, self.history.displacements))[0]

    @cached_property
    def on_gradients(self) -> Array:  # [n, T0]
        """Inner products of the gradients with the stored gradients."""
        return self._products((self._rows, self.history.gradients))[0]

    @cached_property
    def among(self) -> tuple[Array, Array, Array]:  # three of [n, n]
        """Inner products of offsets with offsets, of gradients with offsets, of gradients with gradients."""
        offsets, gradients = self.locations.offsets, self._rows
        n = len(self)
        both = torch.cat([offsets, gradients])
        (products,) = self._products((both, both))
        return products[:n, :n], products[n:, :n], products[n:, n:]

    @property
    def _rows(self) -> Tensor:
        offsets = self.locations.offsets
        return self.gradients.to(offsets.device, offsets.dtype)

    @property
    def is_exact(self) -> bool:
        """Whether what the history will store are these very numbers, and not numbers of fewer digits."""
        stored = self.history.displacements
        exact = self.locations.offsets.dtype == stored.dtype == self.gradients.dtype
        return exact and self.gradients.device == stored.device

    @property
    def knows_cross(self) -> bool:
        """Whether all inner products of gradients and displacements are found already, or nearly."""
        return self.locations.knows_gradients

    @property
    def knows_gradients(self) -> bool:
        """Whether those of gradients with gradients are."""
        return "on_gradients" in self.__dict__
