"""A posterior of some parameters' gradients as one of all parameters' gradients."""

from __future__ import annotations

from torch import Tensor

from optex.estimators.interface import Posterior
from optex.history import Locations
from optex.vectors import Coordinates

__all__ = ["RestrictedPosterior"]


class RestrictedPosterior(Posterior):
    """Predicts where its history looks; holds the last gradient elsewhere, where it predicts no change.

    Args:
        inner: of a history of the chosen coordinates alone.
        coordinates: which ones these are.
        last: [d], the newest gradient; at the coordinates its values are not used.
    """

    def __init__(self, inner: Posterior, coordinates: Coordinates, last: Tensor) -> None:
        super().__init__(inner.history)
        self.inner = inner
        self._coordinates = coordinates
        self._last = last

    def locate(self, points: Tensor) -> Locations:
        return self.inner.locate(self._coordinates.select(points))

    def means(self, locations: Locations) -> Tensor:
        return self._coordinates.embed(self.inner.means(locations), self._last)

    def differences(self, locations: Locations, origins: Locations) -> Tensor:
        changes = self.inner.differences(locations, origins)
        return self._coordinates.embed(changes, self._last.new_zeros(len(self._last)))

    def variance(self, point: Tensor) -> Tensor:
        return self.inner.variance(self._coordinates.select(point[None])[0])
