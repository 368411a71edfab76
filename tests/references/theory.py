"""The quantities of docs/theory.md, written down: dense matrices and loops, nothing shared with optex."""

import numpy as np

from tests.references.dense_gp import distances


def information_gain(points, kernel, noise_variance):
    """½ log det(I + K / σ²)."""
    K = kernel(distances(points, points))
    return np.linalg.slogdet(np.eye(len(points)) + K / noise_variance)[1] / 2


def sequential_variances(points, kernel, noise_variance):
    """The posterior variance at each point, given those before it."""
    found = [float(kernel(np.zeros(1))[0])]
    for j in range(1, len(points)):
        A = kernel(distances(points[:j], points[:j])) + noise_variance * np.eye(j)
        k = kernel(distances(points[j : j + 1], points[:j]))[0]
        found.append(float(kernel(np.zeros(1))[0] - k @ np.linalg.solve(A, k)))
    return np.array(found)


def prior_variance(residuals, covariance, freedom):
    """Maximum likelihood of s² of residuals [n, d] with covariance s² A, A [n, n] or [n d, n d]."""
    n, d = residuals.shape
    if len(covariance) == n:
        total = sum(residuals[:, c] @ np.linalg.solve(covariance, residuals[:, c]) for c in range(d))
    else:
        total = residuals.reshape(-1) @ np.linalg.solve(covariance, residuals.reshape(-1))
    return total / (freedom * d)
