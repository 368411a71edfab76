"""Bounds on the error of a predicted gradient, and on the gradients along steps with such errors."""

from __future__ import annotations

import math

from optex.checks import check_integer, check_number

__all__ = ["error_bound", "stationarity_bound"]


def error_bound(deviation: float, dimension: int, confidence: float = 0.95) -> float:
    """Upper bound on ‖∇F(θ) - μ(θ)‖ that holds with this probability, if the model is right.

    Given the history, the d components of the error are then independent N(0, s² v), so the squared length over
    s² v is χ² with d degrees of freedom. With x = ln 1/δ, with probability at least 1 - δ,

        ‖∇F - μ‖ ≤ √(s² v) · √(d + 2 √(d x) + 2 x).

    It holds at one point, chosen before its gradient is known, and for independent components, as in the
    separable model.

    Args:
        deviation: √(s² v), the predicted standard deviation of one component, not negative.
        dimension: d, at least 1.
        confidence: 1 - δ, in (0, 1).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Laurent and Massart, *Adaptive estimation of a quadratic functional by model selection*, Annals of
    Statistics 2000, lemma 1, for the tail of χ².

    >>> round(error_bound(0.1, dimension=10_000), 3)     # not much more than 0.1 · √d
    10.175
    """
    deviation = check_number("error_bound", "deviation", deviation, least=0)
    dimension = check_integer("error_bound", "dimension", dimension)
    within = check_number(
        "error_bound", "confidence", confidence, least=0, most=1, open_below=True, open_above=True
    )
    x = -math.log1p(-within)
    return deviation * math.sqrt(dimension + 2 * math.sqrt(dimension * x) + 2 * x)


def stationarity_bound(
    rounds: int,
    parallelism: int,
    *,
    lr: float,
    gap: float,
    smoothness: float,
    noise_variance: float = 0.0,
    squared_error: float = 0.0,
) -> float:
    """Upper bound on the mean of E‖∇F‖² over the N · T steps of T rounds of gradient descent.

    Steps θ - η (∇F(θ) + e + n) where e, the error of a prediction, is known before the noise n, which has mean
    zero. For F with an L-Lipschitz gradient and η ≤ 1/L,

        1/(N T) Σ E‖∇F‖² ≤ 2 Δ / (η N T) + L η σ² + ρ²,

    with Δ = F(start) - inf F, σ² ≥ E‖n‖² and ρ² the mean of E‖e‖². ``docs/theory.md`` has the proof, which
    takes every one of the steps as kept.

    Args:
        rounds: T, at least 1.
        parallelism: N, steps a round keeps, at least 1.
        lr: η, positive, at most 1/L.
        gap: Δ, not negative.
        smoothness: L, positive.
        noise_variance: σ², of the whole gradient, not negative.
        squared_error: ρ², not negative.

    Raises:
        ValueError: an argument is out of range; the message names it.

    >>> stationarity_bound(100, 1, lr=0.5, gap=2.0, smoothness=1.0)
    0.08
    >>> stationarity_bound(100, 4, lr=0.5, gap=2.0, smoothness=1.0, squared_error=0.01)
    0.03
    """
    name = "stationarity_bound"
    steps = check_integer(name, "rounds", rounds) * check_integer(name, "parallelism", parallelism)
    smoothness = check_number(name, "smoothness", smoothness, least=0, open_below=True)
    lr = check_number(name, "lr", lr, least=0, most=1 / smoothness, open_below=True)
    gap = check_number(name, "gap", gap, least=0)
    noise_variance = check_number(name, "noise_variance", noise_variance, least=0)
    squared_error = check_number(name, "squared_error", squared_error, least=0)
    return 2 * gap / (lr * steps) + smoothness * lr * noise_variance + squared_error
