"""Data sets: found on this machine, downloaded on request, read into arrays."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import tarfile
import textwrap
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from optex.studies.problems.bounded import Bounded

__all__ = [
    "DATA_SETS",
    "DataSet",
    "Download",
    "Split",
    "cifar10",
    "fashion_mnist",
    "fetch",
    "find",
    "locate",
    "shakespeare",
]

Split = Literal["train", "test"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Download:
    """A public file.

    Attributes:
        file: its name here.
        url: its address.
        sha256: of its content, in hexadecimal.
        size: in bytes; a download that is longer is stopped there.
    """

    file: str
    url: str
    sha256: str
    size: int


@dataclass(frozen=True)
class DataSet:
    """A data set: the names of its files, and where to look for them.

    Attributes:
        folder: under ``$OPTEX_DATA`` and under the user's cache.
        layouts: tuples of files, each of which holds the whole data set; the first that is found is used.
        downloads: the public files; together they are one of the layouts.
        package: Debian's package of the data set; None where there is none.
        package_folder: where that package installs it.
    """

    folder: str
    layouts: tuple[tuple[str, ...], ...]
    downloads: tuple[Download, ...]
    package: str | None = None
    package_folder: Path | None = None


_FASHION_URL: Final = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
_FASHION_FILES: Final = {  # train first, images first
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_FASHION_SIZES: Final = (26_421_880, 29_515, 4_422_102, 5_148)
_CIFAR_ARCHIVE: Final = "cifar-10-binary.tar.gz"
_CIFAR_SIDE: Final = 32
_MOST_UNPACKED: Final = 2**28  # bytes; the largest of these files, CIFAR-10's archive, has 184 million

DATA_SETS: Final[dict[str, DataSet]] = {
    "fashion-mnist": DataSet(
        folder="fashion-mnist",
        layouts=(tuple(_FASHION_FILES), tuple(name.removesuffix(".gz") for name in _FASHION_FILES)),
        downloads=tuple(
            Download(file, _FASHION_URL + file, sum_, size)
            for (file, sum_), size in zip(_FASHION_FILES.items(), _FASHION_SIZES, strict=True)
        ),
        package="dataset-fashion-mnist",  # the same images and labels, compressed differently
        package_folder=Path("/usr/share/datasets/fashion-mnist"),
    ),
    "cifar10": DataSet(
        folder="cifar10",
        # The columns of the parquet files are those of uoft-cs/cifar10 on Hugging Face: img.bytes, an image in
        # any format that Pillow reads, and label. The archive is the authors' own, which has a known checksum.
        layouts=(("train.parquet", "test.parquet"), (_CIFAR_ARCHIVE,)),
        downloads=(
            Download(
                _CIFAR_ARCHIVE,
                f"https://www.cs.toronto.edu/~kriz/{_CIFAR_ARCHIVE}",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                170_052_171,
            ),
        ),
    ),
    "shakespeare": DataSet(
        folder="tinyshakespeare",
        layouts=(("input.txt",),),
        downloads=(
            Download(
                "input.txt",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                1_115_394,
            ),
        ),
    ),
}


# ---------------------------------------------------------------------- finding and fetching


def find(name: str) -> tuple[Path, ...] | None:
    """The files of a data set in the order of their layout; None where it is not on this machine.

    It looks in ``$OPTEX_DATA``, then in the user's cache, then where Debian's package installs the files.

    Args:
        name: a key of ``DATA_SETS``.
    """
    entry = DATA_SETS[name]
    for folder in _folders(entry):
        for layout in entry.layouts:
            paths = tuple(folder / file for file in layout)
            if all(path.is_file() for path in paths):
                return paths
    return None


def locate(name: str) -> tuple[Path, ...]:
    """As ``find``, but an error where the data is not on this machine.

    Raises:
        FileNotFoundError: it is not on this machine; the message, one line, says how to get it.
    """
    paths = find(name)
    if paths is not None:
        return paths
    entry = DATA_SETS[name]
    files = ", ".join(f"{entry.folder}/{file}" for file in entry.layouts[0])
    ways = [f"run `optex fetch {name}`", f"set OPTEX_DATA to a folder that has {files}"]
    if entry.package is not None:
        ways.append(f"install Debian's package {entry.package}")
    elif find_spec("pooch") is not None:
        ways.append(f"put it into {_cache() / entry.folder}")
    raise FileNotFoundError(f"{name}: its data is not on this machine; {', or '.join(ways)}")


def _folders(entry: DataSet) -> list[Path]:
    folders = []
    if os.environ.get("OPTEX_DATA"):
        folders.append(Path(os.environ["OPTEX_DATA"]).expanduser() / entry.folder)
    if find_spec("pooch") is not None:
        folders.append(_cache() / entry.folder)
    if entry.package_folder is not None:
        folders.append(entry.package_folder)
    return folders


def _cache() -> Path:
    return Path(_needed("pooch").os_cache("optex"))


def _needed(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"data sets: {module.partition('.')[0]} is not installed; pip install optex[studies]", name=module
        ) from error


def fetch(name: str) -> tuple[Path, ...]:
    """Download the public files of a data set into the user's cache; those already there are kept.

    Args:
        name: a key of ``DATA_SETS``.

    Returns:
        The files' paths.

    Raises:
        ValueError: the name is unknown, or a downloaded file has another SHA-256 than expected.
        OSError: a file could not be downloaded or written, or is longer than it should be.
        ModuleNotFoundError: pooch is not installed.
    """
    if name not in DATA_SETS:
        raise ValueError(f"fetch: {name!r} is not one of {', '.join(DATA_SETS)}")
    pooch, entry = _needed("pooch"), DATA_SETS[name]
    folder = _cache() / entry.folder
    with _progress(DownloadColumn()) as progress:
        for download in entry.downloads:
            http = pooch.HTTPDownloader(progressbar=_DownloadBar(progress, download.file))
            try:
                pooch.retrieve(
                    download.url,
                    known_hash=f"sha256:{download.sha256}",
                    fname=download.file,
                    path=folder,
                    downloader=partial(_download_at_most, download.size, http),
                )
            except OSError as error:
                reason = textwrap.shorten(str(error), 160)
                raise OSError(f"fetch: could not get {download.url}: {reason}") from error
    return tuple(folder / download.file for download in entry.downloads)


def _download_at_most(size: int, http: Any, url: str, path: str, pooch: Any) -> None:
    """Download to a temporary file, which pooch deletes if the download fails."""
    with Path(path).open("wb") as file:
        http(url, Bounded(file, size, f"more than the {size} bytes that it has came, and were not kept"), pooch)


def _progress(*columns: TimeRemainingColumn | DownloadColumn) -> Progress:
    console = Console(stderr=True)
    shown = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *columns,
        TimeRemainingColumn(),
    )
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)


class _DownloadBar:
    """The interface that pooch expects of a progress bar, drawn by rich."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None)

    @property
    def total(self) -> float | None:
        return self._progress.tasks[self._task].total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size or None)  # 0 where the server does not say

    def update(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop_task(self._task)


# ---------------------------------------------------------------------- Fashion-MNIST


def fashion_mnist(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:  # [n, 1, 28, 28], [n]
    """Images of clothes and their classes, 60,000 to train on and 10,000 to test.

    Raises:
        FileNotFoundError: it is not on this machine.
        ValueError: a file is damaged.
    """
    paths = locate("fashion-mnist")
    return _read_fashion_mnist(*(paths[:2] if split == "train" else paths[2:]))


@lru_cache(maxsize=2)
def _read_fashion_mnist(images_path: Path, labels_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = _read_idx(images_path), _read_idx(labels_path)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise _damaged(
            images_path, f"images {images.shape} and labels {labels.shape} do not fit", "fashion-mnist"
        )
    return images[:, None], labels


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in LeCun's idx format: 0, 0, type 8, number of dimensions, sizes, content."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            kind = file.read(4)
            if len(kind) < 4 or kind[:3] != b"\0\0\x08":
                raise _damaged(path, "it is no idx file of bytes", "fashion-mnist")
            header = file.read(4 * kind[3])
            if len(header) < 4 * kind[3]:
                raise _damaged(path, "it ends within its header", "fashion-mnist")
            shape = struct.unpack(f">{kind[3]}I", header)
            size = math.prod(shape)
            if size > _MOST_UNPACKED:
                raise _damaged(path, f"{shape} are announced, more than any has", "fashion-mnist")
            # No more than one byte too many: a small compressed file may unpack to more than fits into memory.
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error), "fashion-mnist") from error
    if len(content) != size:
        found = len(content) if len(content) < size else f"more than {size}"
        raise _damaged(path, f"{found} bytes where {shape} are announced", "fashion-mnist")
    return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(shape)  # a copy that torch may write to


def _damaged(path: Path, why: str, name: str) -> ValueError:
    reason = " ".join(why.split())
    return ValueError(f"{name}: {path} is damaged ({reason}); delete it and run `optex fetch {name}`")


# ---------------------------------------------------------------------- CIFAR-10


def cifar10(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:  # [n, 3, 32, 32], [n]
    """Photographs and their classes, 50,000 to train on and 10,000 to test.

    The images are decoded once, which takes a few seconds, and kept in the user's cache. A run may depend on
    the files that they come from: their orders differ, and some hold JPEG, which loses a little.

    Raises:
        FileNotFoundError: it is not on this machine.
        ValueError: a file is damaged.
        ModuleNotFoundError: pooch is not installed; or the data is there as parquet files, and pyarrow or
            Pillow is not installed.
    """
    paths = locate("cifar10")
    rows = _read_cifar10(paths[0] if split == "train" else paths[-1], split)  # one archive has both splits
    return rows[:, 1:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE), rows[:, 0]


@lru_cache(maxsize=2)
def _read_cifar10(path: Path, split: Split) -> NDArray[np.uint8]:  # [n, 1 + 3 · 32 · 32], label and pixels
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    decoded = _cache() / "cifar10" / f"decoded-{split}-{digest[:16]}.npy"
    try:
        # Copy on write: pages are read as they are needed and shared by the processes that read them.
        return np.load(decoded, mmap_mode="c")
    except (OSError, ValueError):  # not there yet, or cut short
        pass
    rows = _decode_parquet(path) if path.suffix == ".parquet" else _read_archive(path, split)
    _keep(decoded, rows)
    return rows


def _keep(path: Path, rows: NDArray[np.uint8]) -> None:
    """Write a temporary file, then rename it, so that no other process sees half a file."""
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.save(file, rows)
        beside.replace(path)
    except OSError:  # a cache that cannot be written costs the next run a few seconds, no more
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _decode_parquet(path: Path) -> NDArray[np.uint8]:
    parquet, image = _needed("pyarrow.parquet"), _needed("PIL.Image")
    try:
        table = parquet.read_table(path, columns=["img", "label"])
        encoded = table["img"].combine_chunks().field("bytes")
        labels = table["label"].to_numpy()
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, str(error), "cifar10") from error
    rows = np.empty((len(encoded), 1 + 3 * _CIFAR_SIDE**2), dtype=np.uint8)
    rows[:, 0] = labels
    for i, one in enumerate(_shown(encoded, f"decoding {path.name}")):
        try:
            with image.open(io.BytesIO(one.as_py())) as opened:
                if opened.size != (_CIFAR_SIDE, _CIFAR_SIDE):  # before it is decoded, for it may be huge
                    width, height = opened.size
                    raise _damaged(path, f"image {i} is {width} × {height} pixels", "cifar10")
                pixels = np.asarray(opened.convert("RGB"))  # [32, 32, 3]
        except OSError as error:
            raise _damaged(path, f"image {i}: {error}", "cifar10") from error
        rows[i, 1:] = pixels.transpose(2, 0, 1).ravel()
    return rows


def _shown(items: Iterable[Item], description: str) -> Iterable[Item]:
    with _progress() as progress:
        yield from progress.track(items, description=description)


def _read_archive(path: Path, split: Split) -> NDArray[np.uint8]:
    """Read the authors' binary version: files of rows, each a label and the pixels, channel by channel."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    try:
        with gzip.open(path) as unpacked:
            bounded = Bounded(unpacked, _MOST_UNPACKED, f"it unpacks to more than {_MOST_UNPACKED} bytes")
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                files = [archive.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
                content = b"".join(file.read() for file in files if file is not None)
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise _damaged(path, str(error), "cifar10") from error
    width = 1 + 3 * _CIFAR_SIDE**2
    if not content or len(content) % width:
        raise _damaged(path, f"{len(content)} bytes are no whole number of rows of {width}", "cifar10")
    return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(-1, width)


# ---------------------------------------------------------------------- tinyshakespeare


def shakespeare() -> str:
    """Karpathy's tinyshakespeare: 40,000 lines of Shakespeare's plays.

    Raises:
        FileNotFoundError: it is not on this machine.
        ValueError: the file is damaged: its SHA-256 is not the public file's.
    """
    return _read_shakespeare(*locate("shakespeare"), DATA_SETS["shakespeare"].downloads[0].sha256)


@lru_cache(maxsize=1)
def _read_shakespeare(path: Path, sha256: str) -> str:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise _damaged(path, f"its SHA-256 is {digest[:12]}…, not {sha256[:12]}…", "shakespeare")
    return content.decode()
