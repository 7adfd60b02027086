"""Processes that save in a loop and are killed at random instants, and what must hold of the directory then.

A writer tells each identifier through a pipe after its save has returned. Every writer has a line of its own (one seed)
and takes part in one that all share. What is saved follows from the writer's number and the save's, so that it can be
checked without being remembered.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kasmina_ext.checkpoint import CheckpointError, CheckpointManager, CheckpointRecovery, CheckpointSaveError

KEEP = 6
SHARED = 0
LAST_WRITER_SEED = 1_000
SAVES_IN_A_LIFE = 8
_FULL = "full"
COUNTED = (
    "kills",
    "acknowledged_saves",
    "saves_refused_by_a_full_disk",
    "listed_checkpoints_loaded",
    "last_acknowledged_loaded",
    "last_acknowledged_retired",
    "problems",
)


def content_of(writer: int, number: int) -> dict[str, Any]:
    """From 1 kB to 250 kB, so that kills hit every part of a save."""
    size = 250 * (1 + (writer * 7 + number * 13) % 250)
    values = torch.arange(size, dtype=torch.float32) * 0.5 + writer + number
    return {"state_data": {"writer": writer, "number": number, "lifecycle_state": 3}, "blueprint_state": {"w": values}}


def is_right(found: dict[str, Any]) -> bool:
    state = found["state_data"]
    expected = content_of(state["writer"], state["number"])
    return state == expected["state_data"] and torch.equal(
        found["blueprint_state"]["w"], expected["blueprint_state"]["w"]
    )


# ---- writers -------------------------------------------------------------------------------------


def start_writer(root: Path, writer: int, first: int, fill: Callable[[random.Random], None] | None) -> tuple[int, int]:
    """(pid, the pipe's end to read) of a process that saves for ever."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        os.close(reading)
        save_for_ever(root, writer, first, writing, fill)
    except BaseException as error:
        os.write(writing, f"failed {type(error).__name__}: {str(error)[:200]}\n".encode())
    finally:
        os._exit(1)


def save_for_ever(root: Path, writer: int, first: int, pipe: int, fill: Callable[[random.Random], None] | None) -> None:
    manager = CheckpointManager(root, KEEP)
    generator = random.Random(first)
    os.write(pipe, b"ready\n")
    number = first
    while True:
        for seed in (LAST_WRITER_SEED + writer, SHARED):
            if fill is not None:
                fill(generator)
            try:
                checkpoint_id = manager.save_checkpoint("layer", seed, **content_of(writer, number))
                os.write(pipe, f"saved {checkpoint_id}\n".encode())
            except CheckpointSaveError as error:
                if error.errno != errno.ENOSPC:
                    raise
                os.write(pipe, f"{_FULL} {Path(str(error.filename)).name}\n".encode())
            number += 1


def seconds_of_a_save(root: Path) -> float:
    """Measured in a line of its own, with what retention costs."""
    manager, count = CheckpointManager(root, 1), 4
    started = time.monotonic()
    for number in range(count):
        manager.save_checkpoint("measured", 0, **content_of(0, number))
    return (time.monotonic() - started) / count


# ---- killing and checking ------------------------------------------------------------------------


@dataclass
class Campaign:
    """``counts`` and ``problems`` after :meth:`run`; ``left`` counts what the killed saves had got to."""

    root: Path
    writers: int = 1
    seed: int = 0
    longest: float = 0.0  # seconds that a writer may live; 0: as long as several saves take here
    fill: Callable[[random.Random], None] | None = None
    make_room: Callable[[], None] = lambda: None
    counts: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    full_at: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def run(self, kills: int, told: Callable[[int], None] | None = None) -> Campaign:
        generator = random.Random(self.seed)
        self.longest = self.longest or SAVES_IN_A_LIFE * seconds_of_a_save(self.root)
        self._acknowledged: dict[int, list[str]] = {}
        self._untold: dict[int, set[str]] = {}
        alive: dict[int, tuple[int, int, float]] = {}  # writer -> pid, pipe, when to kill
        number = 0
        try:
            while self.counts["kills"] < kills:
                for writer in range(self.writers):
                    if writer not in alive:
                        number += 1000
                        pid, pipe = start_writer(self.root, writer, number, self.fill)
                        self._hear(writer, os.read(pipe, 6))  # "ready"
                        alive[writer] = pid, pipe, time.monotonic() + generator.random() * self.longest
                writer = min(alive, key=lambda one: alive[one][2])
                pid, pipe, moment = alive.pop(writer)
                time.sleep(max(0.0, moment - time.monotonic()))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.counts["kills"] += 1
                self._hear(writer, _read_all(pipe))
                if self.writers == 1:
                    self._look_at_litter()
                self.check(writer)
                if told is not None:
                    told(self.counts["kills"])
        finally:
            for writer, (pid, pipe, _) in alive.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self._hear(writer, _read_all(pipe))
        self._finish()
        return self

    def _hear(self, writer: int, said: bytes) -> None:
        for line in said.decode().splitlines():
            word, _, rest = line.partition(" ")
            self.counts[{"saved": "acknowledged_saves", _FULL: "saves_refused_by_a_full_disk"}.get(word, word)] += 1
            if word == "saved":
                self._acknowledged.setdefault(writer, []).append(rest)
            elif word == _FULL:
                self.full_at[rest] += 1
            elif word == "failed":
                self._complain(f"writer {writer}: {rest}")

    def check(self, killed: int) -> None:
        """What must hold after the writer ``killed`` was; others may be at work."""
        manager = CheckpointManager(self.root, KEEP)
        for entry in manager.list_checkpoints(limit=None):
            self.counts["listed_checkpoints_loaded"] += self._loads(manager, entry["checkpoint_id"], must_exist=False)
        for name, found in manager.scan():
            if isinstance(found, CheckpointError):
                self._complain(f"a half checkpoint is visible: {found} ({name})")
        self._check_own_line(manager, killed)
        shared = [n for names in self._acknowledged.values() for n in names if n.startswith(f"layer_{SHARED}_")]
        if shared:
            latest = manager.get_latest_checkpoint("layer", SHARED)
            if latest is None or _time_of(latest) < max(map(_time_of, shared)):
                self._complain(f"the newest shared one is {latest}")

    def _check_own_line(self, manager: CheckpointManager, writer: int) -> None:
        """Nobody else writes this one: the newest of all that were published must be there, exactly."""
        seed = LAST_WRITER_SEED + writer
        listed = [entry["checkpoint_id"] for entry in manager.list_checkpoints("layer", seed)]
        acknowledged = [name for name in self._acknowledged.get(writer, []) if name.startswith(f"layer_{seed}_")]
        # Published by a save that was killed before it could tell: they count, too.
        untold = self._untold.setdefault(writer, set())
        untold.update(set(listed) - set(acknowledged))
        newest = sorted({*acknowledged, *untold}, key=_time_of)[-KEEP:]
        for name in set(newest) - set(listed):
            self._complain(f"lost: {name}, listed are {listed}")
        for name in listed:
            self._loads(manager, name, must_exist=True)
        if acknowledged and acknowledged[-1] not in newest:
            # Killed again and again after publishing and before telling: newer ones took all places.
            self.counts["last_acknowledged_retired"] += 1
        elif acknowledged:
            self.counts["last_acknowledged_loaded"] += self._loads(manager, acknowledged[-1], must_exist=True)
        if acknowledged:
            found = CheckpointRecovery(manager).recover_seed_state("layer", seed)
            if found is None or not is_right(found) or found["checkpoint_id"] != newest[-1]:
                self._complain(f"writer {writer} had {newest[-1]}, recovery finds {found and found['checkpoint_id']}")

    def _loads(self, manager: CheckpointManager, name: str, must_exist: bool) -> bool:
        try:
            if not is_right(manager.restore_checkpoint(name)):
                self._complain(f"{name} has other content than was saved")
        except FileNotFoundError as error:
            if must_exist:
                self._complain(f"lost: {error}")
            return False
        except Exception as error:
            self._complain(f"{name} does not load: {type(error).__name__}: {error}")
            return False
        return True

    def _look_at_litter(self) -> None:
        kind = "nothing (between saves)"
        for path in self.root.glob(".*"):
            inside = {file.name for file in path.rglob("*")}
            if path.name.startswith(".removed-"):
                kind = "a checkpoint being removed"
            elif "checkpoint" not in inside:
                kind = "a workspace before or after its payload"
            else:
                last = [name for name in ("tensors.safetensors", "metadata.json", "checksum") if name in inside]
                kind = f"a payload up to {last[-1]}" if last else "an empty payload"
        self.left[kind] += 1

    def _finish(self) -> None:
        """The next save cleans up everything that the dead have left, and nothing else."""
        manager = CheckpointManager(self.root, KEEP)
        for writer in range(self.writers):
            self._check_own_line(manager, writer)
        self.make_room()
        before = {path.name for path in self.root.iterdir() if not path.name.startswith(".")}
        manager.save_checkpoint("last", 0, {})
        after = {path.name for path in self.root.iterdir()}
        if len(after - before) != 1 or before - after:
            self._complain(f"left over after another save: {sorted(after - before)[:5]}")

    def _complain(self, problem: str) -> None:
        self.counts["problems"] += 1
        self.problems.append(problem)

    def record(self) -> dict[str, Any]:
        result: dict[str, Any] = {name: self.counts[name] for name in COUNTED}
        result["longest_life_ms"] = round(1e3 * self.longest)
        if self.left:
            result["killed_saves_had_left"] = dict(self.left.most_common())
        if self.full_at:
            result["disk_was_full_at"] = dict(self.full_at.most_common())
        return result | ({"first_problems": self.problems[:10]} if self.problems else {})


def _read_all(pipe: int) -> bytes:
    """All that was written before the writer died; closes the pipe."""
    said = b""
    while part := os.read(pipe, 1 << 16):
        said += part
    os.close(pipe)
    return said


def _time_of(checkpoint_id: str) -> int:
    return int(checkpoint_id.split("_")[2])
