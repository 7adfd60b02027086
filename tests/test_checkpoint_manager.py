"""The manager's calls as the Triton package has them, retention against a model, and many who share a directory."""

from __future__ import annotations

import errno
import json
import pickle
import re
import shutil
import time
from copy import deepcopy

import pytest
import torch
from checkpoint_cases import FailingSystem, same, small_content, tree_of
from test_checkpoint_files import BAD_IDS

from kasmina_ext.checkpoint import CheckpointManager, CheckpointRecovery, files, manager
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


def test_the_first_save_makes_the_directory(tmp_path):
    path = tmp_path / "a/b"
    checkpoints = CheckpointManager(str(path), 7)
    assert checkpoints.checkpoint_dir == path
    assert checkpoints.list_checkpoints() == [] and checkpoints.get_latest_checkpoint("a", 0) is None
    with pytest.raises(CheckpointNotFound):
        checkpoints.load_layer("latest")
    assert not (tmp_path / "a").exists()
    checkpoints.save_checkpoint("a", 0, {})
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
