"""The obvious twin of AdaSketch-Newton: the iteration as it is written, exact directions; and its sketches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Derivatives", "merit", "newton_iterates", "sketched"]


class Derivatives:
    """f, ∇f, c, J and ∇²_xx L of torch functions, by torch."""

    def __init__(self, f: Callable[[Tensor], Tensor], c: Callable[[Tensor], Tensor]) -> None:
        self._f, self._c = f, c

    def f(self, x: np.ndarray) -> float:
        return float(self._f(torch.from_numpy(x)))

    def g(self, x: np.ndarray) -> np.ndarray:
        return torch.func.grad(self._f)(torch.from_numpy(x)).numpy()

    def c(self, x: np.ndarray) -> np.ndarray:
        return self._c(torch.from_numpy(x)).reshape(-1).numpy()

    def jac(self, x: np.ndarray) -> np.ndarray:
        return torch.func.jacrev(lambda z: self._c(z).reshape(-1))(torch.from_numpy(x)).numpy()

    def hess(self, x: np.ndarray, lam: np.ndarray) -> np.ndarray:
        weights = torch.from_numpy(lam)
        slope = torch.func.grad(lambda z: self._f(z) + weights @ self._c(z).reshape(-1))
        return torch.func.jacrev(slope)(torch.from_numpy(x)).numpy()


def merit(of: Derivatives, x: np.ndarray, lam: np.ndarray, eta1: float, eta2: float) -> float:
    """The exact augmented Lagrangian."""
    slope = of.g(x) + of.jac(x).T @ lam
    return float(of.f(x) + lam @ of.c(x) + eta1 / 2 * of.c(x) @ of.c(x) + eta2 / 2 * slope @ slope)


def newton_iterates(
    of: Derivatives,
    x: np.ndarray,  # [n]
    lam: np.ndarray,  # [m]
    tol: float = 1e-4,
    beta: float = 0.1,
    nu: float = 1.5,
    xi: float = 0.1,
) -> tuple[list[np.ndarray], list[float], float, float]:
    """(x, λ) and step lengths until the KKT residual is within tol, and the last η₁ and η₂."""
    eta1, eta2, iterates, steps = 1.0, 0.1, [np.concatenate([x, lam])], []
    while True:
        n, m = x.size, lam.size
        J, H, c = of.jac(x), of.hess(x, lam), of.c(x)
        slope = of.g(x) + J.T @ lam
        residual = np.concatenate([slope, c])
        if np.linalg.norm(residual) <= tol:
            return iterates, steps, eta1, eta2
        Q, _ = np.linalg.qr(J.T, mode="complete")
        Z = Q[:, m:]
        B = H
        if n > m and np.linalg.eigvalsh(Z.T @ H @ Z)[0] < 1e-6:
            B = H + (xi + np.linalg.norm(H)) * np.eye(n)
        d = np.linalg.solve(np.block([[B, J.T], [J, np.zeros((m, m))]]), -residual)
        while True:
            gradient = np.concatenate([slope + eta2 * H @ slope + eta1 * J.T @ c, c + eta2 * J @ slope])
            if gradient @ d <= -eta2 / 2 * residual @ residual:
                break
            eta1, eta2 = eta1 * nu**2, eta2 / nu
        alpha = 1.0
        before = merit(of, x, lam, eta1, eta2)
        while (
            merit(of, x + alpha * d[:n], lam + alpha * d[n:], eta1, eta2)
            > before + alpha * beta * gradient @ d + 1e-15
        ):
            alpha /= 2
        x, lam = x + alpha * d[:n], lam + alpha * d[n:]
        iterates.append(np.concatenate([x, lam]))
        steps.append(alpha)


def sketched(kind: str, K: np.ndarray, r: np.ndarray, count: int, seed: int) -> np.ndarray:
    """d after so many sketches, numbers drawn 64 sketches at a time."""
    random, d = np.random.default_rng(seed), np.zeros_like(r)
    left = count
    while left:
        size = min(64, left)
        left -= size
        if kind == "gv":
            sketches = random.standard_normal((size, r.size))
        else:
            sketches = np.eye(r.size)[random.integers(r.size, size=size)]
        for s in sketches:
            d = d - (s @ (K @ d - r)) / (s @ K @ K.T @ s) * (K.T @ s)
    return d
