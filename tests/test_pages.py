"""Commands that the pages name can be given; they are parsed, not run. (Blocks of Python run: conftest.py.)"""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from optex.studies.baselines import METHODS
from optex.studies.cli import app
from optex.studies.problems import PROBLEMS

ROOT = Path(__file__).resolve().parents[1]
FIGURES = [str(folder.relative_to(ROOT)) for folder in sorted((ROOT / "results").iterdir()) if folder.is_dir()]
FOLDERS = ("", "docs", "docs/family", "docs/api", "examples", "results", *FIGURES)
# The changelog tells of commands as they were.
PAGES = [
    page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")) if page.name != "CHANGELOG.md"
]


def commands(program: str) -> list[str]:
    """Lines of blocks and pieces of code in sentences that begin with the program, without comments."""
    found: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        sentences = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", sentences)]
        found |= {re.sub(r"\s+#.*", "", line) for line in lines if line.startswith(f"{program} ")}
    # A mention with a word to be filled in is no command.
    return sorted(line for line in found if not re.search(r"\b[A-Z]{3,}\b|\.\.\.|[{}<>|;]", line))


@pytest.mark.parametrize("command", commands("optex"))
def test_a_command_line_is_understood(command):
    name, *words = shlex.split(command)[1:]
    # With --help all options are looked up, and nothing runs.
    asked = CliRunner().invoke(app, [name, "--help", *words])
    # Sentences mention an option without its value: `optex compare --html`.
    assert asked.exit_code == 0 or "requires an argument" in asked.output, asked.output


@pytest.mark.parametrize("command", commands("optex compare"))
def test_a_comparison_names_problems_and_methods_that_there_are(command):
    words = shlex.split(command)[2:]
    problems = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    methods = words[words.index("--methods") + 1].split(",") if "--methods" in words else []
    assert set(problems) <= PROBLEMS.keys()
    assert set(methods) <= METHODS.keys()


@pytest.mark.parametrize("command", commands("python"))
def test_a_script_is_there(command):
    scripts = [word for word in shlex.split(command) if re.match(r"(benchmarks|examples|docs)/", word)]
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("command", commands("make"))
def test_a_target_is_there(command):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert command.split()[1] in targets
