"""Relaxing atoms: force calls of ASE's optimizers and of optex, in turn and in all.

    python benchmarks/atoms.py --json results/atoms/atoms.json      about ten minutes on one core
    python benchmarks/atoms.py report                               the table alone, from the JSON that is there

Four systems of ASE's with its EMT calculator, each rattled with several seeds, relaxed until no force is longer
than 0.01 eV/Å. All optimizers have their defaults; momentum is `OptExOptimizer` with one image a round and
stride 1, which is the base optimizer's own run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111
from ase.calculators.emt import EMT
from ase.cluster import Icosahedron, Octahedron
from ase.constraints import FixAtoms
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch, GPMin

from optex.ase import OptExOptimizer
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "atoms"
FMAX = 0.01  # eV/Å
MOST = 1000  # steps
SAME = 0.005  # eV: minima closer than this count as one

# ---------------------------------------------------------------------- systems


def copper() -> Atoms:
    """Icosahedron of 55 copper atoms."""
    return Icosahedron("Cu", 3)


def gold() -> Atoms:
    """Octahedron of 44 gold atoms."""
    return Octahedron("Au", 4)


def vacancy() -> Atoms:
    """3 × 3 × 3 cubic cells of platinum without one of the 108 atoms."""
    atoms = bulk("Pt", cubic=True) * (3, 3, 3)
    del atoms[0]
    return atoms


def adsorbate() -> Atoms:
    """Oxygen in the fcc hollow of a platinum (111) slab of three layers of nine atoms, the lower two fixed."""
    atoms = fcc111("Pt", (3, 3, 3), vacuum=8.0)
    add_adsorbate(atoms, "O", height=1.3, position="fcc")
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() > 1))
    return atoms


SYSTEMS: dict[str, tuple[Callable[[], Atoms], float]] = {  # and the standard deviation of the rattle, Å
    "Cu55": (copper, 0.15),
    "Au octahedron": (gold, 0.1),
    "Pt with a vacancy": (vacancy, 0.1),
    "O on Pt(111)": (adsorbate, 0.1),
}

# ---------------------------------------------------------------------- optimizers


class Counted(EMT):
    """Counts its calculations."""

    calls = 0

    def calculate(self, *args: Any, **options: Any) -> None:
        """One more."""
        self.calls += 1
        super().calculate(*args, **options)


def ours(**settings: Any) -> Callable[[Atoms], OptExOptimizer]:
    """``OptExOptimizer`` with these settings."""
    return lambda atoms: OptExOptimizer(atoms, logfile=None, **settings)


QUIET: dict[str, Any] = {"logfile": None}  # which ASE takes, and its annotations leave out
OPTIMIZERS: dict[str, Callable[[Atoms], Any]] = {
    **{kind.__name__: lambda atoms, kind=kind: kind(atoms, **QUIET) for kind in (BFGS, LBFGS, BFGSLineSearch)},
    "FIRE": lambda atoms: FIRE(atoms, **QUIET),
    "GPMin": lambda atoms: GPMin(atoms, **QUIET),
    "momentum": ours(parallelism=1, stride=1),
    **{f"optex, N = {n}": ours(parallelism=n) for n in (1, 4, 8)},
    "optex, N = 4, lr = 0.02": ours(parallelism=4, lr=0.02),
}


def relax(system: str, seed: int, optimizer: str) -> dict[str, Any]:
    """One run: whether it converged, calls in turn and in all, and the energy where it ended."""
    make, rattle = SYSTEMS[system]
    atoms = make()
    atoms.rattle(rattle, seed=seed)
    atoms.calc = calculator = Counted()
    run = OPTIMIZERS[optimizer](atoms)
    converged = bool(run.run(fmax=FMAX, steps=MOST))
    calls = calculator.calls
    return {
        "system": system,
        "seed": seed,
        "optimizer": optimizer,
        "converged": converged,
        "in turn": run.rounds if isinstance(run, OptExOptimizer) else calls,
        "in all": run.force_calls if isinstance(run, OptExOptimizer) else calls,
        "energy": float(atoms.get_potential_energy()),
        "fmax": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
    }


# ---------------------------------------------------------------------- the page


def table(result: dict[str, Any]) -> str:
    """Means over the seeds: calls in turn, and in all where that is more."""
    runs = result["runs"]
    systems = list(dict.fromkeys(run["system"] for run in runs))
    optimizers = list(dict.fromkeys(run["optimizer"] for run in runs))
    rows = [(o, *(cell(runs, system, o) for system in systems)) for o in optimizers]
    seeds = len({run["seed"] for run in runs})
    sizes = ", ".join(f"{system} {result['atoms'][system]} atoms" for system in systems)
    return (
        f"Force calls in turn until no force is longer than {FMAX:g} eV/Å, in brackets in all; mean of {seeds} "
        f"rattles, the least and the most ({sizes}):\n\n"
        + markdown_table(("optimizer", *systems), rows)
        + "\n\n‡ one run, ‡‡ two and so on that ended in another minimum than BFGS's of the same start "
        f"(energies more than {1000 * SAME:g} meV apart); × one that did not converge in {MOST:,} "
        "steps, and counts with what it had spent by then."
    )


def cell(runs: list[dict[str, Any]], system: str, optimizer: str) -> str:
    """One of the table's."""
    mine = [run for run in runs if (run["system"], run["optimizer"]) == (system, optimizer)]
    reference = {
        run["seed"]: run["energy"] for run in runs if (run["system"], run["optimizer"]) == (system, "BFGS")
    }
    turns = [run["in turn"] for run in mine]
    text = f"{statistics.mean(turns):.0f}, {min(turns)}–{max(turns)}"
    if optimizer.startswith("optex"):
        text += f" ({statistics.mean(run['in all'] for run in mine):.0f})"
    ended = [run for run in mine if run["converged"]]
    other = sum(abs(run["energy"] - reference[run["seed"]]) > SAME for run in ended)
    return (
        text + " " * bool(other) + "‡" * other + " " * (len(ended) < len(mine)) + "×" * (len(mine) - len(ended))
    )


def report() -> None:
    """Fill the pages from what was measured."""
    result = json.loads((RESULTS / "atoms.json").read_text())
    for page in (RESULTS / "README.md", ROOT / "docs" / "atoms.md"):
        fill(page, {"atoms": table(result)})


# ---------------------------------------------------------------------- the command line


def main() -> None:
    """Measure, print and write; or report what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "report":
        report()
        return
    torch.set_num_threads(1)
    runs = []
    for system in options.systems:
        for optimizer in options.optimizers:
            for seed in range(options.seeds):
                run = relax(system, seed, optimizer)
                runs.append(run)
            mine = [(run["in turn"], run["in all"], round(run["energy"], 4)) for run in runs[-options.seeds :]]
            print(f"{system:18s} {optimizer:15s} {mine}", flush=True)
    if options.json:
        meta = {
            "optex": version("optex"),
            "ase": version("ase"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {platform.system()}",
            "fmax": FMAX,
            "rattle": {system: SYSTEMS[system][1] for system in options.systems},
        }
        sizes = {system: len(SYSTEMS[system][0]()) for system in options.systems}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"meta": meta, "atoms": sizes, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
