"""The pages of examples/: each program has one, which says how it was run. (Sphinx builds them.)"""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import example_pages

    yield example_pages
    sys.modules.pop("example_pages")


def runs(pages, name):
    return re.search(pages.pattern(), str(ROOT / "examples" / f"{name}.py")) is not None


def test_every_program_has_a_page_and_a_row(pages):
    assert list(pages.PROGRAMS) == NAMES
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[`\w+\.py`\]\((\w+)\.py\)", table, re.MULTILINE)) == NAMES
    index = (ROOT / "examples" / "index.rst").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^   (\w+)$", index, re.MULTILINE)) == NAMES


def test_a_program_without_a_page_stops_the_build(pages, monkeypatch):
    monkeypatch.delitem(pages.PROGRAMS, "heat")
    with pytest.raises(LookupError, match=r"docs/example_pages\.py differ in: heat"):
        pages.pattern()


@pytest.mark.parametrize("name", NAMES)
def test_flags_are_the_programs(name, pages, monkeypatch, capsys):
    program = pages.PROGRAMS[name]
    if program.package is not None:
        pytest.importorskip(program.package)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = __import__(name)
    # With --help all flags are looked up, and nothing runs.
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(program.flags), "--help"])
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            module.main()
    finally:
        for script in NAMES:
            sys.modules.pop(script, None)
    title, underline = module.__doc__.splitlines()[:2]
    assert underline == "=" * len(title)
    assert f"\n\n{title}\n{underline}\n\n" in capsys.readouterr().out


def test_a_program_runs_where_its_data_and_packages_are(pages, monkeypatch):
    monkeypatch.setattr(pages, "find", lambda name: (Path(name),))
    monkeypatch.setattr(pages, "find_spec", lambda name: object())
    assert [name for name in NAMES if not runs(pages, name)] == ["train_distributed"]
    monkeypatch.setattr(pages, "find", lambda name: None if name == "cifar10" else (Path(name),))
    monkeypatch.setattr(pages, "find_spec", lambda name: None if name == "accelerate" else object())
    left = {name for name in NAMES if not runs(pages, name)}
    assert left == {"train_distributed", "accelerate_char_gpt", "lightning_cifar10", "train_cifar10"}
    assert "optex fetch cifar10" in pages.PROGRAMS["train_cifar10"].obstacle()
    assert "``accelerate`` is not installed" in pages.PROGRAMS["accelerate_char_gpt"].obstacle()
    assert re.search(pages.pattern(), str(ROOT / "docs" / "gallery" / "plot_1_first_run.py"))


def test_other_flags_have_a_program_run_again(pages, monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    folder = tmp_path / pages.PAGES
    folder.mkdir(parents=True)
    for name, flags in (("heat", "--size 8"), ("train_dqn", pages.PROGRAMS["train_dqn"].flags)):
        (folder / f"{name}.flags").write_text(flags)
        (folder / f"{name}.py.md5").touch()
    pages.forget_other_flags()
    assert [path.name for path in folder.glob("*.md5")] == ["train_dqn.py.md5"]


@pytest.mark.parametrize(
    ("page", "link"),
    [("examples/README", "heat.py"), ("docs/workers", "../examples/heat.py"), ("README", "examples/heat.py")],
)
def test_links_to_programs_lead_to_their_pages(pages, page, link):
    source = [f"[this]({link}), [that]({link[:-7]}no.py), `{link}`"]
    pages.link(None, page, source)
    assert source == [f"[this](/docs/examples/heat.rst), [that]({link[:-7]}no.py), `{link}`"]


def test_a_page_says_with_which_flags_it_was_made_or_why_it_was_not(pages, monkeypatch, tmp_path):
    config = SimpleNamespace(sphinx_gallery_conf={"plot_gallery": True})
    app = SimpleNamespace(config=config, env=SimpleNamespace(note_dependency=lambda path: None))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / pages.PAGES).mkdir(parents=True)
    (tmp_path / pages.PAGES / "train_dqn.flags").write_text("--rounds 7")
    before = "A title\n=======\n\n.. GENERATED FROM PYTHON SOURCE LINES 9-99\n\n"
    code = ".. code-block:: Python\n\n    main()\n"
    run, unrun = [f"{before}Out\n\n|\n\n{code}"], [before + code]
    pages.tell(app, "docs/examples/train_dqn", run)
    assert re.search(
        r"What it wrote\n.*python train_dqn.py --rounds 7\n.*Out\s+The program\n.*main", run[0], re.DOTALL
    )
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    pages.tell(app, "docs/examples/train_dqn", unrun)
    assert "It was not run when these pages were built: ``gymnasium`` is not installed" in unrun[0]
    assert "What it wrote" not in unrun[0]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the program ran, and nothing that it wrote"):
        pages.tell(app, "docs/examples/heat", [before + code])
    config.sphinx_gallery_conf["plot_gallery"] = False
    told = [before + code]
    pages.tell(app, "docs/examples/heat", told)
    assert "It was not run when these pages were built: Sphinx-Gallery was told to run nothing." in told[0]
