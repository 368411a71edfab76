"""Sketches as dense matrices, federated rounds as loops, privacy by its exact formula: slow and obvious."""

import math

import numpy as np
import torch
from scipy.linalg import hadamard
from scipy.optimize import root_scalar
from scipy.stats import norm

from optex.sources.sketched.matrices import AMS, SRHT, CountSketch, Gaussian

__all__ = ["attacked_exactly", "dense", "exact_epsilon", "federated"]

PRIME = 2**31 - 1


def hashed(coefficients, place):
    """A polynomial in Python's integers."""
    value = 0
    for coefficient in coefficients:
        value = (value * place + int(coefficient)) % PRIME
    return value


def dense(kind, size, dimension, seed, number):
    """R [s, d], entry by entry."""
    words = (seed, number)
    if kind == "gaussian":
        matrix = Gaussian(size, dimension, words)
        blocks = [
            torch.randn(size, len(c), generator=g) for g in [matrix.generator()] for c in matrix.columns()
        ]
        return torch.cat(blocks, 1).double() / math.sqrt(size)
    found = torch.zeros(size, dimension, dtype=torch.float64)
    if kind == "count":
        places, signs = CountSketch(size, dimension, words).polynomials(2, 3)
        for i in range(dimension):
            found[hashed(places, i) % size, i] = 1 - 2 * (hashed(signs, i) % 2)
        return found
    if kind == "ams":
        for k, row in enumerate(AMS(size, dimension, words).polynomials(size, 3)):
            for i in range(dimension):
                found[k, i] = (1 - 2 * (hashed(row, i) % 2)) / math.sqrt(size)
        return found
    length = 1
    while length < dimension:
        length *= 2
    generator = SRHT(size, dimension, words).generator()
    signs = 2 * torch.randint(2, (dimension,), generator=generator) - 1
    rows = torch.randperm(length, generator=generator)[:size]
    whole = torch.from_numpy(hadamard(length)).double() / math.sqrt(length)
    return math.sqrt(length / size) * whole[rows][:, :dimension] * signs


def federated(gradient, x0, clients, *, lr, local_steps, server_lr, sketch, rounds, first=0):
    """The rounds, client by client, with R written down; x after each."""
    w, found = torch.as_tensor(x0, dtype=torch.float64).clone(), []
    for t in range(first, first + rounds):
        total = 0
        R = torch.eye(len(w), dtype=torch.float64)
        if sketch is not None:
            R = dense(sketch.kind, sketch.size, len(w), sketch.seed, t)
        for data in clients:
            u = w.clone()
            for _ in range(local_steps):
                u = u - lr * gradient(u, data)
            total = total + R @ (u - w)
        w = w + server_lr * R.T @ (total / len(clients))
        found.append(w.clone())
    return found


def exact_epsilon(mechanism, releases, delta):
    """The least ε of so many Gaussian releases: they are one, of mean μ = √k Δ/z and unit deviation.

    δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ); Balle, Wang, ICML 2018, arXiv 1805.06530.
    """
    mu = math.sqrt(releases) * mechanism.sensitivity / mechanism.noise_multiplier

    def excess(epsilon):
        second = np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return norm.cdf(mu / 2 - epsilon / mu) - second - delta

    if excess(0.0) <= 0:
        return 0.0
    return root_scalar(excess, bracket=(0.0, 10 * mu * mu + 100 * mu + 10), method="brentq").root


def attacked_exactly(gradient, classes):
    """A softmax classifier's one input, out of its gradient [classes · (inputs + 1)]: ratios of entries."""
    rows = gradient.view(classes, -1)
    row = rows[rows[:, -1].abs().argmax()]
    return row[:-1] / row[-1]
