"""The paper's Gaussian process, written down: dense matrices, explicit inverse, nothing shared with optex."""

import numpy as np


def matern52(r, lengthscale):
    a = np.sqrt(5) * r / lengthscale
    return (1 + a + a**2 / 3) * np.exp(-a)


def distances(left, right):
    return np.array([[np.linalg.norm(x - y) for y in right] for x in left])


def posterior(points, gradients, queries, kernel, noise_variance, prior_mean="zero"):
    """Mean [q, d] and variance [q] at the queries; kernel maps distances to covariances."""
    K = kernel(distances(points, points)) + noise_variance * np.eye(len(points))
    k = kernel(distances(queries, points))
    ones = np.ones(len(points))
    inverse = np.linalg.inv(K)
    variance = kernel(np.zeros(1)) - np.einsum("qi,ij,qj->q", k, inverse, k)
    mean = np.zeros(gradients.shape[1])
    if prior_mean == "last":
        mean = gradients[-1]
    if prior_mean == "gls":
        mean = (ones @ inverse @ gradients) / (ones @ inverse @ ones)
        variance = variance + (1 - k @ inverse @ ones) ** 2 / (ones @ inverse @ ones)
    return mean + k @ inverse @ (gradients - mean), variance


def leave_one_out_error(points, gradients, kernel, noise_variance, prior_mean):
    """Sum of squared errors of predicting each gradient from all the others."""
    total = 0.0
    for i in range(len(points)):
        keep = np.arange(len(points)) != i
        if prior_mean == "last":  # the centre is a given: it stays when its pair is left out
            shift = gradients[-1]
            mean, _ = posterior(
                points[keep], gradients[keep] - shift, points[i : i + 1], kernel, noise_variance
            )
            mean = mean + shift
        else:
            mean, _ = posterior(
                points[keep], gradients[keep], points[i : i + 1], kernel, noise_variance, prior_mean
            )
        total += np.sum((gradients[i] - mean[0]) ** 2)
    return total
