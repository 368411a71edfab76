"""Finding, fetching and reading data sets: exact on made-up files, and what is wrong is said in one line."""

import gc
import gzip
import hashlib
import io
import sys
import tarfile
import threading
import tracemalloc
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from optex.studies import cli
from optex.studies.problems import PROBLEMS, data
from optex.studies.problems.images import CIFAR10, FashionMNIST
from tests import datasets

FASHION = tuple(data.DATA_SETS["fashion-mnist"].layouts[0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    datasets.use(monkeypatch, tmp_path)
    return tmp_path


def without(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)


class TestFinding:
    def test_every_problem_with_data_has_a_data_set_and_the_other_way_round(self):
        assert {entry.data for entry in PROBLEMS.values() if entry.data} == data.DATA_SETS.keys()

    @pytest.mark.parametrize("name", data.DATA_SETS)
    def test_without_the_data_one_line_says_how_to_get_it(self, name, folder):
        assert data.find(name) is None
        with pytest.raises(FileNotFoundError) as caught:
            data.locate(name)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{name}: ")
        assert f"`optex fetch {name}`" in message
        assert "OPTEX_DATA" in message
        assert data.DATA_SETS[name].layouts[0][0] in message
        assert ("Debian" in message) == (name == "fashion-mnist")

    def test_the_users_folder_comes_before_the_cache_and_that_before_the_package(self, folder, monkeypatch):
        package = folder / "usr" / "share"
        entry = replace(data.DATA_SETS["fashion-mnist"], package_folder=package)
        monkeypatch.setitem(data.DATA_SETS, "fashion-mnist", entry)
        for place in (package, folder / "cache" / "fashion-mnist", folder / "fashion-mnist"):
            datasets.write_fashion_mnist(place)
            assert data.locate("fashion-mnist") == tuple(place / file for file in FASHION)
        monkeypatch.delenv("OPTEX_DATA")
        assert data.locate("fashion-mnist")[0].parent == folder / "cache" / "fashion-mnist"

    def test_a_folder_that_lacks_a_file_is_passed_over(self, folder):
        datasets.write_fashion_mnist(folder / "fashion-mnist")
        datasets.write_fashion_mnist(folder / "cache" / "fashion-mnist")
        (folder / "fashion-mnist" / FASHION[3]).unlink()
        assert data.locate("fashion-mnist")[0].parent == folder / "cache" / "fashion-mnist"

    def test_without_pooch_the_other_places_are_looked_at(self, folder, monkeypatch):
        monkeypatch.setattr(data, "find_spec", lambda name: None)
        datasets.write_fashion_mnist(folder / "cache" / "fashion-mnist")
        assert data.find("fashion-mnist") is None
        datasets.write_fashion_mnist(folder / "fashion-mnist")
        assert data.find("fashion-mnist") is not None


class TestFashionMNIST:
    @pytest.mark.parametrize("suffix", [".gz", ""])
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_reads_what_was_written(self, folder, suffix, split):
        datasets.write_fashion_mnist(folder / "fashion-mnist", suffix)
        images, labels = data.fashion_mnist(split)
        count, seed = (datasets.TRAIN, 0) if split == "train" else (datasets.TEST, 1)
        expected, classes = datasets.images(count, 1, 28, seed)
        assert images.dtype == labels.dtype == np.uint8
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, classes)

    @pytest.mark.parametrize(
        ("file", "content", "reason"),
        [
            (0, gzip.compress(datasets.idx(np.zeros((9, 28, 28), np.uint8)))[:-20], "end-of-stream"),
            (0, b"not compressed", "[Nn]ot a gzip"),
            (0, gzip.compress(b"\0\0\x09\x01\0\0\0\1a"), "no idx file of bytes"),
            (0, gzip.compress(b"\0\0\x08\x03\0\0\0\1"), "ends within its header"),
            (0, gzip.compress(datasets.idx(np.zeros((120, 28, 28), np.uint8))[:-1]), "94079 bytes where"),
            (1, gzip.compress(datasets.idx(np.zeros(119, np.uint8))), r"labels \(119,\) do not fit"),
        ],
        ids=["cut", "not compressed", "no bytes", "half a header", "a byte short", "a label short"],
    )
    def test_a_damaged_file_is_named(self, folder, file, content, reason):
        datasets.write_fashion_mnist(folder / "fashion-mnist")
        (folder / "fashion-mnist" / FASHION[file]).write_bytes(content)
        with pytest.raises(ValueError, match=reason) as caught:
            data.fashion_mnist("train")
        assert "is damaged" in str(caught.value)
        assert "-ubyte.gz" in str(caught.value)
        assert "\n" not in str(caught.value)


@contextmanager
def little_memory(most=20_000_000):
    """Fails where Python's memory grows by more than this."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


class TestBombs:
    """Small compressed files of much content: no more is unpacked than is announced, or than data sets have."""

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (datasets.idx(np.zeros((9, 28, 28), np.uint8)) + bytes(200_000_000), "more than 7056 bytes where"),
            (b"\0\0\x08\3" + b"\xff" * 12 + bytes(100), "are announced, more than any has"),
            (b"\0\0\x08\4" + b"\0\1\0\0" * 4 + bytes(100), "are announced, more than any has"),  # 2⁶⁴
        ],
        ids=["more than announced", "much announced", "an overflow announced"],
    )
    @pytest.mark.parametrize("suffix", [".gz", ""])
    def test_idx(self, folder, content, reason, suffix):
        datasets.write_fashion_mnist(folder / "fashion-mnist", suffix)
        file = folder / "fashion-mnist" / f"train-images-idx3-ubyte{suffix}"
        file.write_bytes(gzip.compress(content) if suffix else content)
        del content
        with little_memory(), pytest.raises(ValueError, match=reason):
            data.fashion_mnist("train")

    def archive(self, folder, name, size, kind=tarfile.REGTYPE):
        """An archive with a member of many zeros."""
        folder.mkdir(parents=True)
        member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
        member.size, member.type = size, kind
        with gzip.GzipFile(folder / "cifar-10-binary.tar.gz", "wb", compresslevel=1) as file:
            file.write(member.tobuf())
            for _ in range(size // 2**20):
                file.write(bytes(2**20))

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("test_batch.bin", tarfile.REGTYPE), ("other", tarfile.REGTYPE), ("long", tarfile.GNUTYPE_LONGNAME)],
    )
    def test_archives(self, folder, name, kind, monkeypatch):
        monkeypatch.setattr(data, "_MOST_UNPACKED", 2**25)
        self.archive(folder / "cifar10", name, 2**26, kind)
        with little_memory(), pytest.raises(ValueError, match="it unpacks to more than 33554432 bytes"):
            data.cifar10("test")

    def test_images(self, folder, monkeypatch):
        datasets.write_cifar10(folder / "cifar10")
        monkeypatch.setattr(Image.Image, "convert", lambda *arguments: pytest.fail("it was decoded"))
        pixels, labels = np.zeros((1, 3, 2000, 2000), np.uint8), np.zeros(1, np.uint8)
        datasets.write_parquet(folder / "cifar10" / "train.parquet", pixels, labels)
        with pytest.raises(ValueError, match="image 0 is 2000 × 2000 pixels"):
            data.cifar10("train")


def as_rows(pixels, labels):
    return np.concatenate([labels[:, None], pixels.reshape(len(pixels), -1)], axis=1)


class TestCIFAR10:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_reads_what_was_written(self, folder, split):
        datasets.write_cifar10(folder / "cifar10")
        images, labels = data.cifar10(split)
        count, seed = (datasets.TRAIN, 0) if split == "train" else (datasets.TEST, 1)
        expected, classes = datasets.images(count, 3, 32, seed)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, classes)

    def test_jpeg_is_what_pillow_makes_of_it(self, folder):
        datasets.write_cifar10(folder / "cifar10")
        pixels, labels = datasets.images(5, 3, 32, seed=7)
        datasets.write_parquet(folder / "cifar10" / "train.parquet", pixels, labels, "JPEG")
        images, _ = data.cifar10("train")
        with Image.open(io.BytesIO(datasets.encoded(pixels[3], "JPEG"))) as image:
            np.testing.assert_array_equal(images[3].transpose(1, 2, 0), np.asarray(image))
        assert not np.array_equal(images, pixels)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_the_authors_archive_holds_the_same(self, folder, split):
        train, test = datasets.images(33, 3, 32, 0), datasets.images(12, 3, 32, 1)
        datasets.write_archive(folder / "cifar10", as_rows(*train), as_rows(*test))
        images, labels = data.cifar10(split)
        pixels, classes = train if split == "train" else test
        np.testing.assert_array_equal(images, pixels)
        np.testing.assert_array_equal(labels, classes)

    def test_images_are_decoded_once(self, folder, monkeypatch):
        datasets.write_cifar10(folder / "cifar10")
        images, labels = data.cifar10("train")
        data._read_cifar10.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(data, "_decode_parquet", lambda path: pytest.fail("decoded again"))
            again, classes = data.cifar10("train")
        np.testing.assert_array_equal(again, images)
        np.testing.assert_array_equal(classes, labels)

    def test_other_images_of_the_same_name_are_decoded_anew(self, folder):
        datasets.write_cifar10(folder / "cifar10")
        first, _ = data.cifar10("train")
        data._read_cifar10.cache_clear()
        pixels, labels = datasets.images(datasets.TRAIN, 3, 32, seed=9)
        datasets.write_parquet(folder / "cifar10" / "train.parquet", pixels, labels)
        second, _ = data.cifar10("train")
        np.testing.assert_array_equal(second, pixels)
        assert not np.array_equal(first, second)

    def test_a_kept_array_that_is_cut_short_is_made_again(self, folder):
        datasets.write_cifar10(folder / "cifar10")
        images = data.cifar10("train")[0].copy()
        data._read_cifar10.cache_clear()
        (kept,) = (folder / "cache" / "cifar10").glob("decoded-train-*.npy")
        kept.write_bytes(kept.read_bytes()[:-1])
        np.testing.assert_array_equal(data.cifar10("train")[0], images)
        assert [path.suffix for path in kept.parent.iterdir()] == [".npy"]

    def test_a_cache_that_cannot_be_written_does_not_matter(self, folder):
        datasets.write_cifar10(folder / "cifar10")
        (folder / "cache").write_text("a file where the folder should be")
        assert len(data.cifar10("train")[0]) == datasets.TRAIN

    def test_a_parquet_file_cut_short_is_named(self, folder):
        datasets.write_cifar10(folder / "cifar10")
        path = folder / "cifar10" / "train.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"cifar10: .*train\.parquet is damaged .*`optex fetch cifar10`"):
            data.cifar10("train")

    def test_other_columns_are_refused(self, folder):
        datasets.write_cifar10(folder / "cifar10")
        table = datasets.pa.table({"image": [b"1"], "label": [0]})
        datasets.pq.write_table(table, folder / "cifar10" / "train.parquet")
        with pytest.raises(ValueError, match="img"):
            data.cifar10("train")

    @pytest.mark.parametrize(("side", "reason"), [(32, "image 2: "), (31, "image 0 is 31 × 31 pixels")])
    def test_an_image_that_is_none_of_its_size_is_named(self, folder, side, reason, monkeypatch):
        datasets.write_cifar10(folder / "cifar10")
        pixels, labels = datasets.images(3, 3, side, seed=0)
        files = iter([datasets.encoded(image, "PNG") for image in pixels[:2]] + [b"no image"])
        monkeypatch.setattr(datasets, "encoded", lambda image, kind: next(files))
        datasets.write_parquet(folder / "cifar10" / "train.parquet", pixels, labels)
        with pytest.raises(ValueError, match=reason):
            data.cifar10("train")

    def test_an_archive_cut_short_is_named(self, folder):
        rows = as_rows(*datasets.images(20, 3, 32, 0))
        datasets.write_archive(folder / "cifar10", rows, rows)
        path = folder / "cifar10" / "cifar-10-binary.tar.gz"
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(ValueError, match=r"tar\.gz is damaged"):
            data.cifar10("test")

    def test_an_archive_with_half_a_row_is_named(self, folder):
        rows = as_rows(*datasets.images(20, 3, 32, 0))
        datasets.write_archive(folder / "cifar10", rows, rows.ravel()[:-1])
        with pytest.raises(ValueError, match="61459 bytes are no whole number of rows of 3073"):
            data.cifar10("test")

    @pytest.mark.parametrize("module", ["pyarrow.parquet", "PIL.Image"])
    def test_what_is_not_installed_is_named(self, folder, module, monkeypatch):
        datasets.write_cifar10(folder / "cifar10")
        without(monkeypatch, module)
        with pytest.raises(ModuleNotFoundError, match=r"(pyarrow|PIL) is not .*pip install optex\[studies\]"):
            data.cifar10("train")


class TestShakespeare:
    def test_reads_what_was_written(self, made_up_data, made_up_folder):
        assert data.shakespeare() == (made_up_folder / "tinyshakespeare" / "input.txt").read_text()

    def test_another_text_is_refused(self, folder):
        datasets.write_shakespeare(folder / "tinyshakespeare")
        with pytest.raises(ValueError, match=r"input\.txt is damaged \(its SHA-256 is .*, not 86c4e6aa9db7"):
            data.shakespeare()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine: its folder, its address, and the paths that were asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, format, *args):  # noqa: A002 - the name is the base class's
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()
    with warnings.catch_warnings():  # pooch leaves the connection open when a file is not served
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def offered(folder, server, monkeypatch):
    """A server that has Shakespeare's text, and an entry that points to it."""
    served, address, asked = server
    content = b"To be, or not to be" * 4000
    (served / "input.txt").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    download = data.Download("input.txt", f"{address}/input.txt", digest, len(content))
    entry = replace(data.DATA_SETS["shakespeare"], downloads=(download,))
    monkeypatch.setitem(data.DATA_SETS, "shakespeare", entry)
    return served / "input.txt", asked


class TestFetching:
    def test_what_was_fetched_is_found(self, folder, offered):
        assert data.find("shakespeare") is None
        paths = data.fetch("shakespeare")
        assert paths == data.find("shakespeare") == (folder / "cache" / "tinyshakespeare" / "input.txt",)
        assert data.shakespeare() == offered[0].read_text()

    def test_what_is_there_is_not_fetched_again_unless_it_is_damaged(self, offered):
        (path,) = data.fetch("shakespeare")
        data.fetch("shakespeare")
        assert offered[1] == ["/input.txt"]
        path.write_text("cut")
        data.fetch("shakespeare")
        assert len(offered[1]) == 2
        assert path.read_bytes() == offered[0].read_bytes()

    def test_a_wrong_file_is_refused_and_not_kept(self, folder, offered):
        offered[0].write_bytes(b"To be, or to be")
        with pytest.raises(ValueError, match="does not match the known hash"):
            data.fetch("shakespeare")
        assert data.find("shakespeare") is None
        assert list((folder / "cache" / "tinyshakespeare").iterdir()) == []

    def test_a_file_that_is_too_long_is_stopped_there_and_not_kept(self, folder, offered):
        (path,) = data.fetch("shakespeare")
        before = path.read_bytes()
        path.write_bytes(before[:-1])  # so that it is fetched again
        offered[0].write_bytes(before + b"!")
        with pytest.raises(OSError, match=r"fetch: could not get http.*input\.txt: more than the 76000 bytes"):
            data.fetch("shakespeare")
        assert [kept.name for kept in path.parent.iterdir()] == ["input.txt"]
        assert path.read_bytes() == before[:-1]

    def test_a_stream_without_an_end_is_stopped(self, folder, offered, monkeypatch):
        sent = []

        class Endless(io.RawIOBase):
            def read(self, size=-1):
                sent.append(size)
                return b"x" * max(size, 1)

        def send_head(handler):
            handler.send_response(200)
            handler.end_headers()  # no length is announced
            return Endless()

        monkeypatch.setattr(SimpleHTTPRequestHandler, "send_head", send_head)
        monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *arguments: None)
        with pytest.raises(OSError, match="more than the 76000 bytes that it has came, and were not kept"):
            data.fetch("shakespeare")
        assert data.find("shakespeare") is None
        assert list((folder / "cache" / "tinyshakespeare").iterdir()) == []

    def test_a_file_that_is_not_served_is_named(self, offered):
        offered[0].unlink()
        with pytest.raises(OSError, match=r"fetch: could not get http://127.*input\.txt: 404"):
            data.fetch("shakespeare")

    def test_the_command(self, folder, offered):
        result = CliRunner().invoke(cli.app, ["fetch", "shakespeare"])
        assert result.exit_code == 0
        assert result.stdout == f"shakespeare: {folder / 'cache' / 'tinyshakespeare'}\n"

    def test_the_command_says_what_went_wrong(self, offered):
        offered[0].unlink()
        result = CliRunner().invoke(cli.app, ["fetch", "shakespeare"])
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("optex: fetch: could not get ")

    def test_an_unknown_name_is_refused(self):
        result = CliRunner().invoke(cli.app, ["fetch", "nope"])
        assert result.exit_code == 2
        assert result.stderr == "optex: fetch: 'nope' is not one of fashion-mnist, cifar10, shakespeare\n"

    def test_pooch_is_asked_for(self, folder, monkeypatch):
        without(monkeypatch, "pooch")
        with pytest.raises(ModuleNotFoundError, match=r"pooch is not installed; pip install optex\[studies\]"):
            data.fetch("shakespeare")

    def test_the_bar_does_what_pooch_does_with_it(self):
        with data._progress() as progress:
            bar = data._DownloadBar(progress, "a file")
            bar.total = 10
            bar.update(8)
            bar.update(8)
            bar.reset()
            bar.update(10)
            bar.close()
            (task,) = progress.tasks
            assert (bar.total, task.completed, task.finished) == (10, 10, True)

    @pytest.mark.parametrize("name", data.DATA_SETS)
    def test_downloads_are_checked_and_make_up_a_layout(self, name):
        entry = data.DATA_SETS[name]
        assert tuple(download.file for download in entry.downloads) in entry.layouts
        for download in entry.downloads:
            assert download.url.startswith("https://")
            assert download.url.endswith(f"/{download.file}")
            assert len(bytes.fromhex(download.sha256)) == 32
            assert 0 < download.size < 2**28


class TestListing:
    def test_says_which_data_is_missing(self, folder):
        datasets.write_fashion_mnist(folder / "fashion-mnist")
        lines = CliRunner().invoke(cli.app, ["list"], env={"COLUMNS": "80"}).stdout.splitlines()
        missing = {line.split()[0] for line in lines if "(no data yet)" in line}
        assert missing == {"cifar10", "shakespeare"}
        assert "no data yet: `optex fetch NAME` gets it" in lines

    def test_says_nothing_where_none_is_missing(self, made_up_data):
        result = CliRunner().invoke(cli.app, ["list"])
        assert result.exit_code == 0
        assert "cifar10" in result.stdout
        assert "no data yet" not in result.stdout


def real(name):
    return pytest.mark.skipif(data.find(name) is None, reason=f"no {name} on this machine: optex fetch {name}")


class TestRealData:
    @real("fashion-mnist")
    def test_fashion_mnist(self):
        images, labels = data.fashion_mnist("train")
        some = images[::10] / 255
        assert images.shape == (60_000, 1, 28, 28)
        assert set(Counter(labels.tolist()).values()) == {6_000}
        assert labels[:5].tolist() == [9, 0, 0, 3, 0]
        assert FashionMNIST.mean == pytest.approx([some.mean()], abs=5e-3)
        assert FashionMNIST.deviation == pytest.approx([some.std()], abs=5e-3)
        assert Counter(data.fashion_mnist("test")[1].tolist()) == dict.fromkeys(range(10), 1_000)

    @real("cifar10")
    def test_cifar10(self):
        images, labels = data.cifar10("train")
        assert images.shape == (50_000, 3, 32, 32)
        assert Counter(labels.tolist()) == dict.fromkeys(range(10), 5_000)
        some = images[::10] / 255
        assert CIFAR10.mean == pytest.approx(some.mean((0, 2, 3)), abs=5e-3)
        assert CIFAR10.deviation == pytest.approx(some.std((0, 2, 3)), abs=5e-3)
        assert Counter(data.cifar10("test")[1].tolist()) == dict.fromkeys(range(10), 1_000)

    @real("shakespeare")
    def test_shakespeare(self):
        text = data.shakespeare()
        assert len(text) == 1_115_394
        assert len(set(text)) == 65
        assert text.startswith("First Citizen:")
