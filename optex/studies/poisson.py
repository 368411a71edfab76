"""Poisson's equation on a grid with obstacles, as a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import scipy.sparse
from numpy.typing import NDArray

from optex.checks import check_integer

__all__ = ["Poisson", "obstacles"]


@dataclass(frozen=True)
class Poisson:
    """A x = b: -Δx = b, times the square of a cell's width, on the cells outside the obstacles.

    Beyond the grid's rim x is 0 (Dirichlet). Nothing passes an obstacle's wall (Neumann), as for the pressure
    of a fluid. Cells inside an obstacle have rows and columns of zeros, so A is singular; it is definite on the
    others.

    Args:
        solid: [*grid], which cells are inside an obstacle; those that obstacles cut off from the rim are added.

    >>> problem = Poisson(np.zeros((2, 2), dtype=bool))
    >>> problem.matrix.toarray()[0]
    array([ 4., -1., -1.,  0.])
    """

    solid: NDArray[np.bool_]

    def __post_init__(self) -> None:
        labels = np.zeros(self.solid.shape, dtype=np.int32)
        scipy.ndimage.label(~self.solid, output=labels)
        rim = np.zeros_like(self.solid)
        for axis in range(self.solid.ndim):
            np.moveaxis(rim, axis, 0)[[0, -1]] = True
        reached = np.isin(labels, np.unique(labels[rim & ~self.solid]))
        object.__setattr__(self, "solid", self.solid | ~reached)

    @property
    def fluid(self) -> NDArray[np.bool_]:  # [*grid]
        """Which cells are outside the obstacles."""
        return ~self.solid

    @property
    def matrix(self) -> scipy.sparse.csr_array:  # [n, n], n cells in all
        """A, symmetric and semidefinite; definite where there are no obstacles."""
        fluid = self.fluid
        numbers = np.arange(fluid.size).reshape(fluid.shape)
        diagonal = np.where(fluid, 2.0 * fluid.ndim, 0.0)
        rows, columns = [], []
        for axis in range(fluid.ndim):
            one, two = (np.moveaxis(numbers, axis, 0)[part].ravel() for part in (slice(-1), slice(1, None)))
            flat = fluid.ravel()
            open_, walled = flat[one] & flat[two], flat[one] ^ flat[two]
            rows += [one[open_], two[open_]]
            columns += [two[open_], one[open_]]
            for side in (one, two):
                np.subtract.at(diagonal.reshape(-1), side[walled & flat[side]], 1.0)
        places = np.concatenate(rows), np.concatenate(columns)
        links = scipy.sparse.coo_array((-np.ones(len(places[0])), places), shape=(fluid.size,) * 2)
        return (links.tocsr() + scipy.sparse.diags_array(diagonal.ravel())).tocsr()

    def definite(self) -> scipy.sparse.csr_array:  # [m, m], m cells outside the obstacles
        """A without the obstacles' rows and columns, for solvers that need it definite."""
        kept = np.flatnonzero(self.fluid.ravel())
        return self.matrix[kept][:, kept]

    def random_right_hand_side(self, seed: int) -> NDArray[np.float64]:  # [*grid]
        """Standard normal numbers, 0 inside the obstacles."""
        return np.where(self.solid, 0.0, np.random.default_rng(seed).normal(size=self.solid.shape))


def obstacles(shape: tuple[int, ...], count: int, seed: int) -> NDArray[np.bool_]:  # [*shape]
    """Cells inside balls and boxes at random places, with radii of an eighth to a fourth of the shortest side.

    Args:
        shape: of the grid.
        count: how many balls and boxes, at least 0.
        seed: of their places, radii and kinds.

    Raises:
        ValueError: ``count`` is no such integer.

    >>> bool(obstacles((16, 16), 2, 0).any()), bool(obstacles((16, 16), 0, 0).any())
    (True, False)
    """
    random = np.random.default_rng(seed)
    solid = np.zeros(shape, dtype=bool)
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"))
    for _ in range(check_integer("obstacles", "count", count, least=0)):
        centre = np.array([random.uniform(0.2, 0.8) * size for size in shape])
        radius = random.uniform(0.125, 0.25) * min(shape)
        away = grid - centre.reshape(-1, *(1 for _ in shape))
        distance = np.abs(away).max(0) if random.random() < 0.5 else np.sqrt((away**2).sum(0))
        solid |= distance < radius
    return solid
