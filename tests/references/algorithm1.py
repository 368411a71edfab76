"""Algorithm 1 of the paper as a loop, with textbook optimizers; NumPy only, nothing shared with optex."""

import numpy as np

from tests.references.dense_gp import matern52, posterior


def sgd(lr, momentum=0.0):
    def step(x, state, g):
        buffer = g if state is None else momentum * state + g
        return x - lr * buffer, buffer

    return step


def adam(lr, b1=0.9, b2=0.999, eps=1e-8):
    def step(x, state, g):
        m, v, t = (0.0, 0.0, 0) if state is None else state
        m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, t + 1
        return x - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), (m, v, t)

    return step


def median_lengthscale(points):
    gaps = [np.linalg.norm(p - q) for p in points for q in points]
    positive = sorted(gap for gap in gaps if gap > 1e-12)
    return positive[(len(positive) - 1) // 2] if positive else 1.0


def algorithm1(gradient, loss, step, x, rounds, parallelism, history_size, noise_variance, selection="last"):
    """Iterates θ_0, θ_1, ..., θ_rounds."""
    state, history, iterates = None, [], [x]
    for _ in range(rounds):

        def mu(y, pairs=tuple(history)):
            if not pairs:
                return np.zeros_like(y)
            points, gradients = (np.array(column) for column in zip(*pairs, strict=True))
            kernel = lambda r: matern52(r, median_lengthscale(points))  # noqa: E731
            return posterior(points, gradients, y[None], kernel, noise_variance)[0][0]

        proxies = [(x, state)]
        for _ in range(parallelism - 1):
            y, s = proxies[-1]
            proxies.append(step(y, s, mu(y)))
        true = [gradient(y) for y, _ in proxies]
        history = (history + [(y, g) for (y, _), g in zip(proxies, true, strict=True)])[-history_size:]
        scores = {
            "last": [-i for i in range(parallelism)],
            "lowest-loss": [loss(y) for y, _ in proxies],
            "smallest-gradient": [np.linalg.norm(g) for g in true],
        }[selection]
        chosen = int(np.argmin(scores))
        x, state = step(*proxies[chosen], true[chosen])
        iterates.append(x)
    return np.array(iterates)
