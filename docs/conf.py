"""The documentation: `make docs`. Its source is the repository's root, so that pages link as files do."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import optex

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import example_pages  # noqa: E402  (beside this file)

project = "optex"
author = "The optex authors"
copyright = author  # noqa: A001  (Sphinx's name)
release = version = optex.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx-mathjax-offline",  # the pages need no network to show a formula
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "results/**",
    "examples/README.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
]
exclude_patterns = ["docs/gallery/*", "results/**/*.json"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
suppress_warnings = ["config.cache"]
nitpicky = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = "optex"
html_theme_options = {"navigation_with_keys": True}

autodoc_typehints = "none"  # shapes and types stand in the signatures and in the text
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = True
napoleon_google_docstring = True
napoleon_use_ivar = True

intersphinx_mapping: dict[str, tuple[str, None]] = {}  # pages build without a network

sphinx_gallery_conf = {
    "examples_dirs": [str(ROOT / "docs" / "gallery"), str(ROOT / "examples")],
    "gallery_dirs": ["docs/tour", example_pages.PAGES],
    "filename_pattern": example_pages.pattern(),
    "copyfile_regex": r"index\.rst$",
    "reset_argv": "example_pages.argv",
    "image_scrapers": ("matplotlib", "example_pages.picture"),
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "remove_config_comments": True,
}

# Rooms whose names are public; all of them are to be on the pages.
ROOMS = (
    *("optex", "optex.ase", "optex.batching", "optex.distributed.checkpoint", "optex.estimators.kernels"),
    *("optex.optimizers", "optex.regularisers", "optex.solvers", "optex.stepping", "optex.theory"),
)


def undocumented(app: Sphinx, exception: Exception | None) -> None:
    """Fail the build where a public name is on no page."""
    if exception is not None or app.builder.name != "html":
        return
    known = {name.rpartition(".")[2] for name in app.env.domaindata["py"]["objects"]}
    missing = []
    for room in ROOMS:
        module = __import__(room, fromlist=["__all__"])
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value) or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if name not in known:
                missing.append(f"{room}.{name}")
    if missing:
        raise ExtensionError(f"public names on no page: {', '.join(missing)}")


def formulas(*arguments: Any) -> None:
    """Indented formulas of docstrings as literal blocks, and bars and stars of norms as they are."""
    lines: list[str] = arguments[-1]
    found: list[str] = []
    literal = False
    for i, line in enumerate(lines):
        if line.startswith("    "):
            before = next((text for text in reversed(lines[:i]) if text.strip()), "")
            if i and not lines[i - 1].strip() and not before.startswith("    "):
                found += [] if before.endswith("::") else ["::", ""]
                literal = True
        elif line.strip():
            literal = False
        found.append(line if literal else _escaped(line))
    lines[:] = found


def _escaped(line: str) -> str:
    parts = line.split("``")
    parts[::2] = [part.replace("|", "\\|").replace("‖*", "‖\\*") for part in parts[::2]]
    return "``".join(parts)


def setup(app: Sphinx) -> None:
    """Add the check of public names, what docstrings need, and the pages of the example programs."""
    example_pages.forget_other_flags()
    app.connect("source-read", example_pages.tell)
    app.connect("source-read", example_pages.link)
    app.connect("doctree-read", example_pages.leave_uncoloured)
    app.connect("build-finished", undocumented)
    app.connect("autodoc-process-docstring", formulas, priority=100)
