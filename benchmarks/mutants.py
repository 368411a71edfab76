"""Mutation testing: does a test fail where the code is changed a little?

    make mutants                                            every module of the table, on one process
    python benchmarks/mutants.py optex/linalg.py            these modules alone
    python benchmarks/mutants.py --again optex/linalg.py    those of its mutants alone that survived last time
    python benchmarks/mutants.py --show optex/linalg.py     the survivors, as differences
    python benchmarks/mutants.py --report                   the table, from the JSON that is there

The mutants are mutmut's (https://mutmut.readthedocs.io): operators, numbers, strings, conditions, arguments and
assigned values are changed one at a time. So are its trampolines, which choose a mutant while a program runs.
What runs them is here: a module is imported with all its mutants, its tests are collected once, and each mutant
gets a forked process that runs the tests that reach its function until one fails, those first that failed on
mutants of that function before, then the fast ones. A module is put to its own tests alone, which
`tool.mutants` in pyproject.toml names. Ten times the processor time of those tests and two seconds more count
as killed; a mutant that no test reaches has survived. mutmut leaves alone what is decorated (properties),
constants of a module, and docstrings. Hypothesis draws twenty examples a test, the same in every run. Writes
results/mutants.json and the table of results/README.md.
"""

# pyright: reportMissingImports=false
# (mutmut is an extra of its own)

from __future__ import annotations

import argparse
import difflib
import gc
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from mutmut.mutation.file_mutation import MutatedFile, mutate_file_contents
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.format_utils import get_mutant_name, mangled_name_from_mutant_name

from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "mutants.json"
PATIENCE = 10.0  # times what the tests take without a mutant
EXAMPLES = 20  # of a Hypothesis test, beside those that it names
SPARE = 2  # seconds more
WALL = 120  # seconds, for what waits and takes no processor time


class Mutated(importlib.machinery.SourceFileLoader):
    """Loads a module with all its mutants beside it."""

    def __init__(self, name: str, path: str, code: str) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> Any:
        return compile(self._code, self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module, mutated."""

    def __init__(self, path: Path, code: str) -> None:
        self._name = ".".join(path.with_suffix("").parts)
        self._loader = Mutated(self._name, str(ROOT / path), code)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self._loader) if fullname == self._name else None


class Judge:
    """A plugin of pytest: runs the tests it has collected once as they are, and then on each mutant."""

    def __init__(self, mutants: Sequence[str]) -> None:
        self.mutants = mutants
        self.verdicts: dict[str, str] = {}
        self.broken: list[str] = []
        self._reaching: dict[str, list[pytest.Item]] = defaultdict(list)
        self._seconds: dict[pytest.Item, float] = {}

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings  # not before pytest has prepared its plugins

        phases = (Phase.explicit, Phase.generate)  # a smaller example of a failure is of no use
        settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        from hypothesis import settings

        for item in items:
            test = getattr(item, "obj", None)
            drawn = getattr(test, "_hypothesis_internal_use_settings", None)
            # Each decorated test has settings of its own, one object however it is parametrized.
            if test is not None and drawn is not None:
                fewer = settings(drawn, max_examples=min(drawn.max_examples, EXAMPLES))
                getattr(test, "__func__", test)._hypothesis_internal_use_settings = fewer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.broken.append(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._run_clean(session.items)
        if self.broken or not session.items:
            raise pytest.UsageError(f"without a mutant these fail: {self.broken}")
        gc.freeze()
        kills: dict[str, Counter[pytest.Item]] = defaultdict(Counter)
        for name in self.mutants:
            function = mangled_name_from_mutant_name(name)
            items = sorted(
                self._reaching[function], key=lambda item: (-kills[function][item], self._seconds[item])
            )
            self.verdicts[name], by = self._judge(name, items)
            if by is not None:
                kills[function][items[by]] += 1
        return True

    def _run_clean(self, items: list[pytest.Item]) -> None:
        set_mutant_under_test("stats")
        for item in items:
            state()._stats.clear()
            start = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self._seconds[item] = time.process_time() - start
            for function in state()._stats:
                self._reaching[function].append(item)
        set_mutant_under_test("")

    def _judge(self, name: str, items: list[pytest.Item]) -> tuple[str, int | None]:
        """The verdict on a mutant, and which of these tests has failed."""
        if not items:
            return "not reached", None
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            self._in_child(name, items, writer)
        os.close(writer)
        with os.fdopen(reader) as answer:
            said = answer.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
            return "timed out", None
        return ("survived", None) if code == 0 else ("killed", int(said) if said else None)

    def _in_child(self, name: str, items: list[pytest.Item], writer: int) -> None:
        code = 1
        try:
            seconds = int(PATIENCE * sum(self._seconds[item] for item in items)) + SPARE
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(WALL)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            set_mutant_under_test(name)
            code = 0
            for i, item in enumerate(items):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if self.broken:
                    os.write(writer, str(i).encode())
                    code = 1
                    break
        except BaseException:  # noqa: BLE001  # a mutant may raise anything, through pytest as well
            code = 1
        finally:
            os._exit(code)


def settings() -> dict[str, Any]:
    """Tests by module, and those that are left out."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]


def judged(path: Path, again: bool) -> dict[str, Any]:
    """One module's mutants, put to its tests in this process."""
    source = (ROOT / path).read_text()
    mutated = mutate_file_contents(str(path), source)
    sys.meta_path.insert(0, Finder(path, mutated.code))
    names = {get_mutant_name(path, name): name for name in mutated.mutant_names}
    before, wanted = recorded().get(str(path), {}), list(names)
    if again and before.get("sha256") == _sha256(source):
        wanted = [name for name in names if names[name] in before["alive"]]
    judge = Judge(wanted)
    left_out = [word for test in settings()["left_out"] for word in ("--deselect", test)]
    quiet = ("-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal")
    os.chdir(ROOT)
    start = time.monotonic()
    code = pytest.main([*quiet, *settings()["tests"][str(path)], *left_out], plugins=[judge])
    if code:
        raise SystemExit(f"{path}: pytest ended with {code}; without a mutant these fail: {judge.broken}")
    verdicts = {name: judge.verdicts.get(name, "killed") for name in names}
    counts = Counter(verdicts.values())
    if wanted != list(names):  # those that ran out of time before are among the killed now
        counts["killed"] -= before["timed out"]
        counts["timed out"] += before["timed out"]
    left = [names[name] for name in names if verdicts[name] in ("survived", "not reached")]
    alive = {name: change(mutated, name) for name in left}
    print(f"{path}: {len(wanted)} mutants in {time.monotonic() - start:.0f} s, {len(alive)} alive", flush=True)
    kinds = ("killed", "timed out", "survived", "not reached")
    numbers = {"mutants": len(names), **{kind: counts[kind] for kind in kinds}}
    return {"sha256": _sha256(source), **numbers, "alive": alive}


def _sha256(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def change(mutated: MutatedFile, name: str) -> list[str]:
    """Lines of a function without the mutation and with it."""
    lines = mutated.code.splitlines()
    original = f"{mangled_name_from_mutant_name(name)}__mutmut_orig"
    spans = [mutated.line_span_by_function_name[each] for each in (original, name)]
    before, after = ([line.strip() for line in lines[span.start : span.end]] for span in spans)
    return [line for line in difflib.ndiff(before, after) if line[0] in "-+"]


def recorded() -> dict[str, Any]:
    """Results by module."""
    return json.loads(RESULTS.read_text())["modules"] if RESULTS.exists() else {}


def write(modules: dict[str, Any]) -> None:
    """All results, in the table's order, and what they were found with."""
    ordered = {path: modules[path] for path in settings()["tests"] if path in modules}
    tools = {name: version(name) for name in ("mutmut", "pytest", "hypothesis", "torch")}
    machine = f"{platform.machine()}, one of {os.cpu_count()} cores"
    document = {"tools": {"python": platform.python_version(), **tools}, "machine": machine, "modules": ordered}
    RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def kind(lines: Sequence[str]) -> str:
    """What a mutant that is left changes, as far as that says why no test fails."""
    words = {"-": Counter[str](), "+": Counter[str]()}
    for line in lines:
        if "def " not in line:
            words[line[0]].update(re.findall(r"[\w.\"]+|\S", line[2:]))
    gone, come = (words["-"] - words["+"]).keys(), (words["+"] - words["-"]).keys()
    flags = {"None", "True", "False", ")"}
    if "strict" in words["-"] and gone <= {"strict", "=", ",", *flags} and come <= flags:
        return "strict"
    where = {word for word in gone if word.split(".")[-1] == "device" or word == '"cpu"'}
    if where and gone <= {*where, "=", ","} and come <= {"None", ")", '"XXcpuXX"', '"CPU"'}:
        return "device"
    return "other"


def left(modules: dict[str, Any]) -> str:
    """Of which kinds the mutants are that are left."""
    kinds = Counter(kind(lines) for module in modules.values() for lines in module["alive"].values())
    strict, device, other = (kinds[name] for name in ("strict", "device", "other"))
    return (
        f"Of the {kinds.total()} that are left, {strict} ask `zip` less strictly of what is "
        f"always as long, and {device} leave out a device, which a machine with one cannot tell: these cannot "
        f"fail here. Of the other {other} some more are the same program in other words."
    )


def table(modules: dict[str, Any]) -> str:
    """A row for each module, one for all, and what is left."""
    kinds = ("mutants", "killed", "timed out", "survived", "not reached")
    totals = {kind: sum(module[kind] for module in modules.values()) for kind in kinds}
    rows = []
    for path, counts in {**{f"`{path}`": module for path, module in modules.items()}, "all": totals}.items():
        share = (counts["killed"] + counts["timed out"]) / counts["mutants"]
        rows.append((path, *(str(counts[kind]) for kind in kinds), f"{100 * share:.1f} %"))
    return markdown_table(("module", *kinds, "killed of all"), rows) + f"\n\n{left(modules)}"


def main() -> None:
    """Run, show or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="all of the table by default")
    parser.add_argument("--again", action="store_true", help="those that survived last time alone")
    parser.add_argument("--show", action="store_true", help="print the survivors")
    parser.add_argument("--report", action="store_true", help="fill the table, without a run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = judged(Path(options.child), options.again)
        modules = {**recorded(), options.child: found}
        write(modules)
        return
    chosen = options.modules or list(settings()["tests"])
    if options.show:
        for path in chosen:
            for name, lines in recorded()[path]["alive"].items():
                print(path, name, *lines, sep="\n    ")
        return
    for path in () if options.report else chosen:
        words = [sys.executable, __file__, "--child", path, *(["--again"] if options.again else [])]
        subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    fill(ROOT / "results" / "README.md", {"mutants": table(recorded())})


if __name__ == "__main__":
    main()
