"""The structure of the package: imports point one way, and files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "optex"
# From the ground up. A room imports from lower floors alone; rooms of one floor do not know each other.
FLOORS = (
    ("errors", "callback", "checks", "draws", "functional", "wrapper"),
    ("small",),
    ("linalg",),
    ("vector_space",),
    ("optimizers", "batching", "solvers", "regularisers"),
    ("estimators", "stepping", "sources"),
    ("distributed",),
    ("evaluators",),
    ("round",),
    ("optimizer",),
    ("minimizers", "ase", "advice", "theory"),
    ("studies",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "optex" else None


def imported(tree):
    """Rooms of the package that a module imports from; what is for type checkers alone counts as well."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module] if node.module != "optex" else [f"optex.{alias.name}" for alias in node.names]
        yield from (room_of(name) for name in names if name.partition(".")[0] == "optex")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} has no floor: say in FLOORS where it stands"
    for other in imported(ast.parse(path.read_text())):
        if other is None or other == room:
            continue
        if room == "studies" and other not in FLOOR:
            continue  # studies use the package as its users do: optex.OptEx
        assert FLOOR[other] < FLOOR[room], f"{room} imports {other}, which is not below it"


def test_no_circles_among_modules():
    # Within a room the arrows have to end somewhere, too.
    graph = {}
    for path in FILES:
        parts = ("optex", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(part for part in parts if part != "__init__")
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("optex."):
                found.add(node.module)
        graph[name] = found
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, f"a circle: {' -> '.join([*under_way, name])}"
        if name in done or name not in graph:
            return
        under_way.append(name)
        for other in graph[name]:
            # A package's __init__ gathers its own modules, which import each other directly.
            if other != name and not name.startswith(f"{other}."):
                visit(other)
        under_way.pop()
        done.add(name)

    for name in graph:
        visit(name)


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(node):
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno - body[0].lineno + 1) if body else 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in functions(ast.parse(text)):
        assert code_lines(node) <= 45, f"{node.name} has {code_lines(node)} lines"


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_the_stub_has_the_public_names_from_where_they_are_loaded():
    import optex

    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    told, listed = {}, []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != "optex":
            told |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign):
            listed = ast.literal_eval(node.value)
    loaded_from = vars(optex)["_HOME"]
    assert told == loaded_from
    assert sorted(listed) == optex.__all__ == sorted(loaded_from)
    for name in optex.__all__:
        assert getattr(optex, name).__name__ == name


def test_names_are_loaded_when_they_are_asked_for():
    code = "import sys, optex; from optex.studies.cli import app; print('torch' in sys.modules); optex.OptEx; "
    code += (
        "print('torch' in sys.modules, callable(optex.minimize), 'OptEx' in dir(optex), hasattr(optex, 'no'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["False", "True", "True", "True", "False"], result.stderr
