"""What the examples reach: test losses and returns after equally many rounds, plain and with optex.

    python benchmarks/examples.py                               # what the record lacks; an hour or two
    python benchmarks/examples.py --only gpt dqn --seeds 0      # some scripts, some seeds
    python benchmarks/examples.py --report                      # run nothing; tables from the JSON

Calls ``main`` of ``examples/train_cifar10.py``, ``train_char_gpt.py`` and ``train_dqn.py`` with the flags of
each setting, one after the other on one thread, and counts the gradients of their rounds. A run that is in
``results/examples.json`` with the same flags is not made again. Fills the tables in ``examples/README.md``.
The images and the text are found as ``optex fetch`` leaves them, or in ``$OPTEX_DATA``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import optex
from optex.studies.records import significant, this_machine, write_whole
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).resolve().parents[1]
PATH, PAGE = ROOT / "results" / "examples.json", ROOT / "examples" / "README.md"


@dataclass(frozen=True)
class Setting:
    """One way to run a script.

    Attributes:
        flags: what the script is given, beside its seed.
        changes: arguments of ``OptEx`` that the script has no flag for.
    """

    flags: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """An example and the settings it is run in.

    Attributes:
        module: its file in ``examples``, without ``.py``.
        shared: flags of all settings.
        settings: by the name that the table gives them.
        seeds: how many, from 0.
        reached: from what ``main`` returns to the numbers that are kept.
    """

    module: str
    shared: str
    settings: dict[str, Setting]
    seeds: int
    reached: Callable[[dict[str, Any]], dict[str, float]]


def schedules(rate: float, batch_size: int, most: int) -> dict[str, Setting]:
    """The settings of a script that trains a network: plain, larger rates, a larger batch, and optex.

    Args:
        rate: the script's learning rate, of which multiples are tried.
        batch_size: the script's; a batch of four takes what optex with N = 4 takes, four gradients at once.
        most: the largest multiple of the rate.
    """
    cut, plain = "--steps 400 --max-rounds 100", "--steps 100 --max-rounds 100 --optex 1"
    wide = f"{plain} --batch-size {4 * batch_size}"
    multiples = [k for k in (2, 4, 8) if k <= most]
    return (
        {
            "plain": Setting(plain),
            "plain, cut off": Setting(f"{cut} --optex 1"),
            "plain, 4 times the rounds": Setting("--steps 400 --max-rounds 400 --optex 1"),
        }
        | {f"plain, rate {k}x": Setting(f"{plain} --lr {k * rate:g}") for k in multiples}
        | {f"plain, batch 4x, rate {k}x": Setting(f"{wide} --lr {k * rate:g}") for k in multiples}
        | {"optex 4": Setting(f"{cut} --optex 4")}
        | {f"optex 4, rate {k}x": Setting(f"{cut} --optex 4 --lr {k * rate:g}") for k in multiples[:-1]}
        | {"optex 4, stride 1": Setting(f"{cut} --optex 4", {"stride": 1})}
    )


def without(settings: dict[str, Setting], *titles: str) -> dict[str, Setting]:
    """All but these, which take long."""
    return {title: setting for title, setting in settings.items() if title not in titles}


def of_gpt_alone() -> dict[str, Setting]:
    """A schedule of about the steps that optex keeps; eight gradients a round, also with a longer history."""
    planned = "--steps 280 --max-rounds 100 --optex 4 --lr 0.002"
    eight = "--steps 400 --max-rounds 100 --optex 8"
    return {
        "optex 4, rate 2x, 280 steps planned": Setting(planned),
        "optex 8": Setting(eight),
        "optex 8, history 32": Setting(eight, {"history_size": 32}),
    }


def of_cifar10(found: dict[str, Any]) -> dict[str, float]:
    """Mean cross-entropy and share of wrong answers on the test images."""
    return {"rounds": found["rounds"], "loss": found["test"], "error": found["error"]}


def of_gpt(found: dict[str, Any]) -> dict[str, float]:
    """Mean cross-entropy of a character on the text held out."""
    return {"rounds": found["rounds"], "loss": found["held"]}


def of_dqn(found: dict[str, Any]) -> dict[str, float]:
    """Mean return of the last 20 episodes, and of all episodes."""
    whole = statistics.mean(found["returns"])
    return {"rounds": len(found["curve"]), "return": found["curve"][-1], "return of all": whole}


SCRIPTS = {
    "gpt": Script("train_char_gpt", "--sample 0", schedules(1e-3, 16, 8) | of_gpt_alone(), 3, of_gpt),
    "dqn": Script(
        "train_dqn",
        "",
        {
            "plain": Setting("--rounds 800 --optex 1"),
            # As much acting in rounds of a quarter of it, the target network as fast in steps of acting.
            "plain, 4 times the rounds": Setting("--rounds 3200 --act 2 --target-rate 0.005 --optex 1"),
            "plain, rate 2x": Setting("--rounds 800 --optex 1 --lr 0.002"),
            "plain, rate 4x": Setting("--rounds 800 --optex 1 --lr 0.004"),
            "plain, rate 8x": Setting("--rounds 800 --optex 1 --lr 0.008"),
            "optex 4": Setting("--rounds 800 --optex 4"),
            "optex 4, stride 1": Setting("--rounds 800 --optex 4", {"stride": 1}),
        },
        5,
        of_dqn,
    ),
    "cifar10": Script(
        "train_cifar10",
        "--optimizer adamw",
        without(schedules(3e-3, 128, 4), "plain, batch 4x, rate 4x", "optex 4, stride 1"),
        3,
        of_cifar10,
    ),
    "cifar10-sgd": Script(
        "train_cifar10",
        "--optimizer sgd",
        without(schedules(0.1, 128, 2), "plain, batch 4x, rate 2x", "optex 4, stride 1"),
        1,
        of_cifar10,
    ),
}
HEADS = {
    "loss": "test loss",
    "error": "test error",
    "return": "last 20 episodes",
    "return of all": "all episodes",
}


# ---------------------------------------------------------------------- running


def run(script: Script, setting: Setting, seed: int, more: Sequence[str] = ()) -> dict[str, float]:
    """What a script reaches, and the gradients that it took.

    Args:
        more: further flags, behind the setting's.
    """
    module = import_example(script.module)
    gradients, with_optex = 0, module.with_optex

    def watched(optimizer: optex.OptEx, *rest: Any) -> Iterator[Any]:
        nonlocal gradients
        if setting.changes:
            optimizer = changed(optimizer, setting.changes)
        for taken in with_optex(optimizer, *rest):
            assert optimizer.last_report is not None  # a round has run
            gradients += optimizer.last_report.evaluated
            yield taken

    flags = [*shlex.split(f"{script.shared} {setting.flags}"), "--seed", str(seed), *more]
    with mock.patch.object(module, "with_optex", watched):
        found = module.main(flags)
    reached = script.reached(found)
    # A round of the plain loop is one gradient.
    return {"steps": found["steps"], "gradients": gradients or reached["rounds"], **reached}


def import_example(name: str) -> Any:
    """The module, imported as python does that runs it: from its folder."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def changed(optimizer: optex.OptEx, changes: dict[str, Any]) -> optex.OptEx:
    """The optimizer, which has run no round yet, made anew with other arguments."""
    given = {name: getattr(optimizer, name) for name in ("parallelism", "scheduler", "model", "gradient_hook")}
    return optex.OptEx(optimizer.base, **(given | changes))


def complete(record: dict[str, Any], names: Sequence[str], settings: str | None, seeds: Sequence[int]) -> None:
    """Make the runs that the record lacks, seed by seed; write after each."""
    for seed in seeds:
        for name in names:
            script = SCRIPTS[name]
            for title, setting in script.settings.items():
                if seed >= script.seeds or (settings is not None and settings not in title):
                    continue
                entry = entry_of(record, name, title)
                if any(each["seed"] == seed for each in entry["runs"]):
                    continue
                print(f"{name}, {title}, seed {seed}: {script.module}.py {entry['flags']}", flush=True)
                found = {key: kept(value) for key, value in run(script, setting, seed).items()}
                entry["runs"] = sorted([*entry["runs"], {"seed": seed, **found}], key=lambda one: one["seed"])
                entry["mean"], entry["deviation"] = summary(entry["runs"])
                write(record)


def entry_of(record: dict[str, Any], name: str, title: str) -> dict[str, Any]:
    """The record of a setting; an empty one where there is none or its flags were others."""
    setting = SCRIPTS[name].settings[title]
    flags = f"{SCRIPTS[name].shared} {setting.flags}".strip()
    of_script = record["scripts"].setdefault(name, {})
    described = {"flags": flags, "changes": setting.changes}
    if {key: of_script.get(title, {}).get(key) for key in described} != described:
        of_script[title] = described | {"runs": []}
    return of_script[title]


def kept(value: float) -> float | None:
    """A count as it is, a measured number in five digits; null where it is not finite."""
    return value if isinstance(value, int) else significant(value, 5)


def summary(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Mean and, of several seeds, sample standard deviation; null where a number is not finite."""
    columns = {key: [one[key] for one in runs] for key in runs[0] if key != "seed"}
    mean = {key: None if None in column else kept(statistics.fmean(column)) for key, column in columns.items()}
    if len(runs) == 1:
        return mean, {}
    return mean, {
        key: None if None in column else significant(statistics.stdev(column), 3)
        for key, column in columns.items()
    }


def read() -> dict[str, Any]:
    """The record; an empty one where there is none."""
    return json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {"meta": {}, "scripts": {}}


def write(record: dict[str, Any]) -> None:
    """Scripts and settings in the order that they have here."""
    ordered = {
        name: {
            title: record["scripts"][name][title]
            for title in script.settings
            if title in record["scripts"][name]
        }
        for name, script in SCRIPTS.items()
        if name in record["scripts"]
    }
    meta = {
        "optex": optex.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": this_machine(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",  # as the scripts choose it
        "threads": torch.get_num_threads(),
    }
    write_whole(PATH, json.dumps({"meta": meta, "scripts": ordered}, indent=1, allow_nan=False) + "\n")


# ---------------------------------------------------------------------- the page


def tables(record: dict[str, Any]) -> dict[str, str]:
    """A table for each script: a row for each setting that was run."""
    return {f"examples-{name}": table(entries) for name, entries in record["scripts"].items()}


def table(entries: dict[str, dict[str, Any]]) -> str:
    """Means over the seeds, with standard deviations where there are several."""
    wanted = [key for key in HEADS if any(key in entry["mean"] for entry in entries.values())]
    rows = []
    for title, entry in entries.items():
        mean, deviation = entry["mean"], entry["deviation"]
        counts = [f"{mean[key]:,.0f}" for key in ("rounds", "steps", "gradients")]
        reached = [with_spread(key, mean[key], deviation.get(key)) for key in wanted]
        rows.append([title, *counts, *reached, str(len(entry["runs"]))])
    return markdown_table(
        ["run", "rounds", "steps", "gradients", *(HEADS[key] for key in wanted), "seeds"], rows
    )


def with_spread(key: str, mean: float | None, deviation: float | None) -> str:
    """A cell."""
    if mean is None:
        return "not finite"
    scale, form, unit = {"loss": (1, ".3f", ""), "error": (100, ".1f", " %")}.get(key, (1, ".0f", ""))
    spread = "" if deviation is None else f" ± {scale * deviation:{form}}"
    return f"{scale * mean:{form}}{spread}{unit}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="scripts (default all)"
    )
    parser.add_argument("--setting", help="run only settings whose names have this in them")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(10), help="(default: each script's own)")
    parser.add_argument("--report", action="store_true", help="run nothing, fill the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = read()
    if not options.report:
        complete(record, options.only, options.setting, options.seeds)
    fill(PAGE, tables(record))


if __name__ == "__main__":
    main()
