"""Files that came from elsewhere, and may be larger than they should be."""

from __future__ import annotations

from typing import Any

__all__ = ["Bounded"]


class Bounded:
    """Writes, reads or skips up to a number of bytes of a binary file, and not further.

    Args:
        file: as ``open`` or ``gzip.open`` gave it; what counts is what comes out of it.
        size: the number of bytes.
        excuse: says so where there is more.

    Raises:
        OSError: with the excuse, before anything further was written or read.
    """

    def __init__(self, file: Any, size: int, excuse: str) -> None:
        self._file, self._size, self._excuse = file, size, excuse

    def write(self, content: bytes) -> int:
        return self._within(self._file.tell() + len(content)).write(content)

    def read(self, size: int) -> bytes:
        return self._within(self._file.tell() + size).read(size)

    def seek(self, place: int) -> int:
        return self._within(place).seek(place)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _within(self, end: int) -> Any:
        if end > self._size:
            raise OSError(self._excuse)
        return self._file
