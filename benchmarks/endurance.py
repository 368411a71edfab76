"""Memory over thousands of rounds.

    python benchmarks/endurance.py --rounds 5000

Trains the digits network with Adam (minibatches of 32, N = 4) for so many rounds in one process, and prints the
resident memory after every fifth of them. One thread; Linux. Writes results/endurance.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from pathlib import Path

import torch

import optex
from optex.studies.problems import make_problem

RESULT = Path(__file__).parent.parent / "results" / "endurance.json"


def resident_megabytes() -> float:
    """Of this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = make_problem("digits-mlp")
    optimizer = optex.OptEx(torch.optim.Adam(problem.parameters(), lr=1e-3))
    rounds, memory = optimizer.rounds(problem.batches(), problem.source()), {}
    for number, _ in enumerate(itertools.islice(rounds, options.rounds), start=1):
        if number == 100 or number % (options.rounds // 5) == 0:
            memory[number] = round(resident_megabytes(), 1)
            print(f"after {number} rounds: {memory[number]} MB, {optimizer.steps_taken} steps", flush=True)
    document = {"problem": "digits-mlp", "rounds": options.rounds, "megabytes": memory}
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
