"""The curl-free Gaussian process, written down: the full (T0 d) × (T0 d) system, nothing shared with optex."""

import numpy as np


def rbf(s, ell):
    """First and second derivative in s = r² of exp(-s / 2ℓ²)."""
    value = np.exp(-s / (2 * ell**2))
    return -value / (2 * ell**2), value / (4 * ell**4)


def matern52(s, ell):
    a = np.sqrt(5 * s) / ell
    return -5 * (1 + a) * np.exp(-a) / (6 * ell**2), 25 * np.exp(-a) / (12 * ell**4)


def block(x, y, derivatives, ell):
    """Covariance [d, d] of the gradients at x and y: -2 φ' I - 4 φ'' δ δᵀ, in units of -2 φ'(0)."""
    gap = x - y
    first, second = derivatives(gap @ gap, ell)
    unit = -2 * derivatives(0.0, ell)[0]
    return (-2 * first * np.eye(len(x)) - 4 * second * np.outer(gap, gap)) / unit


def posterior(points, gradients, query, derivatives, ell, noise_variance, mean):
    """Posterior mean [d] and covariance [d, d] at a query."""
    count, d = points.shape
    K = np.block([[block(x, y, derivatives, ell) for y in points] for x in points])
    K += noise_variance * np.eye(count * d)
    k = np.hstack([block(query, y, derivatives, ell) for y in points])
    weights = np.linalg.solve(K, k.T)
    return mean + (gradients - mean).reshape(-1) @ weights, np.eye(d) - k @ weights


def least_squares_mean(points, gradients, derivatives, ell, noise_variance):
    """Generalised least-squares mean [d] under the separable part of the covariance, -2 φ' I."""
    squared = ((points[:, None] - points) ** 2).sum(-1)
    A = derivatives(squared, ell)[0] / derivatives(0.0, ell)[0] + noise_variance * np.eye(len(points))
    weights = np.linalg.solve(A, np.ones(len(points)))
    return weights @ gradients / weights.sum()
