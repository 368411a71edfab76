"""A quadratic bilevel problem in closed form, and the penalty's double loop written out."""

import numpy as np
import torch


class QuadraticBilevel:
    """f = ½‖y - a‖² + ½ ρ‖x‖², g = ½ (y - B x)ᵀ A (y - B x): y*(x) = B x, everything else by linear algebra.

    5 outer and 8 inner variables; A has eigenvalues from 1/2 to 3, times ``scale``.
    """

    def __init__(self, outer=5, inner=8, seed=0, least=0.5, ridge=0.1, scale=1.0):
        random = np.random.default_rng(seed)
        turned, _ = np.linalg.qr(random.standard_normal((inner, inner)))
        self.A = scale * turned @ np.diag(np.linspace(least, 3.0, inner)) @ turned.T
        self.B = random.standard_normal((inner, outer)) / np.sqrt(inner)
        self.a = random.standard_normal(inner)
        self.ridge = ridge
        self.outer, self.inner = outer, inner
        self.tensors = [torch.from_numpy(value) for value in (self.A, self.B, self.a)]

    def upper(self, x, y, batch):
        exact = 0.5 * (y - self.tensors[2]).square().sum() + 0.5 * self.ridge * x.square().sum()
        return exact if batch is None else exact + batch[0] @ x + batch[1] @ y

    def lower(self, x, y, batch):
        off = y - self.tensors[1] @ x
        exact = 0.5 * off @ self.tensors[0] @ off
        return exact if batch is None else exact + batch[2] @ x + batch[3] @ y

    def batches(self, count, scale=0.05, seed=0):
        """Noise of the gradients, in x and y, of f and of g: a batch is four vectors."""
        random = np.random.default_rng(seed)
        sizes = (self.outer, self.inner) * 2
        return [
            tuple(torch.from_numpy(scale * random.standard_normal(size)) for size in sizes)
            for _ in range(count)
        ]

    def hypergradient(self, x):
        """Bᵀ (B x - a) + ρ x."""
        return self.B.T @ (self.B @ x - self.a) + self.ridge * x

    def minimiser(self):
        """Of f(x, y*(x))."""
        return np.linalg.solve(self.B.T @ self.B + self.ridge * np.eye(self.outer), self.B.T @ self.a)

    def mixed(self, x, sigma):
        """argmin_y σ f + g."""
        return np.linalg.solve(sigma * np.eye(self.inner) + self.A, sigma * self.a + self.A @ self.B @ x)

    def penalty(self, x, sigma):
        """ψ_σ(x), from the two least values of the lower level."""
        y = self.mixed(x, sigma)
        off = y - self.B @ x
        return 0.5 * np.sum((y - self.a) ** 2) + 0.5 * self.ridge * x @ x + 0.5 * off @ self.A @ off / sigma

    def penalty_gradient(self, x, sigma):
        """∂/∂x of it: ρ x - Bᵀ A (y - B x) / σ."""
        return self.ridge * x - self.B.T @ self.A @ (self.mixed(x, sigma) - self.B @ x) / sigma

    def penalty_hessian(self, sigma):
        """ψ_σ is a quadratic: ρ I + Bᵀ A (σ I + A)⁻¹ B."""
        inverse = np.linalg.inv(sigma * np.eye(self.inner) + self.A)
        return self.ridge * np.eye(self.outer) + self.B.T @ self.A @ inverse @ self.B

    def inner_rate(self, sigma):
        """γ = 1 / (L_g + σ L_f)."""
        return 1 / (np.linalg.eigvalsh(self.A)[-1] + sigma)


def double_loop(problem, x, sigma, rounds, steps, rate, alpha):
    """The paper's double loop with T steps from warm starts, exact gradients; x after every round."""
    A, B, a = problem.A, problem.B, problem.a
    y, z = np.zeros(problem.inner), np.zeros(problem.inner)
    path = []
    for _ in range(rounds):
        for _ in range(steps):
            z = z - rate * A @ (z - B @ x)
            y = y - rate * (sigma * (y - a) + A @ (y - B @ x))
        of_g = -B.T @ A @ ((y - B @ x) - (z - B @ x))
        x = x - alpha * (problem.ridge * x + of_g / sigma)
        path.append(x)
    return path


def single_loop(problem, x, sigma, rate, alpha, noises, momentum):
    """One step of z, y and x at a time, each along a gradient with STORM's momentum.

    ``noises[k]``: what is added to the gradients of f and g in (x, y) at step k: (f_x, f_y, g_x, g_y); the same
    sample is used at the point before.
    """
    A, B, a = problem.A, problem.B, problem.a

    def gradients(x, y, z, noise):
        f_x, f_y, g_x, g_y = noise
        return {
            "z": A @ (z - B @ x) + g_y,
            "fy": y - a + f_y,
            "gy": A @ (y - B @ x) + g_y,
            "fx": problem.ridge * x + f_x,
            "gxy": -B.T @ A @ (y - B @ x) + g_x,
            "gxz": -B.T @ A @ (z - B @ x) + g_x,
        }

    y, z, path, before, running = np.zeros(problem.inner), np.zeros(problem.inner), [], None, {}
    for k in range(len(noises)):
        now = gradients(x, y, z, noises[k])
        if before is None:
            running = now
        else:
            eta, then = momentum(k), gradients(*before, noises[k])
            running = {key: now[key] + (1 - eta) * (running[key] - then[key]) for key in now}
        before = (x, y, z)
        z = z - rate(k) * running["z"]
        y = y - rate(k) * (sigma * running["fy"] + running["gy"])
        x = x - alpha(k) * (running["fx"] + (running["gxy"] - running["gxz"]) / sigma)
        path.append(x)
    return path
