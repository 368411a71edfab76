"""What a round costs beyond its gradients: milliseconds, and the bytes that it has to move.

    python benchmarks/overhead.py                   some minutes on 2 idle cores
    python benchmarks/overhead.py --largest         and d = 1e8, where memory allows
    python benchmarks/overhead.py report            tables and picture alone, from the JSON that is there
    python benchmarks/overhead.py --dim 100000 --parallelism 8 --history 32      one point, printed

Rounds of OptEx in float32 on a quadratic whose gradient is written down, kept whole, once the history is full:
the time of each beyond its gradients, beside the bytes that `traffic.py` counts (docs/cost.md has the formulas)
and the speed at which this machine reads a history of that size. One setting is the base, and one thing is
varied at a time. Writes results/overhead (overhead.json, the page's tables, growth.png) and the tables of
README.md and docs/cost.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any, Final

import torch
from overhead_report import FOLDER, derived, report
from rounds_timed import counted, measure_point
from traffic import MODELS

from optex.studies.records import this_machine

BASE: Final = {"optimizer": "adam", "dimension": 100_000, "parallelism": 4, "history": 16, "stride": 1}
AXES: Final[dict[str, tuple[int, ...]]] = {
    "dimension": (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    "history": (8, 16, 32, 50),
    "parallelism": (1, 4, 8, 16),
}
LARGEST: Final = 100_000_000
KEYS: Final = ("method", *BASE)


def points(largest: bool = False) -> list[dict[str, Any]]:
    """The base with every method, one axis varied at a time, the other base, and strides in N's place."""
    changes: list[dict[str, Any]] = [{axis: value} for axis, values in AXES.items() for value in values]
    changes += [{"optimizer": "sgd"}] + [{"dimension": LARGEST}] * largest
    found = [{"method": method, **BASE, **change} for change in changes for method in MODELS]
    found.append({"method": "default", **BASE, "parallelism": 1, "stride": 4})
    return [point for i, point in enumerate(found) if point not in found[:i]]


def rounds_for(dimension: int) -> int:
    """Fewer where they are long; an even number, as a committee judges in every other."""
    return 40 if dimension <= 10_000 else 24 if dimension <= 100_000 else 12 if dimension <= 1_000_000 else 2


def fits(point: dict[str, Any]) -> bool:
    """Whether memory is free for it, and half as much again: what is read is this machine's."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = counted(point)["memory_bytes"]
    return not 1.5 * needed > free  # NaN where there is no formula, and little to hold


def measure(chosen: list[dict[str, Any]], *, threads: int, rounds: int | None = None) -> dict[str, Any]:
    """Every point, and what it was measured with."""
    load, results = os.getloadavg()[0], []
    for point in chosen:
        if not fits(point):
            print(f"left out, for want of memory: {point}")
            continue
        started = time.perf_counter()
        result = measure_point(point, rounds=rounds or rounds_for(point["dimension"]), threads=threads)
        results.append(result | counted(result))
        seconds = time.perf_counter() - started
        print(*(point[key] for key in KEYS), f"{result['median']:.2f} ms, {seconds:.1f} s", flush=True)
    meta = {
        "threads": threads,
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": this_machine(),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    return {"meta": meta, "base": BASE, "points": results}


def rounded(value: Any) -> Any:
    """Four digits are more than a timing has; what is not a number is None in JSON."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    return value


def write(document: dict[str, Any]) -> None:
    """A line for each point."""
    document = rounded(document)
    lines = ",\n".join("  " + json.dumps(point) for point in document.pop("points"))
    head = json.dumps(document, indent=1)[:-2]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "overhead.json").write_text(f'{head},\n "points": [\n{lines}\n ]\n}}\n')


def show(document: dict[str, Any]) -> None:
    """One setting, method by method."""
    for point in document["points"]:
        ratio = derived(point)["ratio"]
        print(
            f"  {point['method']:12s} median {point['median']:9.2f} ms   least {point['minimum']:9.2f} ms   "
            f"{point['bytes'] / 1e6:10.1f} MB   {point['calls']:6.0f} calls   "
            f"{ratio:5.1f} times reading them at {point['read_bandwidth'] / 1e9:5.1f} GB/s   "
            f"kept {point['accepted']:g} of {point['drafted']:g}"
        )


def main() -> None:
    """Measure and report, or one of the two, or one point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--largest", action="store_true", help="d = 1e8 as well, where memory allows")
    parser.add_argument("--dim", type=int, help="print one point, and write nothing")
    parser.add_argument("--optimizer", choices=["adam", "momentum", "sgd"], default=BASE["optimizer"])
    parser.add_argument("--parallelism", type=int, default=BASE["parallelism"])
    parser.add_argument("--history", type=int, default=BASE["history"])
    parser.add_argument("--stride", type=int, default=BASE["stride"])
    parser.add_argument("--rounds", type=int, help="watched at each point")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in ("dim", "parallelism", "history"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.dim is not None:
        keys = {key: getattr(options, key) for key in BASE if key != "dimension"} | {"dimension": options.dim}
        methods = [m for m in MODELS if options.stride == 1 or m != "optex-paper"]  # published: no strides
        chosen = [{"method": method, **keys} for method in methods]
        show(measure(chosen, threads=options.threads, rounds=options.rounds))
        return
    if options.what == "run":
        write(measure(points(options.largest), threads=options.threads, rounds=options.rounds))
    report()


if __name__ == "__main__":
    main()
