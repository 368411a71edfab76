"""Tuned against tuned: choosing, counting, levels, means and advice, and the study itself on a small budget."""

import json
import math
import re
import shutil
import sys
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from optex import OptEx, WithinTolerance
from optex.studies.baselines import METHODS, Setting
from optex.studies.baselines.line_search import line_search
from optex.studies.problems import DigitsMLP, Quadratic, Rosenbrock, make_problem
from optex.studies.tuning import (
    Attempt,
    Choice,
    Limits,
    Watch,
    attempt,
    finalists,
    first_level_within,
    held_out,
    search,
    tuned,
)

ROOT = Path(__file__).parents[1]
SGD = Choice("sgd", 0.1)


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The study's two files, as python finds them when it runs one."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("tuned", "tuned_report"):
        sys.modules.pop(name, None)


def setting(rounds=12, parallelism=1, lr=0.1):
    return Setting(partial(torch.optim.SGD, lr=lr), parallelism, None, rounds)


def run(problem, limits, method="vanilla", **changes):
    return attempt(METHODS[method].run, problem, setting(limits.rounds, **changes), SGD, limits)


class TestSearch:
    def test_goes_to_the_best_of_each_level_and_of_each_optimizer(self):
        bottoms = {"adam": (0.1, 1e-4), "sgd": (30.0, 10.0)}  # rates of the lowest cost, level by level

        def costs(choice):
            bias = 0.0 if choice.optimizer == "adam" else 5.0
            return [(bias + abs(math.log(choice.rate / best)),) for best in bottoms[choice.optimizer]]

        found = search(costs, [Choice("adam", 0.01), Choice("sgd", 0.1)])
        adam = {choice.rate for choice in found if choice.optimizer == "adam"}
        assert {3e-5, 1e-4, 3e-4, 0.03, 0.1, 0.3} <= adam
        sgd = {choice.rate for choice in found if choice.optimizer == "sgd"}
        assert {3.0, 10.0, 30.0} <= sgd  # its best at the last level, with a neighbour on both sides
        assert Choice("adam", 1e-4) in finalists(found, 1)
        assert Choice("adam", 0.1) in finalists(found, 1)

    def test_tries_no_more_than_it_may_and_nothing_twice(self):
        tried = []

        def costs(choice):
            tried.append(choice)
            return [(choice.rate,)]

        assert len(search(costs, [SGD], most=9)) == 9
        assert len(tried) == len(set(tried)) == 9

    def test_rates_that_diverge_end_the_walk(self):
        found = search(lambda c: [(math.inf, math.inf if c.rate > 1 else -c.rate)], [Choice("sgd", 0.1)])
        assert max(choice.rate for choice in found) == 3.0

    def test_patience_is_three_times_the_best_run_and_at_least_ten_rounds(self):
        assert first_level_within(math.inf, 100) == 100
        assert first_level_within(2.0, 100) == 10
        assert first_level_within(20.0, 100) == 60
        assert first_level_within(90.0, 100) == 100


class TestWatch:
    def test_rounds_and_gradients_to_each_level(self):
        problem = Quadratic(dim=20)
        whole = METHODS["vanilla"].run(problem, setting(40, lr=1.0)).loss
        levels = [whole[4] * 1.0001, whole[9] * 1.0001]
        found = run(problem, Limits(40, levels), lr=1.0)
        assert found.rounds == found.gradients == [4.0, 9.0]
        assert [loss for _, loss in found.curve] == whole[:10]  # it ends there

    @pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if not entry.tunes_rate])
    def test_gradients_are_those_the_method_says(self, method):
        problem = Rosenbrock(dim=8)
        trace = METHODS[method].run(problem, setting(6, 3, 0.001))
        with Watch(problem, Limits(6)) as watch:
            METHODS[method].run(problem, setting(6, 3, 0.001))
        assert [entry[1] for entry in watch.seen] == trace.gradients
        assert [entry[2] for entry in watch.seen] == trace.loss

    def test_leaves_the_problem_as_it_was(self):
        problem = Quadratic(dim=5)
        run(problem, Limits(30, [problem.evaluate() / 2]))
        assert "evaluate" not in vars(problem)
        assert not problem._forward_pre_hooks

    def test_errors_of_a_method_come_through(self):
        problem = Quadratic(dim=5)
        with pytest.raises(KeyError), Watch(problem, Limits(3)):
            raise KeyError
        assert "evaluate" not in vars(problem)

    def test_a_level_that_is_not_reached_is_infinitely_far(self):
        found = run(Quadratic(dim=20), Limits(5, [1e-3]))
        assert found.rounds == found.gradients == [math.inf]
        assert len(found.curve) == 6

    def test_a_run_without_hope_is_given_up(self):
        diverging = run(Quadratic(dim=20), Limits(90, [1e-9]), lr=30.0)
        assert len(diverging.curve) < 10
        late = run(Quadratic(dim=20), Limits(90, [1e-9, 1e-12], first=7))
        assert len(late.curve) == 8

    def test_seen_every_few_rounds_and_at_the_last(self):
        found = run(Quadratic(dim=20), Limits(10, every=4))
        assert [round_ for round_, _ in found.curve] == [0, 4, 8, 10]

    def test_held_out_where_levels_are_reached(self):
        problem = DigitsMLP(seed=1)
        plain = run(problem, Limits(30, held_at=frozenset({10, 30})), lr=0.3)
        levels = [plain.best_by(10), plain.best_by(30)]
        found = run(problem, Limits(30, levels), lr=0.3)
        assert 0 < found.held[1] < found.held[0] < 1
        assert found.held[1] == held_out(problem)  # the run ended there
        assert math.isnan(held_out(Quadratic(dim=2)))
        again = run(problem, Limits(30, held_at=frozenset(map(int, found.rounds))), lr=0.3)
        assert found.held == again.held


def tried(rate, seed, rounds, gradients, held=()):
    return Attempt(Choice("adam", rate), seed, list(rounds), list(gradients), list(held), [])


class TestTuned:
    def test_best_median_at_each_level(self):
        runs = [tried(0.1, seed, [5 + seed, 90], [40, 720]) for seed in range(3)]
        runs += [tried(0.3, seed, [9, 20 + seed], [72, 160]) for seed in range(3)]
        assert tuned(runs, 0, 3).rounds == 6
        assert tuned(runs, 0, 3).choice == Choice("adam", 0.1)
        assert tuned(runs, 1, 3).rounds == 21
        assert tuned(runs, 1, 3).gradients == 160

    def test_fewest_gradients_may_be_of_another_choice(self):
        runs = [tried(0.1, 0, [5], [40]), tried(0.3, 0, [6], [6])]
        found = tuned(runs, 0, 1)
        assert (found.rounds, found.gradients, found.choice) == (5, 6, Choice("adam", 0.1))

    def test_a_choice_that_was_not_run_on_every_seed_does_not_count(self):
        runs = [tried(0.1, 0, [1], [1]), *(tried(0.3, seed, [9], [9]) for seed in range(2))]
        assert tuned(runs, 0, 2).rounds == 9

    def test_what_most_seeds_do_not_reach_is_not_reached(self):
        runs = [tried(0.1, 0, [1], [1]), *(tried(0.1, seed, [math.inf], [math.inf]) for seed in (1, 2))]
        found = tuned(runs, 0, 3)
        assert (found.choice, found.rounds, found.gradients) == (None, math.inf, math.inf)

    def test_held_out_is_of_the_best_choice(self):
        runs = [tried(0.1, seed, [4], [4], [0.1 * seed]) for seed in (1, 2, 3)]
        runs += [tried(0.3, seed, [5], [5], [0.01]) for seed in (1, 2, 3)]
        assert tuned(runs, 0, 3).held == pytest.approx(0.2)


def record(deterministic=True, **rounds):
    """A problem's record with one seed; rounds to the three levels by method, with N gradients a round."""
    methods = {}
    for key, counts in rounds.items():
        name, _, n = key.replace("_", "-").rpartition("-")
        gradients = [None if r is None else int(n) * r for r in counts]
        row = ["adam", 0.1, 0, counts, gradients, 1.0, [None] * 3]
        methods[f"{name} {n}"] = {"runs": [row], "shown": ["adam", 0.1], "curve": [[0, 40], [9.0, 1.0]]}
    return {
        "problem": "made-up",
        "options": {},
        "dimension": 3,
        "deterministic": deterministic,
        "rounds": 40,
        "seeds": 1,
        "every": 1,
        "levels": [[4.0, 2.0, 1.0]],
        "methods": methods,
    }


class TestReport:
    def test_means_are_geometric_over_problems_and_levels(self):
        from tuned_report import goal_lines, mean_share, outcome

        first = outcome(record(vanilla_1=[10, 20, 40], optex_8=[5, 5, 10], optex_1=[5, 10, 20]))
        second = outcome(record(vanilla_1=[10, 20, 40], optex_8=[10, 20, None], optex_1=[5, 10, 20]))
        assert mean_share([first, second], "optex 8", [0], "rounds") == pytest.approx(0.5**0.5)
        assert mean_share([first, second], "optex 8", [2], "rounds") == pytest.approx((0.25 * 2) ** 0.5)
        assert mean_share([first], "optex 8", [1], "gradients") == pytest.approx(2.0)
        assert mean_share([second], "optex 8", [2], "gradients") == pytest.approx(16.0)
        assert math.isnan(mean_share([first], "picard 8", [0], "rounds"))
        lines = goal_lines([first], []).splitlines()
        assert lines[0].endswith("0.500 of vanilla's gradients, where at most 0.5 was the goal: met.")
        assert lines[1].endswith("0.315 of vanilla's rounds, where at most 0.2 was the goal: missed.")

    def test_the_fewest_of_a_row_is_bold_and_target_is_out_of_it(self):
        from tuned_report import count_table, outcome

        found = {"made-up": outcome(record(vanilla_1=[10, 20, 40], target_8=[2, 3, 5], optex_8=[3, 5, 9]))}
        assert "| made-up | 40 | 5 | **9** |" in count_table(found, ("target 8", "optex 8"), "rounds")

    @pytest.mark.parametrize(
        ("rounds", "said"),
        [
            (
                {"lbfgs_scipy_1": [3, 6, 10], "optex_1": [9, 15, 30]},
                r"\*\*lbfgs-scipy\*\*, 10 gradients.* 3.0 times",
            ),
            ({"lbfgs_scipy_1": [3, 6, 39], "optex_1": [9, 15, 30]}, r"\*\*optex, N = 1\*\*, 30 gradients"),
            ({"lbfgs_scipy_1": [3, 6, None], "optex_1": [9, 19, 38]}, "tune the rate.*adam 0.1 needs 40"),
            ({"optex_1": [9, 19, 38], "optex_8": [2, 4, 8]}, r"Eight at once: \*\*optex\*\*, 8 rounds"),
            ({"optex_1": [9, 19, 38], "optex_8": [2, 4, 39]}, "Eight at once gain nothing"),
            (
                {"optex_1": [9, 19, 38], "optex_8": [2, 4, 9], "picard_8": [2, 4, 8]},
                r"\*\*picard, N = 8\*\*, 8 rounds; optex 9",
            ),
        ],
    )
    def test_advice_follows_the_numbers(self, rounds, said):
        from tuned_report import advise, outcome

        given = {"optex_8": [40, 40, 40], **rounds}
        advice = advise(outcome(record(vanilla_1=[10, 20, 40], **given)))
        assert re.search(said, advice), advice


class TestStudy:
    def test_runs_goes_on_and_reports(self, tmp_path, monkeypatch):
        import tuned as script
        from tuned_report import report

        case = script.Case("quadratic", 8, {"dim": 6}, {"sgd": 1.0}, seeds=2)
        monkeypatch.setitem(script.CASES, "quadratic", case)
        few = ("optex 1", "lbfgs-scipy 1", "optex 8", "data-parallel 8", "target 8")
        every = script.configurations(True)
        monkeypatch.setattr(script, "configurations", lambda deterministic: {name: every[name] for name in few})
        script.run_case(("quadratic", None, (), tmp_path))
        path = tmp_path / "quadratic.json"
        written = json.loads(path.read_text())
        assert set(written["methods"]) == {"vanilla 1", *few}
        assert len(written["levels"]) == 2
        assert all(high > low for levels in written["levels"] for high, low in pairwise(levels))
        # Vanilla gets to its own levels when it made them, and N equal gradients are vanilla's N times over.
        vanilla = {tuple(row[:3]): row for row in written["methods"]["vanilla 1"]["runs"]}
        assert any(row[3] == [2, 4, 8] for row in vanilla.values())
        for row in written["methods"]["data-parallel 8"]["runs"]:
            assert [None if r is None else 8 * r for r in row[3]] == row[4]
        # What is there is not run again, but for what is to be.
        written["methods"]["target 8"]["runs"] = written["methods"]["optex 1"]["runs"] = "kept"
        path.write_text(json.dumps(written))
        script.run_case(("quadratic", None, ("optex",), tmp_path))
        again = json.loads(path.read_text())
        assert again["methods"]["target 8"]["runs"] == "kept" != again["methods"]["optex 1"]["runs"]
        del again["methods"]["target 8"]
        path.write_text(json.dumps(again))
        shutil.copy(ROOT / "results" / "tuned" / "README.md", tmp_path)
        report(tmp_path, ["quadratic", "not-run-yet"])
        page = (tmp_path / "README.md").read_text()
        assert "| quadratic | `quadratic`, dim 6 | deterministic | 6 | 8 | 2 |" in page
        assert (tmp_path / "profiles.png").stat().st_size > 10_000
        assert (tmp_path / "deterministic.png").stat().st_size > 10_000

    @pytest.mark.usefixtures("made_up_data")
    def test_every_case_can_be_built(self):
        import tuned as script

        assert script.CASES
        for name, case in script.CASES.items():
            options = {k: v for k, v in case.options.items() if k not in ("held_size", "test_size")}
            if options.get("batch_size", 0) <= 120 or case.problem == "digits-mlp":
                assert make_problem(case.problem, **options).dimension > 1, name
            assert set(case.rates) <= {"adam", "momentum", "sgd", "muon"}

    def test_every_method_is_there(self):
        import tuned as script

        names = {key.rpartition(" ")[0] for key in script.configurations(True)} | {"vanilla"}
        assert names == set(METHODS) - {"optex-alone"}  # which is "optex 1" here
        assert not any("lbfgs" in key for key in script.configurations(False))

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and later")
    def test_muon_with_adam_is_both_and_can_be_accelerated(self):
        import tuned as script

        problem = DigitsMLP()
        matrices, rest = [problem.hidden.weight], [problem.hidden.bias, *problem.output.parameters()]
        muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.Adam(rest, lr=0.01)
        for batch in islice(problem.batches(), 5):
            problem.zero_grad()
            problem(batch).backward()
            muon.step()
            adam.step()
        expected = [p.detach().clone() for p in problem.parameters()]
        build = script.optimizer_of(problem, Choice("muon", 0.01))
        for accelerated in (False, True):
            problem.reset()
            base = build(problem.parameters())
            if accelerated:  # tolerance 0 takes back whatever was drafted
                wrapper = OptEx(base, parallelism=3, acceptance=WithinTolerance(0.0))
                for _ in islice(wrapper.rounds(problem.batches(), problem), 5):
                    pass
            else:
                for batch in islice(problem.batches(), 5):
                    base.zero_grad()
                    problem(batch).backward()
                    base.step()
            for found, value in zip(problem.parameters(), expected, strict=True):
                assert torch.equal(found.detach(), value)
        assert line_search(problem, Setting(build, 3, None, 4)).stopped is None
