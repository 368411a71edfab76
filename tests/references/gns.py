"""Algorithm 1 of gradient-normalized smoothness as it is written: dense, in turn, NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["gns_iterates"]


def gns_iterates(
    fun: Callable[[np.ndarray], float],
    jac: Callable[[np.ndarray], np.ndarray],
    hess: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,  # [d]
    count: int,
    *,
    metric: np.ndarray | None = None,  # [d, d]
    gamma: float = 1.0,
) -> tuple[list[np.ndarray], list[float], int]:
    """Iterates, the γ that each of them begins with, and evaluations; fewer where nothing is taken any more."""
    metric = np.eye(len(start)) if metric is None else metric
    inverse = np.linalg.inv(metric)

    def norm(g: np.ndarray) -> float:
        return float(np.sqrt(g @ inverse @ g))

    x = start.copy()
    f, g = fun(x), jac(x)
    iterates, gammas, evaluations = [x], [gamma], 1
    for _ in range(count):
        if norm(g) == 0:
            break
        matrix, taken = hess(x), None
        for _trial in range(41):
            shift = norm(g) / (gamma + 1e-8)
            shifted = matrix + shift * metric
            if np.linalg.eigvalsh(shifted)[0] > 0:
                there = x - np.linalg.solve(shifted, g)
                f_there, g_there = fun(there), jac(there)
                evaluations += 1
                if f - f_there >= norm(g_there) ** 2 / (8 * shift):
                    taken = there, f_there, g_there
                    break
            gamma /= 2
        if taken is None:
            break
        (x, f, g), gamma = taken, max(2 * gamma, 1e-9)
        iterates.append(x)
        gammas.append(gamma)
    return iterates, gammas, evaluations
