"""Which checkpoints stay: the rule against a model of it, through the manager and on its own."""

from __future__ import annotations

import errno
import random

import pytest
from checkpoint_cases import tree_of

from kasmina_ext.checkpoint import CheckpointManager, manager, retention


@pytest.fixture
def checkpoints(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints", max_checkpoints_per_seed=3)


def ids(entries):
    return [entry["checkpoint_id"] for entry in entries]


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


@pytest.mark.filterwarnings("ignore:.* was removed at once")
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


def test_a_save_that_goes_at_once_is_told_and_logged(checkpoints, caplog):
    for _ in range(3):
        checkpoints.save_checkpoint("layer", 0, {}, priority="high")
    with pytest.warns(UserWarning, match="was removed at once: 3 of higher priority are there, 3 are kept"):
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
