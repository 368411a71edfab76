"""``optex list``: the names of all that can be compared."""

from __future__ import annotations

import textwrap
from functools import partial

from optex.regularisers import REGULARISERS
from optex.solvers import SOLVERS
from optex.stepping import MODEL_OPTIMIZERS, OPTIMIZERS, default_rate
from optex.studies.baselines import METHODS
from optex.studies.cli.app import Printer
from optex.studies.problems import PROBLEMS, ProblemEntry
from optex.studies.problems.data import find

__all__ = ["run"]


def run() -> None:
    """Print every name, with a line that says what it is."""
    printer = Printer()
    groups = {
        "problems": {name: _problem_lines(entry) for name, entry in PROBLEMS.items()},
        "methods": {name: [entry.description] for name, entry in METHODS.items()},
        "optimizers": {name: [_optimizer_line(name)] for name in (*OPTIMIZERS, *MODEL_OPTIMIZERS)},
        "solvers": {name: [text] for name, text in SOLVERS.items()},
        "regularisers": {name: [text] for name, text in REGULARISERS.items()},
    }
    for i, (title, group) in enumerate(groups.items()):
        if not group:
            continue
        printer.line(("\n" if i else "") + title, style="bold")
        width = max(map(len, group))
        for name, (text, *others) in group.items():
            room = max(printer.width - width - 4, 30)
            first, *rest = textwrap.wrap(text, room)
            printer.line(f"  {name:{width}}  {first}", wrap=False)
            for line in (*rest, *(part for other in others for part in textwrap.wrap(other, room))):
                printer.line(" " * (width + 4) + line, style="dim", wrap=False)
    printer.line("\n--set KEY=VALUE: once for each option to be changed; shown are the defaults", style="dim")
    if any(entry.data is not None and find(entry.data) is None for entry in PROBLEMS.values()):
        printer.line("no data yet: `optex fetch NAME` gets it", style="dim")


def _problem_lines(entry: ProblemEntry) -> list[str]:
    """The problem's description, whether its data is missing, and its options for --set with their defaults."""
    missing = entry.data is not None and find(entry.data) is None
    others = [option for option in entry.options if option not in ("dim", "noise", "batch_size")]
    shown = " ".join(f"{option}={entry.shown(option)}" for option in others)
    return [entry.description + " (no data yet)" * missing, *([f"--set {shown}"] if others else [])]


def _optimizer_line(name: str) -> str:
    factory = {**OPTIMIZERS, **MODEL_OPTIMIZERS}[name]
    settings = factory.keywords if isinstance(factory, partial) else {}
    made = factory.func if isinstance(factory, partial) else factory
    made = getattr(made, "__self__", made)  # the class, where the factory is one of its class methods
    home = "torch.optim" if made.__module__.startswith("torch.") else "optex.optimizers"
    inside = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"lr {default_rate(name):<4g}  {home}.{made.__name__}" + f"({inside})" * bool(inside)
