"""SCALE, number by number: column-normalised SGD with momentum in the last layer, AdamW for vectors."""

import math

import torch


class SlowSCALE:
    """Steps lists of (parameter, role) in plain loops; roles as in ``optex.optimizers.SCALE``."""

    def __init__(
        self, parameters, lr, momentum=0.9, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False
    ):
        self.parameters = parameters
        self.lr, self.momentum, self.betas = lr, momentum, betas
        self.eps, self.weight_decay, self.maximize = eps, weight_decay, maximize
        self.state = {}

    def step(self):
        for p, role in self.parameters:
            if p.grad is None:
                continue
            g = -p.grad if self.maximize else p.grad
            p.data.mul_(1 - self.lr * self.weight_decay)
            if p.ndim < 2 or role == "vector":
                self._adamw(p, g)
            elif role == "embedding":
                table, slopes = p.data.reshape(-1, p.shape[-1]), g.reshape(-1, p.shape[-1])
                for j in range(p.shape[-1]):
                    table[:, j] = self._moved(table[:, j], slopes[:, j])
                p.data.copy_(table.reshape(p.shape))
            else:
                if role == "last":
                    before = self.state.get(p, torch.zeros_like(p))
                    g = self.state[p] = self.momentum * before + (1 - self.momentum) * g
                for i in range(p.shape[0]):
                    p.data[i] = self._moved(p.data[i].flatten(), g[i].flatten()).reshape(p.shape[1:])

    def _moved(self, column, slope):  # [n], [n]
        rms = math.sqrt(sum(float(x) ** 2 for x in slope) / len(slope))
        return column - self.lr * slope / max(rms, self.eps)

    def _adamw(self, p, g):
        t, mean, square = self.state.get(p, (0, torch.zeros_like(p), torch.zeros_like(p)))
        beta1, beta2 = self.betas
        t, mean, square = t + 1, beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
        self.state[p] = (t, mean, square)
        corrected = (square / (1 - beta2**t)).sqrt() + self.eps
        p.data -= self.lr * mean / (1 - beta1**t) / corrected
