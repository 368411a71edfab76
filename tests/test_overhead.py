"""What benchmarks/overhead.py counts, against rounds whose torch calls are watched one by one."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optex
from optex.evaluators import SequentialEvaluator
from optex.round import Rounds

ROOT = Path(__file__).parents[1]
DIMENSION, HISTORY = 16_384, 8  # whole blocks of inner_products, longer than what it widens
PARTS = {"_note_start": "mark", "_draft": "draft", "_evaluate": "evaluate", "_remember": "remember"}
PARTS |= {"_replay": "replay", "_keep": "keep"}


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The benchmark's files, as python finds them when it runs one."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("overhead", "traffic", "rounds_timed"):
        sys.modules.pop(name, None)


class Watch(TorchDispatchMode):
    """Rows read and written by every torch call, by part of the round."""

    def __init__(self):
        super().__init__()
        self.part, self.rows, self.calls = None, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.part is not None:
            rows = touched(func, args, kwargs or {}, result)
            self.rows[self.part] += rows
            self.calls[self.part] += bool(rows)
        return result


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def numbers(value, skip=()):
    """Of all different tensors in there; one handed in twice is read once."""
    found = {(t.data_ptr(), t.numel()): t for t in tensors(value)}
    return sum(n for p, n in found if n >= DIMENSION and p not in skip)


def touched(func, args, kwargs, result):
    name = func.overloadpacket.__name__
    returns = func._schema.returns
    if any(r.alias_info and not r.alias_info.is_write for r in returns) or name in ("empty", "empty_like"):
        return 0  # views, and memory nobody has written yet
    if name in ("_unsafe_view", "new_empty", "empty_strided"):
        return 0
    if name in ("index", "index_select"):
        return 2 * numbers([result]) / DIMENSION
    if name == "index_copy_":
        return 2 * numbers([args[3]]) / DIMENSION
    if name == "_foreach_copy_":
        return (numbers(args[0]) + numbers(args[1])) / DIMENSION
    read = args[1:] if name in ("copy_", "zero_", "fill_", "zeros_like") else args
    written = [args[0]] if name.endswith("_") else [result]
    return (numbers(read) + numbers(written)) / DIMENSION


@pytest.fixture
def watch(monkeypatch):
    mode = Watch()

    def within(part, function):
        def wrapped(*args, **kwargs):
            outer, mode.part = mode.part, part
            try:
                return function(*args, **kwargs)
            finally:
                mode.part = outer

        return wrapped

    for name, part in PARTS.items():
        monkeypatch.setattr(Rounds, name, within(part, getattr(Rounds, name)))
    monkeypatch.setattr(SequentialEvaluator, "evaluate", within(None, SequentialEvaluator.evaluate))
    for base, state in ((torch.optim.Adam, 2), (torch.optim.SGD, 0)):

        def step(self, *args, silent=within(None, base.step), passes=3 + 2 * state):
            if mode.part is not None:  # one pass, and one call, whatever it is made of
                mode.rows[mode.part] += passes
                mode.calls[mode.part] += 1
            return silent(self, *args)

        monkeypatch.setattr(base, "step", step)
    return mode


def watched_round(mode, reports):
    """One more round's rows and calls, by part."""
    mode.rows.clear()
    mode.calls.clear()
    with mode:
        report = next(reports)
    return report, dict(mode.rows), dict(mode.calls)


def rounds_of(method, optimizer, parallelism, stride):
    from rounds_timed import Bowl, make_optimizer

    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.rand(DIMENSION) * 4 - 2)
    wrapped = make_optimizer(method, optimizer, theta, parallelism, HISTORY, stride)
    return wrapped, iter(wrapped.rounds(iter(lambda: 0, None), Bowl(theta)))


@pytest.mark.parametrize(
    ("method", "optimizer", "parallelism", "stride"),
    [
        ("optex-paper", "adam", 4, 1),
        ("separable", "adam", 4, 1),
        ("curl-free", "adam", 4, 1),
        ("curl-free", "sgd", 3, 1),
        ("hold-last", "sgd", 4, 1),
        ("hold-last", "adam", 2, 1),
        ("default", "adam", 4, 1),
        ("default", "adam", 1, 4),
        ("default", "adam", 2, 3),
        ("separable", "adam", 2, 2),
    ],
)
def test_the_counts_are_what_torch_calls_touch(watch, method, optimizer, parallelism, stride):
    from traffic import STATES, Setting, round_work

    wrapped, reports = rounds_of(method, optimizer, parallelism, stride)
    for _ in range(HISTORY + 3):
        next(reports)
    seen = set()
    for _ in range(8):
        estimator, anchor = wrapped.estimator, wrapped.history.anchor
        before = getattr(estimator, "_judged", 0)
        report, rows, calls = watched_round(watch, reports)
        moved = wrapped.history.anchor is not anchor
        judged = getattr(estimator, "_judged", 0) > before
        assert report.accepted == report.drafted == parallelism * stride, "the round was not kept whole"
        setting = Setting(
            method, HISTORY, parallelism, parallelism * stride, STATES[optimizer], float(moved), float(judged)
        )
        work = round_work(setting)
        assert {part: w.rows for part, w in work.items()} == {part: rows[part] for part in work}
        assert {part: w.calls for part, w in work.items()} == {part: calls[part] for part in work}
        assert not rows.get("keep")
        seen.add((moved, judged))
    assert {moved for moved, _ in seen} >= {False}
    assert method != "default" or {judged for _, judged in seen} == {False, True}
