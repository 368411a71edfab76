"""The deep conjugate direction method on a dense matrix, every direction kept, all sums written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["conjugate_gradients", "deep_conjugate_directions", "direction_loss"]

Vector = NDArray[np.float64]


def deep_conjugate_directions(
    A: Vector,  # [n, n]
    b: Vector,  # [n]
    direction: Callable[[Vector], Vector],
    *,
    memory: int,
    steps: int,
) -> list[Vector]:
    """x after 0, 1, ..., ``steps`` iterations, without fallbacks; residuals are b - A x itself."""
    x, directions, iterates = np.zeros_like(b), [], [np.zeros_like(b)]
    for _ in range(steps):
        r = b - A @ x
        q = direction(r / np.linalg.norm(r))
        for p in directions[::-1][:memory]:
            q = q - p * (q @ A @ p) / (p @ A @ p)
        x = x + q * (q @ r) / (q @ A @ q)
        directions.append(q)
        iterates.append(x)
    return iterates


def conjugate_gradients(
    A: Vector,  # [n, n]
    b: Vector,  # [n]
    steps: int,
) -> list[Vector]:
    """x after 0, 1, ..., ``steps`` iterations of Hestenes and Stiefel."""
    x, r = np.zeros_like(b), b
    p, iterates = r, [x]
    for _ in range(steps):
        alpha = (r @ r) / (p @ A @ p)
        x, following = x + alpha * p, r - alpha * A @ p
        p, r = following + (following @ following) / (r @ r) * p, following
        iterates.append(x)
    return iterates


def direction_loss(
    A: Vector,  # [n, n]
    q: Vector,  # [batch, n]
    b: Vector,  # [batch, n]
) -> float:
    """The mean over the batch, one after the other."""
    found = [right - A @ row * (row @ right) / (row @ A @ row) for row, right in zip(q, b, strict=True)]
    return float(np.mean([left @ left for left in found]))
