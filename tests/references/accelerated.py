"""The accelerated methods as the papers write them: sequences of vectors, nothing rearranged, float64.

Each function returns the query points y_0..y_n and the output points x_0..x_n, [n + 1, d] each; ``gradient`` is
of a vector of NumPy, and L and mu may be estimated by ``Estimates``.
"""

import math

import numpy as np


def nesterov(gradient, start, L, mu, steps):
    """x⁺ = y - g / L, y⁺ = x⁺ + β (x⁺ - x)."""
    momentum = (math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))
    xs, ys = [start], [start]
    for _ in range(steps):
        xs.append(ys[-1] - gradient(ys[-1]) / L)
        ys.append(xs[-1] + momentum * (xs[-1] - xs[-2]))
    return np.array(ys), np.array(xs)


def nesterov_convex(gradient, start, L, steps):
    """The same with β_k = (t_{k-1} - 1) / t_k."""
    xs, ys, t = [start], [start], 1.0
    for _ in range(steps):
        xs.append(ys[-1] - gradient(ys[-1]) / L)
        following = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ys.append(xs[-1] + (t - 1) / following * (xs[-1] - xs[-2]))
        t = following
    return np.array(ys), np.array(xs)


def triple_momentum(gradient, start, L, mu, steps):
    """ξ⁺ = (1 + β) ξ - β ξ⁻ - α g, y = (1 + γ) ξ - γ ξ⁻, x = (1 + δ) ξ - δ ξ⁻."""
    rho = 1 - math.sqrt(mu / L)
    alpha, beta = (1 + rho) / L, rho**2 / (2 - rho)
    gamma, delta = rho**2 / ((1 + rho) * (2 - rho)), rho**2 / (1 - rho**2)
    xi, ys, xs = [start, start], [start], [start]
    for _ in range(steps):
        xi.append((1 + beta) * xi[-1] - beta * xi[-2] - alpha * gradient(ys[-1]))
        ys.append((1 + gamma) * xi[-1] - gamma * xi[-2])
        xs.append((1 + delta) * xi[-1] - delta * xi[-2])
    return np.array(ys), np.array(xs)


def heavy_ball(gradient, start, L, mu, steps):
    """y⁺ = y - α g + β (y - y⁻)."""
    alpha = 4 / (math.sqrt(L) + math.sqrt(mu)) ** 2
    beta = ((math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))) ** 2
    ys = [start, start]
    for _ in range(steps):
        ys.append(ys[-1] - alpha * gradient(ys[-1]) + beta * (ys[-1] - ys[-2]))
    return np.array(ys[1:]), np.array(ys[1:])


def estimates(points, gradients):
    """L and mu as estimated after each of a run's steps, [n] each; NaN before the second point."""
    steepest, flattest, found = math.nan, math.nan, []
    for k in range(len(points)):
        moved = np.linalg.norm(points[k] - points[k - 1]) if k else 0.0
        if moved > 100 * np.finfo(float).eps * np.linalg.norm(points[k]):
            ratio = np.linalg.norm(gradients[k] - gradients[k - 1]) / moved
            flattest = ratio if math.isnan(flattest) else min(flattest, max(ratio, flattest / 2))
            steepest = ratio if math.isnan(steepest) else max(steepest, ratio)
        found.append((1.3 * steepest, flattest))
    return np.array(found).T


def circling(y):
    """The gradient on which the heavy ball circles: of a function with mu = 1 and L = 25, minimum at 0."""
    return np.where(y < 1, 25 * y, np.where(y < 2, y + 24, 25 * y - 24))
