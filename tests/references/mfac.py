"""M-FAC written down: dense Fisher matrices in float64, and the paper's recursion for the static one."""

import torch


def dense_fisher(rows, damping):
    """λI + the mean of g gᵀ, [d, d]."""
    fisher = damping * torch.eye(rows.shape[1], dtype=torch.float64)
    for row in rows.double():
        fisher += torch.outer(row, row) / len(rows)
    return fisher


def naive_woodbury(rows, vector, damping):
    """(x - Gᵀ(mλI + GGᵀ)⁻¹Gx) / λ in whatever precision the rows have."""
    system = len(rows) * damping * torch.eye(len(rows), dtype=rows.dtype) + rows @ rows.mT
    return (vector - rows.mT @ torch.linalg.solve(system, rows @ vector)) / damping


class Recursion:
    """F⁻¹ = I/λ - Σ h_i h_iᵀ / (m + g_iᵀ h_i), with h_i = F_{i-1}⁻¹ g_i: the static algorithm as published."""

    def __init__(self, rows, damping):
        rows = rows.double()
        self.damping, self.dimension = damping, rows.shape[1]
        self.vectors, self.denominators = [], []
        for row in rows:
            vector = self.product(row)
            self.vectors.append(vector)
            self.denominators.append(len(rows) + row @ vector)

    def product(self, x):
        result = x.double() / self.damping
        for vector, denominator in zip(self.vectors, self.denominators, strict=True):
            result = result - vector * (vector @ x.double()) / denominator
        return result

    def diagonal(self):
        result = torch.full((self.dimension,), 1 / self.damping, dtype=torch.float64)
        for vector, denominator in zip(self.vectors, self.denominators, strict=True):
            result = result - vector.square() / denominator
        return result


class DenseMFAC:
    """The optimizer of one vector, with a list for its window and a matrix inverse in every step."""

    def __init__(
        self, theta, lr, window_size, damping, momentum=0.0, weight_decay=0.0, decoupled_weight_decay=False
    ):
        self.theta, self.lr, self.window_size, self.damping = theta.clone(), lr, window_size, damping
        self.momentum, self.weight_decay, self.decoupled = momentum, weight_decay, decoupled_weight_decay
        self.window, self.velocity = [], torch.zeros_like(theta)

    def step(self, gradient, drafted=False):
        if not self.decoupled:
            gradient = gradient + self.weight_decay * self.theta
        # A ring: the new row takes the place of the oldest, which is the first of the list.
        window = [*self.window, gradient][-self.window_size :]
        direction = torch.linalg.solve(dense_fisher(torch.stack(window), self.damping), gradient)
        if not drafted:
            self.window = window
        self.velocity = self.momentum * self.velocity + (1 - self.momentum) * direction
        if self.decoupled:
            self.theta = self.theta * (1 - self.lr * self.weight_decay)
        self.theta = self.theta - self.lr * self.velocity
