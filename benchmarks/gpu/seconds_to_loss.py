"""Seconds to a target loss: vanilla, larger batches, Algorithm 1 and optex on one device.

    python benchmarks/gpu/seconds_to_loss.py --device cuda --graphs --streams --json results/gpu/cuda.json
    python benchmarks/gpu/seconds_to_loss.py --device cpu --threads 2 --parallelism 4 16 \
        --workloads digits-mlp,deep-mlp,shakespeare --json results/gpu/cpu.json
    python benchmarks/gpu/seconds_to_loss.py --quick

The device evaluates the N gradients of a round in one vmap, so a round costs more than a gradient: it pays
where one gradient does not fill the device. ``--evaluators`` names other ways: ``sequential``; on a GPU
``--graphs`` adds the vmap replayed as a CUDA graph and ``--streams`` a stream for each gradient. The target is
the loss that vanilla at Adam's 1e-3 has after all its steps; a method is stopped there, or after as many rounds
as vanilla has steps. Each runs at that rate and, *tuned*, at the best of ``--grid``, vanilla too: the fewest
seconds on this very run, for all alike. A larger batch, as N data-parallel workers would have, is N times
vanilla's, so as many gradients in all; √N and N times the rate are in its grid as well. The clock runs for the
rounds alone: losses are evaluated between them, every few rounds, and the device is waited for. Where a data
set is not on this machine, data made up in its shape stands in for it, and the table says so. Capturing a graph
counts among its seconds. Prints ratios to vanilla at 1e-3, the most memory allocated, the device's utilisation
(where nvidia-ml-py tells), and

    cost of a round   seconds of its N gradients, in units of one vanilla step
    break-even        how slow one gradient must be for the method to pay, if N at once take the time of one

Methods of a workload run in turn, in one process. ``--quick`` runs every workload with tiny sizes on the CPU,
to see that all of it works; its seconds mean nothing. ``--report`` runs nothing, and puts the tables of the
JSON into results/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cuda_evaluators import require_cuda
from measuring import measure
from workloads import QUICK, WORKLOADS

import optex
from optex.studies.tables import fill, markdown_table


def table(name: str, result: dict[str, Any]) -> str:
    """As Markdown, with ratios to vanilla."""
    vanilla = result["methods"]["vanilla"]
    head = (
        "method",
        "rate",
        "rounds",
        "of vanilla's",
        "seconds",
        "of vanilla's",
        "ms a round",
        "cost of a round",
    )
    rows = []
    for method, r in result["methods"].items():
        rounds, seconds = r["rounds"] / vanilla["rounds"], r["seconds"] / vanilla["seconds"]
        cost = None if r["gradient_ms"] is None else r["gradient_ms"] / vanilla["ms_a_round"]
        pays = cost is not None and 0 < rounds < 1 and r["reached"]
        rows.append(
            (
                method,
                f"{r.get('lr', 1e-3):.2g}",  # earlier documents name it only where it was tuned
                f"{r['rounds']}" + " (not reached)" * (not r["reached"] and method != "vanilla"),
                f"{rounds:.2f}",
                f"{r['seconds']:.2f}",
                f"{seconds:.2f}",
                f"{r['ms_a_round']:.2f}",
                _cell(cost, ".2f"),
                _cell(r["overhead_ms"], ".2f"),
                _cell(r["overhead_ms"] / (1 / rounds - 1) if pays else None, ".2f"),
                f"{r['accepted']:.1f}",
                _cell(r["megabytes"], ""),
                _cell(r["utilisation"], ""),
            )
        )
    heading = f"**{name}**: d = {result['dimension']:,}, loss to reach {result['goal']:.4f}"
    if result.get("data") is not None:
        heading += f" (made-up data in place of {result['data']})"
    head += ("overhead ms", "break-even ms", "accepted", "MB", "busy %")
    shown = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]  # a CPU tells no MB and busy %
    cells = [[row[i] for i in shown] for row in rows]
    return f"{heading}\n\n{markdown_table([head[i] for i in shown], cells)}"


def report(documents: Path, page: Path) -> None:
    """The tables of one device's JSON, put where the page has a place named for it."""
    workloads = json.loads(documents.read_text())["workloads"]
    tables = [table(name, result) for name, result in workloads.items()]
    fill(page, {f"seconds-{documents.stem}": "\n\n".join(tables)})


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def meta(device: str, threads: int, *, quick: bool) -> dict[str, Any]:
    """What was measured on, and with."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "optex": optex.__version__,
        "optimizer": "adam",
        "seed": 0,
        "quick": quick,
    }


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on each other; refuses what this machine cannot do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workloads", help=f"of {', '.join(WORKLOADS)}, with commas; all by default")
    parser.add_argument("--parallelism", type=int, nargs="+")
    parser.add_argument("--grid", type=float, nargs="*", help="rates to tune over, in units of 1e-3")
    parser.add_argument("--evaluators", default="vectorized", help="sequential, vectorized, with commas")
    parser.add_argument("--graphs", action="store_true", help="and one vmap replayed as a CUDA graph")
    parser.add_argument("--streams", action="store_true", help="and N CUDA streams")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", action="store_true", help="only fill results/README.md from the JSON")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() and not options.quick else "cpu")
    options.workloads = options.workloads.split(",") if options.workloads else list(WORKLOADS)
    options.parallelism = options.parallelism or ([1, 4] if options.quick else [1, 4, 8, 16])
    if options.grid is None:
        options.grid = [3.0] if options.quick else [0.3, 1.0, 3.0, 10.0]
    options.evaluators = options.evaluators.split(",")
    if options.report and options.json is None:
        parser.error("--report needs --json")
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"--workloads: {unknown[0]!r} is not one of {', '.join(WORKLOADS)}")
    if unknown := [name for name in options.evaluators if name not in ("sequential", "vectorized")]:
        parser.error(
            f"--evaluators: {unknown[0]!r} is neither sequential nor vectorized; see --graphs, --streams"
        )
    cuda = {"--device cuda": options.device.startswith("cuda")}
    for what, wanted in (cuda | {"--graphs": options.graphs, "--streams": options.streams}).items():
        if wanted:
            try:
                require_cuda(what)
            except RuntimeError as error:
                parser.error(str(error))
            if not options.device.startswith("cuda"):
                parser.error(f"{what} needs --device cuda")
    options.evaluators += [name for name in ("graphs", "streams") if getattr(options, name)]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was measured."""
    options = parsed(arguments)
    if options.report:
        report(options.json, Path(__file__).parents[2] / "results" / "README.md")
        return
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {
        "meta": meta(options.device, options.threads, quick=options.quick),
        "workloads": {},
    }
    for name in options.workloads:
        workload = (QUICK if options.quick else WORKLOADS)[name]
        result = measure(workload, options.device, options.parallelism, options.evaluators, options.grid)
        document["workloads"][name] = result
        print(table(name, result) + "\n", flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
