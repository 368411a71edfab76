"""Where blocks are kept while they are not on the device: main memory, or files."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optex.checks import shown

__all__ = ["FileStore", "MemoryStore", "Store", "open_store"]


class Store(ABC):
    """Keeps tensors: answers CPU tensors, and what is written into these stays."""

    @abstractmethod
    def keep(
        self,
        name: str,
        value: Tensor,  # [...]
    ) -> Tensor:  # [...], on the CPU
        """A tensor of the same values, in the store."""


class MemoryStore(Store):
    """Main memory; page-locked for CUDA, so that copies run beside the device's work."""

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned

    def keep(self, name: str, value: Tensor) -> Tensor:
        kept = value.detach().to("cpu", copy=True).contiguous()
        return kept.pin_memory() if self.pinned else kept


class FileStore(Store):
    """One file a tensor, mapped into memory: the system writes and drops its pages as it needs memory.

    Raises:
        FileExistsError: the folder is not empty.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(
                f"BlockStreamer: store {str(folder)!r} is not empty, and may be another run's; name a new one"
            )
        self.folder = folder

    def keep(self, name: str, value: Tensor) -> Tensor:
        path = self.folder / (re.sub(r"[^\w.-]", "_", name) + ".bin")
        if not value.numel():
            return value.detach().to("cpu", copy=True)
        # Written first: a full disk is an error here, but a crash in a mapping.
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        flat.view(torch.uint8).numpy().tofile(path)
        mapped = torch.from_file(str(path), shared=True, size=flat.numel(), dtype=flat.dtype)
        return mapped.view(value.shape)


def open_store(where: Any, device: torch.device) -> Store:
    """The store that an argument names: ``"cpu"`` or a folder.

    Raises:
        TypeError: it is neither.
        FileExistsError: the folder is not empty.
    """
    if where == "cpu":
        return MemoryStore(pinned=device.type == "cuda")
    if isinstance(where, (str, Path)):
        return FileStore(Path(where))
    raise TypeError(f"BlockStreamer: store must be 'cpu' or a folder, got {shown(where)}")
