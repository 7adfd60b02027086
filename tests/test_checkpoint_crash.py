"""Death at every system call of a save and at random instants, full disks, and crowds in one directory.

scripts/crash_checkpoints.py does the first at length.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import queue
import random
import shutil
import threading

import pytest
import torch
from checkpoint_cases import FailingSystem, tree_of
from checkpoint_crashes import KEEP, Campaign, content_of, is_right

from kasmina_ext.checkpoint import CheckpointManager, CheckpointRecovery, CheckpointSaveError, files

pytestmark = pytest.mark.usefixtures("one_thread")  # a forked process must not wait for this one's threads


class DyingSystem(FailingSystem):
    """Instead of an error, the end of the process: before the call, or right after it."""

    def __init__(self, die_at, after):
        super().__init__()
        self._die_at, self._after = die_at, after

    def __getattr__(self, name):
        real = super().__getattr__(name)
        if name not in self.CHANGING:
            return real

        def call(*args, **kwargs):
            before = len(self.calls)
            dying = before == self._die_at and (name != "open" or (len(args) > 1 and args[1] & os.O_CREAT))
            if dying and not self._after:
                os._exit(0)
            result = real(*args, **kwargs)
            if dying and len(self.calls) > before:
                os._exit(0)
            return result

        return call


def save_in_child(root, system):
    """Whether the child lived to the end of its save."""
    pid = os.fork()
    if not pid:
        try:
            files.os = system
            CheckpointManager(root, KEEP).save_checkpoint("layer", 7, **content_of(1, 99))
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_death_at_each_system_call(tmp_path, after):
    template = CheckpointManager(tmp_path / "template", KEEP)
    kept = [template.save_checkpoint("layer", 7, **content_of(1, number)) for number in range(KEEP)][::-1]
    for die_at in range(100):
        root = tmp_path / str(die_at)
        shutil.copytree(template.checkpoint_dir, root)
        lived = save_in_child(root, DyingSystem(die_at, after))
        manager = CheckpointManager(root, KEEP)
        listed = [entry["checkpoint_id"] for entry in manager.list_checkpoints()]
        assert all(is_right(manager.restore_checkpoint(name)) for name in listed)
        new = [name for name in listed if name not in kept]
        assert listed in (kept, [*new, *kept], [*new, *kept[:-1]])
        assert len(new) == 1 if lived else len(new) <= 1
        other = manager.save_checkpoint("layer", 8, {})  # cleans up
        assert {path.name for path in root.iterdir()} == {*listed, other}
        if lived:
            break
    assert 15 < die_at < 99


@pytest.mark.parametrize("writers", [1, 2])
def test_kill_at_random_instants(tmp_path, writers):
    campaign = Campaign(tmp_path, writers=writers).run(kills=15)
    assert campaign.problems == []
    assert campaign.counts["kills"] == 15
    assert campaign.counts["listed_checkpoints_loaded"] > 0


def test_a_disk_that_is_full_now_and_then(tmp_path, monkeypatch):
    """At any call of any save; what was there stays, and no litter."""
    manager, kept, refused = CheckpointManager(tmp_path, KEEP), [], 0
    generator = random.Random(0)
    for number in range(40):
        system = FailingSystem(generator.randrange(30), errno.ENOSPC)
        monkeypatch.setattr(files, "os", system)
        try:
            kept.append(manager.save_checkpoint("layer", 7, **content_of(1, number)))
        except CheckpointSaveError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
        monkeypatch.undo()
        expected = kept[::-1][:KEEP]  # one more where its removal was what failed
        assert [entry["checkpoint_id"] for entry in manager.list_checkpoints()][: len(expected)] == expected
        assert is_right(manager.restore_checkpoint(kept[-1])) if kept else tree_of(tmp_path) == {}
    assert 10 < refused < 35
    manager.save_checkpoint("layer", 8, {})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---- many at once --------------------------------------------------------------------------------


def listed(entries):
    return [entry["checkpoint_id"] for entry in entries]


def save_many(root, keep, worker, count, answer):
    """Saves in a line of its own and in one that all share; tells the identifiers, and what went wrong."""
    checkpoints, names = CheckpointManager(root, keep), []
    try:
        for i in range(count):
            own = checkpoints.save_checkpoint("own", worker, {"worker": worker, "i": i}, {"w": torch.full((5,), i)})
            shared = checkpoints.save_checkpoint("shared", 0, {"worker": worker, "i": i})
            names += [own, shared]
            checkpoints.prune()
            found = CheckpointRecovery(checkpoints).recover_seed_state("shared", 0)
            assert found is not None
            assert checkpoints.get_latest_checkpoint("own", worker) == own
    except BaseException as error:
        answer.put((worker, names, repr(error)))
    else:
        answer.put((worker, names, ""))


@pytest.mark.parametrize(
    ("workers", "count", "processes"), [(32, 2, False), (4, 6, True)], ids=["32 threads", "4 processes"]
)
def test_many_in_one_directory(tmp_path, caplog, workers, count, processes):
    caplog.set_level(logging.ERROR, logger="kasmina_ext.checkpoint")
    context = multiprocessing.get_context("fork") if processes else None
    answer = context.Queue() if processes else queue.Queue()
    kind = context.Process if processes else threading.Thread
    keep = 3
    crowd = [
        kind(target=save_many, args=(tmp_path, keep, worker, count, answer), daemon=True) for worker in range(workers)
    ]
    for member in crowd:
        member.start()
    answers = [answer.get(timeout=60) for _ in crowd]
    for member in crowd:
        member.join()
    assert [error for _, _, error in answers if error] == []
    everything = [name for _, names, _ in answers for name in names]
    assert len(set(everything)) == len(everything) == 2 * workers * count
    checkpoints = CheckpointManager(tmp_path, keep)
    for worker, names, _ in answers:
        own = [name for name in names if name.startswith("own_")]
        assert listed(checkpoints.list_checkpoints("own", worker)) == own[::-1][:keep]
        assert checkpoints.restore_checkpoint(own[-1])["state_data"] == {"worker": worker, "i": count - 1}
    shared = sorted((name for name in everything if name.startswith("shared_")), key=lambda name: name.split("_")[2:])
    assert listed(checkpoints.list_checkpoints("shared")) == shared[::-1][:keep]
    for entry in checkpoints.list_checkpoints(limit=None):
        checkpoints.verify(entry["checkpoint_id"])
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())
