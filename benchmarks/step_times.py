"""What a step of the family's optimizers costs, beside torch's own, in one run on one machine.

    python benchmarks/step_times.py            # a few minutes; leave the machine alone meanwhile
    python benchmarks/step_times.py --report   # run nothing; fill docs/family.md from the committed JSON

The network is ResNet-20 (269,722 parameters in 65 tensors) with random images and labels. Step rules are timed
with gradients that are there, against ``torch.optim.Adam(foreach=True)``. MKOR is timed with its hooks in whole
training steps over ten times its interval, against SGD with momentum. M-FAC is timed against reading its window
twice at the bandwidth that is measured in between. Methods take turns, so that what else the machine does hits
all of them; medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer

from optex.optimizers import MFAC, MKOR, NAG, SCALE, AdaGradNorm, AdaHessian, HeavyBall, TripleMomentum
from optex.studies.problems.networks import CLASSIFIERS
from optex.studies.tables import fill, markdown_table

ROOT: Final = Path(__file__).parents[1]
RECORD: Final = ROOT / "results" / "family" / "step_times.json"
WINDOW: Final = 64
BATCH: Final = 64


def network() -> nn.Module:
    """ResNet-20 for 32 × 32 coloured pixels, as ``cifar10`` of ``optex list`` has it."""
    torch.manual_seed(0)
    kind = CLASSIFIERS["resnet"]
    return kind.build(3, 32, kind.width, kind.depth)


def given_gradients(model: nn.Module) -> None:
    """Gradients as large as they may be, the same for all."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)


def stepper(make: Callable[[nn.Module], Optimizer], steps: int) -> Callable[[], float]:
    """Times so many steps; seconds a step."""
    model = network()
    optimizer = make(model)
    given_gradients(model)
    for _ in range(3):
        optimizer.step()

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        return (time.perf_counter() - started) / steps

    return timed


def trainer(make: Callable[[nn.Module], Optimizer], steps: int, *, graph: bool = False) -> Callable[[], float]:
    """Times so many whole training steps, forward and backward with them; seconds a step."""
    model = network()
    optimizer = make(model)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward(create_graph=graph)
            optimizer.step()

    train(2)

    def timed() -> float:
        started = time.perf_counter()
        train(steps)
        return (time.perf_counter() - started) / steps

    return timed


def reading(dimension: int) -> Callable[[], float]:
    """Times reading a window of float32 rows once: a product with a vector, as a step has two of them."""
    rows, vector = torch.randn(WINDOW, dimension), torch.randn(dimension)

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(5):
            rows.matmul(vector)
        return (time.perf_counter() - started) / 5

    return timed


def in_turns(tasks: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Median milliseconds of each; all take their turn in every pass."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(turns):
        for name, task in tasks.items():
            found[name].append(1e3 * task())
    return {name: statistics.median(values) for name, values in found.items()}


STEPS: Final[dict[str, Callable[[nn.Module], Optimizer]]] = {
    "Adam, foreach": lambda m: torch.optim.Adam(m.parameters(), lr=1e-6, foreach=True),
    "SGD, momentum, foreach": lambda m: torch.optim.SGD(m.parameters(), lr=1e-6, momentum=0.9, foreach=True),
    "NAG": lambda m: NAG(m.parameters(), L=1e6, mu=1.0),
    "NAG, L and mu estimated": lambda m: NAG(m.parameters()),
    "TripleMomentum": lambda m: TripleMomentum(m.parameters(), L=1e6, mu=1.0),
    "HeavyBall": lambda m: HeavyBall(m.parameters(), L=1e6, mu=1.0),
    "SCALE": lambda m: SCALE.of(m, lr=1e-6),
    "AdaGradNorm": lambda m: AdaGradNorm(m.parameters(), lr=1e-6),
}


def run() -> dict[str, Any]:
    """All measurements."""
    step_times = in_turns({name: stepper(make, 20) for name, make in STEPS.items()}, turns=15)
    dimension = sum(p.numel() for p in network().parameters())
    window = in_turns(
        {
            "M-FAC": stepper(lambda m: MFAC(m.parameters(), lr=1e-6, window_size=WINDOW), 5),
            "reading the window once": reading(dimension),
        },
        turns=15,
    )
    whole = in_turns(
        {
            "SGD with momentum": trainer(lambda m: torch.optim.SGD(m.parameters(), lr=1e-6, momentum=0.9), 10),
            "MKOR": trainer(lambda m: MKOR(m, torch.optim.SGD(m.parameters(), lr=1e-6, momentum=0.9)), 10),
            "AdaHessian": trainer(lambda m: AdaHessian(m.parameters(), lr=1e-6), 10, graph=True),
        },
        turns=5,
    )
    return {
        "meta": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": dimension,
            "tensors": sum(1 for _ in network().parameters()),
            "batch": BATCH,
            "window": WINDOW,
        },
        "steps": step_times,
        "window": window,
        "whole": whole,
    }


def report() -> None:
    """The tables of docs/family.md, from the record."""
    record = json.loads(RECORD.read_text())
    adam = record["steps"]["Adam, foreach"]
    steps = [(name, f"{ms:.3f}", f"{ms / adam:.2f}") for name, ms in record["steps"].items()]
    sgd = record["whole"]["SGD with momentum"]
    whole = [(name, f"{ms:.1f}", f"{ms / sgd:.2f}") for name, ms in record["whole"].items()]
    once = record["window"]["reading the window once"]
    mfac = record["window"]["M-FAC"]
    whole_table = markdown_table(("training step", "ms", "of SGD's"), whole)
    tables = {
        "step-times": markdown_table(("step", "ms", "of Adam's"), steps),
        "whole-times": whole_table,
        "window-time": (
            f"A step of M-FAC with a window of {record['meta']['window']} takes {mfac:.2f} ms, "
            f"{mfac / (2 * once):.2f} times reading the window twice ({2 * once:.2f} ms)."
        ),
    }
    fill(ROOT / "docs" / "family.md", tables)


def main() -> None:
    """Measure, write, fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing; fill the page from the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        RECORD.write_text(json.dumps(run(), indent=1) + "\n")
    report()


if __name__ == "__main__":
    main()
