"""Consensus-based optimization the slow way: a number at a time, and a quadratic in closed form."""

import math

import numpy as np
import torch


def consensus(points, energies, alpha):
    """Weighted mean of the points, its weights, the soft minimum; plain Python."""
    usable = [e for e in energies if e < math.inf]
    least = min(usable)
    weights = [math.exp(-alpha * (e - least)) if e < math.inf else 0.0 for e in energies]
    total = sum(weights)
    weights = [w / total for w in weights]
    centre = [
        sum(w * p[j] for w, p in zip(weights, points, strict=True) if w > 0) for j in range(len(points[0]))
    ]
    return centre, weights, least - math.log(total / len(energies)) / alpha


def cbo_step(points, centre, normal, *, drift, sigma, dt, isotropic):
    """One step of Euler and Maruyama, particle by particle and component by component."""
    moved = []
    for point, shake in zip(points, normal, strict=True):
        away = [v - c for v, c in zip(point, centre, strict=True)]
        length = math.sqrt(sum(a * a for a in away))
        reach = [length if isotropic else a for a in away]
        moved.append(
            [
                v - drift * dt * a + sigma * math.sqrt(dt) * r * xi
                for v, a, r, xi in zip(point, away, reach, shake, strict=True)
            ]
        )
    return moved


def proximal_gradient(hessian, x, tau):
    """(I + τ A)⁻¹ A x: what the consensus of infinitely many samples says of ½ xᵀAx."""
    return torch.linalg.solve(torch.eye(len(x), dtype=x.dtype) + tau * hessian, hessian @ x)


class Bowl:
    """½ xᵀAx + s (target in the batch), at the parameters or, vectorized, at points; can be pickled."""

    def __init__(self, hessian, parameters=None):
        self.hessian = hessian
        self.parameters = parameters

    def __call__(self, *arguments):
        if self.parameters is not None:
            x = torch.cat([p.reshape(-1) for p in self.parameters])
            return 0.5 * x @ self.hessian @ x
        points = arguments[0]
        return 0.5 * ((points @ self.hessian) * points).sum(1)


def rippled(points):
    """[n, d] -> [n], NumPy: many local minima, the least at 0."""
    return (points**2 + 2.5 * (1 - np.cos(2 * np.pi * points))).sum(1)


def rippled_at(x):
    """The same of one point [d]."""
    return float(rippled(x[None])[0])
