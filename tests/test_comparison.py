"""Runs, their record, and the measures, with numbers that can be followed by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.lines import Line2D

from optex.stepping import default_rate
from optex.stepping.bases import OPTIMIZERS
from optex.studies.baselines import METHODS, Trace
from optex.studies.comparison import (
    Comparison,
    Run,
    describe,
    run_case,
    summarise,
    write_json,
)
from optex.studies.measures import (
    Spread,
    acceleration,
    best_so_far,
    geometric_mean,
    largest_acceleration,
    rounds_behind,
    rounds_to_level,
)
from optex.studies.plots import METHOD_STYLES, check_plot_path, plot_comparison, write_plot
from optex.studies.problems import PROBLEMS
from optex.studies.problems.text import Shakespeare
from optex.studies.records import read_lines
from optex.studies.tables import fill, fill_text, markdown_table, places

RUN_KEYS = [
    "problem",
    "method",
    "optimizer",
    "lr",
    "parallelism",
    "seed",
    "rounds",
    "loss",
    "gradients",
    "seconds",
    "accepted",
    "overhead_seconds",
    "stopped",
]


def small(**changes):
    options = {"problems": ("quadratic",), "rounds": 4, "seeds": 2, "dim": 6, "parallelism": 3, "lr": 0.1}
    return Comparison(**{**options, **changes})


def all_runs(comparison):
    return [run_case(comparison, case) for case in comparison.cases()]


def made_up(method, loss, seed=0, *, parallelism=2, overhead=math.nan, stopped=None, problem="sphere"):
    count = len(loss)
    trace = Trace(
        loss=list(loss),
        gradients=list(range(count)),
        seconds=[0.5 * r for r in range(count)],
        accepted=[0] + [1] * (count - 1),
        lr=0.1,
        overhead_seconds=overhead,
        stopped=stopped,
    )
    rounds = (count - 1) // parallelism if method == "vanilla" else count - 1
    return Run(problem, method, "adam", 0.1, parallelism, seed, rounds, trace)


def prototypes_acceleration(losses, vanilla):
    """The evidence prototype's formula, as it stands there."""
    best, vanilla, T = np.fmin.accumulate(losses), np.fmin.accumulate(vanilla), len(losses) - 1
    return float(
        np.mean(
            [min(np.searchsorted(-vanilla, -best[r]), len(vanilla) - 1) / r for r in (T // 3, 2 * T // 3, T)]
        )
    )


def literal_acceleration(losses, vanilla):
    """The sentence of the design, word by word."""
    values = []
    for r in ((len(losses) - 1) // 3, 2 * (len(losses) - 1) // 3, len(losses) - 1):
        best = min(loss for loss in losses[: r + 1] if not math.isnan(loss))
        first = [k for k in range(len(vanilla)) if min(vanilla[: k + 1]) <= best]
        values.append((first[0] if first else len(vanilla) - 1) / r)
    return sum(values) / 3


def losses(rounds):
    return st.lists(st.floats(0, 100), min_size=rounds + 1, max_size=rounds + 1)


class TestAcceleration:
    @given(losses(9), losses(27))
    def test_is_the_prototypes(self, method, vanilla):
        assert acceleration(method, vanilla, 3) == prototypes_acceleration(method, vanilla)

    @given(losses(6), losses(18))
    def test_is_the_designs_sentence(self, method, vanilla):
        assert acceleration(method, vanilla, 3) == pytest.approx(literal_acceleration(method, vanilla))

    def test_a_method_that_diverges_stands_still(self):
        vanilla = [10.0 - r for r in range(10)]
        late = acceleration([10.0, 7.0, math.nan, math.nan], vanilla, 3)  # 3 rounds' worth after 1, 2 and 3
        assert late == pytest.approx((3 / 1 + 3 / 2 + 3 / 3) / 3)
        assert acceleration([10.0, math.nan, math.nan, math.nan], vanilla, 3) == 0

    def test_vanilla_that_diverges_is_beaten_by_its_whole_length(self):
        assert acceleration([5.0, 4.0, 3.0, 2.0], [5.0] + [math.nan] * 6, 2) == pytest.approx(
            np.mean([6, 3, 2])
        )

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_short_runs_have_one_too(self, rounds):
        assert acceleration([3.0, 1.0, 1.0][: rounds + 1], [3.0, 2.0, 1.0], 1) > 0

    @given(losses(6), losses(30))
    def test_does_not_depend_on_how_far_vanilla_was_run(self, method, vanilla):
        assert acceleration(method, vanilla, 3) == acceleration(method, vanilla[:19], 3)

    def test_is_largest_where_vanilla_never_gets(self):
        vanilla = [9.0 - r for r in range(9)]
        best = acceleration([9.0, -1.0, -1.0, -1.0, -1.0], vanilla, 2)
        assert best == largest_acceleration(4, 2) == pytest.approx((8 / 1 + 8 / 2 + 8 / 4) / 3)
        assert acceleration([9.0, 2.0, 2.0, 2.0, 2.0], vanilla, 2) < best

    def test_vanilla_must_have_been_run_far_enough(self):
        with pytest.raises(ValueError, match=r"2 rounds are measured against 6 .* was run for 5"):
            acceleration([3.0, 2.0, 1.0], [1.0] * 6, 3)


class TestOtherMeasures:
    def test_best_so_far_never_rises(self):
        assert best_so_far([4.0, 5.0, math.nan, 2.0, 3.0]).tolist() == [4.0, 4.0, 4.0, 2.0, 2.0]
        assert best_so_far([math.nan, 1.0]).tolist() == [math.inf, 1.0]

    def test_the_level_is_reached_at_the_rounds_of_the_losses(self):
        assert rounds_to_level([4.0, 3.0, 1.0, 2.0], 2.0) == 2.0
        assert rounds_to_level([4.0, 3.0, 1.0], 2.0, [0, 5, 10]) == 10.0
        assert math.isnan(rounds_to_level([4.0, 3.0, math.nan], 2.0))

    def test_rounds_behind_compares_the_best_so_far(self):
        vanilla = [5.0, 4.0, 4.5, 3.0, 2.0]
        assert rounds_behind([5.0, 4.2, 4.2, 2.5], vanilla) == 2
        assert rounds_behind([5.0, math.nan, math.nan, math.nan], vanilla) == 3
        assert rounds_behind(vanilla[:4], vanilla) == 0
        assert rounds_behind([-1.0, -1.0], [-1.0, -1.0]) == 0, "minus a reward, too"

    def test_a_geometric_mean_survives_a_zero(self):
        assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
        assert geometric_mean([0.0, 0.2]) == pytest.approx(0.1)


class TestTables:
    PAGE = "words\n<!-- table:a -->\nold\n<!-- end -->\nmore\n<!-- table:b -->\n<!-- end -->\n"

    def test_a_page_keeps_its_words(self):
        filled = fill_text(self.PAGE, {"b": r"\1 as it is", "a": "new"})
        assert filled == self.PAGE.replace("old", "new").replace("b -->\n", "b -->\n\\1 as it is\n")
        assert places(filled) == {"a", "b"}

    def test_a_page_without_the_place_is_named(self, tmp_path):
        (tmp_path / "page.md").write_text(self.PAGE)
        with pytest.raises(ValueError, match=r"page\.md: .* no place for 'c'"):
            fill(tmp_path / "page.md", {"a": "new", "c": "more"})
        assert (tmp_path / "page.md").read_text() == self.PAGE

    def test_pages_and_records_are_utf_8_whatever_the_locale_is(self, tmp_path):
        text = "±\n" + self.PAGE
        (tmp_path / "page.md").write_text(text, encoding="utf-8")
        program = (
            "from pathlib import Path; from optex.studies import records, tables; "
            "tables.fill(Path('page.md'), {'a': '\\u2265 1'}); "
            "records.write_whole(Path('whole.html'), '\\u221aN')"
        )
        ascii_locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=ascii_locale, check=True)
        assert (tmp_path / "page.md").read_text(encoding="utf-8") == fill_text(text, {"a": "≥ 1"})
        assert (tmp_path / "whole.html").read_text(encoding="utf-8") == "√N"

    def test_rows_have_the_heads_columns(self):
        with pytest.raises(ValueError, match="1 cells under a head of 2"):
            markdown_table(["a", "b"], [["1"]])


class TestLines:
    def test_of_a_run_made_twice_the_later_counts(self, tmp_path):
        lines = [[{"case": "a", "seed": 0, "x": 1}, {"case": "a", "seed": 1, "x": 2}]]
        lines += [[{"case": "a", "seed": 0, "x": 3}]]
        (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        found = read_lines(tmp_path / "runs.jsonl", ["case", "seed"])
        assert [(record["seed"], record["x"]) for record in found] == [(0, 3), (1, 2)]

    def test_no_file_has_no_records(self, tmp_path):
        assert read_lines(tmp_path / "none.jsonl", ["case"]) == []


class TestSummary:
    def test_by_hand(self):
        vanilla = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]  # three rounds at N = 2: its loss to reach is 5
        rows = summarise(
            [
                made_up("vanilla", vanilla, 0),
                made_up("fast", [8.0, 6.0, 4.0, 2.0], 0, overhead=0.2),
                made_up("vanilla", vanilla, 1),
                made_up("fast", [8.0, 7.0, 6.0, 4.0], 1, overhead=0.4),
            ]
        )
        vanilla, fast = rows
        assert (vanilla.method, fast.method) == ("vanilla", "fast")
        assert vanilla.summary.final_loss.mean == 5.0
        assert vanilla.summary.rounds_to_vanilla.mean == 3.0
        assert vanilla.summary.acceleration == Spread(1.0, 0.0, 2)
        assert (vanilla.summary.gradients, vanilla.summary.seconds) == (3.0, 1.5)
        assert math.isnan(vanilla.break_even_seconds)
        second = (1 / 1 + 2 / 2 + 4 / 3) / 3
        assert fast.summary.final_loss.mean == 3.0
        reached = fast.summary.rounds_to_vanilla
        assert (reached.mean, reached.deviation, reached.count) == (2.5, pytest.approx(math.sqrt(0.5)), 2)
        assert fast.summary.acceleration.mean == pytest.approx((2 + second) / 2)
        assert fast.summary.acceleration.deviation == pytest.approx((2 - second) / math.sqrt(2))
        assert fast.overhead_seconds == pytest.approx(0.3)
        assert fast.break_even_seconds == pytest.approx(0.3 / ((2 + second) / 2 - 1))
        assert fast.summary.accepted == 1.0

    def test_a_method_that_gains_nothing_never_pays(self):
        vanilla = [3.0, 2.0, 1.0]
        _, slow = summarise([made_up("vanilla", vanilla), made_up("slow", [3.0, 2.5], overhead=0.1)])
        assert slow.break_even_seconds == math.inf
        assert math.isnan(slow.summary.rounds_to_vanilla.mean)
        assert slow.summary.rounds_to_vanilla.count == 0

    def test_seeds_that_diverged_are_counted_and_left_out_of_the_loss(self):
        vanilla = [3.0, 2.0, 1.0]
        runs = [made_up("vanilla", vanilla, seed) for seed in (0, 1)]
        runs += [made_up("m", [3.0, 2.0], 0), made_up("m", [3.0, math.nan], 1, stopped="too far")]
        row = summarise(runs)[1]
        assert row.summary.stopped == 1
        loss = row.summary.final_loss
        assert (loss.mean, loss.count) == (2.0, 1)
        assert math.isnan(loss.deviation)
        assert row.summary.acceleration.mean == 0.5

    def test_needs_vanilla(self):
        with pytest.raises(ValueError, match="no vanilla run of sphere, seed 0"):
            summarise([made_up("optex", [1.0, 0.5])])


@pytest.fixture(scope="module")
def comparison():
    return small(problems=("quadratic", "logistic-breast-cancer"), methods=tuple(METHODS))


@pytest.fixture(scope="module")
def runs(comparison):
    return all_runs(comparison)


@pytest.fixture(scope="module")
def document(comparison, runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "not" / "there" / "yet.json"
    write_json(path, describe(comparison), runs)
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


class TestRecords:
    def test_there_is_a_run_for_every_case(self, comparison, document):
        cases = {(run["problem"], run["method"], run["seed"]) for run in document["runs"]}
        assert len(document["runs"]) == len(cases) == 2 * len(METHODS) * 2

    def test_the_schema_is_the_designs(self, document):
        assert list(document) == ["meta", "runs"]
        for run in document["runs"]:
            assert list(run) == RUN_KEYS
            length = 4 * 3 * 4 + 1 if run["method"] == "vanilla" else 4 + 1
            assert run["rounds"] == list(range(length))
            assert all(len(run[key]) == length for key in ("loss", "gradients", "seconds", "accepted"))
            assert run["gradients"][0] == run["seconds"][0] == run["accepted"][0] == 0
            assert run["parallelism"] == 3
            assert run["optimizer"] == (METHODS[run["method"]].own_optimizer or "adam")

    def test_methods_share_their_start(self, document):
        for problem in ("quadratic", "logistic-breast-cancer"):
            for seed in (0, 1):
                starts = {
                    run["loss"][0]
                    for run in document["runs"]
                    if run["problem"] == problem and run["seed"] == seed
                }
                assert len(starts) == 1

    def test_meta_says_what_was_run_and_where(self, comparison, document):
        meta = document["meta"]
        assert meta["dimension"] == {"quadratic": 6, "logistic-breast-cancer": 31}
        assert meta["minimum"]["quadratic"] == 0
        assert meta["history_size"] is comparison.history_size is None
        assert meta["noise"] == 0
        assert meta["torch"] == torch.__version__.partition("+")[0] or meta["torch"] == torch.__version__
        assert meta["threads"] == torch.get_num_threads()
        assert meta["options"]["optimizer"] == "adam"
        assert {"optex", "python", "platform", "cpu", "cpus", "date"} <= meta.keys()
        assert len(meta["summary"]) == 2 * len(METHODS)

    def test_what_is_not_finite_is_null(self, tmp_path):
        comparison = small(problems=("rosenbrock",), optimizer="sgd", lr=1e5, methods=("target",), rounds=9)
        write_json(tmp_path / "out.json", {}, all_runs(comparison))
        document = json.loads((tmp_path / "out.json").read_text())
        assert {run["loss"][-1] for run in document["runs"]} == {None}
        assert document["meta"]["summary"][0]["stopped"] == 2

    @pytest.mark.parametrize(
        ("method", "stride", "reach"),
        [("optex", "auto", 12), ("optex-alone", 2, 12), ("optex", 1, 3), ("optex-paper", "auto", 3)],
    )
    def test_vanilla_is_always_run_as_far_as_the_others_may_get(self, method, stride, reach):
        comparison = small(methods=(method,), problems=("sphere", "sphere"), stride=stride)
        assert comparison.methods == ("vanilla", method)
        assert comparison.problems == ("sphere",)
        assert [run.trace.rounds for run in all_runs(comparison)] == [4 * reach, 4] * 2

    @pytest.mark.usefixtures("made_up_data")
    def test_options_reach_the_problems_that_have_them(self):
        comparison = small(
            problems=tuple(PROBLEMS), noise=0.5, batch_size=8, problem_options={"model": "cnn", "width": 12}
        )
        assert comparison.problem("sphere", 0).noise == 0.5
        assert comparison.problem("sphere", 0).dimension == 6
        assert comparison.problem("digits-mlp", 0).batch_size == 8
        assert comparison.problem("cifar10", 0).model == "cnn"
        shakespeare = comparison.problem("shakespeare", 0)
        assert isinstance(shakespeare, Shakespeare)
        assert shakespeare.network.output.in_features == 12

    @pytest.mark.usefixtures("made_up_data")
    def test_a_batch_size_that_is_not_given_is_each_problems_own(self):
        comparison = small(problems=("sphere", "digits-mlp", "fashion-mnist", "shakespeare"))
        expected = {"sphere": None, "digits-mlp": 32, "fashion-mnist": 64, "shakespeare": 16}
        assert describe(comparison)["batch_size"] == expected

    @pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
    def test_every_optimizer_runs_at_its_default_rate(self, name):
        comparison = small(optimizer=name, lr=None, seeds=1, methods=("optex",))
        assert comparison.lr == default_rate(name) > 0
        comparison.check()
        assert all(run.trace.stopped is None for run in all_runs(comparison))


REFUSALS = {
    "no problem": ({"problems": ()}, "problems: none given"),
    "problem": ({"problems": ("nope",)}, "problem: 'nope' is not one of"),
    "method": ({"methods": ("nope",)}, "method: 'nope' is not one of"),
    "optimizer": ({"optimizer": "nope"}, "optimizer: 'nope' is not one of"),
    "parallelism": ({"parallelism": 0}, "parallelism: must be an integer of at least 1, got 0"),
    "history": ({"history_size": -1}, "history_size: must be an integer of at least 1, got -1"),
    "rounds": ({"rounds": 0}, "rounds: must be an integer of at least 1, got 0"),
    "seeds": ({"seeds": 2.5}, "seeds: must be an integer of at least 1, got 2.5"),
    "dim": ({"dim": 0}, "dim: must be an integer of at least 1, got 0"),
    "batch size": ({"batch_size": 0}, "batch_size: must be an integer of at least 1, got 0"),
    "option": ({"problem_options": {"model": "cnn"}}, "nothing here has model; quadratic takes dim, noise"),
    "option with a place": (
        {"problem_options": {"dim": 3}},
        "problem_options: dim is an argument of its own; set dim= instead",
    ),
    "zero rate": ({"lr": 0.0}, "lr: must be positive and finite, got 0.0"),
    "no rate": ({"lr": math.nan}, "lr: must be positive and finite, got nan"),
    "noise": ({"noise": -0.1}, "noise: must be finite and not negative, got -0.1"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_with_a_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.skipif("muon" not in OPTIMIZERS, reason="torch 2.9 and later")
def test_an_optimizer_that_cannot_take_the_parameters_is_found_before_any_run():
    with pytest.raises(ValueError, match="optimizer: muon cannot optimise quadratic"):
        small(optimizer="muon").check()


class TestPlots:
    def test_every_method_has_a_style_of_its_own(self):
        assert METHOD_STYLES.keys() == METHODS.keys()
        assert len({style["color"] for style in METHOD_STYLES.values()}) == len(METHODS)

    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_writes_the_format_of_the_suffix(self, suffix, tmp_path: Path):
        path = tmp_path / "deep" / f"plot.{suffix}"
        write_plot(path, plot_comparison(all_runs(small(seeds=1)), {"quadratic": 0.0}))
        assert path.stat().st_size > 5_000

    def test_panels_lines_and_labels(self):
        comparison = small(problems=("quadratic", "digits-mlp"))
        figure = plot_comparison(all_runs(comparison), {"quadratic": 0.0, "digits-mlp": None})
        quadratic, digits = figure.axes
        assert [line.get_label() for line in quadratic.lines] == list(comparison.methods)
        assert all(np.size(line.get_xdata()) == 5 for line in quadratic.lines)
        assert quadratic.get_yscale() == "log"
        assert (quadratic.get_ylabel(), digits.get_ylabel()) == ("loss − minimum (0)", "loss")
        assert "rounds" in quadratic.get_xlabel()

    def test_the_line_is_the_geometric_mean_above_the_minimum(self):
        runs = [
            made_up("vanilla", [9.0, 5.0, 2.0], seed=0),
            made_up("vanilla", [5.0, 2.0, 2.0], seed=1),
        ]
        figure = plot_comparison(runs, {"sphere": 1.0})
        np.testing.assert_allclose(np.asarray(figure.axes[0].lines[0].get_ydata()), [math.sqrt(32), 2.0])

    def test_a_line_ends_with_a_cross_where_a_seed_diverged(self, tmp_path):
        nan = math.nan
        runs = [made_up("vanilla", [9.0] * 7, seed) for seed in (0, 1)]
        runs += [made_up("optex", [9.0, 1e300, 1e306, nan], 0), made_up("optex", [9.0, 8.0, nan, nan], 1)]
        figure = plot_comparison(runs)
        _, line, cross = figure.axes[0].lines
        assert np.asarray(line.get_xdata()).tolist() == [0, 1]
        assert cross.get_marker() == "X"
        write_plot(tmp_path / "plot.png", figure)

    def test_lines_that_coincide_are_all_seen(self):
        methods = list(METHOD_STYLES)
        figure = plot_comparison([made_up(method, [float(k) for k in range(61, 0, -1)]) for method in methods])
        lines = figure.axes[0].lines
        assert [line.get_label() for line in lines] == methods
        widths = [line.get_linewidth() for line in sorted(lines, key=lambda line: line.get_zorder())]
        assert widths == sorted(widths, reverse=True)
        looks = {(line.get_marker(), line.get_markevery(), line.get_color()) for line in lines}
        assert len(looks) == len(methods)
        starts = {every[0] for every in (line.get_markevery() for line in lines) if isinstance(every, tuple)}
        assert len(starts) > len(methods) / 2, "marks that all stand at one place hide each other"

    def test_the_legend_says_what_the_ends_of_the_scale_are_and_covers_no_line(self):
        figure = plot_comparison(
            [made_up(method, [3.0, 2.0, 1.0]) for method in ("vanilla", "target", "optex")]
        )
        (legend,) = figure.legends
        told = [text.get_text() for text in legend.get_texts()]
        assert told == ["vanilla: 1 step a round", "target: 2 steps a round, a gradient each", "optex"]
        figure.canvas.draw()
        assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
        markers = [handle.get_marker() for handle in legend.legend_handles if isinstance(handle, Line2D)]
        assert markers == [line.get_marker() for line in figure.axes[0].lines]

    def test_a_panel_that_touches_its_minimum_can_be_drawn(self, tmp_path):
        figure = plot_comparison([made_up("vanilla", [1.0, 0.0, 0.0])], {"sphere": 0.0})
        write_plot(tmp_path / "plot.png", figure)
        drawn = np.asarray(figure.axes[0].lines[0].get_ydata())
        assert drawn[0] == pytest.approx(1.0)
        np.testing.assert_allclose(drawn[1:], np.finfo(float).eps, err_msg="a gap of 0 is drawn at rounding's")
        assert figure.axes[0].get_ylim()[0] > 0

    def test_the_users_figures_are_left_alone(self):
        before = plt.get_backend()
        plot_comparison([made_up("vanilla", [3.0, 2.0, 1.0])])
        assert plt.get_fignums() == []
        assert plt.get_backend() == before

    def test_an_unknown_suffix_is_refused(self):
        with pytest.raises(ValueError, match=r"plot: 'a.foo' must end in one of .*\.png"):
            check_plot_path(Path("a.foo"))
