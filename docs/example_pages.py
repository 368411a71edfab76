"""The pages of ``examples/``: how each program is run when the pages are built, and what its page says of it.

Sphinx-Gallery runs them and writes the pages; this says with which flags, and what keeps one from running.
It is imported without Sphinx, too, for the test that every program has its page.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optex.studies.problems.data import find

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PAGES = "docs/examples"  # where Sphinx-Gallery writes
PICTURES = ROOT / "out" / "pages"


@dataclass(frozen=True)
class Program:
    """How a program is run for its page.

    Attributes:
        flags: of its command line, for a run of seconds.
        data: the data set that it needs, as ``optex fetch`` names it.
        package: what it imports beside the library.
        remark: on the flags, in reStructuredText.
        instead: why it is not run at all, in reStructuredText.
    """

    flags: str = ""
    data: str | None = None
    package: str | None = None
    remark: str = ""
    instead: str | None = None

    def obstacle(self) -> str | None:
        """Why it cannot be run on this machine, in reStructuredText; None where it can."""
        if self.instead is not None:
            return self.instead
        if self.package is not None and find_spec(self.package) is None:
            return f"``{self.package}`` is not installed where they were built."
        if self.data is not None and find(self.data) is None:
            return (
                f"its data were not on that machine. ``optex fetch {self.data}`` gets them; "
                "or ``OPTEX_DATA`` names a folder that has them."
            )
        return None


PROGRAMS = {
    "accelerate_char_gpt": Program("--layers 2 --steps 60", data="shakespeare", package="accelerate"),
    # No worker processes: they cannot import what a program defines that Sphinx-Gallery runs.
    "heat": Program(
        "--size 64 --rounds 60 --parallelism 1 --workers 1 --plot ../out/pages/heat.png",
        remark="This is one process, one gradient a round. By default a round has four, on two workers.",
    ),
    "lightning_cifar10": Program("--batches 16 --quiet", data="cifar10", package="lightning"),
    "train_char_gpt": Program("--layers 2 --steps 120 --evaluate-every 40", data="shakespeare"),
    "train_cifar10": Program("--steps 24", data="cifar10"),
    "train_distributed": Program(
        instead="``torchrun`` has to start it, once for each rank. :doc:`/docs/tour/plot_5_two_ranks` "
        "starts it so, and shows what it wrote."
    ),
    "train_dqn": Program("--rounds 300", package="gymnasium"),
}


def pattern() -> str:
    """What Sphinx-Gallery is to run: the tour, and the programs that can be run here.

    Raises:
        LookupError: an example is not in ``PROGRAMS``, or the other way round.
    """
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    if there != PROGRAMS.keys():
        names = ", ".join(sorted(there ^ PROGRAMS.keys()))
        raise LookupError(f"examples/ and PROGRAMS of docs/example_pages.py differ in: {names}")
    run = "|".join(name for name, program in PROGRAMS.items() if program.obstacle() is None)
    return rf"docs/gallery/plot_\w+\.py$|examples/(?:{run})\.py$"


def forget_other_flags() -> None:
    """Have programs run again whose flags are no longer those that their pages were made with."""
    for name, program in PROGRAMS.items():
        noted = ROOT / PAGES / f"{name}.flags"
        if noted.is_file() and noted.read_text(encoding="utf-8") != program.flags:
            noted.with_suffix(".py.md5").unlink(missing_ok=True)


def argv(_: dict[str, Any], script: dict[str, Any]) -> list[str]:
    """Sphinx-Gallery's ``reset_argv``: the flags of a program that is about to run, noted beside its page."""
    source = Path(script["src_file"])
    if source.parent != EXAMPLES:
        return []
    (PICTURES / f"{source.stem}.png").unlink(missing_ok=True)  # of a run that was broken off
    flags = PROGRAMS[source.stem].flags
    Path(script["target_file"]).with_suffix(".flags").write_text(flags, encoding="utf-8")
    return shlex.split(flags)


def picture(_: Any, script: dict[str, Any], gallery: dict[str, Any]) -> str:
    """One of Sphinx-Gallery's ``image_scrapers``: the picture that a program wrote to a file."""
    from sphinx_gallery.scrapers import figure_rst

    source = Path(script["src_file"])
    written = PICTURES / f"{source.stem}.png"
    if source.parent != EXAMPLES or not written.is_file():
        return figure_rst([], gallery["src_dir"])
    path = next(script["image_path_iterator"])
    shutil.move(written, path)
    return figure_rst([path], gallery["src_dir"], f"The picture that {source.name} drew")


# What is left out: a notebook, in which a program that reads its command line is of no use.
_NOTEBOOK = re.compile(r" *\.\. container:: sphx-glr-download sphx-glr-download-(?:jupyter|zip)\n\n.*\n\n")
# A page has its introduction, then this comment, then what was written and drawn, then the code.
_OUTPUT = re.compile(r"^\.\. GENERATED FROM PYTHON SOURCE LINES .*\n", re.MULTILINE)
_CODE = re.compile(r"^(?:\|\n\n)?\.\. code-block:: Python$", re.MULTILINE)


def tell(app: Sphinx, page: str, source: list[str]) -> None:
    """Say on a program's page how it was run, or why it was not."""
    folder, _, name = page.rpartition("/")
    if folder != PAGES or name not in PROGRAMS:
        return
    app.env.note_dependency(__file__)
    text = _NOTEBOOK.sub("", source[0])
    start, code = _OUTPUT.search(text), _CODE.search(text)
    if start is None or code is None or start.end() > code.start():
        raise ValueError(f"{page}: Sphinx-Gallery's pages are no longer what docs/example_pages.py reads")
    program, output = PROGRAMS[name], text[start.end() : code.start()].strip()
    reason = program.obstacle()
    if reason is None and not app.config.sphinx_gallery_conf["plot_gallery"]:
        reason = "Sphinx-Gallery was told to run nothing."
    if not output and reason is None:
        raise ValueError(f"{page}: the program ran, and nothing that it wrote stands before its code")
    if output:
        flags = (ROOT / PAGES / f"{name}.flags").read_text(encoding="utf-8")
        command = f"When these pages were built, in ``examples``::\n\n    python {name}.py {flags}"
        told = f"What it wrote\n-------------\n\n{command}\n\n{program.remark}\n\n{output}"
    else:
        told = f".. note:: It was not run when these pages were built: {reason}"
    code_on = text[code.start() :].removeprefix("|")
    source[0] = f"{text[: start.start()]}{told}\n\nThe program\n-----------\n\n{code_on}"


def leave_uncoloured(app: Sphinx, doctree: Any) -> None:
    """Literal blocks of introductions are commands and formulas; Sphinx-Gallery would colour them as Python."""
    from docutils.nodes import literal_block

    if app.env.docname.startswith(f"{PAGES}/"):
        for block in doctree.findall(literal_block):
            block.attributes.setdefault("language", "none")


_SCRIPT = re.compile(r"\]\(((?:\.\./)*(?:examples/)?)(\w+)\.py\)")


def link(_: Sphinx, page: str, source: list[str]) -> None:
    """Links to a program, which on other sites show the file, lead to its page."""
    folder = (ROOT / page).parent

    def to_page(found: re.Match[str]) -> str:
        known = found[2] in PROGRAMS and (folder / found[1]).resolve() == EXAMPLES
        return f"](/{PAGES}/{found[2]}.rst)" if known else found[0]

    source[0] = _SCRIPT.sub(to_page, source[0])
