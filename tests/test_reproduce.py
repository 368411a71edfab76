"""The paper's figures made again: what is run, its record, and what is said of it."""

import dataclasses
import itertools
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from typer.testing import CliRunner

from optex import OptEx
from optex.stepping.bases import base_optimizer
from optex.studies import cli, reproduce
from optex.studies.baselines import METHODS, Setting
from optex.studies.comparison import Case, Comparison, run_case
from optex.studies.measures import acceleration
from optex.studies.plots import Line, Panel, bootstrap_interval, plot_panels
from optex.studies.problems import make_problem
from optex.studies.problems.images import CIFAR10
from optex.studies.reproduce import Choice, PlannedRun, make_figure, run_curve
from optex.studies.reproduce.record import WithTestError, rounds_of
from optex.studies.reproduce.studies import FITTED, LAST_ONLY
from tests import datasets

SMALL = ["--seeds", "2", "--rounds", "5", "--dim", "12"]
CHOICE = Choice(seeds=2, rounds=5, dim=12)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(
        cli.app, ["reproduce", *map(str, arguments)], env={"COLUMNS": "100", "TERM": "dumb"}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """fig2 and fig6, tiny, through the command line: the folder, and what was printed."""
    out = tmp_path_factory.mktemp("reproduce")
    result = run("fig2", "fig6", *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def document(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def cells(page, table):
    """The rows of a page's table, without its head, as lists of text."""
    found = re.search(rf"<!-- table:{table} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert found is not None, f"the page has no table {table}"
    lines = [line for line in found[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def rounded(values):
    return [float(f"{value:.5g}") for value in values]


ABLATIONS = {
    LAST_ONLY: {"evaluate": "last"},
    "keep smallest-gradient": {"selection": "smallest-gradient"},
    "T0 = 2": {"history_size": 2},
    "N = 2": {"parallelism": 2},
    "matern-1/2 kernel": {"kernel": "matern-1/2"},
}


class TestCommand:
    @pytest.mark.parametrize("name", ["fig2", "fig6"])
    def test_writes_a_record_a_picture_and_a_page(self, made, name):
        folder, printed = made
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not list(folder.glob("*.part"))
        runs, meta = document(folder, name)["runs"], document(folder, name)["meta"]
        assert meta["figure"] == name
        assert len(runs) == sum(2 * len(part["curves"]) for part in meta["sections"].values())
        assert f"{name}: " in printed
        assert all(f"\n{part} " in printed for part in meta["sections"])

    def test_runs_are_those_of_compare(self, made):
        runs = document(made[0], "fig2")["runs"]
        comparison = Comparison(("ackley",), lr=0.1, stride=1, rounds=5, seeds=2, dim=12, history_size=20)
        for method in ("vanilla", "target", "data-parallel", "optex-paper", "optex"):
            trace = run_case(comparison, Case("ackley", method, 1)).trace
            (found,) = (
                run
                for run in runs
                if (run["section"], run["label"], run["seed"]) == ("ackley, lr 0.1", method, 1)
            )
            assert found["loss"] == rounded(trace.loss), method
            assert found["gradients"] == trace.gradients
            assert found["steps"] == list(itertools.accumulate(trace.accepted))
            assert rounds_of(found) == list(range(trace.rounds + 1))

    @pytest.mark.parametrize(("label", "choice"), ABLATIONS.items(), ids=ABLATIONS.keys())
    def test_ablations_are_algorithm_1_with_one_thing_otherwise(self, made, label, choice):
        problem = make_problem("rosenbrock", seed=0, dim=12)
        base = base_optimizer("adam", problem.parameters(), lr=0.1)
        optimizer = OptEx.from_paper(base, **{"parallelism": 5, "history_size": 20, **choice})
        losses = [problem.evaluate()]
        rounds = itertools.islice(optimizer.rounds(problem.batches(), problem), 5)
        losses += [problem.evaluate() for _ in rounds]
        runs = document(made[0], "fig6")["runs"]
        (found,) = (run for run in runs if (run["label"], run["seed"]) == (label, 0))
        assert found["loss"] == rounded(losses)

    def test_the_pages_numbers_follow_from_the_record(self, made):
        folder, _ = made
        runs = document(folder, "fig2")["runs"]
        rows = cells((folder / "fig2.md").read_text(), "numbers")
        assert len(rows) == 6 * 5
        for section, label, last, rounds, share, gained, *_ in rows:
            own = [run for run in runs if (run["section"], run["label"]) == (section, label)]
            vanilla = [run for run in runs if (run["section"], run["label"]) == (section, "vanilla")]
            reached, accelerations = [], []
            for one, its in zip(own, vanilla, strict=True):
                reached += [r for r in range(len(one["loss"])) if one["loss"][r] <= its["loss"][5]][:1]
                accelerations.append(acceleration(one["loss"][:6], its["loss"], one["parallelism"]))
            assert last.split()[0] == f"{np.mean([one['loss'][5] for one in own]):.4g}"
            note = " (1 of 2 seeds)" * (len(reached) == 1)
            assert rounds == (f"{np.mean(reached):.1f}" if reached else "–")
            assert share == (f"{20 * np.mean(reached):.1f} %{note}" if reached else "not reached")
            assert gained.split()[0] == f"{np.mean(accelerations):.2f}"

    def test_claims_are_held_to_the_record(self, made):
        folder, printed = made
        for name in ("fig2", "fig6"):
            loaded = document(folder, name)
            checks = reproduce.checks(loaded["meta"], loaded["runs"])
            assert checks
            page = (folder / f"{name}.md").read_text()
            rows = [[check.where, check.claim, check.measured] for check in checks]
            assert [row[:3] for row in cells(page, "checks")] == rows
            assert [row[3] == "yes" for row in cells(page, "checks")] == [check.holds for check in checks]
            for check in checks:
                sign = "holds" if check.holds else "fails"
                assert f"{sign}  {check.where}: {check.claim}: {check.measured}" in printed

    def test_a_page_keeps_its_words_and_a_whole_record_is_not_run_again(self, made, tmp_path, monkeypatch):
        for file in made[0].glob("fig6.*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        page = tmp_path / "fig6.md"
        words = "<!-- table:checks -->\nof before\n<!-- end -->\n\nMy words.\n"
        page.write_text(words)
        monkeypatch.setattr("optex.studies.reproduce.record.run_curve", None)
        result = run("fig6", *SMALL, "--out", tmp_path, "--resume")
        assert result.exit_code == 0, result.output
        assert page.read_text().endswith("\n\nMy words.\n")
        assert "of before" not in page.read_text()
        assert cells(page.read_text(), "checks") == cells((made[0] / "fig6.md").read_text(), "checks")
        assert (tmp_path / "fig6.json").read_bytes() == (made[0] / "fig6.json").read_bytes()

    def test_what_was_interrupted_goes_on_in_other_processes_to_the_same_record(self, made, tmp_path):
        whole = document(made[0], "fig6")
        reproduce.write_record(tmp_path / "fig6.json", whole["meta"], whole["runs"][2:])
        result = run("fig6", *SMALL, "--out", tmp_path, "--resume", "--workers", 2)
        assert result.exit_code == 0, result.output
        again = sorted(document(tmp_path, "fig6")["runs"], key=lambda run: (run["seed"], run["label"]))
        for one, other in zip(
            again, sorted(whole["runs"], key=lambda run: (run["seed"], run["label"])), strict=True
        ):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}


REFUSALS = {
    "figure": (["fig5"], "figure: 'fig5' is not one of fig2, fig3, fig4, fig6"),
    "scale": (["fig2", "--scale", "huge"], "scale: must be one of small, paper, got 'huge'"),
    "seeds": (["fig2", "--seeds", "0"], "seeds: must be an integer of at least 1, got 0"),
    "rounds": (["fig2", "--rounds", "0"], "rounds: must be an integer of at least 1, got 0"),
    "dim": (["fig2", "--dim", "1"], "dim: must be an integer of at least 2, got 1"),
    "dim of a network": (["fig4", "--dim", "9"], "dim: got 9, but the problems of fig4 have their own"),
    "workers": (["fig2", "--workers", "0"], "workers: must be an integer of at least 1, got 0"),
    "no such place": (["fig2", "--out", "/dev/null/out"], "out: cannot make the folder /dev/null/out"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("optex: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_record_of_other_settings_is_not_gone_on_with(made):
    other = [*SMALL[:2], "--rounds", "4", "--dim", "12"]
    before = (made[0] / "fig6.json").read_bytes()
    result = run("fig6", *other, "--out", made[0], "--resume")
    assert result.exit_code == 2
    assert "fig6.json was made with other settings" in result.stderr
    assert (made[0] / "fig6.json").read_bytes() == before


def test_a_record_is_gone_on_with_to_more_seeds(tmp_path):
    sizes = ["--rounds", "1", "--dim", "2", "--out", tmp_path]
    for seeds in (1, 2):
        result = run("fig2", *sizes, "--seeds", seeds, "--resume")
        assert result.exit_code == 0, result.output
    resumed = document(tmp_path, "fig2")
    assert {part["seeds"] for part in resumed["meta"]["sections"].values()} == {2}
    keys = {(one["section"], one["label"], one["seed"]) for one in resumed["runs"]}
    assert len(keys) == len(resumed["runs"]) == 6 * 5 * 2
    fewer = run("fig2", *sizes, "--seeds", 1, "--resume")
    assert fewer.exit_code == 2
    assert "fig2.json has more seeds or curves" in fewer.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"meta": {}, "runs": []}'])
def test_what_is_no_record_is_not_gone_on_with(content, tmp_path):
    (tmp_path / "fig6.json").write_text(content)
    result = run("fig6", *SMALL, "--out", tmp_path, "--resume")
    assert result.exit_code == 2
    assert "is not a record of a figure" in result.stderr
    assert (tmp_path / "fig6.json").read_text() == content


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    datasets.use(monkeypatch, tmp_path)
    result = run("fig4", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("optex: cifar10: its data is not on this machine; run `optex fetch")


class TestFigures:
    @pytest.mark.parametrize("scale", reproduce.SCALES)
    @pytest.mark.parametrize("name", reproduce.FIGURES)
    def test_vanilla_comes_first_and_every_view_shows_what_is_run(self, name, scale):
        figure = make_figure(name, Choice(scale))
        assert {view.section for view in figure.views} == {section.name for section in figure.sections} != set()
        for section in figure.sections:
            labels = [curve.label for curve in section.curves]
            assert labels[0] == "vanilla"
            assert len(set(labels)) == len(labels)
            assert {"target", "optex-paper", "optex"} < set(labels)
            assert section.setting(section.curves[0]).rounds == section.vanilla_rounds >= section.level_round
        for view in figure.views:
            assert set(view.labels) <= {curve.label for curve in figure.section(view.section).curves}

    def test_the_networks_have_enough_rounds_for_the_promised_shares(self):
        first, second, *_ = make_figure("fig4", Choice()).sections
        for section in (first, second):
            assert section.comparison.rounds >= 0.6 * section.level_round
            assert section.level_round >= 240


@pytest.mark.usefixtures("made_up_data")
class TestNetworks:
    CHOICE = Choice(seeds=1, rounds=6)

    def test_test_errors_are_those_of_the_rounds_they_stand_at(self):
        found = run_curve("fig4", self.CHOICE, PlannedRun("cifar10", "vanilla", 0))
        assert found["rounds"] == 10
        assert list(found["test"]) == ["0", "2", "3", "5", "7", "8", "10"]
        problem = make_problem("cifar10", seed=0)
        assert isinstance(problem, CIFAR10)
        optimizer, batches = torch.optim.Adam(problem.parameters(), lr=1e-3), problem.batches()
        for i in range(11):
            assert found["loss"][i] == float(f"{problem.evaluate():.5g}")
            if str(i) in found["test"]:
                assert found["test"][str(i)] == problem.test_error()
            optimizer.zero_grad()
            problem(next(batches)).backward()
            optimizer.step()

    def test_of_several_tries_the_test_errors_are_those_of_the_trace(self):
        options = {"seed": 0, "width": 4, "depth": 1}
        settings = [
            Setting(partial(torch.optim.Adam, lr=lr), parallelism=4, history_size=20, rounds=4)
            for lr in (0.01, 0.1)
        ]
        both = WithTestError(make_problem("cifar10", **options), 4, 2)
        traces = [METHODS["vanilla"].run(both, setting) for setting in settings]
        for setting, trace in zip(settings, traces, strict=True):
            alone = WithTestError(make_problem("cifar10", **options), 4, 2)
            METHODS["vanilla"].run(alone, setting)
            assert both.errors_of(trace) == alone.errors_of(trace)
            assert list(alone.errors_of(trace)) == ["0", "2", "4"]
        assert both.errors_of(traces[0]) != both.errors_of(traces[1])


def made_up(section, label, seed, loss, *, parallelism=4, test=None, steps=None):
    """A run as a record has it."""
    stopped = "the objective is not finite" if loss[-1] is None else None
    return {
        "section": section,
        "label": label,
        "seed": seed,
        "parallelism": parallelism,
        "history_size": 20,
        "lr": 1e-3,
        "seconds": 1.0,
        "stopped": stopped,
        "warnings": {},
        "rounds": len(loss) - 1,
        "loss": loss,
        "gradients": [parallelism * i for i in range(len(loss))],
        "steps": steps or list(range(len(loss))),
        "test": test or {},
    }


def about(figure, section, curves, *, rounds, level, seeds, parallelism=4):
    part = {"problem": "sphere", "dimension": 3, "minimum": None, "batch_size": None, "options": {}}
    part |= {"optimizer": "adam", "lr": 1e-3, "parallelism": parallelism, "history_size": 20, "rounds": rounds}
    part |= {"seeds": seeds, "vanilla_rounds": level, "level_round": level, "curves": curves}
    return {"figure": figure, "sections": {section: part}}


class TestClaims:
    def test_a_line_has_the_numbers_of_those_seeds_that_have_them(self):
        meta = about("fig4", "a", ["vanilla", "optex"], rounds=2, level=4, seeds=2)
        runs = [
            made_up("a", "vanilla", 0, [5.0, 4.0, 3.0, 2.0, 1.0]),
            made_up("a", "vanilla", 1, [5.0, 4.0, 3.0, 2.0, 1.5]),
            made_up("a", "optex", 0, [5.0, 2.0, 0.5], test={"0": 0.9, "2": 0.2}, steps=[0, 4, 7]),
            made_up("a", "optex", 1, [5.0, 3.0, None], test={"0": 0.9}, steps=[0, 1, 1]),
        ]
        vanilla, ours = reproduce.numbers(meta, runs)
        reached = vanilla.summary.rounds_to_vanilla
        assert (reached.mean, vanilla.share.mean, vanilla.summary.final_loss.mean) == (4.0, 1.0, 3.0)
        loss = ours.summary.final_loss
        assert (loss.mean, loss.count, ours.summary.stopped, ours.summary.seeds) == (0.5, 1, 1, 2)
        reached = ours.summary.rounds_to_vanilla
        assert (reached.mean, reached.count, ours.share.mean) == (2.0, 1, 0.5)
        assert ours.summary.accepted == 2.0
        assert (ours.test.mean, ours.test.count) == (0.2, 1), "a run that stopped has no last test"
        assert ours.summary.acceleration.count == 0, "vanilla was not run for N times as many rounds"

    def networks(self, ours, target_test=0.3, ours_test=0.3):
        curves = ["vanilla", "target", "optex-paper", "optex", FITTED]
        falling = [10.0 - i for i in range(11)]  # vanilla's last loss is 0
        quick = lambda at: [10.0] * at + [0.0] * (7 - at)  # noqa: E731
        runs = []
        for seed in (0, 1):
            runs.append(made_up("a", "vanilla", seed, falling))
            runs.append(made_up("a", "target", seed, quick(2), test={"6": target_test + 0.01 * seed}))
            runs.append(made_up("a", "optex-paper", seed, quick(6)))
            runs.append(made_up("a", "optex", seed, quick(ours), test={"6": ours_test}))
            runs.append(made_up("a", FITTED, seed, [10.0] * 7))
        checks = reproduce.checks(about("fig4", "a", curves, rounds=6, level=10, seeds=2), runs)
        return {check.claim: check for check in checks}

    def test_networks_are_held_to_their_shares_of_vanillas_rounds(self):
        for at, holds in ((3, True), (4, False)):
            checks = self.networks(at)
            check = checks["ours: `optex` at vanilla's last loss within 30 % of its rounds"]
            assert (check.measured, check.holds) == (f"{10 * at}.0 %", holds)
        assert checks["ideal: `target` at vanilla's last loss within 25 % of its rounds"].holds
        assert checks["ours: `optex-paper` at vanilla's last loss within 60 % of its rounds"].holds
        unreached = checks[f"ours: `{FITTED}` at vanilla's last loss within 60 % of its rounds"]
        assert (unreached.measured, unreached.holds) == ("not reached", False)

    @pytest.mark.parametrize(("test", "holds"), [(0.31, True), (0.32, False)])
    def test_the_test_error_may_be_above_targets_by_its_spread(self, test, holds):
        # Target's is 0.305 ± 0.0071.
        (check,) = (c for claim, c in self.networks(3, ours_test=test).items() if "test error" in claim)
        assert check.holds is holds

    def test_sixteen_counts_steps_and_looks_at_every_tenth_round(self):
        curves = ["vanilla", "target", "optex-paper", "optex", FITTED]
        flat = {label: [2.0] * 21 for label in curves}
        flat["optex"] = [3.0] * 10 + [1.0] * 10 + [2.5]  # behind at 20 only, and before 10, where nobody looks
        runs = [made_up("a", label, 0, loss, parallelism=16) for label, loss in flat.items()]
        runs[3]["steps"] = [5 * i for i in range(21)]
        meta = about("fig4", "a", curves, rounds=20, level=20, seeds=1, parallelism=16)
        diverges, steps, paper, fitted = reproduce.checks(meta, runs)
        assert (diverges.holds, steps.holds, steps.measured) == (True, True, "5.00")
        assert (paper.measured, paper.holds, fitted.holds) == ("1, 2; 2.5, 2", False, False)

    def test_rewards_are_compared_seed_by_seed(self):
        curves = ["vanilla", "optex-paper", "optex", FITTED]
        runs = [made_up("a", "vanilla", seed, [-1.0, -10.0 - seed]) for seed in range(3)]
        runs += [made_up("a", "optex-paper", seed, [-1.0, -9.0 - seed]) for seed in range(3)]
        runs += [made_up("a", "optex", seed, [-1.0, -12.0 - seed]) for seed in range(3)]
        runs += [made_up("a", FITTED, seed, [-1.0, -10.0 - seed]) for seed in range(3)]
        paper, fitted, ours = reproduce.checks(about("fig3", "a", curves, rounds=1, level=1, seeds=3), runs)
        assert (paper.measured, paper.holds) == ("difference -1 (-1 to -1)", False)
        assert (fitted.measured, fitted.holds) == ("difference 0 (0 to 0)", False)
        assert (ours.measured, ours.holds) == ("difference 2 (2 to 2)", True)


@pytest.mark.parametrize(("name", "drawn"), [("fig3", "cumulative average reward"), ("fig4", "training loss")])
def test_figures_with_data_are_drawn_and_described_from_their_record(name, drawn, tmp_path):
    figure, sections, runs = make_figure(name, Choice(seeds=2, rounds=12)), {}, []
    generator = np.random.default_rng(0)
    for section in figure.sections:
        labels = [curve.label for curve in section.curves]
        lengths = {"rounds": 12, "level": section.level_round, "seeds": 2}
        part = about(name, section.name, labels, **lengths, parallelism=section.comparison.parallelism)
        sections |= part["sections"]
        for label, seed in itertools.product(labels, (0, 1)):
            rounds = section.vanilla_rounds if label == "vanilla" else 12
            falling = np.sort(generator.uniform(1, 9, rounds + 1))[::-1].tolist()
            runs.append(made_up(section.name, label, seed, falling, test={"0": 0.9, str(rounds): 0.1 * seed}))
    meta = {"figure": name, "sections": sections, "command": ["optex"], "date": "2000-01-01T00:00:00"}
    meta |= {"optex": "1", "torch": "2", "python": "3", "cpus": 4, "cpu": "chip", "threads": 1}
    picture = reproduce.draw(figure, meta, runs)
    assert len(picture.axes) == len(figure.views)
    assert picture.axes[0].get_ylabel() == drawn
    reproduce.write_page(tmp_path / "page.md", figure, meta, runs)
    page = (tmp_path / "page.md").read_text()
    assert len(cells(page, "numbers")) == len(runs) / 2
    assert len(cells(page, "checks")) == len(reproduce.checks(meta, runs)) > 5
    if name == "fig3":
        own, vanilla = (
            np.array([-run["loss"][-1] for run in runs if (run["section"], run["label"]) == ("acrobot", label)])
            for label in ("optex", "vanilla")
        )
        (row,) = (row for row in cells(page, "numbers") if row[:2] == ["acrobot", "optex"])
        assert row[2].startswith(f"{own.mean():.4g} (")
        assert row[3].startswith(f"{(own - vanilla).mean():.4g} (")
        assert row[4] == f"{(own >= vanilla).sum()} of 2"


def test_long_runs_are_recorded_at_some_rounds_the_last_among_them():
    choice = Choice(seeds=1, rounds=301, dim=2)
    found = run_curve("fig2", choice, PlannedRun("sphere, lr 0.1", "target", 0))
    places = rounds_of(found)
    assert (places[0], places[-1], len(places)) == (0, 301, 61)
    assert set(np.diff(places)) == {5, 6}
    whole = run_case(Comparison(("sphere",), lr=0.1, rounds=301, dim=2), Case("sphere", "target", 0))
    assert found["loss"] == rounded(whole.trace.loss[i] for i in places)
    assert found["steps"] == [5 * i for i in places]


class TestPicture:
    def test_the_interval_is_the_percentile_bootstraps(self):
        values = np.random.default_rng(0).normal(size=(10, 3))
        low, high = bootstrap_interval(values)
        slow = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=2_000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        np.testing.assert_allclose(low, slow.low, atol=0.05)
        np.testing.assert_allclose(high, slow.high, atol=0.05)

    @staticmethod
    def panel(logarithmic, values):
        line = Line("a", np.arange(3.0), np.array(values), {"color": "black"})
        return Panel("title", [line], "rounds", "loss", logarithmic)

    def test_a_line_is_the_mean_of_what_is_drawn(self):
        values = [[8.0, 4.0, 1.0], [2.0, 1.0, 1.0]]
        figure = plot_panels([self.panel(True, values), self.panel(False, values)], 2, "heading")
        logarithmic, linear = figure.axes
        np.testing.assert_allclose(np.asarray(logarithmic.lines[0].get_ydata()), [4.0, 2.0, 1.0])
        np.testing.assert_allclose(np.asarray(linear.lines[0].get_ydata()), [5.0, 2.5, 1.0])
        assert (logarithmic.get_yscale(), linear.get_yscale()) == ("log", "linear")

    def test_a_line_ends_with_a_cross_where_a_seed_stopped(self):
        figure = plot_panels([self.panel(False, [[3.0, 2.0, math.nan], [3.0, 2.0, 1.0]])], 1, "heading")
        line, cross = figure.axes[0].lines
        assert np.asarray(line.get_xdata()).tolist() == [0, 1]
        assert cross.get_marker() == "X"

    def test_a_level_is_named_in_the_legend(self):
        named = dataclasses.replace(
            self.panel(False, [[3.0, 2.0, 1.0]]), level=2.5, level_label="to be reached"
        )
        (legend,) = plot_panels([named], 1, "heading").legends
        assert [text.get_text() for text in legend.get_texts()] == ["a", "to be reached"]
        (legend,) = plot_panels([self.panel(False, [[3.0, 2.0, 1.0]])], 1, "heading").legends
        assert [text.get_text() for text in legend.get_texts()] == ["a"]

    def test_no_legend_lies_over_lines_or_leaves_the_picture(self):
        lines = [[float(9 - k) for k in range(9)]] * 2
        many = [
            Line(f"a line with a name {i}", np.arange(9.0), np.array(lines), {"color": "black"})
            for i in range(7)
        ]
        shared = Panel("title", many, "rounds", "loss", False)
        other = Panel("other", [Line("b", np.arange(9.0), np.array(lines), {"color": "red"})], "x", "y", False)
        for panels in ([shared] * 3, [shared, other, shared, other]):
            figure = plot_panels(panels, 3, "heading")
            figure.canvas.draw()
            legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
            assert legends
            for box in (legend.get_window_extent() for legend in legends):
                assert not any(
                    box.overlaps(axes.get_window_extent()) for axes in figure.axes if axes.get_visible()
                )
                assert box.x0 >= 0
                assert box.x1 <= figure.bbox.width

    def test_ablations_have_legends_of_their_own_and_methods_share_one(self, made):
        for name, own in (("fig6", True), ("fig2", False)):
            figure, loaded = make_figure(name, CHOICE), document(made[0], name)
            picture = reproduce.draw(figure, loaded["meta"], loaded["runs"])
            assert [axes.get_title() for axes in picture.axes] == [view.title for view in figure.views]
            assert all((axes.get_legend() is not None) is own for axes in picture.axes)
            for axes, view in zip(picture.axes, figure.views, strict=True):
                assert len(axes.lines) == len(view.labels)
                assert all(np.size(line.get_xdata()) == 6 for line in axes.lines)
