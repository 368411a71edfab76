"""Files from elsewhere, which may be larger than they should be."""

from __future__ import annotations

from typing import Any

__all__ = ["Bounded"]


class Bounded:
    """A binary file that is written, read or skipped up to a number of bytes, and not further.

    Args:
        file: as ``open`` or ``gzip.open`` returned it; of the latter, unpacked bytes count.
        size: the number of bytes.
        excuse: message of the error where there are more.

    Raises:
        OSError: at a call that would go further, before it does.
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
