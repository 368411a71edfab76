"""``optex list``: names of what can be compared."""

from __future__ import annotations

import textwrap
from functools import partial

from rich.console import Console

from optex.regularisers import REGULARISERS
from optex.solvers import SOLVERS
from optex.stepping import MODEL_OPTIMIZERS, OPTIMIZERS, default_rate
from optex.studies.baselines import METHODS
from optex.studies.cli.app import app
from optex.studies.problems import PROBLEMS, ProblemEntry
from optex.studies.problems.data import find

__all__ = ["list_names"]


@app.command("list")
def list_names() -> None:
    """What can be compared: problems, methods, optimizers; and the family's solvers and regularisers."""
    console = Console(highlight=False)
    groups = {
        "problems": {name: _problem_lines(entry) for name, entry in PROBLEMS.items()},
        "methods": {name: entry.description for name, entry in METHODS.items()},
        "optimizers": {name: _optimizer_line(name) for name in (*OPTIMIZERS, *MODEL_OPTIMIZERS)},
        "solvers": SOLVERS,
        "regularisers": REGULARISERS,
    }
    for i, (title, group) in enumerate(groups.items()):
        if not group:
            continue
        console.print(("\n" if i else "") + title, style="bold")
        width = max(map(len, group))
        for name, text in group.items():
            first, *others = text.splitlines()
            console.print(f"  {name:{width}}  {first}", markup=False)
            for line in others:
                console.print(" " * (width + 4) + line, style="dim", markup=False)
    if any(entry.data is not None and find(entry.data) is None for entry in PROBLEMS.values()):
        console.print("\nno data yet: `optex fetch NAME` gets it", style="dim", markup=False)


def _problem_lines(entry: ProblemEntry) -> str:
    """What it is, whether its data is missing, and what --set can choose."""
    missing = entry.data is not None and find(entry.data) is None
    others = [option for option in entry.options if option not in ("dim", "noise", "batch_size")]
    chosen = textwrap.wrap(f"--set {', '.join(others)}", 50) if others else []
    return "\n".join([entry.description + " (no data yet)" * missing, *chosen])


def _optimizer_line(name: str) -> str:
    factory = {**OPTIMIZERS, **MODEL_OPTIMIZERS}[name]
    settings = factory.keywords if isinstance(factory, partial) else {}
    made = factory.func if isinstance(factory, partial) else factory
    made = getattr(made, "__self__", made)  # a class method makes its class
    home = "torch.optim" if made.__module__.startswith("torch.") else "optex.optimizers"
    inside = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"lr {default_rate(name):<4g}  {home}.{made.__name__}" + f"({inside})" * bool(inside)
