"""Trains a network of directions for Poisson's equation with obstacles, in minutes on one core.

    python benchmarks/direction_network.py --grid 32 32 --levels 2 --out out/directions-2d.pt
    python benchmarks/direction_network.py --grid 12 12 12 --channels 8 --steps 400 --out out/directions-3d.pt

The data are combinations of Ritz vectors, as published (weight 9 on the low 55 %), the loss is ``DCDMLoss``.
What differs from the published training, so that it takes minutes: Adam's rate goes up to ``--lr`` and down to
0 (published: 1e-4 throughout), batches of 16 (10), 600 Ritz vectors (10,000), several layouts (one).
The weights go to ``--out``, which ``load`` reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from optex.solvers import DCDMLoss, DirectionNetwork, dcdm, ritz_vectors
from optex.studies.poisson import Poisson, obstacles

__all__ = ["layout", "load", "masked", "save", "train"]

Array = NDArray[np.float64]


def layout(grid: Sequence[int], seed: int, *, most: int = 3) -> Poisson:
    """0 to ``most`` obstacles in random places; seeds below 1000 are for training."""
    return Poisson(obstacles(tuple(grid), seed % (most + 1), seed))


def train(
    problems: Sequence[Poisson],
    *,
    channels: int = 16,
    levels: int = 1,
    steps: int = 1000,
    batch: int = 16,
    lr: float = 1e-3,
    vectors: int = 600,
    samples: int = 1000,
    seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> tuple[DirectionNetwork, list[float]]:
    """A trained network, and its loss step by step.

    Args:
        problems: layouts of one grid; a step draws its batch from one of them.
        channels, levels: of the network.
        steps, batch, lr: of Adam; the rate goes up to ``lr`` and down to 0.
        vectors: Ritz vectors for each layout.
        samples: right-hand sides for each.
        seed: of weights and draws.
        told: called after every step.
    """
    data, losses = [], []
    for number, problem in enumerate(problems):
        count = min(vectors, int(problem.fluid.sum()))
        basis = ritz_vectors(problem.matrix, count, shape=problem.fluid.shape, seed=seed + number)
        data.append(basis.right_hand_sides(samples, seed=seed + number).float())
        losses.append(DCDMLoss(problem.matrix))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DirectionNetwork(problems[0].fluid.ndim, channels, levels=levels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    history = []
    for step in range(steps):
        which = int(torch.randint(len(problems), (), generator=generator))
        b = data[which][torch.randint(samples, (batch,), generator=generator)]
        loss = losses[which](network(b), b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(loss.item())
        if told is not None:
            told(step + 1, history[-1])
    return network.eval(), history


def masked(network: DirectionNetwork, problem: Poisson) -> Callable[[Array], Array]:
    """The network as a direction for ``dcdm``, 0 inside the obstacles."""
    fluid = problem.fluid

    def direction(residual: Array) -> Array:  # [*grid] to [*grid]
        with torch.no_grad():
            found = network(torch.from_numpy(residual).float()).double().numpy()
        return np.where(fluid, found, 0.0)

    return direction


def save(path: Path, network: DirectionNetwork, settings: dict[str, Any]) -> None:
    """Weights and what the network has to be made with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": settings, "weights": network.state_dict()}, path)


def load(path: Path) -> DirectionNetwork:
    """What ``save`` wrote."""
    found = torch.load(path, weights_only=True)
    network = DirectionNetwork(**found["settings"])
    network.load_state_dict(found["weights"])
    return network.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, say what came of it on layouts not trained on, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs="+", default=[32, 32], help="two or three sizes")
    parser.add_argument("--layouts", type=int, default=8, help="layouts of obstacles to train on")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--levels", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="where the weights go")
    options = parser.parse_args(arguments)
    if len(options.grid) not in (2, 3):
        parser.error(f"--grid: takes two or three sizes, got {len(options.grid)}")
    torch.set_num_threads(options.threads)
    started = time.perf_counter()

    def told(step: int, loss: float) -> None:
        if step % max(options.steps // 10, 1) == 0:
            print(f"step {step}: loss {loss:.4f}, {time.perf_counter() - started:.0f} s", flush=True)

    network, _ = train(
        [layout(options.grid, seed) for seed in range(options.layouts)],
        channels=options.channels,
        levels=options.levels,
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        told=told,
    )
    settings = {"dimension": len(options.grid), "channels": options.channels, "levels": options.levels}
    save(options.out, network, settings)
    for seed in range(1000, 1004):
        problem = layout(options.grid, seed)
        b = problem.random_right_hand_side(seed)
        learned = dcdm(problem.matrix, b, masked(network, problem))
        plain = dcdm(problem.matrix, b, lambda r: r, maxiter=10_000)
        print(f"layout {seed}: {learned.nit} iterations, conjugate gradients {plain.nit}")
    print(f"{options.out}: {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
