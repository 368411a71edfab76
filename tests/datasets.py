"""Made-up data sets in the formats of the real ones: few images, a short text."""

import gzip
import hashlib
import io
import struct
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from optex.studies.problems import data

TRAIN, TEST = 120, 40


def images(count, channels, side, seed):
    """Noise, with a bright stripe where the class says so that it can be learned; and the classes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    pixels = generator.integers(0, 60, (count, channels, side, side), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 2 * label : 2 * label + 2] += 150
    return pixels, labels


def idx(values):
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def write_fashion_mnist(folder, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (prefix, count) in enumerate((("train", TRAIN), ("t10k", TEST))):
        pixels, labels = images(count, 1, 28, seed)
        for name, values in (("images-idx3-ubyte", pixels[:, 0]), ("labels-idx1-ubyte", labels)):
            content = idx(values)
            path = folder / f"{prefix}-{name}{suffix}"
            path.write_bytes(gzip.compress(content, mtime=0) if suffix else content)


def encoded(image, kind):
    """An image [3, h, w] as a file's bytes."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, kind)
    return file.getvalue()


def write_parquet(path, pixels, labels, kind="PNG"):
    """The columns of uoft-cs/cifar10 on Hugging Face: an image's bytes and its path, and the label as int64."""
    rows = [{"bytes": encoded(image, kind), "path": None} for image in pixels]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"img": pa.array(rows, struct_type), "label": pa.array(labels.tolist(), pa.int64())}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_cifar10(folder):
    for seed, (split, count) in enumerate((("train", TRAIN), ("test", TEST))):
        write_parquet(folder / f"{split}.parquet", *images(count, 3, 32, seed))


def write_archive(folder, train, test):
    """The authors' binary version: [n, 3073] for each split, the training rows in five files."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {f"data_batch_{i}.bin": part for i, part in enumerate(np.array_split(train, 5), 1)}
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, rows in (*parts.items(), ("test_batch.bin", test)):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = rows.nbytes
            archive.addfile(info, io.BytesIO(rows.tobytes()))


def write_shakespeare(folder, length=3000):
    folder.mkdir(parents=True, exist_ok=True)
    letters = np.random.default_rng(0).choice(list("abcdefgh \n"), length)
    (folder / "input.txt").write_text("".join(letters))


def write_all(folder):
    write_fashion_mnist(folder / "fashion-mnist")
    write_cifar10(folder / "cifar10")
    write_shakespeare(folder / "tinyshakespeare")


def use(patch, folder):
    """Have the problems find the data sets written into ``folder``, and nothing else."""
    patch.setenv("OPTEX_DATA", str(folder))
    patch.setattr(data, "_cache", lambda: folder / "cache")
    text = folder / "tinyshakespeare" / "input.txt"
    if text.exists():
        entry = data.DATA_SETS["shakespeare"]
        download = replace(entry.downloads[0], sha256=hashlib.sha256(text.read_bytes()).hexdigest())
        patch.setitem(data.DATA_SETS, "shakespeare", replace(entry, downloads=(download,)))
    fashion = replace(data.DATA_SETS["fashion-mnist"], package_folder=folder / "no such package")
    patch.setitem(data.DATA_SETS, "fashion-mnist", fashion)
