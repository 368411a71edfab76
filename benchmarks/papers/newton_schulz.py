"""The iterative Newton method: iterations beside gradient descent's, what ends it, direct solvers beside it.

What a transformer's layers are like is read from the record of ``benchmarks/in_context_transformer.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from optex.solvers import Status, newton_schulz_inverse
from papers import Check

ROOM = "solvers"

RECORD: Final = Path(__file__).parents[2] / "results" / "family" / "in_context_transformer.json"
_POINTS, _DIMENSION, _SEEDS, _GOAL = 40, 20, 20, 1e-6
# Standard deviations of the inputs' coordinates; the second covariance has condition number 100.
_SPREADS: Final = {
    "Gaussian": np.ones(_DIMENSION),
    "half the coordinates 10 times as wide": np.where(np.arange(_DIMENSION) < 10, 1.0, 10.0),
}
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000")  # Okabe and Ito

Array = NDArray[np.float64]


# ------------------------------------------------------------------ iterations


@lru_cache
def regressions(spread: str) -> list[tuple[Array, Array]]:
    """XᵀX [d, d] and the weights w [d] of tasks without noise, so that the least-squares solution is w."""
    found = []
    for seed in range(_SEEDS):
        generator = np.random.default_rng(seed)
        inputs = generator.standard_normal((_POINTS, _DIMENSION)) * _SPREADS[spread]
        found.append((inputs.T @ inputs, generator.standard_normal(_DIMENSION)))
    return found


def newton_path(gram: Array, weights: Array, init: Literal["trace", "norm"]) -> list[float]:
    """Relative errors of w after 0, 1, ... iterations of the function."""
    moment, errors = gram @ weights, []

    def told(now: Any) -> bool:
        errors.append(float(np.linalg.norm(now.x @ moment - weights) / np.linalg.norm(weights)))
        return errors[-1] <= _GOAL

    first = np.eye(len(gram)) / np.trace(gram) if init == "trace" else gram.T / np.linalg.norm(gram @ gram.T)
    before = float(np.linalg.norm(first @ moment - weights) / np.linalg.norm(weights))
    newton_schulz_inverse(gram, init=init, tol=1e-14, callback=told)
    return [before, *errors]


def descent_path(gram: Array, weights: Array) -> list[float]:
    """Relative errors of w by gradient descent at its best rate, 2 / (λ_min + λ_max)."""
    values = np.linalg.eigvalsh(gram)
    rate, w, errors = 2 / (values[0] + values[-1]), np.zeros_like(weights), [1.0]
    while errors[-1] > _GOAL:
        w = w - rate * gram @ (w - weights)
        errors.append(float(np.linalg.norm(w - weights) / np.linalg.norm(weights)))
    return errors


@lru_cache
def counts(spread: str) -> dict[str, list[int]]:
    """Iterations to the goal, of every task."""
    tasks = regressions(spread)
    return {
        "norm": [len(newton_path(*task, "norm")) - 1 for task in tasks],
        "trace": [len(newton_path(*task, "trace")) - 1 for task in tasks],
        "descent": [len(descent_path(*task)) - 1 for task in tasks],
    }


def _counted(spread: str, newton: tuple[float, float], descent: float) -> Callable[[], tuple[str, bool]]:
    def run() -> tuple[str, bool]:
        found = counts(spread)
        middle = {name: float(np.median(numbers)) for name, numbers in found.items()}
        figure = (
            f"Newton {middle['norm']:g} (at most {max(found['norm'])}), gradient descent {middle['descent']:g}"
            f"; Newton from the trace {middle['trace']:g} (at most {max(found['trace'])})"
        )
        near = abs(middle["norm"] - newton[0]) <= 1 and abs(max(found["norm"]) - newton[1]) <= 2
        return figure, near and abs(middle["descent"] / descent - 1) <= 0.15

    return run


def _squared() -> tuple[str, bool]:
    worst = 0.0
    for gram, _ in regressions("Gaussian"):
        S, errors = torch.from_numpy(gram), []
        identity = torch.eye(_DIMENSION, dtype=torch.float64)

        def told(now: Any, S: Tensor = S, errors: list = errors, identity: Tensor = identity) -> None:
            errors.append(identity - S @ now.x)

        newton_schulz_inverse(S, init="norm", callback=told)
        pairs = pairwise(errors)
        worst = max(worst, *(float((after - before @ before).abs().max()) for before, after in pairs))
    return f"{worst:.1e} at most", worst <= 1e-12


def _halves() -> tuple[str, bool]:
    found = {}
    for kappa in (1e2, 1e4, 1e6):
        generator = np.random.default_rng(0)
        basis, _ = np.linalg.qr(generator.standard_normal((50, 50)))
        matrix = basis @ (np.geomspace(1, 1 / kappa, 50)[:, None] * basis.T)
        matrix = (matrix + matrix.T) / 2
        found[kappa] = [newton_schulz_inverse(matrix, init=init).nit for init in ("trace", "norm")]
    figure = "; ".join(f"κ = {kappa:g}: {trace} and {norm}" for kappa, (trace, norm) in found.items())
    return figure, all(trace < norm for trace, norm in found.values())


# ------------------------------------------------------------------ where it ends


def raw(gram: Array, first: Array, count: int) -> Array:
    """M after so many iterations with nothing to stop them."""
    M = first
    with np.errstate(all="ignore"):
        for _ in range(count):
            M = 2 * M - M @ gram @ M
    return M


def _boundary() -> tuple[str, bool]:
    refused, missing = 0, {30: 0, 100: 0}
    for gram, _ in regressions("Gaussian"):
        scale = float(2 / np.linalg.norm(gram, 2) ** 2)
        for count in missing:
            error = np.linalg.norm(np.eye(_DIMENSION) - gram @ raw(gram, scale * gram, count))
            missing[count] += not error < 0.5
        try:
            newton_schulz_inverse(gram, init=scale)
        except ValueError:
            refused += 1
    figure = (
        f"{missing[30]} of {_SEEDS} without an inverse after 30 iterations, {missing[100]} after 100; refused "
        f"{refused} times"
    )
    return figure, missing[30] == missing[100] == refused == _SEEDS


def _deficient() -> tuple[str, bool]:
    inputs = np.random.default_rng(0).standard_normal((10, _DIMENSION))
    gram = inputs.T @ inputs
    exact = np.linalg.pinv(gram, rcond=1e-10)

    def away(M: Array) -> float:
        return float(np.linalg.norm(M - exact) / np.linalg.norm(exact))

    first = gram / np.linalg.norm(gram @ gram)
    unstopped = {count: away(raw(gram, first, count)) for count in range(81)}
    closest = min(unstopped, key=lambda count: unstopped[count])
    found = newton_schulz_inverse(gram, init="norm")
    figure = (
        f"unstopped, {unstopped[closest]:.0e} from the pseudo-inverse after {closest} iterations and "
        f"{unstopped[80]:.0e} after 80; stopped after {found.nit}, {Status(found.status).name}, "
        f"{away(found.x):.0e}"
    )
    holds = found.status == Status.STALLED and away(found.x) < 1e-10
    return figure, holds and not unstopped[80] < 1.0


# ------------------------------------------------------------------ seconds


def fastest(act: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several calls."""
    act()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return min(found)


def _spd(size: int, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Tensor:
    inputs = torch.randn(
        *batch, 2 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return (inputs.mT @ inputs).to(dtype)


def _raced(S: Tensor, repeats: int) -> tuple[str, bool]:
    array, iterated = S.numpy(), newton_schulz_inverse(S)
    times = {
        f"Newton ({iterated.nit} iterations)": fastest(lambda: newton_schulz_inverse(S), repeats),
        "torch.linalg.inv": fastest(lambda: torch.linalg.inv(S), repeats),
        "numpy.linalg.inv": fastest(lambda: np.linalg.inv(array), repeats),
        "cholesky_inverse": fastest(lambda: torch.cholesky_inverse(torch.linalg.cholesky(S)), repeats),
    }
    newton, *others = times.values()
    figure = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
    return f"{figure}: Newton takes {newton / min(others):.3g} times the fastest", newton <= min(others)


def _regression_raced() -> tuple[str, bool]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 200, generator=generator, dtype=torch.float64)
    y = X @ torch.randn(200, 1, generator=generator, dtype=torch.float64)
    times = {
        "Newton": fastest(lambda: newton_schulz_inverse(X.mT @ X).x @ (X.mT @ y), 5),
        "torch.linalg.lstsq": fastest(lambda: torch.linalg.lstsq(X, y), 5),
        "numpy.linalg.lstsq": fastest(lambda: np.linalg.lstsq(X.numpy(), y.numpy(), rcond=None), 5),
    }
    newton, *others = times.values()
    figure = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
    return f"{figure}: Newton takes {newton / min(others):.3g} times the fastest", newton <= min(others)


def _warm() -> tuple[str, bool]:
    S = _spd(200)
    near = S + 0.01 * S.diagonal().mean() * torch.eye(200, dtype=torch.float64)
    known = torch.linalg.inv(S)
    found = newton_schulz_inverse(near, init=known)
    times = {
        f"Newton ({found.nit} iterations)": fastest(lambda: newton_schulz_inverse(near, init=known), 5),
        "torch.linalg.inv": fastest(lambda: torch.linalg.inv(near), 5),
    }
    newton, inverse = times.values()
    figure = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
    return figure, newton <= inverse


# ------------------------------------------------------------------ a transformer's layers


@lru_cache
def transformer() -> dict[str, Any]:
    """The record of what was trained and probed."""
    return json.loads(RECORD.read_text())


def middle() -> tuple[list[int], list[int], list[int]]:
    """Layers that have begun to predict, and the last one left out: their numbers, iterations and steps."""
    found = transformer()
    layers = [i for i, best in enumerate(found["newton"]["best"]) if best > 0][:-1]
    return (
        layers,
        [found["newton"]["best"][i] for i in layers],
        [found["descent"]["best"][i] for i in layers],
    )


def _learned() -> tuple[str, bool]:
    found = transformer()
    errors = [row[-1] for row in found["errors"]]
    figure = ", ".join(f"{error:.3f}" for error in errors[1:])
    return f"{figure} behind layers 1 to {len(errors) - 1}", errors[-1] <= 0.05


def _linear() -> tuple[str, bool]:
    layers, iterations, _ = middle()
    slope = float(np.polyfit(layers, iterations, 1)[0])
    away = float(np.corrcoef(layers, iterations)[0, 1])
    return (
        f"{_listed(iterations)} behind layers {layers[0]} to {layers[-1]}: {slope:.1f} a layer, "
        f"correlation {away:.3f}",
        away >= 0.98,
    )


def _three() -> tuple[str, bool]:
    layers, iterations, _ = middle()
    slope = float(np.polyfit(layers, iterations, 1)[0])
    return f"{slope:.1f} a layer", 2.0 <= slope <= 4.0


def _exponential() -> tuple[str, bool]:
    layers, _, steps = middle()
    ratios = [after / before for before, after in pairwise(steps)]
    figure = f"{_listed(steps)} steps behind layers {layers[0]} to {layers[-1]}"
    return f"{figure}: times {_listed([round(ratio, 1) for ratio in ratios])}", min(ratios) >= 2


def _more_alike() -> tuple[str, bool]:
    found = transformer()
    newton = max(found["newton"]["similarity"][-1])
    online = {rule: entry["similarity"][-1][0] for rule, entry in found["online"].items()}
    figure = (
        f"Newton {newton:.3f}, gradient descent {found['descent']['highest'][-1]:.3f}, online in one pass "
        + ", ".join(f"{rule} {value:.3f}" for rule, value in online.items())
    )
    return figure, newton > max(online.values())


def _told_apart() -> tuple[str, bool]:
    found = transformer()
    layers, _, _ = middle()
    layers = [*layers, len(found["errors"]) - 1]
    pairs = [(max(found["newton"]["similarity"][i]), found["descent"]["highest"][i]) for i in layers]
    figure = ", ".join(f"{newton:.3f} and {descent:.3f}" for newton, descent in pairs)
    return f"{figure} behind layers {layers[0]} to {layers[-1]}", all(newton > other for newton, other in pairs)


def _listed(numbers: list[Any]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


CHECKS: list[Check] = [
    Check(
        "iterations until w is within 1e-6, 40 Gaussian points in 20 dimensions",
        "Newton from the norm 14, at most 17; gradient descent 150 (recorded): within 1, 2 and 15%",
        _counted("Gaussian", (14, 17), 150),
    ),
    Check(
        "the same, half the coordinates 10 times as wide (a covariance of condition 100)",
        "24.5, at most 25; gradient descent 6470 (recorded): within 1, 2 and 15%",
        _counted("half the coordinates 10 times as wide", (24.5, 25), 6470),
    ),
    Check("E_{k+1} against E_k², 20 tasks, all iterations", "at most 1e-12", _squared),
    Check("iterations from the trace and from the norm, d = 50", "fewer from the trace", _halves),
    Check(
        "from α S with α = 2 / ‖S Sᵀ‖₂, the boundary",
        "no inverse; refused here",
        _boundary,
    ),
    Check(
        "10 points in 20 dimensions: S is singular",
        "diverges after converging unless stopped; stopped, 1e-10 from the pseudo-inverse",
        _deficient,
    ),
    Check("inverse of d = 20, float64", "no slower than the fastest", lambda: _raced(_spd(20), 50)),
    Check("inverse of d = 200, float64", "no slower than the fastest", lambda: _raced(_spd(200), 20)),
    Check(
        "inverses of 256 matrices, d = 20, float32",
        "no slower than the fastest",
        lambda: _raced(_spd(20, (256,), torch.float32), 5),
    ),
    Check("least squares, 400 points, d = 200", "no slower than the fastest", _regression_raced),
    Check(
        "d = 200, diagonal raised by 1% of its mean: from the old inverse",
        "no slower than a new inverse",
        _warm,
    ),
    Check(
        "small transformer: error of a readout at the last place, over d",
        "at most 0.05 behind the last layer",
        _learned,
    ),
    Check(
        "small transformer: most similar Newton iteration, by layer",
        "linear in the layer (paper): correlation at least 0.98",
        _linear,
    ),
    Check(
        "small transformer: Newton iterations a middle layer",
        "about 3 (paper, 12 layers, d = 20): 2 to 4",
        _three,
    ),
    Check(
        "small transformer: most similar number of gradient steps, by layer",
        "grows exponentially (paper): at least doubles with each layer",
        _exponential,
    ),
    Check(
        "small transformer: similarity of the last layer's errors",
        "Newton's above online gradient descent's (paper)",
        _more_alike,
    ),
    Check(
        "small transformer: highest similarity to Newton and to gradient descent",
        "Newton's is higher behind every layer",
        _told_apart,
    ),
]


# ------------------------------------------------------------------ the picture


def curves() -> dict[str, Any]:
    """Errors by iteration of one task of each kind, and similarities by layer."""
    paths = {}
    for name in _SPREADS:
        task = regressions(name)[0]
        descent = descent_path(*task)
        kept = sorted({round(k) for k in np.geomspace(1, len(descent) - 1, 60)})
        paths[name] = {
            "norm": newton_path(*task, "norm"),
            "trace": newton_path(*task, "trace"),
            "descent": [kept, [descent[k] for k in kept]],
        }
    found = transformer()
    return {
        "paths": paths,
        "newton": found["newton"]["similarity"],
        "descent": found["descent"]["similarity"],
        "steps": found["descent"]["kept"],
    }


def draw(curves: dict[str, Any]) -> Figure:
    """Iterations to an error; what a layer is like, in iterations and in steps."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    errors, newton, descent = figure.subplots(1, 3)
    for (name, path), style in zip(curves["paths"].items(), ("-", "--"), strict=True):
        short = "Gaussian" if name == "Gaussian" else "ill-conditioned"
        for init, colour in (("norm", _COLOURS[0]), ("trace", _COLOURS[2])):
            values = path[init][1:]
            errors.plot(
                range(1, len(values) + 1), values, style, color=colour, label=f"Newton, {init}, {short}"
            )
        errors.plot(*path["descent"], style, color=_COLOURS[1], label=f"gradient descent, {short}")
    errors.set(xscale="log", yscale="log", xlabel="iterations", ylabel="relative error of w")
    errors.set_title("40 points, d = 20")
    errors.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for axes, rows, x in (
        (newton, curves["newton"], range(len(curves["newton"][0]))),
        (descent, curves["descent"], [max(step, 0.5) for step in curves["steps"]]),
    ):
        for layer, row in list(enumerate(rows))[1:]:
            axes.plot(x, row, color=_COLOURS[(layer - 1) % 7], label=f"layer {layer}")
            best = max(range(len(row)), key=row.__getitem__)
            axes.plot(x[best], row[best], "o", color=_COLOURS[(layer - 1) % 7])
    newton.set(xlabel="iterations of Newton's method", ylabel="similarity of errors")
    descent.set(xlabel="steps of gradient descent (0 at the left end)", ylabel="similarity of errors")
    descent.set_xscale("log")
    for axes in (newton, descent):
        axes.set_title(f"a transformer of {len(curves['newton']) - 1} layers, d = 4")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure
