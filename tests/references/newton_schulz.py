"""The iterative Newton method and its rivals in NumPy, an example and a place at a time."""

import numpy as np


def inverse(matrix, first, count):
    """M after so many iterations."""
    M = np.array(first)
    for _ in range(count):
        M = 2 * M - M @ matrix @ M
    return M


def newton_predictions(inputs, targets, steps, init="norm"):
    """[steps + 1, n] of one sequence [n, d], [n]."""
    found = np.zeros((steps + 1, len(targets)))
    for t in range(1, len(targets)):
        X, y = inputs[:t], targets[:t]
        S = X.T @ X
        first = S.T / np.linalg.norm(S @ S.T) if init == "norm" else np.eye(len(S)) / np.trace(S)
        for k in range(steps + 1):
            found[k, t] = inputs[t] @ inverse(S, first, k) @ X.T @ y
    return found


def descent_predictions(inputs, targets, steps, lr):
    """[steps + 1, n] of one sequence."""
    found = np.zeros((steps + 1, len(targets)))
    for t in range(1, len(targets)):
        w = np.zeros(inputs.shape[1])
        for k in range(1, steps + 1):
            w = w - lr * sum((inputs[i] @ w - targets[i]) * inputs[i] for i in range(t))
            found[k, t] = inputs[t] @ w
    return found


def online_predictions(inputs, targets, passes, lr, rule):
    """[passes + 1, n] of one sequence."""
    found = np.zeros((passes + 1, len(targets)))
    for t in range(1, len(targets)):
        w, seen = np.zeros(inputs.shape[1]), 0
        for k in range(1, passes + 1):
            for x, y in zip(inputs[:t], targets[:t], strict=True):
                seen += 1
                rate = {"constant": lr, "decaying": lr / seen**0.5, "normalised": lr / (x @ x)}[rule]
                w = w - rate * (w @ x - y) * x
            found[k, t] = inputs[t] @ w
    return found


def similarity(first, second, targets):
    """Mean cosine of errors, [k, l], of [b, k, n], [b, l, n], [b, n]."""
    found = np.zeros((first.shape[1], second.shape[1]))
    for i in range(first.shape[1]):
        for j in range(second.shape[1]):
            pairs = [
                (a[i, 1:] - y[1:], b[j, 1:] - y[1:]) for a, b, y in zip(first, second, targets, strict=True)
            ]
            found[i, j] = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    return found
