"""A run's step folders, each there whole or not at all: written beside, made durable, then renamed.

A folder is *complete* with its manifest, which is written last and tells size and SHA-256 of every other file,
and *intact* as long as the files agree with it. ``step-00000012`` may for a moment be

- ``step-00000012.new``, while it is written, and until it is renamed;
- ``step-00000012.old``, while one of the same step that is complete takes its place;
- ``step-00000012.trash``, while it is deleted.

A program that ends at any moment leaves a complete folder where there was one; ``tidy`` finishes what it left
half done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = [
    "StepFolder",
    "check_complete",
    "check_intact",
    "checked_in",
    "complete",
    "discard",
    "folders_of",
    "make",
    "manifest_of",
    "put_in_place",
    "step_folder",
    "sync_folder",
    "tidy",
    "what_is_wrong",
    "write_manifest",
]

_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1
_NAME: Final = re.compile(r"step-(\d{8,})(\.old|\.new|)")
_TRASH: Final = ".trash"
# Names of a step's folder, oldest content first: a complete ``.new`` replaces the others.
_IN_ORDER: Final = (".old", "", ".new")

Record = dict[str, Any]  # size and SHA-256 of a file


class StepFolder(NamedTuple):
    """A folder and its step; sorts by age."""

    step: int
    place: int  # in _IN_ORDER
    path: Path


def step_folder(directory: Path, step: int, suffix: str = "") -> Path:
    """The path of a step's folder; with the suffix ``.new`` the one it is written to."""
    return directory / f"step-{step:08d}{suffix}"


def make(directory: Path) -> None:
    """Make a directory, and all above it, if they are not there."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def folders_of(directory: Path) -> list[StepFolder]:
    """All folders of steps, complete or not, the newest last."""
    found = []
    for path in directory.glob("step-*"):
        named = _NAME.fullmatch(path.name)
        if named is not None and path.is_dir():
            found.append(StepFolder(int(named[1]), _IN_ORDER.index(named[2]), path))
    return sorted(found)


# ---------------------------------------------------------------------- manifests


def checked_in(folder: Path, names: Iterable[str]) -> dict[str, Record]:
    """Flush files to the disk; return their sizes and SHA-256."""
    records = {}
    for name in names:
        with (folder / name).open("rb+") as file:  # some systems sync only what is open for writing
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            records[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": digest}
    return records


def write_manifest(folder: Path, records: dict[str, Record]) -> None:
    """Write a folder's manifest; from then on the folder is complete."""
    beside = folder / f"{_MANIFEST}.new"
    with beside.open("w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "files": records}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)  # the other files first: where a manifest is, nothing is missing
    beside.replace(folder / _MANIFEST)
    sync_folder(folder)


def manifest_of(folder: Path) -> dict[str, Record]:
    """Size and SHA-256 of a folder's files by name.

    Raises:
        ValueError: there is no manifest, or none of this format; the message continues the folder's name.
        OSError: it cannot be read.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError("has no manifest (it was not finished, or an earlier version wrote it)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a manifest that cannot be read ({error})") from error
    records = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(records, dict) or manifest.get("format") != _FORMAT:
        raise ValueError("has a manifest of another format")
    for name, record in records.items():
        # A name with a separator could lead outside the folder.
        fits = isinstance(record, dict) and record.keys() == {"size", "sha256"} and Path(name).name == name
        if not fits:
            raise ValueError(f"has a manifest that says nothing sensible about {name!r}")
    return records


def check_complete(folder: Path) -> None:
    """Compare a folder with its manifest by the sizes of its files.

    Raises:
        ValueError: it is not complete; the message continues the folder's name.
        OSError: it cannot be read.
    """
    for name, record in manifest_of(folder).items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size is None:
            raise ValueError(f"is damaged ({name} is missing)")
        if size != record["size"]:
            raise ValueError(f"is damaged ({name} has {size} bytes instead of {record['size']})")


def check_intact(folder: Path, part: int = 0, parts: int = 1) -> None:
    """As ``check_complete``, and by the SHA-256 of the files; of ``parts`` shares of the files one is read.

    Raises:
        ValueError: it is not intact; the message continues the folder's name.
        OSError: it cannot be read.
    """
    check_complete(folder)
    for name, record in sorted(manifest_of(folder).items())[part::parts]:
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                raise ValueError(f"is damaged ({name} has another SHA-256 than when it was written)")


def what_is_wrong(check: Callable[..., None], folder: Path, *arguments: int) -> str | None:
    """What a check found, in words that continue the folder's name; None where nothing is wrong."""
    try:
        check(folder, *arguments)
    except OSError as error:
        return f"cannot be read ({error})"
    except ValueError as error:
        return str(error)
    return None


def complete(directory: Path) -> list[StepFolder]:
    """The folders that are complete and readable, the newest last."""
    return [found for found in folders_of(directory) if what_is_wrong(check_complete, found.path) is None]


# ---------------------------------------------------------------------- renaming and deleting


def put_in_place(directory: Path, step: int) -> Path:
    """Rename a complete ``.new`` folder to its final name, in place of one of the same step."""
    new, final, old = (step_folder(directory, step, suffix) for suffix in (".new", "", ".old"))
    if final.exists():
        discard(old)
        final.rename(old)
    new.rename(final)
    sync_folder(directory)
    discard(old)
    return final


def discard(folder: Path) -> None:
    """Delete a folder if it is there; it is renamed first, so that nobody reads half of it."""
    if folder.exists():
        trash = folder.with_name(folder.name + _TRASH)
        if trash.exists():
            shutil.rmtree(trash)
        folder.rename(trash)
        shutil.rmtree(trash)


def tidy(directory: Path) -> None:
    """Finish what a program left half done that was stopped while it wrote, renamed or deleted.

    Raises:
        OSError: something cannot be read; being unreadable does not get it deleted.
    """
    for trash in directory.glob(f"step-*{_TRASH}"):
        if _NAME.fullmatch(trash.name.removesuffix(_TRASH)):
            shutil.rmtree(trash)
    for step in {found.step for found in folders_of(directory)}:
        new, final, old = (step_folder(directory, step, suffix) for suffix in (".new", "", ".old"))
        if new.exists():
            if _is_intact(new):
                put_in_place(directory, step)
            else:
                discard(new)
        if old.exists() and not _is_intact(final) and _is_intact(old):
            discard(final)
            old.rename(final)
            sync_folder(directory)
        discard(old)


def _is_intact(folder: Path) -> bool:
    try:
        check_intact(folder)
    except ValueError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, as ``os.fsync`` flushes a file's content."""
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
