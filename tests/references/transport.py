"""Sparse optimal transport, slowly: every support tried, and quadratic transport by alternating projections."""

import itertools

import numpy as np


def problem(m, n, seed=0, uniform=False):
    """Masses [m] and [n], and squared distances of points in the plane, at most 1."""
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((m, 2)), random.standard_normal((n, 2)) + 1
    C = ((x[:, None] - y) ** 2).sum(-1)
    a, b = (np.ones(size) if uniform else random.uniform(0.5, 1.5, size) for size in (m, n))
    return a / a.sum(), b / b.sum(), C / C.max()


def simplex_projection(v, mass):
    """The nearest point with t ≥ 0, sum t = mass, by bisection for its threshold."""
    low, high = v.min() - mass, v.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > mass else (low, middle)
    return np.maximum(v - high, 0)


def sparse_projection(v, mass, k):
    """The best of all supports of k entries."""
    best, nearest = np.inf, np.zeros_like(v)
    for support in itertools.combinations(range(len(v)), k):
        rows = list(support)
        t = np.zeros_like(v)
        t[rows] = simplex_projection(v[rows], mass)
        distance = ((t - v) ** 2).sum()
        if distance < best - 1e-13:
            best, nearest = distance, t
    return nearest


def semi_dual(alpha, a, b, C, gamma, k):
    """Value, gradient [m] and plan [m, n], a column after the other."""
    value, plan = a @ alpha, np.zeros_like(C)
    for j in range(len(b)):
        x = alpha - C[:, j]
        plan[:, j] = sparse_projection(x / gamma, b[j], k)
        value -= x @ plan[:, j] - gamma / 2 * plan[:, j] @ plan[:, j]
    return value, a - plan.sum(1), plan


def dual(alpha, beta, a, b, C, gamma, k):
    """Value and plan [m, n], a column after the other."""
    value, plan = a @ alpha + b @ beta, np.zeros_like(C)
    for j in range(len(b)):
        x = alpha + beta[j] - C[:, j]
        for i in np.argsort(-x, kind="stable")[:k]:
            plan[i, j] = max(x[i], 0) / gamma
        value -= gamma / 2 * plan[:, j] @ plan[:, j]
    return value, plan


def quadratic(a, b, C, gamma, steps=20_000):
    """min ⟨T, C⟩ + γ/2 ‖T‖² over all plans: -C / γ projected onto them, by Dykstra's alternation."""
    m, n = C.shape
    T, correction = -C / gamma, np.zeros_like(C)
    for _ in range(steps):
        rows, columns = a - T.sum(1), b - T.sum(0)
        affine = T + rows[:, None] / n + columns / m - rows.sum() / (m * n)
        positive = np.maximum(affine + correction, 0)
        correction += affine - positive
        if np.abs(positive - T).max() < 1e-15:
            break
        T = positive
    return T
