"""The command line itself, and what its commands share.

Nothing here may load torch, so that ``--help`` appears at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["INTERRUPTED", "Printer", "app", "check_file", "make_folder", "progress", "refuse"]

app: Final[typer.Typer] = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

INTERRUPTED: Final = 130  # a shell's exit code for a command that Ctrl-C ended

# The library's errors begin with the name of its argument; the command line shows the option's name instead.
_OPTIONS: Final[dict[str, str]] = {
    "history_size": "--history",
    "problem_options": "--set",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            *("methods", "optimizer", "lr", "parallelism", "rounds", "seeds", "dim", "noise", "batch_size"),
            *("set", "threads", "json", "plot", "html", "scale", "workers", "resume", "out", "seconds"),
        )
    },
}

# What a terminal that knows nothing but ASCII is given instead.
_SPELLED: Final = str.maketrans(
    {
        "±": "+-",
        "≥": ">=",
        "≤": "<=",
        "–": "-",
        "−": "-",
        "×": "x",
        "√": "sqrt",
        "µ": "u",
        "·": "*",
        "…": "...",
        "θ": "theta",
        "σ": "sigma",
        "μ": "mu",
        "α": "alpha",
        "’": "'",
    }
)


def refuse(error: object) -> NoReturn:
    """Print one line on stderr and exit with code 2, for a mistake in how the command was called."""
    message = " ".join(str(error).split())
    argument, colon, reason = message.partition(": ")
    typer.echo(f"optex: {_OPTIONS.get(argument, argument)}{colon}{reason}", err=True)
    raise typer.Exit(2)


def make_folder(name: str, folder: Path) -> None:
    """Make a folder that files are to be written into.

    Raises:
        ValueError: it cannot be made, or nothing can be written there; the message begins with ``name``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{name}: nothing can be written into the folder {folder}")


def check_file(name: str, path: Path | None) -> None:
    """Refuse, before hours of runs, a file that could not be written after them; None passes.

    Raises:
        ValueError: it is a folder, its folder cannot be made, or it cannot be replaced.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder; name a file in it")
    make_folder(name, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{name}: {path} is there and cannot be written")


class Printer:
    """Lines and tables on stdout, as wide as the terminal, in ASCII where stdout cannot encode more."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
        self._ascii = not encoding.startswith("utf")

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        return self._console.width

    def line(self, text: str = "", style: str | None = None, *, wrap: bool = True) -> None:
        """Print a line, wrapped at the terminal's width unless ``wrap`` is False; ``style`` is rich's."""
        self._console.print(self._spelled(text), style=style, markup=False, soft_wrap=not wrap)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
        """Print columns; those that do not fit beside the others follow below, again with the first column.

        Args:
            headers: [columns], with line breaks where they are long.
            rows: each [columns], cells as text.
            left: headers of the columns that are aligned left, beside the first.
        """
        spelled = [[self._spelled(cell) for cell in row] for row in (headers, *rows)]
        widths = [max(len(line) for row in spelled for line in row[i].split("\n")) for i in range(len(headers))]
        gap = 2 if self._console.width >= 90 else 1
        for block in _blocks(widths, gap, self._console.width):
            table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
            for i in block:
                aligned = "left" if i == 0 or headers[i] in left else "right"
                table.add_column(spelled[0][i], justify=aligned, no_wrap=True)
            for row in spelled[1:]:
                table.add_row(*(row[i] for i in block))
            self._console.print(table)

    def _spelled(self, text: str) -> str:
        if not self._ascii:
            return text
        return text.translate(_SPELLED).encode("ascii", "replace").decode()


def _blocks(widths: Sequence[int], gap: int, room: int) -> Iterator[list[int]]:
    """Indices of the columns of each table: the first, and as many of the others as fit."""
    block, used = [0], widths[0]
    for i in range(1, len(widths)):
        if len(block) > 1 and used + gap + widths[i] > room:
            yield block
            block, used = [0], widths[0]
        block.append(i)
        used += gap + widths[i]
    yield block


@contextmanager
def progress(total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A function for a command to call after each of its runs, with the run's name.

    It moves a progress bar on a terminal, and prints a line anywhere else.

    Args:
        total: how many runs there are.
        done: how many of them had been made before.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _lines(total, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda name: bar.update(task, description=name, advance=1)


def _lines(total: int, done: int) -> Callable[[str], None]:
    started, first = time.monotonic(), done

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        spent = time.monotonic() - started
        left = spent / (done - first) * (total - done)
        typer.echo(f"{done}/{total}  {name}  {spent:.0f} s, about {left:.0f} s to go", err=True)

    return tell


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"optex {version('optex')}")
        raise typer.Exit


@app.callback()
def main(
    asked: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> Any:
    """First-order optimizers with fewer gradients, and several at once."""
