"""What the sentences of the study of acceleration quote, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import acceleration_summary

    return acceleration_summary.summary


def run(case, method, n, acceleration, *, seed=0, loss=(4.0, 2.0, 1.0), diverged=False):
    return {
        "case": case,
        "method": method,
        "N": n,
        "seed": seed,
        "acceleration": acceleration,
        "loss": list(loss),
        "diverged": diverged,
    }


RECORDS = [
    run("a", "vanilla", 1, 1.0),
    run("a", "vanilla", 1, 1.0, seed=1),
    run("b", "vanilla", 1, 1.0),
    run("b", "vanilla", 1, 1.0, seed=1, diverged=True),
    run("a", "optex", 4, 1.0),
    run("a", "optex", 4, 3.0, seed=1, loss=(4.0, 4.0, 1.5)),
    run("b", "optex", 4, 8.0, diverged=True),
    run("b", "optex", 4, 8.0, seed=1, diverged=True),
    run("a", "target", 4, 4.0),
    run("a", "target", 4, 4.0, seed=1),
    run("a", "separable", 4, 2.0),
    run("b", "separable", 4, 2.0),
    run("a", "curl-free", 4, 2.0),
]


def test_means_over_the_cases_follow_from_the_means_over_the_seeds(summary):
    found = summary(RECORDS, {"both": ["a", "b"]}, ["a"], ("optex", "separable", "curl-free"))
    assert found["optex"] == {"N = 4": {"a": 2.0, "b": 8.0}}
    own = {"mean": 4.0, "capped": pytest.approx(math.sqrt(8), rel=1e-4), "worst": 2.0, "of optex": 1.0}
    assert found["suites"]["both"]["optex"]["N = 4"] == own
    assert found["suites"]["both"]["separable"]["N = 4"]["of optex"] == 0.5
    assert "curl-free" not in found["suites"]["both"]  # of which a case is missing


def test_the_loss_over_targets_is_the_mean_of_the_seeds_own(summary):
    found = summary(RECORDS, {}, ["a", "c"], ())
    assert found["over target"] == {"a": [0.5, 0.25], "c": []}


def test_runs_count_as_diverged_only_where_vanilla_does_not(summary):
    found = summary(RECORDS, {}, [], ())
    assert found["diverged"]["optex"] == {"runs": 3, "diverged": 1, "share": 0.3333, "cases": {"b": 1}}
    assert found["diverged"]["hold-last"] == {"runs": 0, "diverged": 0, "share": None, "cases": {}}
