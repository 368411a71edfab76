"""Checkpoints are there whole or not at all, whatever stops the program that writes them."""

import contextlib
import errno
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from optex import DistributedEvaluator, OptEx, WithinTolerance
from optex.distributed import checkpoint, folders, slices
from optex.distributed.checkpoint import CheckpointWarning
from tests.models import network, regression_batches, squared_error
from tests.ranks import run_ranks


def built(evaluator=None, seed=0):
    model = network(seed=seed)
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    rule = WithinTolerance(0.05, adaptive=False)  # leaves steps in the window
    return model, OptEx(base, parallelism=4, acceptance=rule, evaluator=evaluator)


def walked(rounds=2, evaluator=None, seed=0):
    model, optimizer = built(evaluator, seed)
    walk(model, optimizer, rounds)
    return model, optimizer


def walk(model, optimizer, rounds):
    batches = regression_batches(40)[optimizer.batches_drawn :]
    for _ in itertools.islice(optimizer.rounds(batches, squared_error(model)), rounds):
        pass
    optimizer.gather()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def newest_in(directory):
    folder = checkpoint.latest(directory)
    assert folder is not None
    return folder


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def loaded(directory, **options):
    """``extra`` and the parameters of what is loaded; nothing about it is warned of."""
    model, optimizer = built(seed=1)
    extra = checkpoint.load(directory, optimizer, **options)
    return extra, flat(model), optimizer


def loaded_anyway(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        return loaded(directory)


def spoil(path, byte=-20):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------- what is written


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path):
    model, optimizer = walked()
    folder = checkpoint.save(tmp_path, optimizer, {"epoch": 3})
    assert len(optimizer.state_dict()["optex"]["window"]) > 0
    assert folder == tmp_path / f"step-{optimizer.steps_taken:08d}" == checkpoint.latest(tmp_path)
    assert names(folder) == ["manifest.json", "rest-0.pt"]
    twin = network(seed=1)
    base, rule = torch.optim.Adam(twin.parameters()), WithinTolerance(0.05, adaptive=False)
    other = OptEx(base, parallelism=4, acceptance=rule)  # at torch's own rate: the run's has to come along
    assert checkpoint.load(tmp_path, other) == {"epoch": 3}
    assert torch.equal(flat(twin), flat(model))
    walk(model, optimizer, 5)
    walk(twin, other, 5)
    assert torch.equal(flat(twin), flat(model))


def test_the_manifest_tells_size_and_checksum_of_every_file(tmp_path):
    _, optimizer = walked()
    folder = checkpoint.save(tmp_path, optimizer)
    manifest = json.loads((folder / "manifest.json").read_text())
    (record,) = manifest["files"].values()
    assert manifest["files"].keys() == {"rest-0.pt"}
    assert record["size"] == (folder / "rest-0.pt").stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", record["sha256"])


def test_the_newest_stay_by_number_not_by_name(tmp_path):
    model, optimizer = built()
    steps = []
    for _ in range(4):
        walk(model, optimizer, 1)
        checkpoint.save(tmp_path, optimizer, keep=3)
        steps.append(optimizer.steps_taken)
    assert names(tmp_path) == [f"step-{step:08d}" for step in steps[-3:]]
    shutil.copytree(newest_in(tmp_path), tmp_path / "step-100000000")
    assert newest_in(tmp_path).name == "step-100000000"  # comes before step-99999999 by name
    shutil.copytree(newest_in(tmp_path), tmp_path / "step-99999999")
    assert newest_in(tmp_path).name == "step-100000000"


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
    for name in ("step-1", "step-00000001.bak", "notes", "step-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-99999998").write_text("a file")
    (tmp_path / "step-00000000").mkdir()  # of an earlier version: it has no manifest
    before = names(tmp_path)
    _, optimizer = walked()
    folder = checkpoint.save(tmp_path, optimizer, keep=1, overwrite=True)
    assert names(tmp_path) == sorted([*before, folder.name])
    loaded(tmp_path)


# ---------------------------------------------------------------- later steps of another run


@pytest.fixture
def later(tmp_path):
    """A directory with two checkpoints of a run that got further, and what a new run has at its start."""
    model, optimizer = walked(5)
    checkpoint.save(tmp_path, optimizer, "later")
    walk(model, optimizer, 1)
    checkpoint.save(tmp_path, optimizer, "later still")
    return tmp_path, walked(1)


def test_later_steps_are_not_saved_over(later):
    directory, (_, optimizer) = later
    before = names(directory)
    with pytest.raises(ValueError, match=rf"checkpoints of later steps.*{before[0]}.*overwrite=True"):
        checkpoint.save(directory, optimizer, "new")
    assert names(directory) == before
    assert loaded(directory)[0] == "later still"


def test_later_steps_are_deleted_on_request_when_the_new_one_is_complete(later, monkeypatch):
    directory, (_, optimizer) = later
    deleted = []
    discard = folders.discard

    def noted(folder):
        if folder.name in before:
            deleted.append(folder.name)
            assert (directory / f"step-{optimizer.steps_taken:08d}" / "manifest.json").exists()
        discard(folder)

    before = names(directory)
    monkeypatch.setattr(folders, "discard", noted)
    folder = checkpoint.save(directory, optimizer, "new", overwrite=True)
    assert deleted == before
    assert names(directory) == [folder.name]
    assert loaded(directory)[0] == "new"


# ---------------------------------------------------------------- stopped at any moment


@pytest.fixture
def saved(tmp_path):
    """A directory with one checkpoint, of the step the optimizer stands at."""
    model, optimizer = walked()
    checkpoint.save(tmp_path / "all", optimizer, "old")
    return tmp_path / "all", model, optimizer


class Stop(BaseException):
    """As ``KeyboardInterrupt`` at a chosen line."""


@contextlib.contextmanager
def at_every_line(action):
    """Call it before each line that the checkpoint's modules run."""
    files = {checkpoint.__file__, folders.__file__}

    def line(frame, event, argument):
        if event == "line":
            action()
        return line

    def call(frame, event, argument):
        return line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(function):
    counter = itertools.count()
    with at_every_line(lambda: next(counter)):
        function()
    return next(counter)


# A file whose ``with`` is interrupted on the way in or out is closed by the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("again", [True, False], ids=["the same step", "another step"])
def test_an_interrupt_at_any_line_leaves_what_is_complete(saved, tmp_path, monkeypatch, again):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # power is not cut here
    directory, model, optimizer = saved
    old = flat(model)
    if not again:
        walk(model, optimizer, 1)
    shutil.copytree(directory, tmp_path / "scratch")
    count = lines_of(lambda: checkpoint.save(tmp_path / "scratch", optimizer, "new", keep=1))
    found = set()
    for last in range(0, count, 1 if again else 3):
        here = tmp_path / f"{last}"
        shutil.copytree(directory, here)
        counter = itertools.count()

        def stop(counter=counter, last=last):
            if next(counter) == last:
                raise Stop

        with pytest.raises(Stop), at_every_line(stop):
            checkpoint.save(here, optimizer, "new", keep=1)
        extra, point, _ = loaded_anyway(here)
        found.add(extra)
        assert torch.equal(point, flat(model) if extra == "new" or again else old)
        # The next save ends what was begun, and nothing is left of it.
        folder = checkpoint.save(here, optimizer, "after", keep=1)
        assert names(here) == [folder.name]
        assert loaded(here)[0] == "after"
    assert found == {"old", "new"}


def test_a_program_that_ends_at_any_line_leaves_what_is_complete(saved, tmp_path):
    # Nothing is cleaned up then: what is there before each line is what a program that ends there leaves.
    directory, model, optimizer = saved
    images = {}

    def picture():
        seen = tuple(
            (str(path.relative_to(directory)), path.stat().st_ino, path.stat().st_size)
            for path in sorted(directory.rglob("*"))
        )
        if seen not in images:
            images[seen] = tmp_path / f"{len(images)}"
            shutil.copytree(directory, images[seen])

    with at_every_line(picture):
        checkpoint.save(directory, optimizer, "new")
    assert len(images) >= 8
    found = []
    for here in images.values():
        extra, point, _ = loaded_anyway(here)
        found.append(extra)
        assert torch.equal(point, flat(model))
        folder = checkpoint.save(here, optimizer, "after")
        assert names(here) == [folder.name]
        assert loaded(here)[0] == "after"
    assert found == sorted(found, key=("old", "new").index)
    assert set(found) == {"old", "new"}


FAILING = [(torch, "save"), (os, "fsync"), (Path, "mkdir"), (Path, "open"), (Path, "rename"), (Path, "replace")]


@pytest.mark.parametrize(("owner", "name"), FAILING, ids=lambda found: getattr(found, "__name__", found))
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
    ids=["full", "interrupt"],
)
def test_a_full_disk_leaves_what_is_complete(saved, tmp_path, monkeypatch, owner, name, failure):
    directory, model, optimizer = saved
    original, stopped = getattr(owner, name), []
    for last in itertools.count():
        here = tmp_path / f"{last}"
        shutil.copytree(directory, here)
        counter = itertools.count()

        def failing(*arguments, counter=counter, last=last, **options):
            if next(counter) == last:
                raise failure
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                checkpoint.save(here, optimizer, "new")
            except (OSError, KeyboardInterrupt) as error:
                assert error is failure  # noqa: PT017
                stopped.append(last)
        if next(counter) <= last:
            break
        extra, point, _ = loaded_anyway(here)
        assert extra == "new" or (extra == "old" and last in stopped)
        assert torch.equal(point, flat(model))
        checkpoint.save(here, optimizer, "after")
        assert loaded(here)[0] == "after"
    assert stopped


class Filling:
    """A file on a disk that has little room left."""

    def __init__(self, file, room, failure):
        self.file, self.room, self.failure = file, room, failure

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise self.failure
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_a_write_that_fails_half_way_comes_through(saved, monkeypatch, failure):
    # torch's writer of archives covers the first error up with one of its own.
    directory, _, optimizer = saved
    opened = Path.open

    def filling(path, mode="r", **options):
        file = opened(path, mode, **options)
        return Filling(file, 3000, failure) if path.suffix == ".pt" and mode == "wb" else file

    monkeypatch.setattr(Path, "open", filling)
    with pytest.raises(type(failure)) as caught:
        checkpoint.save(directory, optimizer, "new")
    assert caught.value is failure
    monkeypatch.undo()
    assert len(names(directory)) == 1
    assert loaded(directory)[0] == "old"


def test_what_cannot_be_pickled_leaves_what_is_complete(saved):
    directory, _, optimizer = saved
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(directory, optimizer, lambda: None)
    assert len(names(directory)) == 1
    assert loaded(directory)[0] == "old"


# ---------------------------------------------------------------- damaged


@pytest.fixture
def two(tmp_path):
    model, optimizer = walked(1)
    first = checkpoint.save(tmp_path, optimizer, "first")
    walk(model, optimizer, 1)
    return tmp_path, first, checkpoint.save(tmp_path, optimizer, "second")


def damage_byte(folder):
    spoil(folder / "rest-0.pt", 500)


def cut(folder):
    path = folder / "rest-0.pt"
    path.write_bytes(path.read_bytes()[:-1])


def damage_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-3])


def other_manifest(folder):
    (folder / "manifest.json").write_text('{"format": 2, "files": {}}')


def leading_elsewhere(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("rest-0.pt", "../rest-0.pt"))


DAMAGES = [
    (damage_byte, r"is damaged \(rest-0\.pt has another SHA-256"),
    (cut, r"is damaged \(rest-0\.pt has \d+ bytes instead of \d+\)"),
    (lambda folder: (folder / "rest-0.pt").unlink(), r"is damaged \(rest-0\.pt is missing\)"),
    (lambda folder: (folder / "manifest.json").unlink(), "has no manifest"),
    (damage_manifest, "has a manifest that cannot be read"),
    (other_manifest, "has a manifest of another format"),
    (leading_elsewhere, r"has a manifest that says nothing sensible about '\.\./rest-0\.pt'"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_the_newest_intact_one_is_loaded_and_that_is_said(two, damage, reason):
    directory, first, second = two
    damage(second)
    with pytest.warns(
        CheckpointWarning, match=rf"{second.name} {reason}.*Going on from .*{first.name}"
    ) as caught:
        assert loaded(directory)[0] == "first"
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_without_an_intact_one_the_error_says_what_is_wrong_and_nothing_changes(two, damage, reason):
    directory, first, second = two
    damage(second)
    cut(first)
    model, optimizer = walked(3, seed=2)
    before, steps, rows = flat(model), optimizer.steps_taken, optimizer.history.gradients.clone()
    expected = rf"no complete checkpoint in .*{second.name} {reason}.*{first.name} is damaged"
    with pytest.raises(FileNotFoundError, match=expected):
        checkpoint.load(directory, optimizer)
    assert torch.equal(flat(model), before)
    assert optimizer.steps_taken == steps
    assert torch.equal(optimizer.history.gradients, rows)


def test_an_older_one_that_is_damaged_is_nobodys_concern(two):
    directory, first, _ = two
    damage_byte(first)
    assert loaded(directory)[0] == "second"


def test_other_parameters_are_refused_and_nothing_changes(two):
    directory, _, _ = two
    theta = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = OptEx(torch.optim.Adam([theta]), parallelism=2)
    with pytest.raises(ValueError, match=r"is of \d+ numbers, and the optimizer's parameters are 3"):
        checkpoint.load(directory, optimizer)
    assert theta.eq(1).all()
    assert optimizer.steps_taken == 0


def test_an_interrupt_before_the_parameters_move_comes_after_they_did(two, monkeypatch):
    directory, _, _ = two
    model, optimizer = built(seed=1)
    move, calls = optimizer.stepper.move_to, []

    def interrupted(point):
        calls.append(point)
        if len(calls) == 1:
            raise KeyboardInterrupt
        move(point)

    monkeypatch.setattr(optimizer.stepper, "move_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(directory, optimizer)
    assert torch.equal(flat(model), loaded(directory)[1])


# ---------------------------------------------------------------- without running code


class Evil:
    """What harms whoever unpickles it."""

    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


PLAIN = {"epoch": 3, "name": "a", "rates": [0.1, None, True], "pair": (1, torch.arange(3)), b"k": b"v"}


def test_plain_content_is_read_without_running_code(tmp_path):
    model, optimizer = walked()
    checkpoint.save(tmp_path, optimizer, PLAIN)
    extra, point, other = loaded(tmp_path)
    assert torch.equal(extra.pop("pair")[1], torch.arange(3))
    assert extra == {key: value for key, value in PLAIN.items() if key != "pair"}
    assert torch.equal(point, flat(model))
    assert other.batches_drawn == optimizer.batches_drawn


@pytest.mark.parametrize("extra", [np.ones(2), Path("here"), Evil()], ids=["NumPy", "a path", "code"])
def test_other_content_is_refused_where_code_must_not_run(tmp_path, extra):
    _, optimizer = walked()
    with pytest.raises(ValueError, match=r"checkpoint.save: extra and batches must be"):
        checkpoint.save(tmp_path, optimizer, extra)
    assert names(tmp_path) == []
    checkpoint.save(tmp_path, optimizer, extra, weights_only=False)
    model, other = built(seed=1)
    before = flat(model)
    with pytest.raises(ValueError, match=r"holds more than is read without running code.*weights_only=False"):
        checkpoint.load(tmp_path, other)
    assert not Evil.ran
    assert torch.equal(flat(model), before)
    assert other.steps_taken == 0


def test_batches_are_checked_as_well(tmp_path):
    model, optimizer = built()
    batches = [(x.numpy(), y.numpy()) for x, y in regression_batches(8)]
    inner = squared_error(model)
    next(optimizer.rounds(batches, lambda batch: inner(tuple(map(torch.from_numpy, batch)))))
    assert len(optimizer.state_dict()["optex"]["window"]) > 0
    with pytest.raises(ValueError, match="extra and batches must be"):
        checkpoint.save(tmp_path, optimizer)


# ---------------------------------------------------------------- several ranks


FAILING_RANKS = [
    ("rest", 0, checkpoint, "_write_rest"),
    ("slices", 1, dcp.FileSystemWriter, "write_data"),  # among torch's own messages
    ("metadata", 0, dcp.FileSystemWriter, "finish"),
    ("sums", 1, folders, "checked_in"),
    ("manifest", 0, folders, "write_manifest"),
]


def on_two_ranks(rank, directory):
    """Save, save again, fail in every phase, be stopped, be damaged; what was found on this rank."""
    said: dict[str, Any] = {}
    model, optimizer = walked(2, DistributedEvaluator())
    folder = checkpoint.save(directory, optimizer, PLAIN)
    said["files"] = names(folder)
    said["folder"] = folder.name
    for name, chosen, owner, function in FAILING_RANKS:
        said[name] = fails_on(chosen, rank, owner, function, directory, optimizer)
        torch.distributed.barrier()
        said[f"{name} left"] = names(directory)
    checkpoint.save(directory, optimizer, "again")
    walk(model, optimizer, 1)
    newest = checkpoint.save(directory, optimizer, "damaged")
    if rank == 0:
        spoil(next(newest.glob("__1_*")))
    torch.distributed.barrier()
    twin, other = built(DistributedEvaluator())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said["extra"] = checkpoint.load(directory, other)
    said["warned"] = [str(warning.message) for warning in caught if warning.category is CheckpointWarning]
    other.gather()
    said["point"] = flat(twin).numpy()
    _, early = built(DistributedEvaluator())
    try:
        checkpoint.save(directory, early)
    except ValueError as error:
        said["refused"] = str(error)
    return said


def fails_on(chosen, rank, owner, name, directory, optimizer):
    """What a save says when a function fails on one rank."""
    original = getattr(owner, name)

    def failing(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == chosen:
        setattr(owner, name, failing)
    try:
        checkpoint.save(directory, optimizer, "new")
    except Exception as error:  # noqa: BLE001  (the message is the test's)
        return f"{type(error).__name__}: {error}"
    finally:
        setattr(owner, name, original)


def test_two_ranks(tmp_path):
    first, second = run_ranks(on_two_ranks, 2, tmp_path)
    for said in (first, second):
        assert said["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "rest-0.pt"]
        for name, *_ in FAILING_RANKS:
            assert said[f"{name} left"] == [said["folder"]]
        assert said["extra"] == "again"
        assert "checkpoints of later steps than 0" in said["refused"]
    for name, chosen, *_ in FAILING_RANKS:
        own, others = (first, second) if chosen == 0 else (second, first)
        assert own[name] == "OSError: [Errno 28] No space left on device"
        assert re.match(
            f"RuntimeError: checkpoint.*: failed on rank {chosen}: OSError: .*see its", others[name]
        )
    assert re.search(r"is damaged \(__1_0.distcp has another SHA-256.*Going on from", *first["warned"])
    assert second["warned"] == []
    model, _ = walked(2)
    np.testing.assert_allclose(first["point"], flat(model), atol=1e-6)


def save_split(rank, directory):
    model, optimizer = walked(2, DistributedEvaluator())
    checkpoint.save(directory, optimizer, PLAIN)
    return flat(model).numpy()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_in_metadata_are_read_whatever_python_wrote_them(tmp_path, module):
    (tmp_path / ".metadata").write_bytes(f"c{module}\nPosixPath\n(Va\nVb\ntR.".encode())
    with (tmp_path / ".metadata").open("rb") as file:
        assert slices._MetadataUnpickler(file).load() == Path("a/b")


@pytest.mark.parametrize("recent", [True, False])
def test_slices_are_read_without_running_code(tmp_path, recent, monkeypatch):
    if recent and not slices._LOAD_TAKES_NO_DIST:
        pytest.skip("torch's load takes no no_dist")
    monkeypatch.setattr(slices, "_LOAD_TAKES_NO_DIST", recent)
    first, _ = run_ranks(save_split, 2, tmp_path)
    extra, point, _ = loaded(tmp_path)
    assert extra["epoch"] == 3
    np.testing.assert_array_equal(point, first)
    folder = newest_in(tmp_path)
    # Whoever means harm writes the manifest, too.
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.planner_data = Evil()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    files = [name for name in names(folder) if name != "manifest.json"]
    folders.write_manifest(folder, folders.checked_in(folder, files))
    with pytest.raises(ValueError, match=r"holds more than is read without running code \(.*builtins\.setattr"):
        loaded(tmp_path)
    assert not Evil.ran
