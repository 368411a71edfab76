"""The record of the examples: the numbers of their ``main``, gradients as counted, the page's tables."""

import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

import optex
from optex.studies.tables import fill_text

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--layers",
    "1",
    "--heads",
    "2",
    "--width",
    "16",
    "--context",
    "16",
    "--batch-size",
    "8",
    "--warm-up",
    "3",
]


@pytest.fixture
def script(monkeypatch):
    """The script, imported as python does that runs it."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "examples", raising=False)
    yield importlib.import_module("examples")
    for name in {"examples", "train_char_gpt", "train_cifar10", "train_dqn"} - known:
        sys.modules.pop(name, None)
    while str(ROOT / "examples") in sys.path:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def gpt(script, tmp_path):
    """The GPT made small: run by the script, and by itself."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    more = [*SMALL, "--text", str(path), "--device", "cpu"]

    def run(flags, **changes):
        return script.run(script.SCRIPTS["gpt"], script.Setting(flags, changes), 1, more)

    def main(flags):
        return script.import_example("train_char_gpt").main([*flags.split(), "--seed", "1", *more])

    return run, main


@pytest.fixture
def backwards(monkeypatch):
    """How often a loss was differentiated."""
    calls, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *args, **kwargs: calls.append(1) or backward(*args, **kwargs)
    )
    return calls


@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_run_has_what_main_returns_and_every_gradient_counts(gpt, backwards, parallelism):
    run, main = gpt
    flags = f"--steps 12 --max-rounds 5 --optex {parallelism}"
    found = run(flags)
    assert found.pop("gradients") == len(backwards) >= 5
    whole = main(f"{flags} --sample 0")
    assert found == {"steps": whole["steps"], "rounds": whole["rounds"], "loss": whole["held"]}


def test_changes_are_those_of_the_optimizer_and_nothing_else_changes(gpt, monkeypatch):
    run, _ = gpt
    flags = "--steps 12 --max-rounds 4 --optex 3"
    assert run(flags) == run(flags, history_size=16)
    made, original = [], optex.OptEx.rounds
    monkeypatch.setattr(
        optex.OptEx, "rounds", lambda self, *rest: made.append(self.history_size) or original(self, *rest)
    )
    run(flags, history_size=2)
    assert made == [2]


def test_dqn_says_what_its_last_episodes_returned(script):
    pytest.importorskip("gymnasium")
    found = script.run(script.SCRIPTS["dqn"], script.Setting("--rounds 30 --optex 2"), 0)
    whole = script.import_example("train_dqn").main(["--rounds", "30", "--optex", "2", "--seed", "0"])
    assert found["rounds"] == 30
    assert found["gradients"] == 60
    assert found["steps"] == whole["steps"] > 30
    assert found["return"] == pytest.approx(statistics.mean(whole["returns"][-20:]))
    assert found["return of all"] == pytest.approx(statistics.mean(whole["returns"]))


class TestCompleting:
    """Which runs are made; each is told what it finds."""

    @pytest.fixture
    def settings(self, script, monkeypatch, tmp_path):
        def with_flags(*flags):
            settings = {f"run {i}": script.Setting(each) for i, each in enumerate(flags)}
            one = script.Script("train_char_gpt", "--shared", settings, 2, script.of_gpt)
            monkeypatch.setattr(script, "SCRIPTS", {"gpt": one})

        with_flags("--a", "--b")
        monkeypatch.setattr(script, "PATH", tmp_path / "record.json")
        return with_flags

    @pytest.fixture
    def calls(self, script, monkeypatch, settings):
        """The runs that are made for some seeds."""
        made = []

        def run(_, setting, seed):
            made.append((setting.flags, seed))
            return {"steps": 10, "gradients": 10, "rounds": 10, "loss": 2.0 + seed}

        def complete(seeds, title=None):
            made.clear()
            script.complete(script.read(), ["gpt"], title, seeds)
            return list(made)

        monkeypatch.setattr(script, "run", run)
        return complete

    def test_a_run_that_is_in_the_record_is_not_made_again(self, calls):
        assert calls([0]) == [("--a", 0), ("--b", 0)]
        assert calls([0, 1, 2]) == [("--a", 1), ("--b", 1)]
        assert calls([0, 1]) == []

    def test_a_run_with_other_flags_is(self, calls, settings, script):
        calls([0, 1])
        settings("--a", "--c")
        assert calls([1]) == [("--c", 1)]
        kept = script.read()["scripts"]["gpt"]
        assert [one["seed"] for one in kept["run 0"]["runs"]] == [0, 1]
        assert [one["seed"] for one in kept["run 1"]["runs"]] == [1]

    def test_one_setting_can_be_run_alone(self, calls):
        assert calls([0, 1], "run 1") == [("--b", 0), ("--b", 1)]

    def test_mean_and_deviation_are_those_of_the_seeds(self, calls, script):
        calls([0])
        alone = script.read()["scripts"]["gpt"]["run 0"]
        assert (alone["mean"]["loss"], alone["deviation"]) == (2.0, {})
        calls([1])
        entry = script.read()["scripts"]["gpt"]["run 0"]
        assert entry["mean"]["loss"] == 2.5
        assert entry["deviation"]["loss"] == pytest.approx(math.sqrt(0.5), rel=1e-3)
        assert "| run 0 | 10 | 10 | 10 | 2.500 ± 0.707 | 2 |" in script.tables(script.read())["examples-gpt"]


def test_a_loss_that_is_not_finite_is_null_and_the_table_says_so(script):
    runs = [
        {"seed": seed, "rounds": 1, "steps": 1, "gradients": 1, "loss": script.kept(loss)}
        for seed, loss in enumerate([math.nan, 1.0])
    ]
    mean, deviation = script.summary(runs)
    assert json.loads(json.dumps([mean["loss"], deviation["loss"]], allow_nan=False)) == [None, None]
    assert "not finite" in script.table({"plain": {"runs": runs, "mean": mean, "deviation": deviation}})


def test_the_page_has_the_records_tables(script):
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert fill_text(page, script.tables(script.read())) == page


def test_the_record_has_the_settings_that_the_script_would_run(script):
    record = script.read()["scripts"]
    assert record.keys() == script.SCRIPTS.keys()
    for name, one in script.SCRIPTS.items():
        flags = {title: f"{one.shared} {setting.flags}".strip() for title, setting in one.settings.items()}
        assert {title: entry["flags"] for title, entry in record[name].items()} == flags
