"""Made-up input at three doors: saved states, the command line, ``minimize``.

    python benchmarks/fuzz.py --seconds 180                 each door for so long, one process
    pip install atheris && python benchmarks/fuzz_guided.py the same, and atheris looks for new branches

Inputs are built from what is valid, by seed, with something of it put wrong, so that they come past the
first check: real state dicts with up to three entries deleted, cut short or replaced; commands of the command
line with options and values of their own and of others; arguments of ``minimize``. What is not taken has to be
refused by a TypeError, a ValueError or an error of ``optex.errors``, by exit code 2 at the command line; a
state that is refused leaves the optimizer untouched, one that is taken runs. Anything else is a finding, with
its seed: ``--door NAME --seed N`` runs that one again. Writes results/fuzz.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typer.testing import CliRunner

import optex
from optex import errors
from optex.stepping.bases import OPTIMIZERS
from optex.studies import cli
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "fuzz.json"
sys.path.insert(0, str(ROOT))

from tests.faults.injection import Run, mutate  # noqa: E402
from tests.models import assert_equal_trees  # noqa: E402

NAMED = tuple(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
REFUSALS = (TypeError, ValueError, *(kind for kind in NAMED if not issubclass(kind, Warning)))
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 3, 2.5, 1e300, math.nan, math.inf, "", "strange", b"x", (), [], {}, [1, "x"]),
    *(torch.ones(2), torch.tensor(2), np.float32(0.5), np.int64(3), np.array(["x"]), 10**30, 10**400),
)


def saved_state(draw: random.Random) -> str:
    """Load a broken state into a run."""
    run, ahead = _prepared(2), copy.deepcopy(_prepared(4).optimizer.state_dict())
    for _ in range(draw.choice((1, 1, 2, 3))):
        ahead = mutate(ahead, torch.Generator().manual_seed(draw.getrandbits(32)))[0]
    before = run.state()
    try:
        run.optimizer.load_state_dict(ahead)
    except (TypeError, ValueError):
        assert_equal_trees(run.state(), before)
        return "refused"
    run.generator = torch.get_rng_state()
    for _ in range(2):
        run.round()
    return "taken"


def _prepared(rounds: int) -> Run:
    run = Run(2.0)
    for _ in range(rounds):
        run.round()
    return run


# ------------------------------------------------------------------ the command line

PROBLEMS = ("sphere", "rosenbrock", "ackley", "quadratic", "digits-mlp", "no-such-problem")
VALUES = (
    *("1", "2", "3", "0", "-1", "2.5", "nan", "inf", "1e300", "", "x", "auto", "adam", "sgd", "nag", "true"),
    *("vanilla", "optex", "vanilla,target", "optex,optex", ",", "a=b", "size=3", "=", "dim=4"),
    *("\u00e9\u0000", "/nowhere/x.json"),
)
OPTIONS = (
    *(
        "--lr",
        "--optimizer",
        "--parallelism",
        "--history",
        "--noise",
        "--methods",
        "--set",
        "--stride",
        "--seed",
    ),
    *(
        "--kernel",
        "--dtype",
        "--batch-size",
        "--tolerance",
        "--estimator",
        "--no-such-option",
        "--json",
        "--plot",
    ),
)


def command_line(draw: random.Random) -> str:
    """A command with options, some of them wrong; sizes stay tiny."""
    words = [draw.choice(("compare", "compare", "compare", "list", "advise", "reproduce", "fetch", "strange"))]
    if words[0] in ("reproduce", "fetch"):  # long, or from the network: with a wrong name alone
        words.append(draw.choice(("no-such-name", "", "--strange")))
    elif words[0] == "compare":
        words += draw.choices(PROBLEMS, k=draw.choice((1, 1, 2)))
        words += ["--rounds", "2", "--seeds", "1", "--dim", "4", "--threads", "1"]
    elif words[0] == "advise":
        words += [draw.choice(PROBLEMS), "--dim", "4", "--seconds", "0.2"]
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        words += [draw.choice(OPTIONS), draw.choice(VALUES)][: draw.choice((1, 2, 2, 2))]
    # Commands write what they are told to, under names drawn from the values: not here.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "80", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        result.exception.add_note(f"optex {' '.join(map(repr, words))}")
        raise result.exception
    if result.exit_code not in (0, 2):
        raise AssertionError(f"exit code {result.exit_code} of optex {words}: {result.output[-300:]}")
    return "refused" if result.exit_code else "taken"


# ------------------------------------------------------------------ minimize


def _bowl(x: Any) -> Any:
    return ((x - 0.5) ** 2).sum()


FUNCTIONS: tuple[Any, ...] = (
    *(_bowl, lambda x: (_bowl(x), 2 * (x - 0.5)), lambda x: 2 * (x - 0.5), lambda x: x, lambda _: math.nan),
    *(lambda _: None, lambda _: "x", lambda x: (_bowl(x),), lambda x: _bowl(x) / 0, lambda x: (x**0.5).sum()),
    *(lambda x: -_bowl(x), lambda x: x.sum() * 1e300, lambda x: (_bowl(x), x.reshape(-1)[:1])),
)
STARTS: tuple[Any, ...] = (
    *([1.0, -1.0], 2.0, (1, 2, 3), np.zeros(3, np.float32), torch.ones(2, 2), torch.zeros(3), np.ones(2) * 1j),
    *(np.array([]), [[1.0]], torch.ones(2, dtype=torch.float16), torch.ones(1, requires_grad=True), "ab"),
)
GOOD: dict[str, tuple[Any, ...]] = {
    "jac": (None, True, lambda x: 2 * (x - 0.5)),
    "optimizer": (*sorted(OPTIMIZERS), torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1)),
    "lr": (None, 0.1, 1e-3),
    "parallelism": (1, 2, 4),
    "stride": ("auto", 1, 3),
    "history_size": (None, 1, 4),
    "estimator": (None, optex.HoldLast(), optex.CurlFreeEstimator(), optex.SeparableEstimator()),
    "acceptance": (None, optex.WithinTolerance(0), optex.Last(), optex.LowestLoss()),
    "evaluator": (None, "sequential", "vectorized"),
    "callback": (None, lambda _: False),
    "tol": (None, 1e-3),
    "gtol": (None, 1e-3),
    "ftol": (None, 1e-3),
    "options": (None, {"disp": False}, {"maxiter": 2}),
    "weight_decay": (0.0, 0.1),
    "no_such_argument": (1,),
}


def minimization(draw: random.Random) -> str:
    """``minimize`` with some arguments, some of them odd."""
    names = draw.sample(sorted(GOOD), draw.choice((0, 1, 2, 4)))
    chosen: dict[str, Any] = {name: draw.choice(GOOD[name]) for name in names}
    for name in draw.sample(sorted(GOOD), draw.choice((0, 0, 1, 2))):
        chosen[name] = draw.choice(ODD)
    fun, x0 = draw.choice(FUNCTIONS[:2] + FUNCTIONS), draw.choice(STARTS + ODD)
    try:
        result = optex.minimize(fun, x0, **{"maxiter": 4, **chosen})
    except REFUSALS:
        return "refused"
    except Exception as error:
        error.add_note(f"fun {FUNCTIONS.index(fun)}, x0 {x0!r}, {chosen}")
        raise
    assert torch.as_tensor(result.x).isfinite().all(), (chosen, x0, result)
    assert result.success == (result.status == 0), (chosen, x0, result)
    return "taken"


# ------------------------------------------------------------------ the run

DOORS: dict[str, Callable[[random.Random], str]] = {
    "load_state_dict": saved_state,
    "command line": command_line,
    "minimize": minimization,
}


class Findings:
    """What came of the inputs of a door, and each kind of finding with the first inputs that led to it."""

    def __init__(self, door: str) -> None:
        self.door = door
        self.counts: Counter[str] = Counter()
        self.found: dict[str, dict[str, Any]] = {}

    def knock(self, draw: random.Random, name: int | str) -> None:
        """Try one input, and note under ``name`` whatever is neither taken nor refused."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.counts[DOORS[self.door](draw)] += 1
        except Exception as error:  # noqa: BLE001 (any other error is what is looked for)
            self.counts["found"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(place.filename).name}, {place.name}"
            notes = " ".join(getattr(error, "__notes__", []))
            found = self.found.setdefault(where, {"inputs": [], "message": f"{error} {notes}"[:300]})
            found["inputs"] = [*found["inputs"], name][:5]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"counts": dict(sorted(self.counts.items())), "findings": self.found}


def fuzzed(door: str, seconds: float, first: int) -> dict[str, Any]:
    """Seeds from ``first`` on until the time is up: what came of them, and what was found."""
    findings, seed = Findings(door), first
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        findings.knock(random.Random(seed), seed)
        seed += 1
    return {"seeds": [first, seed], **findings.as_dict()}


def note(**parts: Any) -> None:
    """Put parts into the record, leave its others, and fill the table of results/README.md."""
    record = (json.loads(RECORD.read_text()) if RECORD.exists() else {}) | parts
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    kinds = {"by seed": record, "guided by atheris": record.get("guided", {"doors": {}})}
    rows = []
    for inputs, part in kinds.items():
        for door, tried in part["doors"].items():
            ends = [f"{tried['counts'].get(end, 0):,}" for end in ("refused", "taken")]
            rows.append((door, inputs, *ends, str(len(tried["findings"]))))
    table = markdown_table(("door", "inputs", "refused", "taken", "kinds of findings"), rows)
    fill(ROOT / "results" / "README.md", {"fuzz": table})


def main() -> None:
    """Fuzz, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="for each door")
    parser.add_argument("--door", choices=DOORS)
    parser.add_argument("--seed", type=int, help="run this one alone, with --door")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.seed is not None and options.door:
        print(DOORS[options.door](random.Random(options.seed)))
        return
    doors = {}
    for door in [options.door] if options.door else DOORS:
        doors[door] = fuzzed(door, options.seconds, options.first)
        print(door, json.dumps(doors[door], indent=1), flush=True)
    if not options.door:
        note(torch=torch.__version__, seconds=options.seconds, doors=doors)


if __name__ == "__main__":
    main()
