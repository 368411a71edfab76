"""``optex advise``: whether OptEx pays on a named problem, on this machine."""

from __future__ import annotations

import json as json_module
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import optex
from optex.checks import check_integer
from optex.stepping import base_optimizer, check_name, default_rate
from optex.studies.cli.app import check_file, refuse
from optex.studies.cli.settings import read_settings
from optex.studies.problems import Problem, make_problem
from optex.studies.records import finite_or_null, write_whole

__all__ = ["run"]


def run(
    problem: str,
    optimizer: str,
    lr: float | None,
    seed: int,
    options: dict[str, Any],
    settings: Sequence[str],
    seconds: float,
    workers: int | None,
    threads: int,
    json: Path | None,
) -> None:
    """Measure, print, and write what was measured; arguments as ``optex advise`` has them."""
    try:
        check_integer(None, "threads", threads)
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds: must be positive and finite, got {seconds}")
        check_file("json", json)
        options = {**options, **read_settings([problem], settings)}
        start = make_problem(problem, seed=seed, **options)
        base = _base(start, optimizer, lr)
        torch.set_num_threads(threads)
        advice = optex.advise(
            base, start.batches(), start.source(), model=start, seconds=seconds, workers=workers
        )
        if json is not None:
            meta = {"command": ["optex", *sys.argv[1:]], "problem": problem, "seed": seed, "options": options}
            document = finite_or_null({**meta, **advice.as_dict()})
            write_whole(json, json_module.dumps(document, allow_nan=False) + "\n")
    except (ValueError, ImportError, OSError) as error:
        refuse(error)


def _base(start: Problem, optimizer: str, lr: float | None) -> torch.optim.Optimizer:
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr: must be positive and finite, got {lr}")
    check_name(optimizer)
    try:
        return base_optimizer(optimizer, start, lr=default_rate(optimizer) if lr is None else lr)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {optimizer} cannot optimise {start.name}: {error}") from error
