"""Directories that appear whole or not at all, and reading that trusts no name, no size and no link.

A directory is written inside a workspace, ``.saving-<random>`` in the same root: every file and the directory are
fsynced, then it is renamed to its name and the root is fsynced. So a crash between any two system calls leaves the
directory whole or absent. The workspace holds a lock file that its writer keeps locked (``flock``): the kernel lets go
of it when the process dies, however it dies, and only then does the next writer clean up.

A directory is removed by renaming it to ``.removed-<random>`` first, so that no reader finds half of one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from kasmina_ext.checkpoint.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointSaveError,
    InvalidCheckpointId,
)

try:
    import fcntl
except ImportError:  # Windows: the package works there, checkpoints do not
    fcntl = None  # type: ignore[assignment]

# fullmatch: "$" would let a newline pass.
_ID = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_SAVING = re.compile(r"\.saving-[0-9a-f]{16}")
_REMOVED = re.compile(r"\.removed-[0-9a-f]{16}")
_LOCK = "lock"
_PAYLOAD = "checkpoint"

_NOFOLLOW, _CLOEXEC, _ISDIR, _NONBLOCK, _NOCTTY = (
    getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "CLOEXEC", "DIRECTORY", "NONBLOCK", "NOCTTY")
)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC
# O_NONBLOCK: a fifo planted under the name of a file must not make a reader wait for ever.
_READ = os.O_RDONLY | _NOFOLLOW | _NONBLOCK | _NOCTTY | _CLOEXEC
_DIRECTORY = os.O_RDONLY | _ISDIR | _CLOEXEC
_held: set[int] = set()
"""Descriptors of the locks of this process."""
_STEP = 256 << 10  # bytes copied, hashed and handed to the system at a time: they stay in a core's cache
UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE})
"""Errors of the system that say who may read, or that the disk is ill, and nothing about what was saved."""
# Nor does want of a resource of this process. All these are raised as they are.
_OURS = UNREADABLE | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN}


def checked_id(checkpoint_id: object) -> str:
    """The identifier; :class:`InvalidCheckpointId` for anything but 1 to 128 letters, digits, ``_`` and ``-``."""
    if isinstance(checkpoint_id, str) and _ID.fullmatch(checkpoint_id):
        return checkpoint_id
    raise InvalidCheckpointId(f"Invalid checkpoint_id: {_shown(checkpoint_id)}")


def _require_posix() -> None:
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "checkpoints need flock and openat, which this system does not have")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({type(value).__name__})"


# ---- writing -------------------------------------------------------------------------------------


class NewFile:
    """A file being written: its size and sha256 are known when it is closed, and then it is on the disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self.size = path, hashlib.sha256(), 0
        self._fd = os.open(path, _CREATE, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """All of ``data``, however little of it the system takes at a time."""
        view = memoryview(data).cast("B")
        buffer = memoryview(bytearray(min(len(view), _STEP)))
        with _named(self._path):
            for start in range(0, len(view), _STEP):
                # A copy: what is hashed is what is written, though another thread may be training these very tensors.
                part = buffer[: len(view) - start]
                part[:] = view[start : start + _STEP]
                self._digest.update(part)
                self.size += len(part)
                while part:
                    part = part[os.write(self._fd, part) :]

    def sync(self) -> None:
        with _named(self._path):
            os.fsync(self._fd)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.sync()
        finally:
            os.close(self._fd)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of calls on descriptors do not name the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def new_directory(root: Path, name: str) -> Iterator[Path]:
    """Yields a path to fill with :class:`NewFile` s; when the block ends, ``root / name`` is there, whole and durable.

    If anything fails, in the block or after it, ``root`` is as it was. ``root`` is made where it is
    missing, and what dead writers left in it is removed. :class:`CheckpointSaveError` for what the
    system refuses, also where ``root / name`` exists already.
    """
    try:
        _require_posix()
        make_root(root)
        clean(root)
        workspace, lock = _new_workspace(root)
        try:
            payload = workspace / _PAYLOAD
            os.mkdir(payload)
            yield payload
            sync_directory(payload)
            _publish(payload, root / name)
        finally:
            _discard(workspace)
            _let_go(lock)
    except CheckpointSaveError:
        raise
    except OSError as error:
        raise CheckpointSaveError.because(name, error) from error


def make_root(root: Path) -> None:
    """``root`` and its missing parents, durable."""
    made = []
    for folder in (root, *root.parents):
        if folder.is_dir():
            break
        made.append(folder)
    for folder in reversed(made):
        with suppress(FileExistsError):
            os.mkdir(folder)
        sync_directory(folder.parent)
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))


def _publish(payload: Path, target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(payload, target)  # refused if somebody was faster: a directory that is not empty is never replaced
    try:
        sync_directory(target.parent)
    except OSError:
        os.rename(target, payload)
        raise


def sync_directory(path: Path) -> None:
    fd = os.open(path, _DIRECTORY)
    try:
        with _named(path):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(fd)


# ---- workspaces, and what is left of them --------------------------------------------------------


def _new_workspace(root: Path) -> tuple[Path, int]:
    """A fresh workspace and its lock's descriptor.

    Between making the directory and locking it, somebody who cleans up may take it: then the lock is
    theirs or the file is gone, and another one is made.
    """
    while True:
        workspace = root / f".saving-{secrets.token_hex(8)}"
        os.mkdir(workspace, 0o700)
        try:
            lock = _take(workspace)
        except FileNotFoundError:
            continue
        except BaseException:
            _discard(workspace)
            raise
        if lock is not None:
            return workspace, lock


def _take(workspace: Path) -> int | None:
    """The descriptor of the workspace's lock, now ours; None while somebody else has it."""
    path = workspace / _LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW | _CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Locked, but is it still the one with that name? The last owner may have removed it.
        here, there = os.fstat(fd), os.stat(path, follow_symlinks=False)
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            _held.add(fd)
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _let_go(lock: int) -> None:
    _held.discard(lock)
    os.close(lock)


def _after_fork() -> None:
    """A fork's copy of a lock would go on holding it when the writer is dead."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _discard(path: Path) -> None:
    """Remove a tree as far as it goes; what stays is left for the next one who cleans up."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def clean(root: Path) -> None:
    """Remove what killed processes left in ``root``: workspaces that nobody holds, trees that were being removed."""
    for name in _names(root):
        if _REMOVED.fullmatch(name):
            _discard(root / name)
        elif _SAVING.fullmatch(name):
            _clean_workspace(root / name)


def _clean_workspace(workspace: Path) -> None:
    try:
        if not stat.S_ISDIR(os.stat(workspace, follow_symlinks=False).st_mode):
            return
        lock = _take(workspace)
    except OSError:  # just removed, or a file system without locks: better litter than somebody's work
        return
    if lock is not None:
        _discard(workspace)
        _let_go(lock)


def _names(root: Path) -> list[str]:
    try:
        return os.listdir(root)
    except FileNotFoundError:
        return []


# ---- whole directories ---------------------------------------------------------------------------


def list_directories(root: Path) -> list[str]:
    """Names in ``root`` that could be a checkpoint's, sorted; links and files are left out."""
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if _ID.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_directory(root: Path, name: str, *, durable: bool = False) -> bool:
    """Remove ``root / name`` at once for all who look; False where there is none. Works on a full disk.

    ``durable``: it stays away after a power cut, too.
    """
    removed = root / f".removed-{secrets.token_hex(8)}"
    try:
        os.rename(root / name, removed)
    except FileNotFoundError:
        return False
    try:
        if durable:
            sync_directory(root)
    finally:
        _discard(removed)
    return True


def move_directory(root: Path, name: str, target_root: Path) -> bool:
    """Move ``root / name`` into another root of the same file system; False where there is none."""
    if not os.path.lexists(root / name):
        return False
    make_root(target_root)
    if os.path.lexists(target_root / name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target_root / name))
    try:
        os.rename(root / name, target_root / name)
    except FileNotFoundError:
        return False
    sync_directory(target_root)
    sync_directory(root)
    return True


# ---- reading -------------------------------------------------------------------------------------


class OpenDirectory:
    """A checkpoint's directory, opened once: whatever happens to its name, all that is read comes from this one.

    ``name`` may be a path inside it for :meth:`open` (``tensors/a.pt``): no part of it may be a link.
    """

    def __init__(self, root: Path, checkpoint_id: str) -> None:
        self.checkpoint_id, self._path = checked_id(checkpoint_id), root / checkpoint_id
        _require_posix()
        try:
            self._fd = os.open(self._path, _DIRECTORY | _NOFOLLOW)
        except FileNotFoundError:
            raise CheckpointNotFound(checkpoint_id) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                kind = "a symbolic link" if self._path.is_symlink() else "no directory"
                raise self.damaged(".", f"{self._path} is {kind}") from None
            raise self._refused(".", error) from error

    def damaged(self, file: str, reason: str) -> CheckpointDamaged:
        return CheckpointDamaged(self.checkpoint_id, file, reason)

    def __enter__(self) -> OpenDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def names(self) -> list[str]:
        """Of everything in it, sorted."""
        try:
            return sorted(os.listdir(self._fd))
        except OSError as error:
            raise self._refused(".", error) from error

    def stamp(self, *names: str) -> tuple[tuple[int, ...] | None, ...]:
        """Tells this directory and these files of it from any others that had their names before."""
        return self._stamp("."), *map(self._stamp, names)

    def _stamp(self, name: str) -> tuple[int, ...] | None:
        try:
            facts = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns

    def open(self, name: str) -> OpenFile:
        """A regular file in it. :class:`CheckpointDamaged` for anything else, :class:`CheckpointNotFound` if all is
        gone.
        """
        try:
            return self._open(name)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise self._refused(name, error) from error

    def _open(self, name: str) -> OpenFile:
        *folders, last = name.split("/")
        at, opened = self._fd, []
        try:
            for folder in folders:
                at = os.open(folder, _DIRECTORY | _NOFOLLOW, dir_fd=at)
                opened.append(at)
            # Looked at before it is opened, since opening a device can do things.
            self._check_kind(name, os.stat(last, dir_fd=at, follow_symlinks=False))
            fd = os.open(last, _READ, dir_fd=at)
        finally:
            for folder_fd in opened:
                os.close(folder_fd)
        try:
            facts = os.fstat(fd)
            self._check_kind(name, facts)
        except BaseException:
            os.close(fd)
            raise
        return OpenFile(self, name, fd, facts.st_size)

    def _check_kind(self, name: str, facts: os.stat_result) -> None:
        if not stat.S_ISREG(facts.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(facts.st_mode) else "no regular file"
            raise self.damaged(name, f"is {kind}")

    def _missing(self, name: str) -> Exception:
        try:
            here, there = os.fstat(self._fd), os.stat(self._path, follow_symlinks=False)
            if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                return self.damaged(name, "is missing")
        except FileNotFoundError:
            pass
        return CheckpointNotFound(f"{self.checkpoint_id} (removed while it was read)")

    def _refused(self, name: str, error: OSError) -> Exception:
        if error.errno in _OURS:
            return error
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return self.damaged(name, "is a symbolic link, or lies behind one")
        return self.damaged(name, f"cannot be read: {error.strerror}")

    def read(self, name: str, limit: int) -> bytes:
        """All of a file of at most ``limit`` bytes; a larger one is refused unread."""
        with self.open(name) as file:
            if file.size > limit:
                raise self.damaged(name, f"has {file.size} bytes, at most {limit} are read")
            content = bytearray(file.size)
            file.read_into(memoryview(content))
            file.expect_end()
            return bytes(content)


class OpenFile:
    """A regular file that is read once from its beginning; what was read is hashed on the way."""

    def __init__(self, directory: OpenDirectory, name: str, fd: int, size: int) -> None:
        self._directory, self._name, self._fd, self.size = directory, name, fd, size
        self._digest = hashlib.sha256()

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read_into(self, view: memoryview) -> None:
        """Fill ``view``; :class:`CheckpointDamaged` where the file ends before."""
        for start in range(0, len(view), _STEP):
            step = view[start : start + _STEP]
            part = step
            while part:
                count = self._readv(part)
                if not count:
                    raise self._directory.damaged(self._name, f"is cut off: {self.size} bytes were promised")
                part = part[count:]
            self._digest.update(step)

    def expect_end(self) -> None:
        if self._readv(memoryview(bytearray(1))):
            raise self._directory.damaged(self._name, f"has more than {self.size} bytes")

    def _readv(self, view: memoryview) -> int:
        try:
            return os.readv(self._fd, [view])
        except OSError as error:
            raise self._directory._refused(self._name, error) from error
