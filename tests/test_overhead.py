"""What benchmarks/overhead.py counts, against rounds whose torch calls are watched one by one."""

import importlib
import math
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optex.evaluators import SequentialEvaluator
from optex.round import Rounds, linear

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
    for name in ("overhead", "overhead_report", "rounds_timed", "traffic"):
        sys.modules.pop(name, None)


class Watch(TorchDispatchMode):
    """Rows read and written by every torch call, by part of the round."""

    def __init__(self):
        super().__init__()
        self.part: str | None = None
        self.rows: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

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

    def one_pass(step, passes):  # and one call, whatever it is made of
        silent = within(None, step)

        def wrapped(*args):
            if mode.part is not None:
                mode.rows[mode.part] += passes
                mode.calls[mode.part] += 1
            return silent(*args)

        return wrapped

    for base, passes in ((torch.optim.Adam, 7), (torch.optim.SGD, 3)):
        monkeypatch.setattr(base, "step", one_pass(base.step, passes))
    return mode


def watched_round(mode, reports):
    """One more round's rows and calls, by part."""
    mode.rows.clear()
    mode.calls.clear()
    with mode:
        report = next(reports)
    return report, dict(mode.rows), dict(mode.calls)


def rounds_of(method, optimizer, parallelism, stride):
    timed = importlib.import_module("rounds_timed")
    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.rand(DIMENSION) * 4 - 2)
    wrapped = timed.make_optimizer(method, optimizer, theta, parallelism, HISTORY, stride)
    return wrapped, iter(wrapped.rounds(iter(lambda: 0, None), timed.Bowl(theta)))


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
def test_the_counts_are_what_torch_calls_touch(monkeypatch, watch, method, optimizer, parallelism, stride):
    traffic = importlib.import_module("traffic")
    monkeypatch.setattr(linear, "SHORTEST", 1 << 40)  # what is counted is walking
    wrapped, reports = rounds_of(method, optimizer, parallelism, stride)
    for _ in range(HISTORY // parallelism + 3):
        next(reports)
    seen = set()
    for _ in range(6):
        estimator, anchor = wrapped.estimator, wrapped.history.anchor
        before = getattr(estimator, "_judged", 0)
        report, rows, calls = watched_round(watch, reports)
        moved = wrapped.history.anchor is not anchor
        judged = getattr(estimator, "_judged", 0) > before
        assert report.accepted == report.drafted == parallelism * stride, "the round was not kept whole"
        state, drafted = traffic.STATES[optimizer], parallelism * stride
        setting = traffic.Setting(method, HISTORY, parallelism, drafted, state, float(moved), float(judged))
        work = traffic.round_work(setting)
        assert {part: w.rows for part, w in work.items()} == {part: rows[part] for part in work}
        assert {part: w.calls for part, w in work.items()} == {part: calls[part] for part in work}
        assert not rows.get("keep")
        seen.add((moved, judged))
    assert {moved for moved, _ in seen} >= {False}
    assert method != "default" or {judged for _, judged in seen} == {False, True}


def page_formulas():
    """The table of docs/cost.md: (part, method) to its formulas, each as Python has it."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "cost.md").read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line[0] == "part")
    methods, part, found = lines[start][2:], "", {}
    for line in lines[start + 2 : start + 14]:
        part, cells = (line[0], line[2:]) if len(line) == 7 else (part, line[1:])
        for method, cell in zip(methods, cells, strict=True):
            found.setdefault((part, method), []).append(python_of(cell))
    return found


def python_of(cell):
    plain = "0" if cell == "–" else cell.replace("T0", "T")
    return re.sub(r"(?<=[0-9NTKsb)]) ?(?=[NTKsb(])", "*", plain)


@pytest.mark.parametrize("method", ["optex-paper", "separable", "curl-free", "default", "hold-last"])
@pytest.mark.parametrize(("n", "k", "t0", "state"), [(4, 4, 16, 2), (3, 3, 8, 0), (2, 8, 32, 1)])
def test_the_page_has_the_same_formulas(method, n, k, t0, state):
    traffic = importlib.import_module("traffic")
    if method == "optex-paper":
        k = n
    name = "published" if method == "optex-paper" else method
    signs = {"N": n, "K": k, "T": t0, "s": state, "b": 5 + 2 * state}
    page = {
        part: [eval(cell, {}, signs) for cell in cells]
        for (part, column), cells in page_formulas().items()
        if column == name
    }
    drafted, replayed = page["*between*"]
    expected = {
        "mark": page["mark"][0],
        "draft": page["draft"][0] + (n - 1) * page["draft"][1] + (k - n) * drafted,
        "evaluate": page["evaluate"][0],
        "remember": page["remember"][0] + 0.5 * page["remember"][1],
        "replay": page["replay"][0] + (n - 1) * page["replay"][1] + (k - n) * replayed,
    }
    for moves in (0.0, 1.0):
        work = traffic.round_work(traffic.Setting(method, t0, n, k, state, moves))
        found = {part: work[part].rows for part in work}
        moved = sum(found.values()) - sum(expected.values())
        assert moved == moves * page["remember"][2]
        assert moves or found == expected


def test_the_report_fills_the_pages_from_the_json(tmp_path):
    overhead_report = importlib.import_module("overhead_report")
    pages = ["README.md", "docs/cost.md", "results/overhead/README.md"]
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / page).read_text()
        emptied = re.sub(
            r"(<!-- table:(?!functions)\S+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL
        )
        assert emptied != text
        (tmp_path / page).write_text(emptied)
    folder = tmp_path / "results" / "overhead"
    shutil.copy(ROOT / "results" / "overhead" / "overhead.json", folder)
    overhead_report.report(folder, tmp_path)
    for page in pages:  # which are those that are committed
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert (folder / "growth.png").stat().st_size > 10_000


def test_an_exponent_is_a_slope():
    exponent = importlib.import_module("overhead_report").exponent
    assert exponent([8, 16, 32], [5, 20, 80]) == pytest.approx(2)
    assert math.isnan(exponent([1], [1]))


def test_points_are_different_and_vary_at_most_two_settings_of_the_base():
    overhead = importlib.import_module("overhead")
    chosen, base = overhead.points(), overhead.BASE
    assert len({tuple(point.items()) for point in chosen}) == len(chosen)
    assert all(sum(point[key] != base[key] for key in base) <= 2 for point in chosen)
    largest = overhead.points(largest=True)
    assert max(point["dimension"] for point in chosen) < max(point["dimension"] for point in largest)


def test_bytes_are_counted_at_every_point_but_the_plain_optimizers():
    chosen = importlib.import_module("overhead").points()
    counted = importlib.import_module("rounds_timed").counted
    plain = [point for point in chosen if point["parallelism"] * point["stride"] == 1]
    assert plain
    for point in chosen:
        known = counted(point)
        assert math.isnan(known["bytes"]) if point in plain else known["bytes"] > known["least_bytes"] > 0


def test_a_point_is_measured_in_processes_of_its_own():
    measure_point = importlib.import_module("rounds_timed").measure_point
    point = {"method": "hold-last", "optimizer": "sgd", "dimension": 500, "parallelism": 2, "history": 2}
    found = measure_point(point | {"stride": 1}, rounds=2, threads=1)
    assert found["median"] >= found["minimum"] > 0
    assert found["accepted"] == 2
    assert min(found["read_bandwidth"], found["copy_bandwidth"], found["base_step"]) > 0


def test_one_point_is_printed(monkeypatch, capsys):
    overhead = importlib.import_module("overhead")
    monkeypatch.setattr(overhead, "MODELS", ["curl-free"])
    monkeypatch.setattr("sys.argv", ["overhead.py", "--dim", "300", "--history", "4", "--rounds", "2"])
    overhead.main()
    assert "curl-free" in capsys.readouterr().out
