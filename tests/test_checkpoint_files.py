"""Directories that appear whole or not at all: failures at every system call, locks, left-overs, confined reading."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
from checkpoint_cases import FailingSystem, tree_of

from kasmina_ext.checkpoint import files
from kasmina_ext.checkpoint.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointSaveError,
    InvalidCheckpointId,
)

FILES = {"a": b"first", "b": b"x" * 1000}


def save(root, name="one", content=FILES):
    with files.new_directory(root, name) as path:
        for file, data in content.items():
            with files.NewFile(path / file) as new:
                new.write(data)


def read(root, name="one"):
    with files.OpenDirectory(root, name) as directory:
        return {file: directory.read(file, 10_000) for file in directory.names()}


# ---- identifiers ---------------------------------------------------------------------------------

BAD_IDS = [
    *(
        "",
        ".",
        "..",
        "a/b",
        "/a",
        "../a",
        "a\n",
        "\na",
        "a\0",
        "a.b",
        "a b",
        "ä",
        "a\\b",
        "ａ",
        "٣",
        "a" * 129,
        "a" * 500,
    ),
    *(None, 3, b"a", ["a"], ("a",), 1.0),
]


@pytest.mark.parametrize("name", BAD_IDS, ids=repr)
def test_bad_identifiers_are_refused_before_anything_is_touched(tmp_path, name):
    with pytest.raises(InvalidCheckpointId, match="Invalid checkpoint_id"):
        files.checked_id(name)
    with pytest.raises(ValueError, match="Invalid checkpoint_id"):
        files.OpenDirectory(tmp_path / "nowhere", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "-", "_", "a" * 128, "L-1_2_3", "0"])
def test_good_identifiers(name):
    assert files.checked_id(name) == name


# ---- writing -------------------------------------------------------------------------------------


def test_a_directory_appears_with_its_files_and_nothing_else(tmp_path):
    save(tmp_path)
    assert read(tmp_path) == FILES
    assert tree_of(tmp_path) == {"one": None, "one/a": FILES["a"], "one/b": FILES["b"]}


def test_short_writes_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "os", FailingSystem(short_writes=True))
    save(tmp_path)
    monkeypatch.undo()
    assert read(tmp_path) == FILES


def test_everything_is_synced_before_it_gets_its_name_and_the_root_after(tmp_path, monkeypatch):
    """What a power loss between any two calls leaves behind follows from this order."""
    order, real_fsync, real_rename = [], os.fsync, os.rename

    def fsync(fd):
        order.append(os.readlink(f"/proc/self/fd/{fd}"))
        real_fsync(fd)

    def rename(source, target):
        order.append((str(source), str(target)))
        real_rename(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "rename", rename)
    save(tmp_path)
    payload = os.path.dirname(order[0])
    assert order == [f"{payload}/a", f"{payload}/b", payload, (payload, f"{tmp_path}/one"), str(tmp_path)]


def test_missing_roots_are_made(tmp_path):
    save(tmp_path / "x/y/z")
    assert read(tmp_path / "x/y/z") == FILES


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_failure_at_any_call_leaves_all_as_it_was(tmp_path, monkeypatch, code):
    save(tmp_path, "before")
    before = tree_of(tmp_path)
    counting = FailingSystem()
    monkeypatch.setattr(files, "os", counting)
    save(tmp_path)
    # What comes after the last sync only tidies up.
    last = max(k for k, call in enumerate(counting.calls) if call == "fsync")
    assert last >= 9
    for k in range(last + 1):
        monkeypatch.setattr(files, "os", os)
        files.remove_directory(tmp_path, "one")
        monkeypatch.setattr(files, "os", FailingSystem(k, code))
        with pytest.raises(CheckpointSaveError, match="saving checkpoint one failed") as caught:
            save(tmp_path)
        assert caught.value.errno == code
        assert os.strerror(code) in str(caught.value)
        assert isinstance(caught.value, (OSError, RuntimeError))
        assert tree_of(tmp_path) == before, counting.calls[k]


def test_an_error_of_the_caller_leaves_all_as_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_directory(tmp_path, "one") as path:
        (path / "half").write_bytes(b"1")
        raise KeyboardInterrupt
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("kind", ["directory", "file", "link", "dangling"])
def test_nothing_is_replaced(tmp_path, kind):
    target = tmp_path / "one"
    if kind == "directory":
        save(tmp_path)
    elif kind == "file":
        target.write_bytes(b"mine")
    else:
        elsewhere = tmp_path / "elsewhere"
        if kind == "link":
            elsewhere.mkdir()
        target.symlink_to(elsewhere)
    before = tree_of(tmp_path)
    with pytest.raises(CheckpointSaveError, match="File exists"):
        save(tmp_path, content={"a": b"other"})
    assert tree_of(tmp_path) == before


def test_a_faster_rival_is_not_replaced(tmp_path):
    with pytest.raises(CheckpointSaveError), files.new_directory(tmp_path, "one"):
        save(tmp_path)  # after this one began, before it ends
    assert read(tmp_path) == FILES
    assert tree_of(tmp_path).keys() == {"one", "one/a", "one/b"}


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(CheckpointSaveError) as caught:
        save(tmp_path / "root")
    assert caught.value.errno == errno.ENOTDIR


@pytest.fixture
def read_only_root():
    """A directory that this process may not write; where the tests run as root they become nobody for a while."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        root.mkdir()
        save(root, "before")
        root.chmod(0o555)
        Path(name).chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield root
        if user == 0:
            os.seteuid(0)
        root.chmod(0o755)


def test_a_read_only_root(read_only_root):
    before = tree_of(read_only_root)
    with pytest.raises(CheckpointSaveError, match="Permission denied") as caught:
        save(read_only_root)
    assert caught.value.errno == errno.EACCES
    assert tree_of(read_only_root) == before
    assert read(read_only_root, "before") == FILES


# ---- left-overs ----------------------------------------------------------------------------------


def _die_while_saving(root, ready):
    with files.new_directory(root, "never") as path:
        (path / "half").write_bytes(b"1")
        ready.set()
        time.sleep(60)


def test_the_dead_are_cleaned_up_and_the_living_left_alone(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=_die_while_saving, args=(tmp_path, ready), daemon=True)
    child.start()
    assert ready.wait(30)
    with files.new_directory(tmp_path, "mine"):
        files.clean(tmp_path)
        save(tmp_path)  # cleans too
        assert len(list(tmp_path.glob(".saving-*/checkpoint"))) == 2
    assert len(list(tmp_path.glob(".saving-*"))) == 1
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    save(tmp_path, "two")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "one", "two"}


def test_every_shape_of_litter(tmp_path):
    (tmp_path / ".saving-0123456789abcdef").mkdir()  # killed before there was a lock
    locked = tmp_path / ".saving-1123456789abcdef"
    (locked / "checkpoint").mkdir(parents=True)
    (locked / "lock").touch()
    (tmp_path / ".saving-2123456789abcdef/checkpoint").mkdir(parents=True)  # killed while it was removed
    (tmp_path / ".removed-0123456789abcdef/tensors").mkdir(parents=True)
    others = [".saving-xyz", ".saving-0123456789abcdef0", ".hidden", "mine"]
    for name in others:
        (tmp_path / name).mkdir()
    held = tmp_path / ".saving-3123456789abcdef"
    held.mkdir()
    with open(held / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files.clean(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {*others, held.name}
    files.clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_litter_that_is_a_trap(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()
    for prefix in (".saving", ".removed"):
        (root / f"{prefix}-0123456789abcdef").symlink_to(precious)
        trap = root / f"{prefix}-1123456789abcdef"
        trap.mkdir()
        (trap / "checkpoint").symlink_to(precious)
    (root / ".saving-2123456789abcdef").mkdir()
    (root / ".saving-2123456789abcdef/lock").symlink_to(precious / "data")
    save(root)
    assert tree_of(precious) == {"data": b"1"}
    assert read(root) == FILES


def test_without_locks_nothing_is_cleaned_up(tmp_path, monkeypatch):
    (tmp_path / ".saving-0123456789abcdef").mkdir()

    def no_locks(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    files.clean(tmp_path)
    with pytest.raises(CheckpointSaveError):
        save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".saving-0123456789abcdef"]


def test_a_workspace_that_is_taken_before_it_is_locked(tmp_path, monkeypatch):
    """Cleaning runs between the making of the directory and its locking, at each step of the locking."""
    real_open, stolen = os.open, []

    def open_and_clean(path, *args, **kwargs):
        before = str(path).endswith("lock") and len(stolen) < 4 and not stolen.append(path)
        if before and len(stolen) % 2:
            monkeypatch.setattr(files.os, "open", real_open)
            files.clean(tmp_path)
            monkeypatch.setattr(files.os, "open", open_and_clean)
        fd = real_open(path, *args, **kwargs)
        if before and not len(stolen) % 2:
            monkeypatch.setattr(files.os, "open", real_open)
            files.clean(tmp_path)
            monkeypatch.setattr(files.os, "open", open_and_clean)
        return fd

    monkeypatch.setattr(files.os, "open", open_and_clean)
    save(tmp_path)
    assert len(stolen) >= 4
    assert read(tmp_path) == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"one"}


def test_cleaning_while_many_save(tmp_path):
    stop, errors = threading.Event(), []

    def clean_for_ever():
        while not stop.is_set():
            files.clean(tmp_path)

    def save_some(k):
        try:
            for j in range(5):
                save(tmp_path, f"{k}_{j}")
        except BaseException as error:
            errors.append(error)

    cleaners = [threading.Thread(target=clean_for_ever) for _ in range(2)]
    savers = [threading.Thread(target=save_some, args=(k,)) for k in range(8)]
    for thread in cleaners + savers:
        thread.start()
    for thread in savers:
        thread.join()
    stop.set()
    for thread in cleaners:
        thread.join()
    assert errors == []
    assert {path.name for path in tmp_path.iterdir()} == {f"{k}_{j}" for k in range(8) for j in range(5)}
    assert all(read(tmp_path, f"{k}_{j}") == FILES for k in range(8) for j in range(5))


# ---- removing ------------------------------------------------------------------------------------


def test_removing(tmp_path):
    save(tmp_path)
    assert files.remove_directory(tmp_path, "one")
    assert tree_of(tmp_path) == {}
    assert not files.remove_directory(tmp_path, "one")


def test_removing_on_a_full_disk(tmp_path, monkeypatch):
    save(tmp_path)
    system = FailingSystem()
    monkeypatch.setattr(files, "os", system)
    assert files.remove_directory(tmp_path, "one")
    assert set(system.calls) <= {"rename"}
    save(tmp_path, "two")
    assert files.remove_directory(tmp_path, "two", durable=True)
    assert system.calls[-1] == "fsync"


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    save(tmp_path, "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert files.remove_directory(tmp_path, "link")
    assert read(tmp_path, "target") == FILES


def test_a_reader_of_what_is_removed_is_told_so(tmp_path):
    save(tmp_path)
    with files.OpenDirectory(tmp_path, "one") as directory:
        directory.read("a", 10)
        files.remove_directory(tmp_path, "one")
        with pytest.raises(CheckpointNotFound, match="Checkpoint not found: one .removed while it was read"):
            directory.read("b", 10_000)
        save(tmp_path)  # another one of the same name
        with pytest.raises(CheckpointNotFound):
            directory.read("b", 10_000)


# ---- reading -------------------------------------------------------------------------------------


def test_a_missing_directory(tmp_path):
    for error in (ValueError, FileNotFoundError):
        with pytest.raises(error, match="Checkpoint not found"):
            files.OpenDirectory(tmp_path, "one")


def make_odd_file(path, kind, outside):
    path.unlink()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            path.symlink_to("/dev/zero")
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "device", "socket"])
def test_only_regular_files_are_read(tmp_path, kind):
    save(tmp_path)
    (tmp_path / "outside").write_bytes(FILES["a"])
    make_odd_file(tmp_path / "one/a", kind, tmp_path / "outside")
    with (
        files.OpenDirectory(tmp_path, "one") as directory,
        pytest.raises(CheckpointDamaged, match="checkpoint one: a: is (a symbolic link|no regular file)"),
    ):
        directory.read("a", 10)


def test_no_part_of_a_path_may_be_a_link(tmp_path):
    save(tmp_path)
    (tmp_path / "one/sub").symlink_to(tmp_path / "one")
    with (
        files.OpenDirectory(tmp_path, "one") as directory,
        pytest.raises(CheckpointDamaged, match="sub/a: is a symbolic link, or lies behind one"),
    ):
        directory.read("sub/a", 10)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_the_directory_itself_must_be_one(tmp_path, kind):
    save(tmp_path, "real")
    if kind == "link":
        (tmp_path / "one").symlink_to(tmp_path / "real")
    else:
        (tmp_path / "one").write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match="is a symbolic link|is no directory"):
        files.OpenDirectory(tmp_path, "one")
    assert files.list_directories(tmp_path) == ["real"]


def test_hard_links_are_files(tmp_path):
    """Backups are made of them."""
    save(tmp_path)
    os.link(tmp_path / "one/a", tmp_path / "backup")
    assert read(tmp_path) == FILES


def test_a_large_file_is_refused_unread(tmp_path):
    save(tmp_path)
    os.truncate(tmp_path / "one/a", 4 << 30)  # sparse
    started = time.monotonic()
    with (
        files.OpenDirectory(tmp_path, "one") as directory,
        pytest.raises(CheckpointDamaged, match="a: has 4294967296 bytes, at most 1000 are read"),
    ):
        directory.read("a", 1000)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_whose_size_changes_while_it_is_read(tmp_path, change):
    save(tmp_path)
    with files.OpenDirectory(tmp_path, "one") as directory, directory.open("b") as file:
        os.truncate(tmp_path / "one/b", file.size + change)
        with pytest.raises(CheckpointDamaged, match="is cut off|has more than 1000 bytes"):
            file.read_into(memoryview(bytearray(file.size)))
            file.expect_end()


def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path)
    refused = (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE)
    for code, error in ((errno.EINVAL, CheckpointDamaged), *((code, OSError) for code in refused)):

        def fail(*_, code=code, **__):
            raise OSError(code, os.strerror(code))

        with files.OpenDirectory(tmp_path, "one") as directory:
            monkeypatch.setattr(files.os, "readv", fail)
            with pytest.raises(error) as caught:
                directory.read("a", 10)
            monkeypatch.undo()
        assert isinstance(caught.value, CheckpointDamaged) == (error is CheckpointDamaged)


def test_descriptors_are_closed(tmp_path):
    save(tmp_path)
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        save(tmp_path, "two")
        read(tmp_path, "two")
        files.remove_directory(tmp_path, "two")
        with pytest.raises(CheckpointSaveError):
            save(tmp_path)
        with pytest.raises(CheckpointDamaged), files.OpenDirectory(tmp_path, "one") as directory:
            directory.read("sub/a", 1)
    assert len(os.listdir("/proc/self/fd")) == count
