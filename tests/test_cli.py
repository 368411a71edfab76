"""The command line, as a user meets it."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from typer.testing import CliRunner

import optex
from optex.__main__ import main
from optex.stepping.bases import OPTIMIZERS
from optex.studies import cli
from optex.studies.baselines import METHODS
from optex.studies.comparison import run_case
from optex.studies.problems import PROBLEMS
from tests import datasets

NAMES = [name for name, entry in PROBLEMS.items() if entry.data is None]
SAMPLED = [name for name, entry in METHODS.items() if not entry.deterministic_only]  # run on every problem
SMALL = ["--rounds", "4", "--seeds", "2", "--dim", "6", "--parallelism", "3"]


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def data_of(page):
    """What a page of a comparison has for its program."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def run(*arguments, width=80):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": str(width), "TERM": "dumb"})


@pytest.fixture(scope="module")
def result():
    methods = ",".join(SAMPLED)
    return run("compare", *NAMES, *SMALL, "--methods", methods, "--lr", "0.05")


class TestCompare:
    def test_prints_a_table_for_every_problem(self, result):
        assert result.exit_code == 0, result.output
        for name in NAMES:
            assert re.search(rf"^{name}: d = ", result.stdout, re.MULTILINE)
        for name in SAMPLED:
            assert len(re.findall(rf"^{name} ", result.stdout, re.MULTILINE)) >= len(NAMES)

    def test_methods_for_deterministic_objectives_run_there_and_nowhere_else(self):
        methods = ["--methods", ",".join(name for name in METHODS if name not in SAMPLED)]
        result = run("compare", "sphere", "heat", "--set", "size=6", *SMALL, *methods)
        assert result.exit_code == 0, result.output
        assert len(re.findall(r"^lbfgs-scipy-50 ", result.stdout, re.MULTILINE)) == 2
        assert max(map(len, result.stdout.splitlines())) <= 80
        refused = run("compare", "sphere", "digits-mlp", *SMALL, *methods)
        assert refused.exit_code == 2
        assert "nonlinear-cg need a deterministic objective, and digits-mlp has sampled" in refused.stderr

    def test_the_table_fits_eighty_columns_without_cuts(self, result):
        assert "…" not in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80

    def test_says_what_was_run_and_what_the_columns_mean(self, result):
        assert result.stdout.startswith("adam, lr 0.05, N = 3, each method's own T0, 4 rounds, 2 seeds\n")
        for column in ("as good at round", "seconds", "pays above"):
            assert f"\n{column}: " in result.stdout

    def test_where_nobody_watches_each_run_is_a_line(self, result):
        lines = result.stderr.splitlines()
        assert len(lines) == len(NAMES) * len(SAMPLED) * 2
        assert re.fullmatch(rf"1/{len(lines)}  {NAMES[0]}, seed 0: vanilla  \d+ s, about \d+ s to go", lines[0])
        assert "\x1b" not in result.stderr

    def test_writes_the_record_and_the_plot_into_new_folders(self, tmp_path):
        record, plot = tmp_path / "a" / "b" / "out.json", tmp_path / "c" / "out.png"
        result = run("compare", "sphere", *SMALL, "--noise", "0.1", "--json", str(record), "--plot", str(plot))
        assert result.exit_code == 0, result.output
        document = json.loads(record.read_text())
        assert {run["method"] for run in document["runs"]} == {"vanilla", "target", "optex-paper", "optex"}
        assert document["meta"]["noise"] == 0.1
        assert document["meta"]["command"][0] == "optex"
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert plot.stat().st_size > 10_000

    def test_writes_a_page_with_the_record_and_the_table(self, tmp_path):
        record, page = tmp_path / "out.json", tmp_path / "new" / "out.html"
        files = ["--json", str(record), "--html", str(page)]
        result = run("compare", "sphere", "digits-mlp", *SMALL, "--methods", "optex", *files)
        assert result.exit_code == 0, result.output
        text = page.read_text()
        assert data_of(page)["runs"] == json.loads(record.read_text())["runs"]
        for line in result.stdout.splitlines():
            if line.startswith(("sphere: ", "digits-mlp: ")):
                assert f"<h2>{line}</h2>" in text
        assert text.count('<th scope="row">optex</th>') == 2 + 1  # the tables' rows, and the version

    def test_a_page_of_a_broken_off_comparison_has_what_is_there(self, monkeypatch, tmp_path):
        interrupted_after(monkeypatch, 3)
        page = tmp_path / "out.html"
        result = run("compare", "sphere", *SMALL, "--methods", "target,optex", "--html", str(page))
        assert result.exit_code == 130
        assert [run["method"] for run in data_of(page)["runs"]] == ["vanilla", "target", "optex"]

    @pytest.mark.usefixtures("made_up_data")
    def test_options_of_a_problem_are_set_and_shown(self):
        choices = ["--set", "model=cnn", "--set", "width=2", "--set", "augment=true", "--batch-size", "5"]
        result = run("compare", "cifar10", *SMALL, *choices, "--methods", "target", width=120)
        assert result.exit_code == 0, result.output
        assert "cifar10: d = 2,702, batches of 5, model cnn, width 2, augment True\n" in result.stdout

    def test_target_shows_its_acceleration(self):
        result = run("compare", "sphere", *SMALL, "--optimizer", "sgd", "--lr", "0.01", "--methods", "target")
        assert re.search(r"^target .* 3\.00 ± 0\.00 ", result.stdout, re.MULTILINE)
        assert re.search(r"^vanilla .* 1\.00 ± 0\.00 ", result.stdout, re.MULTILINE)

    def test_a_diverging_method_is_a_row_like_the_others(self):
        result = run("compare", "rosenbrock", *SMALL, "--rounds", "9", "--optimizer", "sgd", "--lr", "1e5")
        assert result.exit_code == 0, result.output
        assert re.search(r"^optex .*diverged", result.stdout, re.MULTILINE)

    def test_a_history_that_is_given_is_shown(self):
        result = run("compare", "sphere", *SMALL, "--seeds", "1", "--history", "7", "--methods", "optex")
        assert ", T0 = 7, " in result.stdout

    def test_more_than_can_be_measured_is_marked(self):
        slow = ["--optimizer", "sgd", "--lr", "1e-4", "--methods", "lbfgs", "--rounds", "9"]
        result = run("compare", "quadratic", *SMALL, *slow)
        assert re.search(r"^lbfgs .* ≥ ", result.stdout, re.MULTILINE), result.stdout
        assert "\n≥: better than vanilla in all of its 27 rounds; more cannot be measured\n" in result.stdout
        assert "≥" not in run("compare", "quadratic", *SMALL, "--methods", "target").stdout

    def test_one_seed_has_no_spread(self):
        result = run("compare", "sphere", *SMALL, "--seeds", "1")
        assert "1 seed\n" in result.stdout
        assert "±" not in result.stdout

    def test_threads_are_set_on_purpose_and_are_one_by_default(self):
        torch.set_num_threads(2)
        run("compare", "sphere", *SMALL, "--seeds", "1", "--threads", "3")
        assert torch.get_num_threads() == 3
        run("compare", "sphere", *SMALL, "--seeds", "1")
        assert torch.get_num_threads() == 1

    def test_warnings_are_gathered_under_the_table(self, monkeypatch):
        def warned(comparison, case, run_case=run_case):
            warnings.warn("a bit of jitter", optex.JitterWarning, stacklevel=1)
            return run_case(comparison, case)

        monkeypatch.setattr("optex.studies.cli.compare.run_case", warned)
        result = run("compare", "sphere", *SMALL, "--seeds", "1", "--methods", "target")
        assert "2 × JitterWarning, the first: a bit of jitter" in result.stdout


def interrupted_after(monkeypatch, runs):
    """As if Ctrl-C were pressed in the run after so many."""
    left = iter(range(runs))

    def interrupted(comparison, case, run_case=run_case):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run_case(comparison, case)

    monkeypatch.setattr("optex.studies.cli.compare.run_case", interrupted)


class TestInterrupted:
    METHODS = ("--methods", "target,optex")

    def test_what_is_finished_is_kept_and_it_says_how_to_go_on(self, monkeypatch, tmp_path):
        record, plot = tmp_path / "out.json", tmp_path / "out.png"
        outputs = ["--json", str(record), "--plot", str(plot)]
        with monkeypatch.context() as patched:
            interrupted_after(patched, 4)
            result = run("compare", "sphere", *SMALL, *self.METHODS, *outputs)
        assert result.exit_code == 130
        assert re.search(r"^target .* 3\.\d\d", result.stdout, re.MULTILINE)
        assert result.stderr.endswith(
            "optex: interrupted after 4 of 6 runs; the same command with --resume makes the others\n"
        )
        assert len(json.loads(record.read_text())["runs"]) == 4
        assert plot.exists()

        made = []
        monkeypatch.setattr(
            "optex.studies.cli.compare.run_case",
            lambda comparison, case: made.append(case) or run_case(comparison, case),
        )
        resumed = run("compare", "sphere", *SMALL, *self.METHODS, *outputs, "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert [(case.method, case.seed) for case in made] == [("target", 1), ("optex", 1)]
        whole = run("compare", "sphere", *SMALL, *self.METHODS, "--json", str(tmp_path / "whole.json"))
        assert whole.exit_code == 0
        losses = [
            [(each["method"], each["seed"], each["loss"]) for each in json.loads(path.read_text())["runs"]]
            for path in (record, tmp_path / "whole.json")
        ]
        assert losses[0] == losses[1]

    def test_before_the_first_run_there_is_nothing_to_print(self, monkeypatch):
        interrupted_after(monkeypatch, 0)
        result = run("compare", "sphere", *SMALL)
        assert (result.exit_code, result.stdout) == (130, "")
        assert "interrupted after 0 of 8 runs; with --json FILE" in result.stderr

    def test_runs_of_an_earlier_command_survive_a_second_interruption(self, monkeypatch, tmp_path):
        record = tmp_path / "out.json"
        first = run("compare", "sphere", *SMALL, "--seeds", "1", "--methods", "target", "--json", str(record))
        assert first.exit_code == 0
        resume = ["compare", "ackley", "sphere", *SMALL, *self.METHODS, "--json", str(record), "--resume"]
        with monkeypatch.context() as patched:
            interrupted_after(patched, 0)
            again = run(*resume)
        assert (again.exit_code, again.stdout) == (130, "")
        assert len(json.loads(record.read_text())["runs"]) == 2  # as it was: nothing was made

        # The sphere's vanilla is too short to measure optex by, and left out; target is kept.
        interrupted_after(monkeypatch, 2)
        again = run(*resume)
        assert again.exit_code == 130
        assert "ackley" in again.stdout
        assert "sphere" not in again.stdout  # nothing to measure by
        kept = [(each["problem"], each["method"]) for each in json.loads(record.read_text())["runs"]]
        assert kept == [("ackley", "vanilla"), ("ackley", "target"), ("sphere", "target")]

    def test_a_record_written_on_the_way_keeps_runs_that_stand_behind(self, monkeypatch, tmp_path):
        record = tmp_path / "out.json"
        assert run("compare", "sphere", *SMALL, *self.METHODS, "--json", str(record)).exit_code == 0
        monkeypatch.setattr("optex.studies.cli.compare._WRITE_EVERY", -1.0)
        written = []
        monkeypatch.setattr(
            "optex.studies.cli.compare.write_json",
            lambda path, meta, runs: written.append([(each.problem, each.method, each.seed) for each in runs]),
        )
        more = run("compare", "ackley", "sphere", *SMALL, *self.METHODS, "--json", str(record), "--resume")
        assert more.exit_code == 0, more.output
        assert len(written) == 7  # six runs of the new problem, and the end
        assert all(sum(case[0] == "sphere" for case in cases) == 6 for cases in written)

    def test_other_settings_are_not_mixed(self, tmp_path):
        record = tmp_path / "out.json"
        run("compare", "sphere", *SMALL, "--methods", "target", "--json", str(record))
        before = record.read_bytes()
        refused = run("compare", "sphere", *SMALL, "--lr", "0.5", "--json", str(record), "--resume")
        assert refused.exit_code == 2
        assert "was made with lr = 0.01, not 0.5; choose that, or another file" in refused.stderr
        assert record.read_bytes() == before

    @pytest.mark.parametrize("text", ["", "[]", '{"meta": {}, "runs": [{}]}'])
    def test_what_is_no_record_is_left_alone(self, tmp_path, text):
        record = tmp_path / "out.json"
        record.write_text(text)
        refused = run("compare", "sphere", *SMALL, "--json", str(record), "--resume")
        assert refused.exit_code == 2
        assert "is not a record of compare; move it away" in refused.stderr
        assert record.read_text() == text

    def test_a_diverged_run_is_read_back_as_it_was(self, tmp_path):
        record = tmp_path / "out.json"
        wild = ["compare", "rosenbrock", *SMALL, "--optimizer", "sgd", "--lr", "1e5", "--json", str(record)]
        first, again = run(*wild), run(*wild, "--resume")
        assert again.exit_code == 0, again.output
        assert again.stderr == ""  # nothing was run
        assert "diverged" in again.stdout
        assert first.stdout.partition("\nas good")[0] == again.stdout.partition("\nas good")[0]


class TestTerminals:
    def test_sixty_columns_put_the_later_ones_below(self):
        result = run("compare", "rosenbrock", *SMALL, width=60)
        assert max(map(len, result.stdout.splitlines())) <= 60
        assert "…" not in result.stdout
        assert len(re.findall(r"^optex-paper +\S", result.stdout, re.MULTILINE)) == 2
        for header in ("final loss", "acceleration", "gradients", "seconds", "above"):
            assert header in result.stdout

    def test_a_terminal_without_other_letters_gets_ascii(self):
        command = [
            sys.executable,
            "-m",
            "optex",
            "compare",
            "sphere",
            *SMALL,
            "--methods",
            "target,data-parallel",
        ]
        result = subprocess.run(
            command,
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert " +- " in result.stdout.decode("ascii")
        assert "sqrtN" in result.stdout.decode("ascii")


REFUSALS = {
    "problem": (["nope"], "problem: 'nope' is not one of sphere, ackley"),
    "method": (["sphere", "--methods", "vanilla,nope"], "method: 'nope' is not one of vanilla"),
    "optimizer": (["sphere", "--optimizer", "nope"], "--optimizer: 'nope' is not one of sgd"),
    "rounds": (["sphere", "--rounds", "0"], "--rounds: must be an integer of at least 1, got 0"),
    "seeds": (["sphere", "--seeds", "0"], "--seeds: must be an integer of at least 1, got 0"),
    "parallelism": (["sphere", "--parallelism", "0"], "--parallelism: must be an integer of at least 1"),
    "history": (["sphere", "--history", "0"], "--history: must be an integer of at least 1"),
    "learning rate": (["sphere", "--lr", "0"], "--lr: must be positive and finite, got 0.0"),
    "negative rate": (["sphere", "--lr", "-1"], "--lr: must be positive and finite, got -1.0"),
    "noise": (["sphere", "--noise", "-1"], "--noise: must be finite and not negative, got -1.0"),
    "dimension": (["rosenbrock", "--dim", "1"], "Rosenbrock: dim must be an integer of at least 2, got 1"),
    "batch size": (["digits-mlp", "--batch-size", "5000"], "batch_size must be between 1 and 1437, got 5000"),
    "no value": (["digits-mlp", "--set", "model"], "--set: 'model' must be KEY=VALUE"),
    "value of another type": (["cifar10", "--set", "width=a"], "--set: width must be of type int, got 'a'"),
    "neither true nor false": (["cifar10", "--set", "augment=2"], "augment must be true or false, got '2'"),
    "option of no problem": (
        ["digits-mlp", "--set", "model=cnn"],
        "--set: nothing here has model; digits-mlp takes batch_size",
    ),
    "option of its own": (["sphere", "--set", "dim=3"], "--set: dim has an option of its own, --dim"),
    "threads": (["sphere", "--threads", "0"], "--threads: must be an integer of at least 1, got 0"),
    "plot format": (["sphere", "--plot", "out.foo"], "--plot: 'out.foo' must end in one of"),
    "page format": (["sphere", "--html", "out.png"], "--html: 'out.png' must end in one of .html, .htm"),
    "page folder": (["sphere", "--html", "/dev/null/a.html"], "--html: cannot make the folder /dev/null"),
    "nothing to resume from": (["sphere", "--resume"], "--resume: needs the file that has the runs"),
    "folder": (["sphere", "--json", "."], "--json: . is a folder; name a file in it"),
    "no such place": (["sphere", "--json", "/dev/null/out.json"], "--json: cannot make the folder /dev/null"),
}
if "muon" in OPTIMIZERS:
    REFUSALS["shape"] = (["sphere", "--optimizer", "muon"], "--optimizer: muon cannot optimise sphere")


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, message):
    result = run("compare", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("optex: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("arguments", [["compare"], ["compare", "sphere", "--lr", "abc"], ["nope"], ["--nope"]])
def test_what_cannot_be_parsed_exits_with_two_and_no_traceback(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_missing_data_package_says_how_to_get_it(monkeypatch):
    def missing(name, **options):
        raise ModuleNotFoundError("digits-mlp: pip install optex[studies]")

    monkeypatch.setattr("optex.studies.comparison.make_problem", missing)
    result = run("compare", "digits-mlp")
    assert result.exit_code == 2
    assert result.stderr == "optex: digits-mlp: pip install optex[studies]\n"


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    datasets.use(monkeypatch, tmp_path)
    result = run("compare", "cifar10")
    assert result.exit_code == 2
    assert result.stderr.startswith("optex: cifar10: its data is not on this machine; run `optex fetch")
    assert result.stderr.count("\n") == 1


def test_list_names_everything_with_one_line_each():
    result = run("list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in (*PROBLEMS, *METHODS, *OPTIMIZERS):
        assert sum(line.split()[:1] == [name] and len(line.split()) > 2 for line in lines) == 1, name
    assert max(map(len, lines)) <= 80


class TestEntryPoint:
    @staticmethod
    def in_a_new_process(*arguments, missing=None):
        """``python -m optex``, as if a package were not installed: a None in sys.modules fails its import."""
        hide = f"sys.modules[{missing!r}] = None; " if missing else ""
        code = f"import runpy, sys; {hide}sys.argv[1:] = {list(arguments)!r}; "
        code += "runpy.run_module('optex', run_name='__main__', alter_sys=True)"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    def test_runs_the_command_line(self):
        result = self.in_a_new_process("--version")
        assert (result.returncode, result.stdout) == (0, f"optex {optex.__version__}\n")

    @pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
    def test_a_missing_package_is_one_line_and_exit_code_two(self, missing):
        result = self.in_a_new_process("compare", "sphere", missing=missing)
        assert result.returncode == 2
        assert result.stdout == ""
        needed = f'optex: the command line needs {missing}: pip install "optex[studies]"\n'
        assert result.stderr == needed

    def test_another_missing_module_is_a_fault_of_ours_and_shown(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "optex.studies.cli", None)
        with pytest.raises(ModuleNotFoundError, match=r"optex\.studies\.cli"):
            main()

    def test_the_library_does_without_the_packages_of_the_studies(self):
        hidden = "".join(
            f"sys.modules[{name!r}] = None; " for name in ("matplotlib", "rich", "typer", "sklearn")
        )
        code = f"import sys; {hidden}import optex; import torch; optex.OptEx(torch.optim.SGD([torch.ones(2, "
        code += "requires_grad=True)], lr=0.1))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stderr) == (0, "")


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"optex {optex.__version__}\n")


def test_help_has_every_option():
    result = run("compare", "--help")
    options = "--optimizer --lr --parallelism --stride --history --rounds --seeds --dim --noise --methods"
    for option in f"{options} --batch-size --set --threads --json --plot --html --resume".split():
        assert option in result.stdout
