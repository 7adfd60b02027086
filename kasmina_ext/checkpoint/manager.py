"""Checkpoints of seeds and of whole layers in one directory, shared by threads and processes."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from kasmina_ext.arguments import integer, positive
from kasmina_ext.checkpoint import format
from kasmina_ext.checkpoint.catalog import PATIENCE, Catalog, Entry, Found, is_checkpoint, read_any
from kasmina_ext.checkpoint.content import to_device
from kasmina_ext.checkpoint.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointSaveError,
    InvalidCheckpointId,
)
from kasmina_ext.checkpoint.files import (
    checked_id,
    clean,
    move_directory,
    remove_directory,
)
from kasmina_ext.checkpoint.header import (
    LAYER,
    MAX_TIMESTAMP,
    PRIORITIES,
    SEED,
    age_of,
    checked_layer_id,
    checked_priority,
    checked_seed_id,
    checked_tag,
    layer_header,
    lifecycle_of,
    plausible,
    seed_header,
)
from kasmina_ext.checkpoint.retention import group_of, in_excess
from kasmina_ext.checkpoint.tensor_file import Progress
from kasmina_ext.lifecycle import ExtendedLifecycle

log = logging.getLogger(__name__)

ARCHIVE = ".archive"  # never an identifier


class CheckpointManager:
    """Saves, finds, restores and removes checkpoints below ``checkpoint_dir``, which the first save makes where it is missing.

    Any number of managers, threads and processes may share a directory. A checkpoint is there when its
    save returns, whatever happens to the process or the power afterwards, and before that it is not
    seen by anybody. Directories that the Triton package wrote are listed and restored like any other.

    Retention: after each save, of all checkpoints of the same layer and seed (of the same layer and tag)
    the ``max_checkpoints_per_seed`` best stay: those of the highest priority, of one priority the newest.
    Critical ones always stay, and take places. So a save goes at once where others of higher priority
    take all places: its identifier is returned, a UserWarning says so, and loading finds the older ones.

    A timestamp is always later than the newest one of its seed, though the clock was set back. Timestamps
    more than a day ahead of the clock count as older than all others, and do not keep new ones from being
    the newest.

    A relative ``checkpoint_dir`` is below the working directory of now, whatever that becomes.

    Errors: ValueError for arguments and identifiers; :class:`CheckpointNotFound` (both ValueError and
    FileNotFoundError); :class:`CheckpointDamaged` (RuntimeError, "Integrity check failed ...", naming
    file and reason); :class:`CheckpointSaveError` (both OSError and RuntimeError), which leaves
    everything as it was.
    """

    def __init__(self, checkpoint_dir: str | PathLike[str], max_checkpoints_per_seed: int = 5) -> None:
        self.checkpoint_dir = Path(os.path.abspath(checkpoint_dir))
        self.max_checkpoints_per_seed = positive("max_checkpoints_per_seed", max_checkpoints_per_seed)
        self.metadata_cache: dict[str, Entry] = {}
        """What was read of each checkpoint for lists, by identifier; may be cleared at any time."""
        self._catalog = Catalog(self.checkpoint_dir, self.metadata_cache)
        self._newest: dict[str, int] = {}

    @property
    def archive_dir(self) -> Path:
        """Where archived checkpoints go: not listed, but still restored by their identifier."""
        return self.checkpoint_dir / ARCHIVE

    # ---- seeds -----------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        layer_id: str,
        seed_id: int,
        state_data: Mapping[str, Any],
        blueprint_state: Mapping[str, Any] | None = None,
        priority: str = "normal",
    ) -> str:
        """Save what a seed is; returns the identifier, ``{layer_id}_{seed_id}_{milliseconds}_{random}``.

        ``state_data`` and ``blueprint_state`` are JSON with tensors allowed anywhere, and tuples, NaN and
        any scalars as keys; they come back as given, tensors as plain ones. ``state_data["lifecycle_state"]``
        (a member, number or name) is what :meth:`list_checkpoints` filters by. ``priority`` is low, normal,
        high or critical. ValueError ("Invalid layer_id", "Invalid seed_id", "Invalid priority"); TypeError for
        values that cannot be saved, and for what is no dict.
        """
        layer_id, seed_id = checked_layer_id(layer_id), checked_seed_id(seed_id)
        priority = checked_priority(priority)
        for name, value in {"state_data": state_data, "blueprint_state": blueprint_state or {}}.items():
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
        prefix = f"{layer_id}_{seed_id}_"
        timestamp = self._next_timestamp(prefix, (layer_id, seed_id))
        header = seed_header(layer_id, seed_id, timestamp, priority, lifecycle_of(state_data))
        content = {"state_data": state_data, "blueprint_state": blueprint_state}
        return self._save(prefix, header, content)

    def restore_checkpoint(
        self, checkpoint_id: str, target_device: torch.device | str | int | None = None
    ) -> dict[str, Any]:
        """A seed's checkpoint: a dict with ``version, checkpoint_id, layer_id, seed_id, timestamp, priority,
        state_data, blueprint_state``, tensors on ``target_device`` (the CPU). All was verified.

        Archived ones are found too. :class:`InvalidCheckpointId`, also for a whole layer's.
        """
        header, content = self._read(checkpoint_id)
        if header["kind"] != SEED:
            raise InvalidCheckpointId(f"{checkpoint_id} is the checkpoint of a whole layer: use load_layer")
        if target_device is not None:
            content = to_device(content, target_device)
        names = ("version", "checkpoint_id", "layer_id", "seed_id", "timestamp", "priority")
        return {name: header[name] for name in names} | content

    def load_checkpoint(
        self, checkpoint_id: str, target_device: torch.device | str | int | None = None
    ) -> dict[str, Any]:
        """The same as :meth:`restore_checkpoint`."""
        return self.restore_checkpoint(checkpoint_id, target_device)

    def get_latest_checkpoint(self, layer_id: str, seed_id: int) -> str | None:
        """The identifier of the newest of a seed, or None."""
        found = self._catalog.settled(lambda: self.list_checkpoints(layer_id, seed_id, limit=1))
        return found[0]["checkpoint_id"] if found else None

    # ---- whole layers ----------------------------------------------------------------------------

    def save_layer(
        self,
        layer_id: str,
        tag: str,
        content: Mapping[str, Any],
        *,
        priority: str = "normal",
        summary: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        checkpoint_id: str | None = None,
    ) -> str:
        """Save any content under a tag; returns the identifier, ``{layer_id}_{tag}_{milliseconds}_{random}``.

        A tag (1 to 32 letters, digits, ``_`` and ``-``) names a line of checkpoints: :meth:`load_layer` finds
        the newest, retention counts each line alone. ``content`` is as in :meth:`save_checkpoint`; ``summary``
        is a little JSON for lists; ``progress(done, total)`` is called with bytes of tensors as they are
        written. ``checkpoint_id`` is one that :meth:`new_layer_id` gave for this layer and tag; by default a new one.
        """
        layer_id, tag = checked_layer_id(layer_id), checked_tag(tag)
        priority = checked_priority(priority)
        prefix = f"{layer_id}_{tag}_"
        if checkpoint_id is None:
            timestamp = self._next_timestamp(prefix, (layer_id, tag))
        else:
            timestamp = _timestamp_in(checked_id(checkpoint_id), prefix)
            if timestamp < 0:
                raise InvalidCheckpointId(f"Invalid checkpoint_id: {checkpoint_id} is none of {prefix}...")
        header = layer_header(layer_id, tag, timestamp, priority, summary or {})
        return self._save(prefix, header, {"content": content}, progress, checkpoint_id)

    def new_layer_id(self, layer_id: str, tag: str) -> str:
        """An identifier for a :meth:`save_layer` to come, later than all before. Only the first of a line looks at the
        directory.
        """
        prefix = f"{checked_layer_id(layer_id)}_{checked_tag(tag)}_"
        newest = self._newest.get(prefix)
        if newest is None:
            self._newest[prefix] = self._next_timestamp(prefix, (layer_id, tag))
        else:
            self._newest[prefix] = _later_than(newest)
        return f"{prefix}{self._newest[prefix]}_{secrets.token_hex(4)}"

    def load_layer(
        self,
        id_or_tag: str,
        layer_id: str | None = None,
        *,
        max_bytes: int | None = None,
        check: Callable[[dict[str, Any], Any], object] | None = None,
    ) -> dict[str, Any]:
        """What :meth:`save_layer` saved: a dict with ``version, checkpoint_id, kind, layer_id, tag, timestamp,
        priority, summary, content``, tensors on the CPU.

        ``id_or_tag`` is a tag, for the newest with it (of the layer ``layer_id``, where given), or an identifier.
        ``max_bytes`` bounds the tensors, which are refused unread above it. ``check(header, content)`` is called
        before any tensor is read, when only the metadata are verified: the content's tensors are on the device
        "meta", with dtype and shape but without memory. What it raises is raised.

        A tag whose newest is damaged is an error, :class:`CheckpointDamaged`: an older one is not taken in its
        place, :meth:`CheckpointRecovery.recover_layer` does that. InvalidCheckpointId for an identifier of another
        layer than ``layer_id``.
        """
        checked_id(id_or_tag)
        checked = None if check is None else lambda header, content: check(header, content.get("content"))
        for _ in range(PATIENCE):
            found = self._newest_of(id_or_tag, layer_id)
            try:
                header, content = self._read(found or id_or_tag, max_bytes, checked)
                break
            except CheckpointNotFound:
                if not found and not self._catalog.settled(lambda: self.list_layers(id_or_tag, layer_id)):
                    raise  # else it was removed meanwhile, because there is a newer one
        else:
            raise CheckpointNotFound(id_or_tag)
        if header["kind"] != LAYER:
            raise InvalidCheckpointId(f"{id_or_tag} is the checkpoint of a seed: use restore_checkpoint")
        if layer_id not in (None, header["layer_id"]):
            raise InvalidCheckpointId(
                f"{id_or_tag} is a checkpoint of the layer {header['layer_id']}, not of {layer_id}"
            )
        return header | content

    def _newest_of(self, tag: str, layer_id: str | None) -> str | None:
        """The identifier; its error where the newest cannot be read, as far as its name tells that it is one of these."""
        of_line = re.compile(
            rf"{'.+' if layer_id is None else re.escape(layer_id)}_{re.escape(tag)}_([0-9]{{1,16}})_.*"
        )
        found: list[dict[str, Any]] = []
        for name, entry in self._catalog.scan():
            if not isinstance(entry, Exception):
                if entry["tag"] == tag and layer_id in (None, entry["layer_id"]):
                    found.append(entry)
            elif parts := of_line.fullmatch(name):
                found.append({"checkpoint_id": name, "timestamp": int(parts[1]), "error": entry})
        newest = max(found, key=age_of, default={"checkpoint_id": None})
        error = newest.get("error")
        if isinstance(error, CheckpointDamaged):
            advice = "CheckpointRecovery(manager).recover_layer finds the newest that is whole"
            raise type(error)(error.checkpoint_id, error.file, f"{error.reason} ({advice})")
        if error is not None:
            raise error
        return newest["checkpoint_id"]

    def list_layers(self, tag: str, layer_id: str | None = None) -> list[Entry]:
        """Entries of a tag (of the layer ``layer_id``, where given), newest first."""
        return [e for e in self._catalog.entries() if e["tag"] == tag and layer_id in (None, e["layer_id"])]

    # ---- all of them -----------------------------------------------------------------------------

    def list_checkpoints(
        self,
        layer_id: str | None = None,
        seed_id: int | None = None,
        lifecycle_state: ExtendedLifecycle | int | str | None = None,
        limit: int | None = 100,
    ) -> list[Entry]:
        """At most ``limit`` entries, newest first; None: all. Whole layers are listed too, with ``seed_id`` None.

        Each is a dict: :data:`Entry`. Their metadata were verified; what is damaged is left out and logged
        (:meth:`scan` tells it).
        """
        state = None if lifecycle_state is None else int(ExtendedLifecycle.parse(lifecycle_state))
        if limit is not None and integer("limit", limit) < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        wanted = {"layer_id": layer_id, "seed_id": seed_id, "lifecycle_state": state}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        found = [e for e in self._catalog.entries() if all(e[name] == value for name, value in wanted.items())]
        return found[:limit]

    def delete_checkpoint(self, checkpoint_id: str, archive: bool = False) -> bool:
        """Remove a checkpoint, archived or not, or move it to the archive; whether there was one.

        Others see all of it or nothing. False, too, for what is no identifier, and for directories and files
        that are no checkpoints, whatever their names.
        """
        try:
            checked_id(checkpoint_id)
        except InvalidCheckpointId as error:
            log.warning("%s", error)
            return False
        self.metadata_cache.pop(checkpoint_id, None)
        if archive:
            if self.archive_dir.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, "the archive is a symbolic link", str(self.archive_dir))
            one = is_checkpoint(self.checkpoint_dir / checkpoint_id)
            return one and move_directory(self.checkpoint_dir, checkpoint_id, self.archive_dir)
        return any(
            is_checkpoint(root / checkpoint_id) and remove_directory(root, checkpoint_id, durable=True)
            for root in self.roots()
        )

    def roots(self) -> list[Path]:
        """The directory, and the archive unless it is a link: that could lead anywhere."""
        archive = self.archive_dir
        return [self.checkpoint_dir] if archive.is_symlink() else [self.checkpoint_dir, archive]

    def prune(self, keep: int | None = None) -> list[str]:
        """Apply retention to everything, with ``keep`` in place of ``max_checkpoints_per_seed``; the identifiers of what
        was removed. Also removes what killed saves have left.
        """
        keep = self.max_checkpoints_per_seed if keep is None else positive("keep", keep)
        clean(self.checkpoint_dir)
        return self._remove(in_excess(self._catalog.entries(), keep))

    def verify(self, checkpoint_id: str, *, max_bytes: int | None = None) -> None:
        """Read all of a checkpoint of any kind; the errors of :meth:`restore_checkpoint`."""
        self._read(checkpoint_id, max_bytes)

    def scan(self) -> Iterator[tuple[str, Found]]:
        """Each checkpoint's identifier with its entry, or with what is wrong with its metadata: CheckpointDamaged, or the
        system's OSError where it cannot be read.
        """
        return self._catalog.scan()

    # ---- what the methods share ------------------------------------------------------------------

    def _save(
        self,
        prefix: str,
        header: dict[str, Any],
        content: dict[str, Any],
        progress: Progress | None = None,
        checkpoint_id: str | None = None,
    ) -> str:
        checkpoint_id = checkpoint_id or f"{prefix}{header['timestamp']}_{secrets.token_hex(4)}"
        format.write(self.checkpoint_dir, checkpoint_id, header, content, progress=progress)
        try:
            group = self._group(prefix, group_of(header))
        except OSError as error:  # the save itself is done
            log.warning("after checkpoint %s was saved: %s", checkpoint_id, error)
            return checkpoint_id
        removed = self._remove(in_excess(group, self.max_checkpoints_per_seed))
        rank = PRIORITIES.index(header["priority"])
        better = sum(PRIORITIES.index(entry["priority"]) > rank for entry in group)
        if checkpoint_id in removed and better:  # not where newer ones came meanwhile
            text = (
                f"checkpoint {checkpoint_id} ({header['priority']}) was removed at once: {better} of higher priority "
                f"are there, {self.max_checkpoints_per_seed} are kept"
            )
            log.warning(text)
            warnings.warn(text, UserWarning, stacklevel=3)
        return checkpoint_id

    def _next_timestamp(self, prefix: str, group: tuple[Any, ...]) -> int:
        try:
            known = [entry["timestamp"] for entry in self._group(prefix, group)]
        except OSError as error:
            raise CheckpointSaveError.because(f"{prefix}...", error) from error
        return _later_than(max(filter(plausible, known), default=-1))

    def _group(self, prefix: str, group: tuple[Any, ...]) -> list[Entry]:
        """Entries of one line. Identifiers tell most of it, so that a save does not read the metadata of all others."""
        return [entry for entry in self._catalog.entries(prefix) if group_of(entry) == group]

    def _read(
        self, checkpoint_id: str, max_bytes: int | None = None, check: format.Check | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Header (with version and identifier) and content, from the directory or the archive."""
        checked_id(checkpoint_id)
        for root in self.roots():
            try:
                return read_any(root, checkpoint_id, max_bytes, check)
            except CheckpointNotFound:
                continue
        raise CheckpointNotFound(f"{checkpoint_id} (in {self.checkpoint_dir})")

    def _remove(self, entries: list[Entry]) -> list[str]:
        removed = []
        for entry in entries:
            try:
                if remove_directory(self.checkpoint_dir, entry["checkpoint_id"]):
                    removed.append(entry["checkpoint_id"])
            except OSError as error:  # the save itself is done
                log.warning("checkpoint %s cannot be removed: %s", entry["checkpoint_id"], error)
        return removed


_clock = threading.Lock()
_last_timestamp = -1


def _after_fork() -> None:
    """A thread that the fork does not have may hold the lock."""
    global _clock
    _clock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _later_than(newest: int) -> int:
    """Milliseconds: now, or just after ``newest``, and another one at each call in this process."""
    global _last_timestamp
    with _clock:
        _last_timestamp = max(time.time_ns() // 1_000_000, _last_timestamp + 1)
        timestamp = max(_last_timestamp, newest + 1)
    if timestamp > MAX_TIMESTAMP:
        raise CheckpointSaveError(
            errno.EOVERFLOW, f"the clock shows {timestamp} ms, at most {MAX_TIMESTAMP} can be saved"
        )
    return timestamp


def _timestamp_in(checkpoint_id: str, prefix: str) -> int:
    """Of an identifier of the line that ``prefix`` begins; -1 for any other."""
    if not checkpoint_id.startswith(prefix):
        return -1
    parts = re.fullmatch(r"([0-9]{1,16})_[0-9a-f]{8}", checkpoint_id[len(prefix) :])
    return -1 if parts is None else int(parts[1])
