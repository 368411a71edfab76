"""The command line itself, and what its commands share."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["app", "make_folder", "progress_bar", "refuse"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# The library's errors begin with the name of its argument; whoever typed a command knows the option.
_OPTIONS: Final[dict[str, str]] = {
    "history_size": "--history",
    "problem_options": "--set",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            *("methods", "optimizer", "lr", "parallelism", "rounds", "seeds", "dim", "noise", "batch_size"),
            *("set", "threads", "json", "plot", "scale", "workers", "resume", "out", "seconds"),
        )
    },
}


def refuse(error: object) -> NoReturn:
    """One line on stderr and exit code 2: the user's mistake, not ours."""
    message = " ".join(str(error).split())
    argument, colon, reason = message.partition(": ")
    typer.echo(f"optex: {_OPTIONS.get(argument, argument)}{colon}{reason}", err=True)
    raise typer.Exit(2)


def make_folder(name: str, folder: Path) -> None:
    """Make a folder that files are to be written into.

    Raises:
        ValueError: it cannot be made; the message begins with ``name``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: cannot make the folder {folder}: {error.strerror}") from error


def progress_bar() -> Progress:
    """On stderr, and only where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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
) -> None:
    """First-order optimizers with fewer gradients, and several at once."""
