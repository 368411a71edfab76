"""How a plate conducts heat
=========================

How well, and where? An inverse problem, solved on worker processes or on Ray::

    python examples/heat.py --workers 2 --plot out/heat.png
    python examples/heat.py --workers 2 --hire ray
    python examples/heat.py --size 48 --heaters-at-once 1 --lr 0.02

Heaters warm a plate, one after the other, and thermometers on it are read as time goes by. From their noisy
readings we recover the conductivity at every point: m = log κ on a grid of n × n cells, which minimises::

    J(m) = 1/(2 σ² count) Σ (readings of the model - readings)² + α/2 Σ over neighbours (m_i - m_j)²

The model is the heat equation ∂u/∂t = ∇·(κ ∇u) + heater, zero at the rim, by finite volumes and implicit
Euler::

    (I + τ K) u_{t+1} = u_t + τ f,     K = Dᵀ diag(W κ) D

with D the differences across the faces between cells and W the mean of κ on a face's two sides. One gradient is
one sparse LU factorisation, a march forward in time, and the adjoint's march back::

    (I + τ K) λ_t = λ_{t+1} + Sᵀ (S u_t - readings_t) / (σ² count),    ∂J/∂κ = -τ Wᵀ Σ_t (D λ_t) ∘ (D u_t)

which costs as much as a second march, however many unknowns there are. Each iteration of Adam has to wait for
it; optex evaluates the gradients of several iterations at once.

Where J is exact, SciPy's L-BFGS-B may need fewer gradients still: it is run beside, to the same J. Where there
are more heaters than one can afford, each gradient looks at some of them, drawn at random
(``--heaters-at-once``); then L-BFGS has to have them all, and Adam has not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse as sparse
import torch
from scipy.optimize import OptimizeResult
from scipy.sparse.linalg import splu

import optex


@dataclass(frozen=True)
class Plate:
    """A plate with heaters and thermometers.

    Attributes:
        size: n, cells along each side; the plate measures 1 × 1.
        steps: of time.
        duration: of one heater's experiment; at κ = 1 warmth crosses the plate in about 1.
        spacing: cells between thermometers, along each side.
        noise: σ, standard deviation of a reading, in the units of the temperature.
        smoothness: α.
    """

    size: int = 128
    steps: int = 12
    duration: float = 0.1
    spacing: int = 8
    noise: float = 1e-3
    smoothness: float = 1e-3

    def differences(self) -> tuple[Any, Any]:
        """D and W: sparse, [faces, n²] each, cells counted row by row; the rim is half a cell away."""
        n = self.size
        across = np.eye(n + 1, n) - np.eye(n + 1, n, -1)
        mean = abs(across) / 2  # on the rim of one cell alone, the face's part of the plate being half as wide
        across[[0, -1]] *= 2
        return n * _along_both(across), _along_both(mean)

    def neighbours(self) -> Any:
        """Sparse, [pairs, n²]: the differences between cells that touch."""
        return _along_both(np.eye(self.size - 1, self.size, 1) - np.eye(self.size - 1, self.size))

    def heaters(self) -> np.ndarray:
        """[n², 4], the warmth that each heater gives off."""
        y, x = np.meshgrid(*[(np.arange(self.size) + 0.5) / self.size] * 2, indexing="ij")
        places = [(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]
        return np.stack(
            [50 * np.exp(-((y - b) ** 2 + (x - a) ** 2) / 0.005).ravel() for a, b in places], axis=1
        )

    def thermometers(self) -> np.ndarray:
        """Indices of the cells that have one."""
        along = np.arange(self.spacing // 2, self.size, self.spacing)
        return (along[:, None] * self.size + along[None, :]).ravel()

    def truth(self) -> np.ndarray:
        """[n²], log κ: one place that conducts well, one that does not, and a bar."""
        y, x = np.meshgrid(*[(np.arange(self.size) + 0.5) / self.size] * 2, indexing="ij")
        good = 1.2 * np.exp(-((x - 0.3) ** 2 + (y - 0.65) ** 2) / 0.02)
        bad = -1.2 * np.exp(-((x - 0.7) ** 2 + (y - 0.6) ** 2) / 0.015)
        bar = 0.8 * ((abs(y - 0.25) < 0.06) & (abs(x - 0.5) < 0.3))
        return (good + bad + bar).ravel()


def _along_both(matrix: np.ndarray) -> Any:
    """What ``matrix`` does to a row of cells, done to all rows and to all columns."""
    unit = sparse.eye_array(matrix.shape[1])
    return sparse.vstack([sparse.kron(unit, matrix), sparse.kron(matrix, unit)], format="csr")


class Misfit:
    """J and its gradient, as a function of m: what ``optex.minimize`` takes with ``jac=True``."""

    def __init__(self, plate: Plate, seed: int = 0) -> None:
        self.plate = plate
        self.differences, self.means = plate.differences()
        self.neighbours = plate.neighbours()
        self.heaters, self.thermometers = plate.heaters(), plate.thermometers()
        clean = self.march(plate.truth())[0][:, self.thermometers]
        noise = np.random.default_rng(seed).standard_normal(clean.shape)
        self.readings = clean + plate.noise * noise  # [steps, thermometers, heaters]

    def march(self, m: np.ndarray, heaters: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """The temperatures [steps, n², heaters] for log κ = m [n²], and the factorised I + τ K."""
        plate, warmth = self.plate, self.heaters if heaters is None else self.heaters[:, heaters]
        tau = plate.duration / plate.steps
        stiffness = self.differences.T @ sparse.diags_array(self.means @ np.exp(m)) @ self.differences
        matrix = splu((sparse.eye_array(plate.size**2) + tau * stiffness).tocsc(), permc_spec="MMD_AT_PLUS_A")
        temperatures = np.empty((plate.steps, *warmth.shape))
        now = np.zeros_like(warmth)
        for step in range(plate.steps):
            now = temperatures[step] = matrix.solve(now + tau * warmth)
        return temperatures, matrix

    def __call__(
        self,
        m: np.ndarray,  # [n²]
        heaters: np.ndarray | None = None,  # [k], indices
    ) -> tuple[float, np.ndarray]:  # J, [n²]
        """From all heaters, or from some: drawn at random, their mean over the draws is that from all."""
        temperatures, matrix = self.march(m, heaters)
        readings = self.readings if heaters is None else self.readings[:, :, heaters]
        residuals = temperatures[:, self.thermometers] - readings
        weight = 1 / (self.plate.noise**2 * residuals.size)
        jumps = self.neighbours @ m
        value = 0.5 * weight * (residuals**2).sum() + 0.5 * self.plate.smoothness * (jumps**2).sum()

        through_faces = np.zeros(self.differences.shape[0])
        adjoint = np.zeros_like(temperatures[0])
        for state, residual in zip(temperatures[::-1], residuals[::-1], strict=True):
            adjoint[self.thermometers] += weight * residual
            adjoint = matrix.solve(adjoint)
            through_faces += ((self.differences @ adjoint) * (self.differences @ state)).sum(axis=1)
        tau = self.plate.duration / self.plate.steps
        data = -tau * np.exp(m) * (self.means.T @ through_faces)
        return value, data + self.plate.smoothness * (self.neighbours.T @ jumps)


class SomeHeaters(optex.GradientSource):
    """The gradient of J from a batch of heaters, for torch's optimizers."""

    deterministic = False

    def __init__(self, misfit: Misfit) -> None:
        self.misfit = misfit
        self.m = torch.zeros(misfit.plate.size**2, dtype=torch.float64, requires_grad=True)

    def gradient(self, batch: np.ndarray) -> tuple[torch.Tensor, None]:
        value, gradient = self.misfit(self.m.detach().numpy(), batch)
        self.m.grad = torch.from_numpy(gradient)
        return torch.tensor(value, dtype=torch.float64), None


@dataclass(frozen=True)
class Run:
    """A solved problem, and how J went down: seconds since the start, and the least J seen by then."""

    result: OptimizeResult
    seconds: list[float]
    values: list[float]


def solve(misfit: Misfit, *, rounds: int, until: float = -np.inf, **options: Any) -> Run:
    """Minimise J from κ = 1 on by rounds of Adam, until J is at most ``until``."""
    seconds: list[float] = []
    values: list[float] = []
    started = time.perf_counter()

    def note(intermediate_result: OptimizeResult) -> bool:
        seconds.append(time.perf_counter() - started)
        values.append(float(intermediate_result.fun))
        return values[-1] <= until

    start = np.zeros(misfit.plate.size**2)
    result = optex.minimize(misfit, start, jac=True, optimizer="adam", maxiter=rounds, callback=note, **options)
    return Run(result, seconds, values)


def vanilla(misfit: Misfit, *, rounds: int, lr: float) -> Run:
    """Adam as it is: one gradient a round, in this process."""
    return solve(misfit, rounds=rounds, lr=lr, parallelism=1, stride=1)


def drawn(at_once: int, count: int = 4, seed: int = 0) -> Iterator[np.ndarray]:
    """Batches of heaters without end, [at_once] indices each."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.permutation(count)[:at_once]


def solve_sampled(
    misfit: Misfit,
    *,
    at_once: int,
    rounds: int,
    lr: float,
    parallelism: int | None,
    until: float = -np.inf,
    evaluator: optex.Evaluator | None = None,
) -> Run:
    """The same with gradients that see ``at_once`` of the heaters; without optex where parallelism is None.

    J itself, from all heaters, is looked at after each round, and not counted in the seconds.
    """
    source, seconds, values = SomeHeaters(misfit), [0.0], []
    adam = torch.optim.Adam([source.m], lr=lr)
    if parallelism is None:
        steps: Iterator[int] = plain_steps(adam, source, drawn(at_once))
    else:
        optimizer = optex.OptEx(adam, parallelism=parallelism, evaluator=evaluator)
        steps = (report.accepted for report in optimizer.rounds(drawn(at_once), source))
    taken, started = 0, time.perf_counter()
    for accepted in steps:
        seconds.append(seconds[-1] + time.perf_counter() - started)
        taken += accepted
        values.append(misfit(source.m.detach().numpy())[0])
        if values[-1] <= until or len(values) == rounds:
            break
        started = time.perf_counter()
    return Run(OptimizeResult(x=source.m.detach().numpy(), nit=len(values), nstep=taken), seconds[1:], values)


def plain_steps(
    adam: torch.optim.Optimizer, source: SomeHeaters, batches: Iterator[np.ndarray]
) -> Iterator[int]:
    """Adam as it is, one step at a time."""
    for batch in batches:
        source.gradient(batch)
        adam.step()
        yield 1


def quasi_newton(misfit: Misfit, *, until: float, evaluations: int) -> Run:
    """SciPy's L-BFGS-B, with all heaters: J at each evaluation, and the least by then."""
    seconds: list[float] = []
    values: list[float] = []
    started = time.perf_counter()

    def noted(m: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = misfit(m)
        seconds.append(time.perf_counter() - started)
        values.append(min([value, *values[-1:]]))
        if values[-1] <= until or len(values) == evaluations:
            raise StopIteration
        return value, gradient

    start = np.zeros(misfit.plate.size**2)
    with suppress(StopIteration):
        scipy.optimize.minimize(noted, start, jac=True, method="L-BFGS-B", options={"ftol": 0.0, "gtol": 0.0})
    return Run(OptimizeResult(nit=len(values)), seconds, values)


def pool_of(kind: str, workers: int, stack: ExitStack) -> int | Callable[..., Any]:
    """What ``workers=`` takes: a number of processes, or the map of a pool of Ray's actors."""
    if kind == "processes":
        return workers
    import ray
    from ray.util.multiprocessing import Pool

    path = str(Path(__file__).parent)  # where Ray's processes find this module
    ray.init(num_cpus=workers, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    stack.callback(ray.shutdown)
    return Pool(workers).map


STYLES: dict[str, dict[str, Any]] = {
    "vanilla": {"color": "#000000", "linestyle": ":", "linewidth": 1.8},
    "optex": {"color": "#d55e00", "linewidth": 2.4},
    "L-BFGS": {"color": "#857a00", "linestyle": "--", "linewidth": 1.4},
}


def draw(path: Path, plate: Plate, estimate: np.ndarray, start: float, runs: dict[str, Run]) -> None:
    """Truth, estimate, and J against seconds; every run begins at second 0 with ``start``, J at κ = 1."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained", width_ratios=[1, 1, 1.3])
    truth = plate.truth()
    for axis, values, title in ((axes[0], truth, "truth"), (axes[1], estimate, "estimate")):
        picture = axis.imshow(
            values.reshape(plate.size, -1),
            origin="lower",
            cmap="RdBu_r",
            vmin=-1.3,
            vmax=1.3,
            extent=(0, 1, 0, 1),
        )
        axis.set_title(f"log conductivity: {title}")
    figure.colorbar(picture, ax=axes[:2], shrink=0.9)
    for name, run in runs.items():
        label = f"{name}, {run.result.nit} {'evaluations' if name == 'L-BFGS' else 'rounds'}"
        axes[2].plot([0.0, *run.seconds], [start, *run.values], label=label, **STYLES[name])
    axes[2].set(yscale="log", xlabel="seconds since the start, that of workers included", ylabel="misfit J")
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Solve the problem with and without optex."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="cells along each side")
    parser.add_argument("--rounds", type=int, default=150, help="of Adam without optex")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--parallelism", type=int, default=4, help="gradients at once")
    parser.add_argument(
        "--heaters-at-once", type=int, default=4, choices=[1, 2, 3, 4], help="of 4, that each gradient sees"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hire", choices=["processes", "ray"], default="processes")
    parser.add_argument("--plot", type=Path, default=Path("out/heat.png"))
    options = parser.parse_args()

    misfit = Misfit(Plate(size=options.size))
    misfit(np.zeros(options.size**2))
    started = time.perf_counter()
    at_start, _ = misfit(np.zeros(options.size**2))
    print(f"{options.size**2} unknowns, one gradient takes {1e3 * (time.perf_counter() - started):.0f} ms")
    vanilla(misfit, rounds=1, lr=options.lr)  # torch imports much of itself at the first step
    with ExitStack() as stack:
        plain, ours = with_and_without(misfit, options, pool_of(options.hire, options.workers, stack))
    quasi = quasi_newton(misfit, until=plain.values[-1], evaluations=options.rounds)
    print(f"vanilla  J = {plain.values[-1]:.4f} in {plain.result.nit} rounds, {plain.seconds[-1]:.1f} s")
    print(f"optex    J = {ours.values[-1]:.4f} in {ours.result.nit} rounds, {ours.seconds[-1]:.1f} s")
    print(f"L-BFGS   J = {quasi.values[-1]:.4f} in {quasi.result.nit} evaluations, {quasi.seconds[-1]:.1f} s")
    if options.heaters_at_once < 4:
        print(f"         the first two see {options.heaters_at_once} of 4 heaters in a gradient, L-BFGS all")
    print(
        f"         optex: {ours.seconds[-1] / plain.seconds[-1]:.2f} of vanilla's time; the first round, in "
        f"which workers start, took {ours.seconds[0]:.1f} s"
    )
    runs = {"vanilla": plain, "optex": ours, "L-BFGS": quasi}
    draw(options.plot, misfit.plate, ours.result.x, at_start, runs)
    print(f"wrote {options.plot}")


def with_and_without(misfit: Misfit, options: argparse.Namespace, pool: Any) -> tuple[Run, Run]:
    """Adam for so many rounds, then optex until J is as low."""
    rounds, lr, n = options.rounds, options.lr, options.parallelism
    if options.heaters_at_once == 4:
        plain = vanilla(misfit, rounds=rounds, lr=lr)
        ours = solve(misfit, rounds=rounds, until=plain.values[-1], lr=lr, parallelism=n, workers=pool)
        return plain, ours
    at_once = options.heaters_at_once
    plain = solve_sampled(misfit, at_once=at_once, rounds=rounds, lr=lr, parallelism=None)
    with optex.WorkersEvaluator(pool) as evaluator:
        ours = solve_sampled(
            misfit,
            at_once=at_once,
            rounds=rounds,
            lr=lr,
            parallelism=n,
            until=min(plain.values),
            evaluator=evaluator,
        )
    return plain, ours


if __name__ == "__main__":
    main()
