"""The manager's calls as the Triton package has them, retention against a model, and many who share a directory."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import pickle
import queue
import random
import re
import shutil
import threading
import time
from copy import deepcopy

import pytest
import torch
from checkpoint_cases import FailingSystem, same, small_content, tree_of
from test_checkpoint_files import BAD_IDS

from kasmina_ext.checkpoint import CheckpointManager, CheckpointRecovery, files, manager, retention
from kasmina_ext.checkpoint.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointSaveError,
    InvalidCheckpointId,
)
from kasmina_ext.lifecycle import ExtendedLifecycle

STATE = {"lifecycle_state": 3, "blueprint_id": 42, "performance_metrics": {"loss": 0.123}}


@pytest.fixture
def checkpoints(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints", max_checkpoints_per_seed=3)


def ids(entries):
    return [entry["checkpoint_id"] for entry in entries]


# ---- saving and restoring ------------------------------------------------------------------------


def test_a_new_manager_makes_its_directory(tmp_path):
    path = tmp_path / "a/b"
    assert CheckpointManager(str(path), 7).checkpoint_dir == path
    assert path.is_dir()
    assert CheckpointManager(path).max_checkpoints_per_seed == 5
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_checkpoints_per_seed must be at least 1"):
            CheckpointManager(path, wrong)


def test_there_and_back(checkpoints):
    content = small_content()
    before = time.time_ns() // 1_000_000
    name = checkpoints.save_checkpoint("layer1", 10, **content, priority="high")
    assert re.fullmatch(r"layer1_10_\d{13}_[0-9a-f]{8}", name)
    found = checkpoints.restore_checkpoint(name)
    assert before <= found["timestamp"] <= time.time_ns() // 1_000_000
    assert str(found["timestamp"]) in name
    expected = {"version": 3, "checkpoint_id": name, "layer_id": "layer1", "seed_id": 10}
    expected |= {"timestamp": found["timestamp"], "priority": "high"} | content
    assert same(found, expected)
    assert same(checkpoints.load_checkpoint(name), found)


def test_without_a_blueprint(checkpoints):
    found = checkpoints.restore_checkpoint(checkpoints.save_checkpoint("layer1", 10, {}))
    assert found["blueprint_state"] is None
    assert found["state_data"] == {}
    assert found["priority"] == "normal"


def test_restored_to_a_device(checkpoints, device):
    name = checkpoints.save_checkpoint("layer1", 1, {"t": (torch.ones(2, device=device),)}, {"w": torch.ones(3)})
    found = checkpoints.restore_checkpoint(name, target_device=device)
    assert found["state_data"]["t"][0].device.type == found["blueprint_state"]["w"].device.type == device.type
    assert checkpoints.load_checkpoint(name, device)["blueprint_state"]["w"].device.type == device.type
    assert checkpoints.restore_checkpoint(name)["state_data"]["t"][0].device.type == "cpu"


@pytest.mark.parametrize("layer_id", ["", "a/b", "../etc", "a b", "a\n", "ä", "x" * 65, None, 3, b"layer"], ids=repr)
def test_layer_ids(checkpoints, layer_id):
    with pytest.raises(ValueError, match="^Invalid layer_id"):
        checkpoints.save_checkpoint(layer_id, 0, {})
    with pytest.raises(ValueError, match="^Invalid layer_id"):
        checkpoints.save_layer(layer_id, "latest", {})
    assert tree_of(checkpoints.checkpoint_dir) == {}


@pytest.mark.parametrize("seed_id", [-1, 2**63, "0", None, 1.0, True, float("nan"), torch.ones(2)], ids=repr)
def test_seed_ids(checkpoints, seed_id):
    with pytest.raises(ValueError, match="^Invalid seed_id"):
        checkpoints.save_checkpoint("layer", seed_id, {})


@pytest.mark.parametrize("priority", ["", "urgent", "NORMAL", None, 1, ["low"]], ids=repr)
def test_priorities(checkpoints, priority):
    with pytest.raises(ValueError, match="^Invalid priority"):
        checkpoints.save_checkpoint("layer", 0, {}, priority=priority)


@pytest.mark.parametrize("tag", ["", "a/b", "x" * 33, None, 3], ids=repr)
def test_tags(checkpoints, tag):
    with pytest.raises(ValueError, match="^Invalid tag"):
        checkpoints.save_layer("layer", tag, {})


def test_the_longest_names_fit(checkpoints):
    name = checkpoints.save_checkpoint("x" * 64, 2**63 - 1, {})
    assert checkpoints.restore_checkpoint(name)["seed_id"] == 2**63 - 1
    name = checkpoints.save_layer("x" * 64, "y" * 32, {})
    assert checkpoints.load_layer(name)["tag"] == "y" * 32


def test_integers_of_other_libraries(checkpoints):
    name = checkpoints.save_checkpoint("layer", torch.tensor(4), {"lifecycle_state": torch.tensor(5)})
    assert checkpoints.list_checkpoints(seed_id=4, lifecycle_state=5)[0]["checkpoint_id"] == name


@pytest.mark.parametrize("name", BAD_IDS, ids=repr)
def test_bad_identifiers(checkpoints, name, caplog):
    for call in (checkpoints.restore_checkpoint, checkpoints.load_checkpoint, checkpoints.load_layer):
        with pytest.raises(ValueError, match="^Invalid checkpoint_id"):
            call(name)
    assert checkpoints.delete_checkpoint(name) is False
    assert checkpoints.delete_checkpoint(name, archive=True) is False
    assert "Invalid checkpoint_id" in caplog.text
    assert CheckpointRecovery(checkpoints).validate_checkpoint_integrity(name)[0] is False
    assert tree_of(checkpoints.checkpoint_dir) == {}


def test_unknown_identifiers(checkpoints):
    for error in (ValueError, FileNotFoundError, CheckpointNotFound, CheckpointError):
        with pytest.raises(error, match="^Checkpoint not found: unknown"):
            checkpoints.restore_checkpoint("unknown")
    assert checkpoints.delete_checkpoint("unknown") is False


def test_what_cannot_be_saved_changes_nothing(checkpoints):
    with pytest.raises(TypeError, match=r"state_data\.x is of type bytes"):
        checkpoints.save_checkpoint("layer", 0, {"x": b""})
    assert tree_of(checkpoints.checkpoint_dir) == {}


def test_a_tampered_checkpoint(checkpoints):
    name = checkpoints.save_checkpoint("layer", 0, {"value": 42})
    path = checkpoints.checkpoint_dir / name / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["state_data"]["value"] = 666
    path.write_text(json.dumps(metadata))
    with pytest.raises(RuntimeError, match="^Integrity check failed for checkpoint layer_0_.*: metadata.json: "):
        checkpoints.restore_checkpoint(name)


def test_a_full_disk_costs_nothing_that_was_there(checkpoints, monkeypatch):
    kept = [checkpoints.save_checkpoint("layer", 0, {"i": i}) for i in range(3)]
    before = tree_of(checkpoints.checkpoint_dir)
    monkeypatch.setattr(files, "os", FailingSystem(6, errno.ENOSPC))
    with pytest.raises(CheckpointSaveError, match="No space left on device") as caught:
        checkpoints.save_checkpoint("layer", 0, {"i": 3})
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert tree_of(checkpoints.checkpoint_dir) == before
    assert ids(checkpoints.list_checkpoints()) == kept[::-1]


def test_errors_travel_between_processes(checkpoints):
    name = checkpoints.save_checkpoint("layer", 0, {})
    (checkpoints.checkpoint_dir / name / "checksum").unlink()
    for call in (lambda: checkpoints.restore_checkpoint("none"), lambda: checkpoints.restore_checkpoint(name)):
        with pytest.raises(CheckpointError) as caught:
            call()
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (type(copy), str(copy)) == (type(caught.value), str(caught.value))
    error = CheckpointSaveError.because("x", OSError(errno.ENOSPC, "No space left on device", "file"))
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.errno, copy.filename, str(copy)) == (errno.ENOSPC, "file", str(error))


def test_a_manager_can_be_copied_and_pickled(checkpoints):
    name = checkpoints.save_checkpoint("layer", 0, {})
    for copy in (pickle.loads(pickle.dumps(checkpoints)), deepcopy(checkpoints)):
        assert ids(copy.list_checkpoints()) == [name]
        assert copy.max_checkpoints_per_seed == 3


# ---- listing -------------------------------------------------------------------------------------


def test_listing(checkpoints):
    names = []
    for i in range(5):
        state = {**STATE, "lifecycle_state": i % 3}
        names.append(checkpoints.save_checkpoint("layer1" if i < 3 else "layer2", i, state, priority="low"))
        time.sleep(0.002)
    found = checkpoints.list_checkpoints()
    assert ids(found) == names[::-1]
    assert [entry["timestamp"] for entry in found] == sorted((entry["timestamp"] for entry in found), reverse=True)
    assert ids(checkpoints.list_checkpoints("layer1")) == names[2::-1]
    assert ids(checkpoints.list_checkpoints(seed_id=2)) == [names[2]]
    assert ids(checkpoints.list_checkpoints(layer_id="layer2", seed_id=3)) == [names[3]]
    assert ids(checkpoints.list_checkpoints(limit=2)) == names[:2:-1]
    assert checkpoints.list_checkpoints(limit=0) == []
    assert len(checkpoints.list_checkpoints(limit=None)) == 5
    for state in (0, "DORMANT", "dormant", ExtendedLifecycle.DORMANT):
        assert ids(checkpoints.list_checkpoints(lifecycle_state=state)) == [names[3], names[0]]
    with pytest.raises(ValueError, match="unknown lifecycle state"):
        checkpoints.list_checkpoints(lifecycle_state="asleep")
    with pytest.raises(ValueError, match="limit must be at least 0"):
        checkpoints.list_checkpoints(limit=-1)
    entry = found[0]
    assert (entry["kind"], entry["layer_id"], entry["seed_id"], entry["tag"]) == ("seed", "layer2", 4, None)
    assert (entry["priority"], entry["lifecycle_state"], entry["version"]) == ("low", 1, 3)


@pytest.mark.parametrize(
    ("state", "expected"),
    [(ExtendedLifecycle.GRAFTING, 3), ("grafting", 3), (3, 3), (11, None), ("asleep", None), (None, None), (1.5, None)],
    ids=repr,
)
def test_the_lifecycle_state_is_found_in_any_form(checkpoints, state, expected):
    checkpoints.save_checkpoint("layer", 0, {"lifecycle_state": state})
    assert checkpoints.list_checkpoints()[0]["lifecycle_state"] == expected


def test_no_more_than_a_hundred_unless_asked(tmp_path, monkeypatch):
    checkpoints = CheckpointManager(tmp_path)
    entries = [{"timestamp": k, "checkpoint_id": str(k)} for k in range(150)]
    monkeypatch.setattr(checkpoints._catalog, "entries", lambda: entries)
    assert len(checkpoints.list_checkpoints()) == 100


def test_names_that_begin_alike_are_kept_apart(checkpoints):
    """Layer a, seed 1 and layer a_1, seed 2: the one's identifiers begin like the other's."""
    other = [checkpoints.save_checkpoint("a_1", 2, {}) for _ in range(3)]
    mine = [checkpoints.save_checkpoint("a", 1, {}) for _ in range(5)]
    assert ids(checkpoints.list_checkpoints("a_1")) == other[::-1]
    assert ids(checkpoints.list_checkpoints("a", 1)) == mine[:1:-1]


def test_strangers_in_the_directory_are_left_alone(checkpoints, caplog):
    name = checkpoints.save_checkpoint("layer", 0, {})
    root = checkpoints.checkpoint_dir
    (root / "runs").mkdir()
    (root / "runs/events").write_bytes(b"1")
    (root / "layer_0_notes.txt").write_bytes(b"1")
    (root / "link").symlink_to(root / name)
    (root / "layer_0_1").mkdir()
    (root / "layer_0_1/metadata.json").write_text("{}")  # damaged
    for _ in range(4):
        checkpoints.save_checkpoint("layer", 0, {})
    assert len(checkpoints.list_checkpoints()) == 3
    assert "checkpoint layer_0_1: metadata.json" in caplog.text
    assert {"runs", "layer_0_notes.txt", "link", "layer_0_1"} < {path.name for path in root.iterdir()}


def test_the_latest(checkpoints):
    assert checkpoints.get_latest_checkpoint("layer", 60) is None
    for _ in range(3):
        name = checkpoints.save_checkpoint("layer", 60, STATE)
        assert checkpoints.get_latest_checkpoint("layer", 60) == name
    assert checkpoints.get_latest_checkpoint("layer", 6) is None


def test_a_clock_that_is_set_back(checkpoints, monkeypatch):
    """The newest is what was saved last, and retention takes the oldest, whatever the clock says."""
    names = [checkpoints.save_checkpoint("layer", 0, {})]
    monkeypatch.setattr(manager.time, "time_ns", lambda: 5_000_000)
    names += [CheckpointManager(checkpoints.checkpoint_dir, 3).save_checkpoint("layer", 0, {}) for _ in range(4)]
    assert ids(checkpoints.list_checkpoints()) == names[:1:-1]
    assert checkpoints.get_latest_checkpoint("layer", 0) == names[-1]


def test_the_cache_can_be_cleared_and_does_not_outlive_what_it_tells(checkpoints):
    names = [checkpoints.save_checkpoint("layer", seed, {}) for seed in range(3)]
    checkpoints.metadata_cache.clear()
    assert len(checkpoints.list_checkpoints()) == 3 == len(checkpoints.metadata_cache)
    checkpoints.list_checkpoints()[0]["layer_id"] = "changed by the caller"
    assert checkpoints.list_checkpoints()[0]["layer_id"] == "layer"
    other = CheckpointManager(checkpoints.checkpoint_dir)
    assert other.delete_checkpoint(names[0])
    shutil.copytree(checkpoints.checkpoint_dir / names[2], checkpoints.checkpoint_dir / names[0])
    assert ids(checkpoints.list_checkpoints()) == [names[2], names[1]]  # what stands there now is of another name


# ---- removing ------------------------------------------------------------------------------------


def test_deleting(checkpoints):
    names = [checkpoints.save_checkpoint("layer", 0, {}) for _ in range(2)]
    assert checkpoints.delete_checkpoint(names[0]) is True
    assert ids(checkpoints.list_checkpoints()) == names[1:]
    with pytest.raises(CheckpointNotFound):
        checkpoints.restore_checkpoint(names[0])
    assert checkpoints.delete_checkpoint(names[0]) is False


def test_archiving(checkpoints):
    name = checkpoints.save_checkpoint("layer", 0, {"v": 1})
    assert checkpoints.delete_checkpoint(name, archive=True) is True
    assert checkpoints.list_checkpoints() == []
    assert (checkpoints.archive_dir / name).is_dir()
    assert checkpoints.restore_checkpoint(name)["state_data"] == {"v": 1}
    assert checkpoints.delete_checkpoint(name, archive=True) is False
    assert checkpoints.delete_checkpoint(name) is True
    assert checkpoints.delete_checkpoint(name) is False


# ---- retention -----------------------------------------------------------------------------------

RANK = {"low": 0, "normal": 1, "high": 2, "critical": 3}


def survivors(saved, keep):
    """The rule as section 10 has it: while there are too many, the oldest of the lowest priority goes; critical never."""
    kept = list(saved)
    while len(kept) > keep and any(priority != "critical" for _, priority in kept):
        lowest = min(RANK[priority] for _, priority in kept if priority != "critical")
        kept.remove(next(one for one in kept if RANK[one[1]] == lowest))
    return kept


def test_of_one_priority_the_oldest_goes_first(checkpoints):
    names = [checkpoints.save_checkpoint("layer", 0, {"i": i}) for i in range(7)]
    assert ids(checkpoints.list_checkpoints()) == names[:3:-1]
    assert tree_of(checkpoints.checkpoint_dir).keys() >= set(names[4:])
    assert len(list(checkpoints.checkpoint_dir.iterdir())) == 3


@pytest.mark.parametrize("seed", range(3))
def test_retention_against_the_rule(tmp_path, seed):
    generator = random.Random(seed)
    keep = generator.choice([1, 2, 4])
    checkpoints = CheckpointManager(tmp_path, keep)
    saved = []
    for _ in range(14):
        priority = generator.choice(["low", "normal", "normal", "high", "critical"])
        saved = survivors([*saved, (checkpoints.save_checkpoint("layer", 0, {}, priority=priority), priority)], keep)
        assert ids(checkpoints.list_checkpoints()) == [name for name, _ in reversed(saved)]


def test_the_rule_on_many_orders():
    generator = random.Random(0)
    for _ in range(2000):
        saved = [(str(k), generator.choice(list(RANK))) for k in range(generator.randrange(9))]
        entries = [
            {"kind": "seed", "layer_id": "a", "seed_id": 0, "timestamp": k, "checkpoint_id": name, "priority": priority}
            for k, (name, priority) in enumerate(saved)
        ]
        keep = generator.randrange(1, 6)
        gone = {entry["checkpoint_id"] for entry in retention.in_excess(generator.sample(entries, len(entries)), keep)}
        assert [one for one in saved if one[0] not in gone] == survivors(saved, keep)


def test_a_save_that_goes_at_once_is_logged(checkpoints, caplog):
    for _ in range(3):
        checkpoints.save_checkpoint("layer", 0, {}, priority="high")
    name = checkpoints.save_checkpoint("layer", 0, {}, priority="low")
    assert f"checkpoint {name} (low) was removed at once: 3 of higher priority" in caplog.text
    assert len(checkpoints.list_checkpoints()) == 3


def test_seeds_layers_and_tags_are_counted_apart(checkpoints):
    for _ in range(4):
        for layer in ("a", "b"):
            for seed in (1, 2):
                checkpoints.save_checkpoint(layer, seed, {})
            checkpoints.save_layer(layer, "1", {})
            checkpoints.save_layer(layer, "best", {})
    found = checkpoints.list_checkpoints()
    groups = [(entry["layer_id"], entry["kind"], entry["seed_id"], entry["tag"]) for entry in found]
    assert len(found) == 24
    assert all(groups.count(group) == 3 for group in groups)


def test_pruning_on_demand(checkpoints):
    for seed in (1, 2):
        for priority in ("low", "normal", "high"):
            checkpoints.save_checkpoint("layer", seed, {"p": priority}, priority=priority)
    (checkpoints.checkpoint_dir / ".removed-0123456789abcdef").mkdir()
    removed = checkpoints.prune(keep=1)
    assert len(removed) == 4
    assert [entry["priority"] for entry in checkpoints.list_checkpoints()] == ["high", "high"]
    assert len(list(checkpoints.checkpoint_dir.iterdir())) == 2
    assert checkpoints.prune() == []
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoints.prune(keep=0)


def test_what_cannot_be_removed_does_not_fail_a_save(checkpoints, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(manager, "remove_directory", refuse)
    names = [checkpoints.save_checkpoint("layer", 0, {}) for _ in range(4)]
    assert ids(checkpoints.list_checkpoints()) == names[::-1]
    assert f"checkpoint {names[0]} cannot be removed" in caplog.text


# ---- whole layers --------------------------------------------------------------------------------


def test_layers(checkpoints):
    content = small_content()
    first = checkpoints.save_layer("net_0", "latest", content, summary={"seeds": 5}, priority="high")
    assert re.fullmatch(r"net_0_latest_\d{13}_[0-9a-f]{8}", first)
    found = checkpoints.load_layer(first)
    timestamp = found["timestamp"]
    expected = {"version": 3, "checkpoint_id": first, "kind": "layer", "layer_id": "net_0", "tag": "latest"}
    expected |= {"timestamp": timestamp, "priority": "high", "summary": {"seeds": 5}, "content": content}
    assert same(found, expected)
    second = checkpoints.save_layer("net_0", "latest", {"v": 2})
    other = checkpoints.save_layer("net_1", "latest", {"v": 3})
    assert checkpoints.load_layer("latest")["checkpoint_id"] == other
    assert checkpoints.load_layer("latest", "net_0")["checkpoint_id"] == second
    assert checkpoints.load_layer(first, "net_0")["checkpoint_id"] == first
    assert [entry["summary"] for entry in checkpoints.list_checkpoints("net_0")] == [{}, {"seeds": 5}]
    with pytest.raises(CheckpointNotFound):
        checkpoints.load_layer("latest", "net_2")
    with pytest.raises(CheckpointDamaged, match="at most 10 are read"):
        checkpoints.load_layer(first, max_bytes=10)


def test_a_link_named_like_a_tag_is_in_nobodys_way(checkpoints):
    name = checkpoints.save_layer("net", "latest", {})
    (checkpoints.checkpoint_dir / "latest").symlink_to(name)
    assert checkpoints.load_layer("latest")["checkpoint_id"] == name


def test_seeds_and_layers_are_not_mixed_up(checkpoints):
    layer, seed = checkpoints.save_layer("net", "t", {}), checkpoints.save_checkpoint("net", 1, {})
    with pytest.raises(InvalidCheckpointId, match="use load_layer"):
        checkpoints.restore_checkpoint(layer)
    with pytest.raises(InvalidCheckpointId, match="use restore_checkpoint"):
        checkpoints.load_layer(seed)


def test_progress(checkpoints):
    seen = []
    checkpoints.save_layer("net", "t", {"t": torch.ones(10)}, progress=lambda *args: seen.append(args))
    assert seen == [(40, 40)]


def test_identifiers_given_before_the_save(checkpoints, monkeypatch):
    """For saves in the background: later than all before, whatever the clock says, and in the order they were given."""
    old = checkpoints.save_layer("net", "t", {"v": 0})
    monkeypatch.setattr(manager.time, "time_ns", lambda: 5_000_000)
    monkeypatch.setattr(manager, "_last_timestamp", -1)
    given = [checkpoints.new_layer_id("net", "t") for _ in range(3)]
    assert len(set(given)) == 3
    for k in (2, 0, 1):
        assert checkpoints.save_layer("net", "t", {"v": k}, checkpoint_id=given[k]) == given[k]
    assert ids(checkpoints.list_layers("t")) == given[::-1]
    assert checkpoints.load_layer("t")["content"] == {"v": 2}
    assert not (checkpoints.checkpoint_dir / old).exists()
    for wrong in ("other_t_5_00000000", "net_t_x_00000000", f"{given[0]}0", "net_t_"):
        with pytest.raises(InvalidCheckpointId):
            checkpoints.save_layer("net", "t", {}, checkpoint_id=wrong)
    with pytest.raises(CheckpointSaveError, match="File exists"):
        checkpoints.save_layer("net", "t", {}, checkpoint_id=given[2])


def test_recovery_of_layers(checkpoints):
    names = [checkpoints.save_layer("net", "t", {"v": k}) for k in range(2)]
    (checkpoints.checkpoint_dir / names[1] / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointDamaged):
        checkpoints.load_layer("t")
    recovery = CheckpointRecovery(checkpoints)
    assert recovery.recover_layer("t")["checkpoint_id"] == names[0]
    assert recovery.recover_layer("t", "net")["content"] == {"v": 0}
    assert recovery.recover_layer("t", "other") is None


# ---- recovery ------------------------------------------------------------------------------------


def test_recovery(checkpoints, caplog):
    recovery = CheckpointRecovery(checkpoints)
    assert recovery.recover_seed_state("layer", 0) is None
    names = [checkpoints.save_checkpoint("layer", 0, {"epochs": i}, {"w": torch.ones(3)}) for i in range(3)]
    assert recovery.recover_seed_state("layer", 0)["checkpoint_id"] == names[2]
    path = checkpoints.checkpoint_dir / names[2] / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = recovery.recover_seed_state("layer", 0, target_device="cpu")
    assert found["checkpoint_id"] == names[1] and found["state_data"] == {"epochs": 1}
    assert f"checkpoint {names[2]}: tensors.safetensors" in caplog.text
    assert path.exists()
    for name in names[:2]:
        shutil.rmtree(checkpoints.checkpoint_dir / name)
    assert recovery.recover_seed_state("layer", 0) is None


def test_validation(checkpoints):
    recovery = CheckpointRecovery(checkpoints)
    seed, layer = checkpoints.save_checkpoint("layer", 0, {}), checkpoints.save_layer("layer", "t", {})
    assert recovery.validate_checkpoint_integrity(seed) == (True, None)
    assert recovery.validate_checkpoint_integrity(layer) == (True, None)
    (checkpoints.checkpoint_dir / seed / "checksum").write_text("0" * 64)
    ok, error = recovery.validate_checkpoint_integrity(seed)
    assert not ok and "metadata.json: its sha256 is not the one in checksum" in error
    assert recovery.validate_checkpoint_integrity("unknown")[1].startswith("Checkpoint not found: unknown")


def test_recovery_while_another_prunes(checkpoints, monkeypatch):
    """What the list named is gone when it is read, but there are newer ones by then."""
    for i in range(3):
        checkpoints.save_checkpoint("layer", 0, {"i": i})
    real, saves = checkpoints.restore_checkpoint, iter(range(3, 6))

    def restore(checkpoint_id, device=None):
        for i in saves:
            checkpoints.save_checkpoint("layer", 0, {"i": i})
        return real(checkpoint_id, device)

    monkeypatch.setattr(checkpoints, "restore_checkpoint", restore)
    assert CheckpointRecovery(checkpoints).recover_seed_state("layer", 0)["state_data"] == {"i": 5}


# ---- many at once --------------------------------------------------------------------------------


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for this one's threads
    keep = 3
    crowd = [kind(target=save_many, args=(tmp_path, keep, worker, count, answer)) for worker in range(workers)]
    for member in crowd:
        member.start()
    answers = [answer.get(timeout=60) for _ in crowd]
    for member in crowd:
        member.join()
    torch.set_num_threads(threads)
    assert [error for _, _, error in answers if error] == []
    everything = [name for _, names, _ in answers for name in names]
    assert len(set(everything)) == len(everything) == 2 * workers * count
    checkpoints = CheckpointManager(tmp_path, keep)
    for worker, names, _ in answers:
        own = [name for name in names if name.startswith("own_")]
        assert ids(checkpoints.list_checkpoints("own", worker)) == own[::-1][:keep]
        assert checkpoints.restore_checkpoint(own[-1])["state_data"] == {"worker": worker, "i": count - 1}
    shared = sorted((name for name in everything if name.startswith("shared_")), key=lambda name: name.split("_")[2:])
    assert ids(checkpoints.list_checkpoints("shared")) == shared[::-1][:keep]
    for entry in checkpoints.list_checkpoints(limit=None):
        checkpoints.verify(entry["checkpoint_id"])
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())
