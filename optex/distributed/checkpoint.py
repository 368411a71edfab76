"""Checkpoints of a run, written by all its ranks and read by any other number of them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from optex.checks import check_integer
from optex.distributed.ranks import Ranks
from optex.distributed.sharding import ShardedStepper, joined_state
from optex.stepping import Stepper

__all__ = ["Resumable", "latest", "load", "save"]

_PARAMETERS: Final = "parameters"


class Resumable(Protocol):
    """What is saved: an ``optex.OptEx``."""

    base: Optimizer
    steps_taken: int

    @property
    def stepper(self) -> Stepper: ...
    @property
    def ranks(self) -> Ranks | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class _Rest:
    """All but the tensors stored in slices; one object, or it would be stored leaf by leaf."""

    state: Any


@dataclass(frozen=True)
class _Stored:
    """Stands in the pickled part for a tensor that is stored in slices."""

    key: str


def save(directory: Path | str, optimizer: Resumable, extra: Any = None, *, keep: int = 2) -> Path:
    """Write parameters, base state, history, window and schedule into a new folder of ``directory``.

    Every rank calls it, between rounds, and writes its own slices through ``torch.distributed.checkpoint``;
    without a process group it writes everything. A checkpoint that was not finished is not found by ``latest``.

    Args:
        directory: on storage that all ranks see.
        optimizer: what to save; the model's parameters it trains are saved with it, its buffers are not.
        extra: anything picklable to keep beside it, as an epoch; the first rank's.
        keep: how many of the newest checkpoints stay, at least 1.

    Returns:
        The folder.

    Raises:
        ValueError: ``keep`` is less than 1.
    """
    check_integer("checkpoint.save", "keep", keep)
    stepper, ranks = optimizer.stepper, optimizer.ranks
    parameters = stepper.vector.space.whole(stepper.point)
    state = {_PARAMETERS: parameters, "optimizer": optimizer.state_dict(), "extra": extra}
    leaves, structure = pytree.tree_flatten(state)
    tensors = {f"{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, DTensor)}
    rest = [_Stored(f"{i}") if isinstance(leaf, DTensor) else leaf for i, leaf in enumerate(leaves)]
    folder = Path(directory) / f"step-{optimizer.steps_taken:08d}"
    content: dict[str, Any] = {"tensors": tensors}
    proxy, part = (0, 0) if ranks is None else ranks.place
    if proxy == 0:  # batches of the window differ along the data alone
        content[_rest_key(part)] = _Rest(pytree.tree_unflatten(rest, structure))
    with _alone_without_warning():
        dcp.save(
            content, checkpoint_id=folder, no_dist=not _is_distributed(), process_group=ranks and ranks.group
        )
    if not _is_distributed() or dist.get_rank(ranks and ranks.group) == 0:
        for old in _complete(Path(directory))[:-keep]:
            shutil.rmtree(old)
    return folder


def load(directory: Path | str, optimizer: Resumable) -> Any:
    """Go on from the newest complete checkpoint of ``directory``, on any number of ranks.

    Every rank calls it, with an optimizer built as the saved one was, over the same parameters and with the
    same settings; ranks and ``shard`` may differ. Each reads the slices it needs.

    The pickled part of a checkpoint can run code: load only what you trust.

    Returns:
        The ``extra`` that was saved.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: it was saved with another number of ranks along "data", whose batches it holds.
    """
    folder = latest(directory)
    if folder is None:
        raise FileNotFoundError(f"checkpoint.load: no complete checkpoint in {directory}")
    stepper, ranks = optimizer.stepper, optimizer.ranks
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    data, part = (1, 0) if ranks is None else (ranks.data, ranks.place[1])
    if data != sum(key.startswith("rest-") for key in known):
        raise ValueError(
            f"checkpoint.load: {folder} was saved with another number of ranks along 'data'; the batches "
            "that were drawn ahead belong to that split. Load it with as many"
        )
    tensors = {
        key.removeprefix("tensors."): _room(stepper, metadata)
        for key, metadata in known.items()
        if isinstance(metadata, TensorStorageMetadata)
    }
    rest_key = _rest_key(part)
    content: dict[str, Any] = {"tensors": tensors, rest_key: None}
    with _alone_without_warning():
        dcp.load(
            content, checkpoint_id=folder, no_dist=not _is_distributed(), process_group=ranks and ranks.group
        )
    leaves, structure = pytree.tree_flatten(content[rest_key].state)
    filled = [content["tensors"][leaf.key] if isinstance(leaf, _Stored) else leaf for leaf in leaves]
    state = pytree.tree_unflatten(filled, structure)
    own = state["optimizer"]
    if "sliced" in own and not isinstance(stepper, ShardedStepper):
        base = {key: value for key, value in own.items() if key != "optex"}
        own = joined_state(base, optimizer.base, stepper.vector.parameters) | {"optex": own["optex"]}
    optimizer.load_state_dict(own)
    stepper.move_to(stepper.vector.space.local(state[_PARAMETERS]))
    return state["extra"]


def latest(directory: Path | str) -> Path | None:
    """The newest complete checkpoint of a directory; None where there is none."""
    found = _complete(Path(directory))
    return found[-1] if found else None


def _complete(directory: Path) -> list[Path]:
    # The metadata are written last.
    return sorted(folder for folder in directory.glob("step-*") if (folder / ".metadata").exists())


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        # A single process is what was asked for.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _rest_key(part: int) -> str:
    return f"rest-{part}"


def _room(stepper: Stepper, metadata: TensorStorageMetadata) -> Tensor:
    vector = stepper.vector
    return vector.space.empty_whole(metadata.size, metadata.properties.dtype, vector.device)
