"""What is in a directory of checkpoints, while others add and remove."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from kasmina_ext.checkpoint import format, legacy
from kasmina_ext.checkpoint.errors import CheckpointDamaged, CheckpointNotFound
from kasmina_ext.checkpoint.files import UNREADABLE, OpenDirectory, list_directories
from kasmina_ext.checkpoint.forks import without_lost_threads
from kasmina_ext.checkpoint.header import LAYER, SEED, age_of, problem_with

log = logging.getLogger(__name__)

Entry = dict[str, Any]
"""What a list shows: ``checkpoint_id, kind`` ("seed" or "layer") ``, layer_id, seed_id, tag, timestamp`` (milliseconds),
``priority, lifecycle_state, version, size`` (bytes of the tensors' file), ``summary``; None where there is none."""

PATIENCE = 100
"""How often what was found is looked for again when others remove it meanwhile."""

_FIELDS = (
    "kind",
    "layer_id",
    "seed_id",
    "tag",
    "timestamp",
    "priority",
    "lifecycle_state",
    "version",
    "size",
    "summary",
)
_FILES = (*format.FILES, legacy.MANIFEST)
_CONTENT = {SEED: {"state_data", "blueprint_state"}, LAYER: {"content"}}
_TICK = 10_000_000  # ns; two changes within a tick of the kernel's clock leave the same time
_PAUSE = 0.002  # s

Item = TypeVar("Item")
Found = Entry | CheckpointDamaged | OSError


class Catalog:
    """The entries of one directory. What was read once is kept in ``cache``, by identifier, and used while the same
    directory stands under that name.
    """

    def __init__(self, root: Path, cache: dict[str, Entry]) -> None:
        self.root, self._cache = root, cache

    def entries(self, prefix: str = "") -> list[Entry]:
        """Of those whose identifier starts with ``prefix``, newest first; what is damaged is logged and left out."""
        names = list_directories(self.root)
        for gone in set(self._cache).difference(names):
            self._cache.pop(gone, None)
        found = []
        for _, entry in self._look(name for name in names if name.startswith(prefix)):
            if isinstance(entry, Exception):
                log.warning("%s", entry)
            else:
                found.append(entry)
        return sorted(found, key=age_of, reverse=True)

    def scan(self) -> Iterator[tuple[str, Found]]:
        """Each identifier with its entry, or with what is wrong with its metadata (OSError: it cannot be read)."""
        return self._look(list_directories(self.root))

    def settled(self, find: Callable[[], list[Item]]) -> list[Item]:
        """What ``find`` finds; nothing only if there was nothing.

        A scan that runs while a checkpoint is replaced by a newer one may miss both: the old one was gone
        when it came there, the new one came when it had passed. So nothing counts only when the
        directory has not changed meanwhile.
        """
        found: list[Item] = []
        for _ in range(PATIENCE):
            before = self._changed_at()
            found = find()
            if found or before == self._changed_at() < time.time_ns() - _TICK:
                break
            time.sleep(_PAUSE)
        return found

    def _changed_at(self) -> int:
        try:
            return os.stat(self.root).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _look(self, names: Iterator[str] | list[str]) -> Iterator[tuple[str, Found]]:
        for name in names:
            try:
                entry = self._entry(name)
            except CheckpointNotFound:  # removed meanwhile
                continue
            except CheckpointDamaged as error:
                yield name, error
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                yield name, error
            else:
                if entry is not None:
                    yield name, entry

    def _entry(self, name: str) -> Entry | None:
        """None for a directory that has nothing to do with checkpoints."""
        with OpenDirectory(self.root, name) as directory:
            stamp = directory.stamp(format.METADATA, format.CHECKSUM)
            cached = self._cache.get(name)
            if cached is not None and cached["stamp"] == stamp:
                return {key: deepcopy(value) for key, value in cached.items() if key != "stamp"}
            if not set(_FILES).intersection(directory.names()):
                return None
            header = legacy.read_header(directory) if legacy.is_legacy(directory) else format.read_header(directory)
            problem = problem_with(header)
            if problem:
                raise directory.damaged(format.METADATA, problem)
            entry = {"checkpoint_id": name, **{field: header.get(field) for field in _FIELDS}}
            self._cache[name] = {**deepcopy(entry), "stamp": stamp}
            return entry


def is_checkpoint(path: Path) -> bool:
    """Whether it is a directory, no link, that has a checkpoint's files, whole or not."""
    if path.is_symlink() or not path.is_dir():
        return False
    return any(os.path.lexists(path / name) for name in _FILES)


@without_lost_threads()
def read_any(
    root: Path, checkpoint_id: str, max_bytes: int | None = None, check: format.Check | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(header, content)`` of a checkpoint of any kind and age, all verified; the header with ``version`` and
    ``checkpoint_id``. ``max_bytes`` and ``check`` (whose header has the identifier too) as in
    :func:`kasmina_ext.checkpoint.format.read`.
    """
    named = (
        None if check is None else lambda header, content: check({"checkpoint_id": checkpoint_id, **header}, content)
    )
    with OpenDirectory(root, checkpoint_id) as directory:
        if legacy.is_legacy(directory):
            header, content = legacy.read(directory, max_bytes=max_bytes, check=named)
            version = legacy.VERSION
        else:
            header, content = format.read_from(directory, max_bytes=max_bytes, check=named)
            version = format.VERSION
        problem = problem_with(header)
        if not problem and content.keys() != _CONTENT[header["kind"]]:
            problem = "has other fields than a checkpoint of its kind"
        if problem:
            raise directory.damaged(format.METADATA, problem)
    return {"version": version, "checkpoint_id": checkpoint_id, **header}, content
