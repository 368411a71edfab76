"""Vectors split among ranks in a checkpoint, through ``torch.distributed.checkpoint``."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from optex.distributed.ranks import Ranks
from optex.stepping import ParameterVector

__all__ = ["raise_cause", "read_slices", "slices_reader", "stored_slices", "write_slices"]

_PREFIX: Final = "tensors"
_LOAD_TAKES_NO_DIST: Final = "no_dist" in inspect.signature(dcp.load).parameters  # torch 2.6's does not
_KNOWN: Final = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
}
# Where Python 3.13 has the classes of a module, and where every version finds them.
_MOVED: Final = {"pathlib._local": "pathlib"}


def write_slices(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks | None) -> None:
    """Write split tensors by name, each rank its slices, and flush them to the disk."""
    writer = FileSystemWriter(folder, sync_files=True)
    with _explained(ranks):
        dcp.save({_PREFIX: dict(tensors)}, storage_writer=writer, process_group=ranks and ranks.group)


def slices_reader(folder: Path, weights_only: bool) -> FileSystemReader:
    """The reader of a folder's slices; with ``weights_only`` nothing that it reads can run code."""
    return (_CarefulReader if weights_only else FileSystemReader)(folder)


def stored_slices(reader: FileSystemReader) -> dict[str, TensorStorageMetadata]:
    """The tensors that were stored, by name."""
    stored = reader.read_metadata().state_dict_metadata.items()
    return {
        key.removeprefix(f"{_PREFIX}."): found
        for key, found in stored
        if isinstance(found, TensorStorageMetadata)
    }


def read_slices(
    reader: FileSystemReader,
    stored: Mapping[str, TensorStorageMetadata],
    vector: ParameterVector,
    ranks: Ranks | None,
) -> dict[str, Tensor]:
    """Tensors by name, laid out as ``vector`` is, whole or split; each rank reads its slices."""
    tensors = {
        key: vector.space.empty_whole(found.size, found.properties.dtype, vector.device)
        for key, found in stored.items()
    }
    content = {_PREFIX: tensors}
    with _explained(ranks):
        if ranks is None:
            _load_alone(content, reader)
        else:
            dcp.load(content, storage_reader=reader, process_group=ranks.group)
    return content[_PREFIX]


def _load_alone(content: dict[str, Any], reader: FileSystemReader) -> None:
    """Fill the tensors in this process, whatever group it is in."""
    with warnings.catch_warnings():
        # torch warns of a single process, which is meant here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        if _LOAD_TAKES_NO_DIST:
            dcp.load(content, storage_reader=reader, no_dist=True)
        else:
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            dcp.load_state_dict(content, reader, no_dist=True)


class _CarefulReader(FileSystemReader):
    """Reads the metadata, which torch pickles, with nothing but the classes that belong there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _MetadataUnpickler(file).load()
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        module = _MOVED.get(module, module)
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        found = getattr({"torch": torch, metadata.__name__: metadata}.get(module), name, None)
        if isinstance(found, torch.dtype):
            return found
        if isinstance(found, type) and found.__module__ == metadata.__name__:
            return found
        raise pickle.UnpicklingError(f"its metadata name {module}.{name}")


# ---------------------------------------------------------------------- failures


@contextmanager
def _explained(ranks: Ranks | None) -> Iterator[None]:
    """Raise this rank's failure in place of torch's collection of all ranks', which is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        own = error.failures.get(0 if ranks is None else ranks.rank)
        if own is None:
            rank, (failure, _) = next(iter(error.failures.items()))
            reason = f"{type(failure).__name__}: {failure}"
            raise RuntimeError(f"checkpoint: failed on rank {rank}: {reason}; see its traceback") from error
        raise_cause(own[0])


def raise_cause(error: BaseException) -> NoReturn:
    """Raise the first cause: torch's archive writer hides a full disk and an interrupt behind its own error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) or not isinstance(cause, Exception):
            raise cause
        cause = cause.__context__
    raise error
