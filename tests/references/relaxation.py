"""Relaxation and its bandits by loops over entries, dense inverses and whole histories."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import lsq_linear

__all__ = ["ChebTwin", "TsallisTwin", "laplacian", "pcg_iterates", "relaxed", "sor_iterates"]


def laplacian(side):
    """Five-point Laplacian, entry by entry."""
    matrix = np.zeros((side**2, side**2))
    for i in range(side):
        for j in range(side):
            here = i * side + j
            matrix[here, here] = 4
            for k, m in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if 0 <= k < side and 0 <= m < side:
                    matrix[here, k * side + m] = -1
    return matrix


def sor_iterates(A, b, omega, count):
    """Sweeps through the unknowns, each replaced as soon as it is known: Young's own form."""
    x = np.zeros(len(b))
    found = [x.copy()]
    for _ in range(count):
        for i in range(len(b)):
            others = A[i] @ x - A[i, i] * x[i]
            x[i] = (1 - omega) * x[i] + omega * (b[i] - others) / A[i, i]
        found.append(x.copy())
    return found


def pcg_iterates(A, b, omega, count):
    """CG on C⁻¹ A C⁻ᵀ with P = C Cᵀ, the preconditioner written down; by the minimum over Krylov's space."""
    D, L = np.diag(np.diag(A)), np.tril(A, -1)
    X = D + omega * L
    P = X @ np.linalg.inv(D) @ X.T / (omega * (2 - omega))
    basis, vector = [], np.linalg.solve(P, b)
    found = [np.zeros(len(b))]
    for _ in range(count):
        for _ in range(2):
            for other in basis:
                vector = vector - other * (other @ A @ vector)
            vector = vector / math.sqrt(vector @ A @ vector)
        basis.append(vector)
        V = np.array(basis).T
        found.append(V @ (V.T @ b))  # the least energy error over the space, V A-orthonormal
        vector = np.linalg.solve(P, A @ vector)
    return found


class TsallisTwin:
    """Probabilities by bisection, from the list of everything observed."""

    def __init__(self, actions):
        self.actions, self.seen = actions, []

    def probabilities(self):
        losses = np.zeros(self.actions)
        costs = [cost for _, _, cost in self.seen if cost is not None]
        worst = max(costs, default=0.0) or 1.0
        scale = np.mean(costs) if sum(costs) > 0 else 1.0
        for action, chance, cost in self.seen:
            losses[action] += (worst if cost is None else cost) / chance / scale
        rate = 2 / math.sqrt(len(self.seen) + 1)

        def chances(x):
            return 4 / (rate * (losses - x)) ** 2

        low, high = losses.min() - 1e9, losses.min() - 1e-12
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if chances(middle).sum() < 1 else (low, middle)
        return chances(low)


class ChebTwin:
    """All rows kept, every action fitted anew each time."""

    def __init__(self, actions, contexts, features):
        self.actions, self.contexts, self.features = actions, contexts, features
        self.seen, self.online = [], 0.0

    def row(self, context):
        low, high = self.contexts
        z = np.clip(2 * (context - low) / (high - low) - 1, -1, 1)
        return np.polynomial.chebyshev.chebvander(z, self.features - 1).ravel()

    def fits(self):
        ended = [cost for _, _, cost in self.seen if cost is not None]
        worst = max(ended, default=0.0) or 1.0
        spread = max(ended, default=0.0) - min(ended, default=0.0)
        theta, residual = np.zeros((self.actions, self.features)), 0.0
        for action in range(self.actions):
            own = [(self.row(c), worst if k is None else k) for c, a, k in self.seen if a == action]
            if not own:
                continue
            rows, costs = np.array([row for row, _ in own]), np.array([cost for _, cost in own])
            theta[action] = np.linalg.lstsq(rows, costs, rcond=None)[0]
            bound = np.array([worst, *(2 * spread / j for j in range(1, self.features))])
            if (abs(theta[action]) > bound).any():
                room = np.maximum(bound, 1e-12 * worst)
                theta[action] = lsq_linear(rows, costs, (-room, room), method="bvls").x
            residual += ((rows @ theta[action] - costs) ** 2).sum()
        return theta, residual, spread

    def probabilities(self, context):
        theta, residual, spread = self.fits()
        time, d, m = len(self.seen), self.actions, self.features
        alpha = (math.pi + 2 / math.pi * math.log(2 * m + 1)) * spread / (2 * (m + 1))
        below = max(0.0, self.online - residual) + 2 * alpha**2 * time
        rate = 2 * time * math.sqrt(d * time / below) if below > 0 else 0.0
        predicted = theta @ self.row(context)
        best = int(predicted.argmin())
        chances = np.array([1 / (d + rate * (value - predicted[best])) for value in predicted])
        chances[best] = 1 - (chances.sum() - chances[best])
        return chances

    def observe(self, context, action, cost):
        theta, _, _ = self.fits()
        ended = [k for _, _, k in [*self.seen, (0, 0, cost)] if k is not None]
        paid = (max(ended, default=0.0) or 1.0) if cost is None else cost
        self.online += (theta[action] @ self.row(context) - paid) ** 2
        self.seen.append((context, action, cost))


def relaxed(result, truth):
    """Relative error of a solution in any form."""
    x = result.x.detach().cpu().numpy() if hasattr(result.x, "detach") else result.x
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))
