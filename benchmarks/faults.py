"""Break rounds and loads at every place, and see that nothing is torn.

    python benchmarks/faults.py --every 1 --workers 2       all of it, a quarter of an hour on 2 cores

A ``KeyboardInterrupt`` at every line of the package that a round or a load runs, and an out-of-memory error at
every torch operation of a first and of a later round: each time the state has to be that of the start or of the
end, and a run with tolerance 0 that goes on has to end where the plain loop ends, to the bit. Then state dicts
with one thing wrong: each is taken over and runs, or is refused by name with the optimizer untouched. Small
network with BatchNorm and dropout, Adam, a schedule; N = 3. The same code samples a part of this in the test
suite. Writes results/faults.json and the table in results/README.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.injection import Lines, Net, Operations, Run, count, load_mutated, plain_end, sweep  # noqa: E402

FAULTS = {"interrupt at a line": Lines, "out of memory at an operation": Operations}
STARTS = {"the first round": 0, "a later round": 3}


def prepared(rounds: int, tolerance: float = 0.0) -> Run:
    """A run after so many rounds."""
    run = Run(tolerance)
    for _ in range(rounds):
        run.round()
    return run


def load(run: Run) -> None:
    """Load the state of a run that is two rounds ahead."""
    run.optimizer.load_state_dict(run.ahead)


def job(task: tuple[str, str, float, int, int, int]) -> tuple[tuple[str, str, float], dict[str, int], int]:
    """Some of the places of one kind of fault."""
    action, fault, tolerance, first, every, step = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = prepared(STARTS.get(action, 3), tolerance)
    act = Run.round
    if action == "a load":
        run.ahead = copy.deepcopy(prepared(5, tolerance).optimizer.state_dict())
        act = load
    places = range(1, count(FAULTS[fault], run, act) + 1)
    end = plain_end(Net()) if tolerance == 0 and act is Run.round else None
    found = sweep(FAULTS[fault], run, act, places[first * every :: step * every], end)
    return (action, fault, tolerance), found, len(places)


def mutations(seeds: range) -> Counter[str]:
    """State dicts with one thing wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    state = copy.deepcopy(prepared(5, 2.0).optimizer.state_dict())
    target = prepared(3, 2.0)
    return Counter(load_mutated(copy.deepcopy(target), state, seed) for seed in seeds)


def table(document: dict[str, Any]) -> str:
    """What was broken, how often, and what was found."""
    rows = [
        (
            r["action"],
            r["fault"],
            f"{r['tolerance']:g}",
            str(r["places"]),
            str(r["broken"]),
            str(r["start"]),
            str(r["end"]),
        )
        for r in document["sweeps"]
    ]
    head = ("broken", "how", "tolerance", "places", "tried", "state of the start", "of the end")
    fuzz = document["mutations"]
    refused, taken = fuzz.get("refused", 0), fuzz.get("accepted", 0)
    words = (
        f"State dicts with one thing wrong: {refused + taken}, of which {refused} were refused by name with "
        f"the optimizer untouched and {taken} were taken over and ran."
    )
    return markdown_table(head, rows) + "\n\n" + words


def main() -> None:
    """Break, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="break at every so-many-th place")
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    parts = 8
    tasks = [
        (action, fault, tolerance, part, options.every, parts)
        for action in (*STARTS, "a load")
        for fault in FAULTS
        for tolerance in ((0.0, 2.0) if action == "a later round" else (0.0,))
        for part in range(parts)
    ]
    seeds = [range(i, options.mutations, parts) for i in range(parts)]
    sums: dict[tuple[str, str, float], dict[str, int]] = {}
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        fuzz = pool.map(mutations, seeds)
        for key, found, places in pool.map(job, tasks):
            whole = sums.setdefault(key, {"places": places, "start": 0, "end": 0})
            for name, value in found.items():
                whole[name] += value
            print(key, whole, flush=True)
        counted = sum(fuzz, Counter())
    sweeps = [
        {"action": a, "fault": f, "tolerance": t, **found, "broken": found["start"] + found["end"]}
        for (a, f, t), found in sums.items()
    ]
    document = {
        "torch": torch.__version__,
        "every": options.every,
        "sweeps": sweeps,
        "mutations": dict(counted),
    }
    print(table(document))
    (ROOT / "results" / "faults.json").write_text(json.dumps(document, indent=1) + "\n")
    fill(ROOT / "results" / "README.md", {"faults": table(document)})


if __name__ == "__main__":
    main()
