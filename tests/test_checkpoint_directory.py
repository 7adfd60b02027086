"""A directory that others write in: strangers, links, made-up names, damage of the newest, clocks, the working directory.

And what is told of a checkpoint before its tensors are read.
"""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch
from checkpoint_cases import HEADER, edit, read_plainly, tree_of
from torch import nn

from kasmina_ext.checkpoint import (
    CheckpointDamaged,
    CheckpointManager,
    CheckpointNotFound,
    CheckpointRecovery,
    CheckpointSaveError,
    content,
    files,
    format,
    header,
    manager,
)

LAST = 10**16 - 1


@pytest.fixture
def checkpoints(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints", max_checkpoints_per_seed=3)


def flip(path):
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)


# ---- tensors and values that cannot come back ------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor without memory, as sharded and fake ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        found = function(*(a.inner if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))
        return Wrapper(found) if isinstance(found, torch.Tensor) else found


def test_only_plain_tensors_are_saved(checkpoints):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(4)
    for tensor, message in (
        (Wrapper(torch.arange(4.0)), r"state_data\.t is a Wrapper"),
        (fake, r"state_data\.t is a FakeTensor"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            checkpoints.save_checkpoint("a", 0, {"t": tensor})
    assert not checkpoints.checkpoint_dir.exists()
    name = checkpoints.save_checkpoint("a", 0, {"t": nn.Parameter(torch.ones(2))})
    assert torch.equal(checkpoints.restore_checkpoint(name)["state_data"]["t"], torch.ones(2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("\ud83d\ude00", "pair of surrogates"),
        ({"\ud83d\ude00": 1, "\U0001f600": 2}, "pair of surrogates"),
        ({1: "\ud83d\ude00"}, "pair of surrogates"),
        ({("\ud83d\ude00",): 1}, "pair of surrogates"),
        ({torch.tensor(1): 1, torch.tensor(1): 2}, "has the key 1 twice"),
    ],
)
def test_what_would_not_come_back_is_refused(checkpoints, value, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.save_checkpoint("a", 0, {"v": value})


def test_all_depths_that_are_taken_come_back(checkpoints):
    refused = 0
    for inner in ({(1, 2): 3}, {1: 2}, {((1,),): 0}, [], {}, "x"):
        for depth in range(94, 102):
            value = inner
            for _ in range(depth):
                value = {"a": value}
            try:
                name = checkpoints.save_checkpoint("a", 0, value if isinstance(value, dict) else {"a": value})
            except ValueError:
                refused += 1
            else:
                assert checkpoints.restore_checkpoint(name)["state_data"] == value
    assert refused >= 6


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_complex_tensors(tmp_path, dtype):
    """Any reader of safetensors opens them: as pairs of real numbers."""
    tensor = torch.tensor([[1 + 2j, complex("nan")], [-0.0j, 3]], dtype=torch.complex128).to(dtype)
    given = {"plain": tensor, "conj": tensor.conj(), "strided": tensor.t(), "none": tensor[:0], "one": tensor[0, 0]}
    format.write(tmp_path, "one", HEADER, given)
    for content_read in (format.read(tmp_path, "one")[1], read_plainly(tmp_path / "one")[1]):
        for name, expected in given.items():
            found = content_read[name]
            assert found.dtype == dtype and found.shape == expected.shape
            assert torch.equal(found.to(torch.complex128).nan_to_num(7), expected.to(torch.complex128).nan_to_num(7))
    for wrong in ({"dtype": "I64", "shape": [2]}, {"dtype": "F32", "shape": []}, {"dtype": "F32", "shape": [3]}):
        edit(tmp_path / "one", tensors={"plain": wrong}, plain={"$complex": "plain"})
        with pytest.raises(CheckpointDamaged):
            format.read(tmp_path, "one")


@pytest.mark.parametrize("wrong", [None, [1], "x", 3, torch.ones(1)])
def test_state_data_is_a_dict(checkpoints, wrong):
    with pytest.raises(TypeError, match="state_data must be a dict"):
        checkpoints.save_checkpoint("a", 0, wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match="blueprint_state must be a dict"):
            checkpoints.save_checkpoint("a", 0, {}, [1])


def test_many_values_are_refused_at_both_ends(checkpoints, monkeypatch):
    name = checkpoints.save_checkpoint("a", 0, {"x": [0] * 300})
    monkeypatch.setattr(content, "MAX_VALUES", 200)
    monkeypatch.setattr(format, "MAX_VALUES", 200)
    with pytest.raises(CheckpointDamaged, match="more than 200 values"):
        checkpoints.restore_checkpoint(name)
    with pytest.raises(ValueError, match="at most 200 are read back"):
        checkpoints.save_checkpoint("a", 0, {"x": [0] * 300})


# ---- strangers, links, made-up names ---------------------------------------------------------------


def test_only_checkpoints_are_deleted(checkpoints):
    name = checkpoints.save_checkpoint("a", 0, {})
    root = checkpoints.checkpoint_dir
    (root / "my_dataset").mkdir()
    (root / "my_dataset/data").write_text("precious")
    (root / "notes").write_text("hello")
    (root / "link").symlink_to(name)
    before = tree_of(root)
    for stranger in ("my_dataset", "notes", "link"):
        assert not checkpoints.delete_checkpoint(stranger)
        assert not checkpoints.delete_checkpoint(stranger, archive=True)
    assert tree_of(root) == before
    flip(root / name / "metadata.json")
    assert checkpoints.delete_checkpoint(name)  # a damaged one is one


def test_an_archive_that_is_a_link_is_no_archive(checkpoints, tmp_path):
    other = CheckpointManager(tmp_path / "other")
    name, ours = other.save_checkpoint("evil", 0, {}), checkpoints.save_checkpoint("a", 0, {})
    checkpoints.archive_dir.symlink_to(other.checkpoint_dir)
    before = tree_of(other.checkpoint_dir)
    with pytest.raises(CheckpointNotFound):
        checkpoints.restore_checkpoint(name)
    assert not checkpoints.delete_checkpoint(name)
    with pytest.raises(OSError, match="archive is a symbolic link"):
        checkpoints.delete_checkpoint(ours, archive=True)
    assert tree_of(other.checkpoint_dir) == before
    assert checkpoints.restore_checkpoint(ours)


def test_left_overs_that_are_files_are_removed(checkpoints):
    checkpoints.save_checkpoint("a", 0, {})
    left = checkpoints.checkpoint_dir / ".removed-0123456789abcdef"
    left.write_text("")
    checkpoints.prune()
    assert not left.exists()


@pytest.mark.parametrize("ahead", [LAST, 2 * 24 * 60 * 60 * 1000])
def test_a_timestamp_of_the_future_does_not_stay_the_newest(checkpoints, ahead):
    future = ahead if ahead == LAST else time.time_ns() // 1_000_000 + ahead
    fields = header.seed_header("a", 0, future, "normal", None)
    format.write(checkpoints.checkpoint_dir, "a_0_x", fields, {"state_data": {}, "blueprint_state": None})
    summary = header.layer_header("net", "t", future, "normal", {})
    format.write(checkpoints.checkpoint_dir, f"net_t_{future}_00000000", summary, {"content": {}})
    for k in range(4):
        name = checkpoints.save_checkpoint("a", 0, {"v": k})
        assert checkpoints.get_latest_checkpoint("a", 0) == name
        assert checkpoints.restore_checkpoint(name)["state_data"] == {"v": k}
        given = checkpoints.new_layer_id("net", "t")
        assert checkpoints.save_layer("net", "t", {"v": k}, checkpoint_id=given) == given
        assert checkpoints.load_layer("t")["content"] == {"v": k}


def test_names_alone_do_not_move_the_clock(checkpoints):
    (checkpoints.checkpoint_dir / f"net_t_{LAST}_00000000").mkdir(parents=True)
    given = checkpoints.new_layer_id("net", "t")
    assert int(given.split("_")[2]) < LAST
    checkpoints.save_layer("net", "t", {}, checkpoint_id=given)
    assert checkpoints.load_layer("t")["checkpoint_id"] == given


def test_a_clock_beyond_all_identifiers(checkpoints, monkeypatch):
    monkeypatch.setattr(manager, "_last_timestamp", LAST)
    with pytest.raises(CheckpointSaveError, match="the clock shows"):
        checkpoints.save_checkpoint("a", 0, {})


# ---- damage of the newest, and lists that tell it --------------------------------------------------


@pytest.mark.parametrize("layer_id", [None, "net"])
def test_a_damaged_newest_is_told_and_not_passed_over(checkpoints, layer_id):
    names = [checkpoints.save_layer("net", "t", {"v": k}) for k in range(3)]
    flip(checkpoints.checkpoint_dir / names[0] / "metadata.json")
    assert checkpoints.load_layer("t", layer_id)["checkpoint_id"] == names[2]
    flip(checkpoints.checkpoint_dir / names[2] / "metadata.json")
    with pytest.raises(CheckpointDamaged, match="CheckpointRecovery") as caught:
        checkpoints.load_layer("t", layer_id)
    assert caught.value.checkpoint_id == names[2]
    recovered = CheckpointRecovery(checkpoints).recover_layer("t", layer_id)
    assert recovered["checkpoint_id"] == names[1]
    flip(checkpoints.checkpoint_dir / names[1] / "metadata.json")
    with pytest.raises(CheckpointDamaged):
        checkpoints.load_layer("t", layer_id)
    with pytest.raises(CheckpointNotFound):
        checkpoints.load_layer("other", layer_id)


def test_what_may_not_be_read_is_told_by_a_list_and_passed_over_by_recovery(checkpoints, monkeypatch, caplog):
    names = [checkpoints.save_layer("net", "t", {"v": k}) for k in range(2)]
    checkpoints.metadata_cache.clear()
    real = files.OpenDirectory.open

    def refuse(self, name):
        if self.checkpoint_id == names[1]:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(self, name)

    monkeypatch.setattr(files.OpenDirectory, "open", refuse)
    assert [entry["checkpoint_id"] for entry in checkpoints.list_checkpoints()] == [names[0]]
    assert "Permission denied" in caplog.text
    with pytest.raises(PermissionError):
        checkpoints.load_layer("t")
    assert CheckpointRecovery(checkpoints).recover_layer("t")["checkpoint_id"] == names[0]


def test_lists_notice_damage_and_are_their_readers_own(checkpoints):
    name = checkpoints.save_layer("net", "t", {}, summary={"deep": {"x": 1}})
    checkpoints.list_checkpoints()[0]["summary"]["deep"]["x"] = "changed"
    assert checkpoints.list_checkpoints()[0]["summary"] == {"deep": {"x": 1}}
    path = checkpoints.checkpoint_dir / name / "metadata.json"
    with open(path, "r+b") as file:  # in place: the directory does not change
        file.seek(10)
        file.write(b"~")
    assert checkpoints.list_checkpoints() == []


# ---- the working directory, errors of the system ---------------------------------------------------


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    checkpoints = CheckpointManager("saved")
    os.chdir(tmp_path / "b")
    name = checkpoints.save_checkpoint("a", 0, {})
    assert (tmp_path / "a/saved" / name).is_dir() and not os.listdir(tmp_path / "b")


def test_a_directory_that_cannot_be_made_is_an_error_of_the_save(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointSaveError):
        CheckpointManager(tmp_path / "file/sub").save_checkpoint("a", 0, {})
    with pytest.raises(CheckpointSaveError):
        CheckpointManager(tmp_path / "file").save_layer("net", "t", {})


def test_a_save_that_goes_at_once_warns(checkpoints):
    for _ in range(3):
        checkpoints.save_checkpoint("layer", 0, {}, priority="high")
    with pytest.warns(UserWarning, match="was removed at once: 3 of higher priority") as caught:
        checkpoints.save_checkpoint("layer", 0, {}, priority="low")
    assert caught[0].filename == __file__


def test_a_system_without_locks_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.raises(CheckpointSaveError, match="need flock"):
        CheckpointManager(tmp_path).save_checkpoint("a", 0, {})


# ---- before the tensors are read -------------------------------------------------------------------


class Refused(Exception):
    pass


def test_a_check_sees_types_and_shapes_and_can_refuse(checkpoints, monkeypatch):
    name = checkpoints.save_layer("net", "t", {"w": torch.ones(2, 3).half(), "n": [1, (torch.tensor(1),)]})
    seen = []
    found = checkpoints.load_layer("t", check=lambda *told: seen.append(told))
    [(told, preview)] = seen
    assert told["layer_id"] == "net" and told["tag"] == "t"
    assert preview["w"].is_meta and preview["w"].shape == (2, 3) and preview["w"].dtype == torch.float16
    assert preview["n"][0] == 1 and preview["n"][1][0].is_meta
    assert torch.equal(found["content"]["w"], torch.ones(2, 3).half())

    def refuse(*_):
        raise Refused

    # The tensors are not even looked at.
    (checkpoints.checkpoint_dir / name / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(Refused):
        checkpoints.load_layer(name, check=refuse)
    with pytest.raises(CheckpointDamaged):
        checkpoints.load_layer(name, check=lambda *_: None)


def test_a_check_of_tensors_that_no_machine_can_make(tmp_path):
    format.write(tmp_path, "one", HEADER, {"t": torch.ones(2)})
    edit(tmp_path / "one", tensors={"t": {"dtype": "F32", "shape": [2**40, 2**10]}})
    seen = []
    with pytest.raises(CheckpointDamaged):
        format.read(tmp_path, "one", check=lambda *told: seen.append(told))
    assert seen[0][1]["t"].shape == (2**40, 2**10)  # and no memory was taken
