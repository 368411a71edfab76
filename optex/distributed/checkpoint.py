"""Checkpoints of a run, written by all its ranks and read by any other number of them.

A checkpoint is a folder: vectors split among ranks through ``torch.distributed.checkpoint``, all else in a file
``rest-<part>.pt`` for each part of the batches, and the manifest with the checksums of all files.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from optex.checks import check_integer
from optex.distributed import folders
from optex.distributed.ranks import Ranks
from optex.distributed.sharding import ShardedStepper, joined_state
from optex.distributed.slices import raise_cause, read_slices, slices_reader, stored_slices, write_slices
from optex.errors import warn
from optex.stepping import Stepper

__all__ = ["CheckpointWarning", "Resumable", "latest", "load", "save"]

_PARAMETERS: Final = "parameters"
Item = TypeVar("Item")


class CheckpointWarning(RuntimeWarning):
    """The newest checkpoint is not complete or not intact, and an earlier one was loaded; says why."""


class Resumable(Protocol):
    """What is saved: an ``optex.OptEx``."""

    base: Optimizer

    @property
    def steps_taken(self) -> int: ...
    @property
    def stepper(self) -> Stepper: ...
    @property
    def ranks(self) -> Ranks | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


# ---------------------------------------------------------------------- saving


def save(
    directory: Path | str,
    optimizer: Resumable,
    extra: Any = None,
    *,
    keep: int = 2,
    overwrite: bool = False,
    weights_only: bool = True,
) -> Path:
    """Write parameters, base state, history, window and schedule into a new folder of ``directory``.

    Every rank calls it, between rounds, and writes its own slices through ``torch.distributed.checkpoint``;
    without a process group it writes everything. One run at a time writes to a directory.

    The folder is written beside the others, made durable and renamed when it is complete. If that ends early,
    by an error, an interrupt or a power cut, complete checkpoints stay complete, also one of the same step;
    ``load`` ignores what is left of the new one, and the next ``save`` deletes it.

    Args:
        directory: on storage that all ranks see.
        optimizer: what to save; the model's parameters it trains are saved with it, its buffers are not.
        extra: anything to keep beside it, such as the epoch or the model's buffers; what the first rank of each
            part of the batches passes is kept.
        keep: how many of the newest checkpoints stay, at least 1.
        overwrite: delete checkpoints of later steps, which another run left here, when this one is complete.
        weights_only: make sure that ``load`` can read it without unpickling; ``load`` says what ``extra`` and
            batches may then be. With False they may be anything picklable, and ``load`` needs False as well.

    Returns:
        The folder.

    Raises:
        ValueError: ``keep`` is less than 1; the directory has checkpoints of later steps; with
            ``weights_only``, ``extra`` or a batch of the window is of a type that needs unpickling.
        OSError: it could not be written.
        RuntimeError: another rank failed.
    """
    check_integer("checkpoint.save", "keep", keep)
    ranks, step, directory = _ranks(optimizer), optimizer.steps_taken, Path(directory)
    later = _on_first(ranks, "save", lambda: _prepare(directory, step))
    if later and not overwrite:
        raise ValueError(
            f"checkpoint.save: {directory} has checkpoints of later steps than {step} ({', '.join(later)}), of "
            "another run; save to another directory, or pass overwrite=True to delete them"
        )
    new = folders.step_folder(directory, step, ".new")
    try:
        _on_first(ranks, "save", new.mkdir)
        _write(new, optimizer, extra, weights_only)
    except BaseException:
        if ranks is None or ranks.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
        raise
    return _on_first(ranks, "save", lambda: _commit(directory, step, keep, overwrite))


def _prepare(directory: Path, step: int) -> list[str]:
    """Make the directory ready; return the names of complete checkpoints of later steps."""
    folders.make(directory)
    folders.tidy(directory)
    later = [found for found in folders.folders_of(directory) if found.step > step]
    wrong = folders.what_is_wrong
    return [found.path.name for found in later if wrong(folders.check_complete, found.path) is None]


def _write(folder: Path, optimizer: Resumable, extra: Any, weights_only: bool) -> None:
    ranks, stepper = _ranks(optimizer), optimizer.stepper
    proxy, part = (0, 0) if ranks is None else ranks.place
    parameters = stepper.vector.space.whole(stepper.point)
    state = {_PARAMETERS: parameters, "optimizer": optimizer.state_dict(), "extra": extra}
    leaves, structure = _leaves(state)
    slices = {f"{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, DTensor)}
    # A list of places, not an object in each: plain containers load without running code.
    rest = [None if isinstance(leaf, DTensor) else leaf for leaf in leaves]
    content = {"state": pytree.tree_unflatten(rest, structure), "slices": [int(key) for key in slices]}

    def write_rest() -> None:
        if proxy == 0:  # batches of the window differ along the data alone
            _write_rest(folder / _rest_file(part), content, weights_only)

    _together(ranks, "save", write_rest)
    if slices:
        _together(ranks, "save", lambda: write_slices(folder, slices, ranks))
    names = _on_first(ranks, "save", lambda: sorted(path.name for path in folder.iterdir()))
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    records = _together(ranks, "save", lambda: folders.checked_in(folder, names[rank::size]))
    parts = [records] if ranks is None else ranks.gather_objects(records)
    everything = {name: record for found in parts for name, record in found.items()}
    _on_first(ranks, "save", lambda: folders.write_manifest(folder, everything))


def _write_rest(path: Path, content: dict[str, Any], weights_only: bool) -> None:
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise_cause(error)
        file.flush()
        os.fsync(file.fileno())
    if weights_only:
        try:
            torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                "checkpoint.save: extra and batches must be tensors, numbers, strings and lists, tuples and "
                f"dicts of them ({_first_line(error)}); pass them so, or save and load with weights_only=False"
            ) from error


def _commit(directory: Path, step: int, keep: int, overwrite: bool) -> Path:
    folder = folders.put_in_place(directory, step)
    later = [found for found in folders.folders_of(directory) if overwrite and found.step > step]
    for found in later:
        folders.discard(found.path)
    for found in folders.complete(directory)[:-keep]:
        if found.path != folder:
            folders.discard(found.path)
    return folder


# ---------------------------------------------------------------------- loading


def load(directory: Path | str, optimizer: Resumable, *, weights_only: bool = True) -> Any:
    """Resume from the newest checkpoint of ``directory`` that is complete and intact, on any number of ranks.

    Every rank calls it, with an optimizer built as the saved one was, over the same parameters and with the
    same settings; ranks and ``shard`` may differ. Each reads the slices it needs, after the checksums of all
    files were compared. Nothing of the optimizer changes before everything is read.

    Args:
        directory: where ``save`` wrote to.
        optimizer: takes over what was saved.
        weights_only: read nothing that can run code, as ``torch.load(..., weights_only=True)``. ``extra`` and
            the batches may then be tensors, numbers, strings, None, lists, tuples and dicts of them, and types
            registered by ``torch.serialization.add_safe_globals``; NumPy's arrays are not among them. ``save``
            makes sure of it. With False a checkpoint is unpickled, which can run code: load only what you
            trust. Checksums detect damage, not malice.

    Returns:
        The ``extra`` that was saved.

    Raises:
        FileNotFoundError: there is no complete and intact checkpoint; says what is wrong with each.
        ValueError: it was saved with another number of ranks along "data", whose batches it holds; it is of
            other parameters; or, with ``weights_only``, it holds a type that needs unpickling.
        RuntimeError: another rank failed.

    Warns:
        CheckpointWarning: the newest is damaged or was not finished, and an earlier one was loaded.
    """
    ranks, stepper = _ranks(optimizer), optimizer.stepper
    folder = _newest_intact(Path(directory), ranks)
    state = _together(ranks, "load", lambda: _read_rest(folder, ranks, weights_only))
    leaves, structure = _leaves(state["state"])
    if state["slices"]:
        reader = slices_reader(folder, weights_only)
        known = _together(ranks, "load", lambda: _known_slices(reader, stepper, weights_only))
        tensors = _together(ranks, "load", lambda: read_slices(reader, known, stepper.vector, ranks))
        for place in state["slices"]:
            leaves[place] = tensors[f"{place}"]
    state = pytree.tree_unflatten(leaves, structure)
    _check_length(folder, state[_PARAMETERS].shape, stepper)
    own = state["optimizer"]
    if "sliced" in own and not isinstance(stepper, ShardedStepper):
        base = {key: value for key, value in own.items() if key != "optex"}
        own = joined_state(base, optimizer.base, stepper.vector.parameters) | {"optex": own["optex"]}
    point = stepper.vector.space.local(state[_PARAMETERS])
    optimizer.load_state_dict(own)
    try:
        stepper.move_to(point)
    except BaseException:
        if ranks is None:  # state and parameters belong together: an interrupt comes after both
            stepper.move_to(point)
        raise
    return state["extra"]


def latest(directory: Path | str) -> Path | None:
    """The newest complete checkpoint of a directory; None where there is none. Checksums are not compared."""
    found = folders.complete(Path(directory))
    return found[-1].path if found else None


def _newest_intact(directory: Path, ranks: Ranks | None) -> Path:
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    wrong = []
    for found in reversed(_on_first(ranks, "load", lambda: folders.folders_of(directory))):
        here = folders.what_is_wrong(folders.check_intact, found.path, rank, size)
        everywhere = [here] if ranks is None else ranks.gather_objects(here)
        reason = next((said for said in everywhere if said is not None), None)
        if reason is None:
            if wrong and rank == 0:
                said = f"checkpoint.load: {'; '.join(wrong)}. Going on from {found.path}"
                warn(said, CheckpointWarning)
            return found.path
        wrong.append(f"{found.path.name} {reason}")
    reasons = f": {'; '.join(wrong)}" if wrong else ""
    raise FileNotFoundError(f"checkpoint.load: no complete checkpoint in {directory}{reasons}")


def _read_rest(folder: Path, ranks: Ranks | None, weights_only: bool) -> dict[str, Any]:
    data, part = (1, 0) if ranks is None else (ranks.data, ranks.place[1])
    if data != sum(name.startswith("rest-") for name in folders.manifest_of(folder)):
        raise ValueError(
            f"checkpoint.load: {folder} was saved with another number of ranks along 'data'; the batches "
            "that were drawn ahead belong to that split. Load it with as many"
        )
    with _weights_alone(folder, weights_only):
        return torch.load(folder / _rest_file(part), weights_only=weights_only)


@contextmanager
def _weights_alone(folder: Path, weights_only: bool) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise
        raise ValueError(
            f"checkpoint.load: {folder} holds more than is read without running code ({_first_line(error)}); "
            "if you trust it, load it with weights_only=False"
        ) from error


def _known_slices(
    reader: FileSystemReader, stepper: Stepper, weights_only: bool
) -> dict[str, TensorStorageMetadata]:
    with _weights_alone(Path(reader.path), weights_only):
        known = stored_slices(reader)
    for metadata in known.values():
        _check_length(reader.path, metadata.size, stepper)
    return known


def _check_length(folder: Any, size: torch.Size, stepper: Stepper) -> None:
    if size[-1] != stepper.vector.dimension:
        raise ValueError(
            f"checkpoint.load: {folder} is of {size[-1]} numbers, and the optimizer's parameters are "
            f"{stepper.vector.dimension}; build it over the same parameters"
        )


# ---------------------------------------------------------------------- what ranks do together


def _ranks(optimizer: Resumable) -> Ranks | None:
    if optimizer.ranks is not None:
        return optimizer.ranks
    # Every rank of a job has a whole run of its own, all alike: the first one's is written.
    alone = not (dist.is_available() and dist.is_initialized())
    return None if alone else Ranks(None, optimizer.stepper.vector.device)


def _together(ranks: Ranks | None, name: str, action: Callable[[], Item]) -> Item:
    """Run an action on every rank and wait for all; an error on one rank is raised on all."""
    try:
        answer, failure = action(), None
    except Exception as error:  # noqa: BLE001  (raised when the others know)
        answer, failure = None, error
    if ranks is not None:
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        for rank, reason in enumerate(ranks.gather_objects(said)):
            if failure is None and reason is not None:
                raise RuntimeError(f"checkpoint.{name}: failed on rank {rank}: {reason}; see its traceback")
    if failure is not None:
        raise failure
    return answer  # type: ignore[return-value]


def _on_first(ranks: Ranks | None, name: str, action: Callable[[], Item]) -> Item:
    """Run an action on the first rank; return its answer on all."""
    if ranks is None:
        return action()
    answer = _together(ranks, name, action if ranks.rank == 0 else lambda: None)
    return ranks.gather_objects(answer)[0]


def _leaves(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    # Plain containers alone: a loaded tree then has the same leaves, whatever types torch's trees know by then.
    containers = (dict, OrderedDict, list, tuple)
    return pytree.tree_flatten(tree, is_leaf=lambda node: type(node) not in containers)


def _rest_file(part: int) -> str:
    return f"rest-{part}.pt"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
