"""Numbers of `benchmarks/acceleration.py` over several runs, for its tables and the sentences of its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optex.studies.measures import VANILLA, geometric_mean
from optex.studies.records import significant

__all__ = ["by_case", "over_target", "pooled", "shared_runs", "summary"]

Records = list[dict[str, Any]]


def by_case(records: Records, field: str = "acceleration") -> dict[tuple[str, str], float]:
    """(case, method) -> mean over seeds, for records of one N."""
    groups: dict[tuple[str, str], list[float]] = {}
    for entry in records:
        groups.setdefault((entry["case"], entry["method"]), []).append(entry[field])
    return {key: float(np.mean(values)) for key, values in groups.items()}


def pooled(records: Records, names: Sequence[str], method: str, n: int) -> dict[str, float] | None:
    """Geometric mean over the cases, also with each capped at N, and the worst; None where one is missing."""
    mine = [r for r in records if r["N"] == n and r["method"] == method and r["case"] in names]
    values = list(by_case(mine).values())
    if len(values) < len(names):
        return None
    capped = geometric_mean([min(value, n) for value in values])
    return {"mean": geometric_mean(values), "capped": capped, "worst": min(values)}


def over_target(records: Records, case: str, n: int = 4) -> list[float]:
    """Loss of optex over target's, less 1, at every tenth round: mean over the seeds; empty without runs."""
    mine = [r for r in records if r["case"] == case and r["N"] == n]
    targets = {r["seed"]: r["loss"] for r in mine if r["method"] == "target"}
    ratios = [
        [(a or math.inf) / (b or math.inf) - 1 for a, b in zip(r["loss"], targets[r["seed"]], strict=True)]
        for r in mine
        if r["method"] == "optex"
    ]
    return [float(value) for value in np.mean(ratios, axis=0)[1:]] if ratios else []


def shared_runs(records: Records) -> Records:
    """Those at a case and a seed at which vanilla does not diverge, with several gradients a round."""
    lost = {(r["case"], r["seed"]) for r in records if r["method"] == VANILLA and r["diverged"]}
    return [r for r in records if (r["case"], r["seed"]) not in lost and r["N"] > 1]


def summary(
    records: Records, suites: Mapping[str, Sequence[str]], networks: Sequence[str], methods: Sequence[str]
) -> dict[str, Any]:
    """What the sentences of the page quote.

    Args:
        records: of all runs.
        suites: names of the cases that are pooled, by name of the suite.
        networks: names of the cases that are compared with target.
        methods: those that are pooled.
    """
    sizes = sorted({r["N"] for r in records if r["N"] > 1})
    means: dict[str, Any] = {}
    for suite, names in suites.items():
        for method in methods:
            for n in sizes:
                found, own = pooled(records, names, method, n), pooled(records, names, "optex", n)
                if found is not None and own is not None:
                    found["of optex"] = found["mean"] / own["mean"]
                    cell = {key: significant(value, 5) for key, value in found.items()}
                    means.setdefault(suite, {}).setdefault(method, {})[f"N = {n}"] = cell
    cases = {
        f"N = {n}": {
            case: significant(value, 5)
            for (case, method), value in by_case([r for r in records if r["N"] == n]).items()
            if method == "optex"
        }
        for n in sizes
    }
    ahead = {case: [significant(value, 4) for value in over_target(records, case)] for case in networks}
    diverged = {method: _diverged(records, method) for method in ("hold-last", "optex-paper", "optex")}
    return {"suites": means, "optex": cases, "over target": ahead, "diverged": diverged}


def _diverged(records: Records, method: str) -> dict[str, Any]:
    """Runs of a method that diverge where vanilla does not: how many, what share of all, in which cases."""
    mine = [r for r in shared_runs(records) if r["method"] == method]
    lost = [r["case"] for r in mine if r["diverged"]]
    return {
        "runs": len(mine),
        "diverged": len(lost),
        "share": significant(len(lost) / len(mine), 4) if mine else None,
        "cases": {case: lost.count(case) for case in sorted(set(lost))},
    }
