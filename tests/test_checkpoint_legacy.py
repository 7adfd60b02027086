"""The Triton package's directories, written here as that package wrote them: read, listed, converted, never trusted."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from checkpoint_cases import OLD_NAME, STATE, same, seal_old, tree_of, write_old

from kasmina_ext.checkpoint import CheckpointManager, CheckpointRecovery, format, legacy
from kasmina_ext.checkpoint.errors import CheckpointDamaged, CheckpointNotFound, CheckpointVersionError
from kasmina_ext.checkpoint.files import OpenDirectory

NAME = OLD_NAME


def blueprint():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer1.weight": torch.randn(10, 5, generator=generator),
        "layer1.bias": torch.randn(10, generator=generator).half(),
        "count": torch.tensor(5),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(seal_old(value) if path.name == "metadata.json" else value))


def refused(path, message):
    before = tree_of(path)
    with pytest.raises(CheckpointDamaged, match=message) as caught:
        CheckpointManager(path.parent).restore_checkpoint(path.name)
    assert str(caught.value).startswith(f"Integrity check failed for checkpoint {path.name}: {caught.value.file}: ")
    assert tree_of(path) == before
    return caught.value


# ---- reading -------------------------------------------------------------------------------------


def test_version_two(tmp_path):
    write_old(tmp_path, tensors=blueprint(), priority="high")
    found = CheckpointManager(tmp_path).restore_checkpoint(NAME)
    expected = {"version": 2, "checkpoint_id": NAME, "layer_id": "layer1", "seed_id": 10}
    expected |= {
        "timestamp": 1_700_000_000_000,
        "priority": "high",
        "state_data": STATE,
        "blueprint_state": blueprint(),
    }
    assert same(found, expected)


def test_without_a_blueprint(tmp_path):
    write_old(tmp_path)
    assert CheckpointManager(tmp_path).restore_checkpoint(NAME)["blueprint_state"] is None
    write_old(tmp_path, "empty", tensors={})
    assert CheckpointManager(tmp_path).restore_checkpoint("empty")["blueprint_state"] == {}


def test_version_one(tmp_path):
    """It had no priority, and `state` where version 2 has `lifecycle_state`."""
    write_old(tmp_path, "test_v1", {"state": 3, "blueprint_id": 42}, version=1, priority=..., timestamp=1737.5)
    found = CheckpointManager(tmp_path).restore_checkpoint("test_v1")
    assert found["version"] == 2
    assert found["priority"] == "normal"
    assert found["timestamp"] == 1737
    assert found["state_data"] == {"blueprint_id": 42, "lifecycle_state": 3}
    write_old(tmp_path, "newer", {"state": 3, "lifecycle_state": 5}, version=1)
    assert CheckpointManager(tmp_path).restore_checkpoint("newer")["state_data"] == {"state": 3, "lifecycle_state": 5}
    write_old(tmp_path, "neither", {}, version=1)
    assert CheckpointManager(tmp_path).restore_checkpoint("neither")["state_data"] == {"lifecycle_state": 0}
    write_old(tmp_path, "two", {"state": 3}, version=2)
    assert CheckpointManager(tmp_path).restore_checkpoint("two")["state_data"] == {"state": 3}


def test_in_one_directory_with_new_ones(tmp_path):
    write_old(tmp_path, tensors=blueprint())
    manager = CheckpointManager(tmp_path, 2)
    new = manager.save_checkpoint("layer1", 10, {"lifecycle_state": 3})
    entries = manager.list_checkpoints("layer1", 10, lifecycle_state="grafting")
    assert [(entry["checkpoint_id"], entry["version"]) for entry in entries] == [(new, 3), (NAME, 2)]
    (tmp_path / new / "checksum").unlink()
    assert CheckpointRecovery(manager).recover_seed_state("layer1", 10)["checkpoint_id"] == NAME
    for _ in range(2):
        manager.save_checkpoint("layer1", 10, {})
    with pytest.raises(CheckpointNotFound):  # retention counts it like any other
        manager.restore_checkpoint(NAME)


def test_a_tensor_that_was_part_of_a_larger_one(tmp_path):
    large = torch.arange(100.0)
    write_old(tmp_path, tensors={"w": large[10:20].view(2, 5).t()})
    found = CheckpointManager(tmp_path).restore_checkpoint(NAME)["blueprint_state"]["w"]
    assert torch.equal(found, large[10:20].view(2, 5).t())
    assert found.is_contiguous() and found.untyped_storage().nbytes() == 40


def test_a_limit_on_tensors(tmp_path):
    path = write_old(tmp_path, tensors=blueprint())
    size = sum(file.stat().st_size for file in (path / "tensors").iterdir())
    with OpenDirectory(tmp_path, NAME) as directory:
        legacy.read(directory, max_bytes=size)
        with pytest.raises(CheckpointDamaged, match="are read"):
            legacy.read(directory, max_bytes=size - 1)


# ---- damage --------------------------------------------------------------------------------------


def test_every_changed_byte_of_the_metadata(tmp_path):
    """Changes to spaces between the JSON's parts mean nothing, in the old format too."""
    path = write_old(tmp_path) / "metadata.json"
    data = path.read_bytes()
    accepted = 0
    for k in range(len(data)):
        path.write_bytes(data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :])
        try:
            found = CheckpointManager(tmp_path).restore_checkpoint(NAME)
        except CheckpointDamaged:
            continue
        accepted += 1
        assert found["state_data"] == STATE
    assert accepted < data.count(b" ") + data.count(b"\n")


def test_every_changed_byte_of_a_tensor(tmp_path):
    """The sums in the archive find what changes the data; other changes are refused, or mean nothing."""
    tensors = {"w": torch.arange(6.0)}
    path = write_old(tmp_path, tensors=tensors) / "tensors/w.pt"
    data = path.read_bytes()
    refusals = 0
    for k in range(0, len(data), 7):
        path.write_bytes(data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :])
        try:
            found = CheckpointManager(tmp_path).restore_checkpoint(NAME)
        except CheckpointDamaged as error:
            assert error.file == "tensors/w.pt"
            refusals += 1
        else:
            assert same(found["blueprint_state"], tensors)
    assert refusals > 10


@pytest.mark.parametrize("field", ["version", "checkpoint_id", "layer_id", "seed_id", "timestamp", "state_data"])
def test_a_missing_field(tmp_path, field):
    path = write_old(tmp_path, **{field: ...})
    assert refused(path, f"has no field '{field}'").file == "metadata.json"


def test_no_checksum(tmp_path):
    path = write_old(tmp_path)
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({k: v for k, v in metadata.items() if k != "checksum"}))
    refused(path, "has no field 'checksum'")
    (path / "metadata.json").write_text(json.dumps(metadata | {"seed_id": 11}))
    refused(path, "its checksum is wrong")


@pytest.mark.parametrize("version", [0, 3, 10**6, "2", None, True, 2.0])
def test_other_versions(tmp_path, version):
    path = write_old(tmp_path, version=version)
    assert isinstance(refused(path, "has version .*; old ones are 1 and 2"), CheckpointVersionError)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_id": 3},
        {"seed_id": -1},
        {"seed_id": "0"},
        {"timestamp": "now"},
        {"timestamp": math.inf},
        {"priority": "urgent"},
        {"checkpoint_id": "other"},
    ],
    ids=str,
)
def test_impossible_fields(tmp_path, fields):
    refused(write_old(tmp_path, **fields), "metadata.json: (has|is of)")


def test_text_that_is_no_metadata(tmp_path):
    path = write_old(tmp_path)
    for text in (b"", b"[]", b'{"a": 1, "a": 1}', b"\xff\xfe{}", b"[" * 100_000):
        (path / "metadata.json").write_bytes(text)
        refused(path, "metadata.json: ")
    deep = "[" * 500 + "]" * 500
    (path / "metadata.json").write_text(json.dumps(seal_old({"version": 2, "state_data": json.loads(deep)})))
    refused(path, "metadata.json: ")
    shutil.rmtree(path)
    refused(write_old(tmp_path, state=json.loads(deep)), "nested")


def test_a_new_checkpoint_without_its_files_is_no_old_one(tmp_path):
    manager = CheckpointManager(tmp_path)
    path = tmp_path / manager.save_checkpoint("layer", 0, {})
    (path / "checksum").unlink()
    (path / "tensors.safetensors").unlink()
    assert refused(path, "checksum: is missing").file == "checksum"


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd",
        "../metadata.json",
        "../../x.pt",
        "a/b.pt",
        "a\\b.pt",
        "..",
        "",
        "x.pt\0",
        "x.pt\n",
        "x.pkl",
        None,
        3,
    ]
    + [["x.pt"]],
    ids=repr,
)
def test_files_outside_are_never_opened(tmp_path, file):
    path = write_old(tmp_path, tensors={"w": torch.ones(2)})
    torch.save(torch.ones(2), tmp_path / "x.pt")
    edit_json(path / "tensor_manifest.json", lambda manifest: manifest["w"].update(file=file))
    assert refused(path, "is no file of tensors/|names no file").file == "tensor_manifest.json"


@pytest.mark.parametrize("what", ["tensors", "tensors/w.pt", "tensor_manifest.json", "metadata.json"])
def test_links_are_not_followed(tmp_path, what):
    path = write_old(tmp_path / "root", tensors={"w": torch.ones(2)})
    shutil.move(path / what, tmp_path / "moved")
    (path / what).symlink_to(tmp_path / "moved")
    refused(path, "symbolic link")


def test_missing_files(tmp_path):
    path = write_old(tmp_path, tensors={"w": torch.ones(2)})
    (path / "tensors/w.pt").unlink()
    assert refused(path, "is missing").file == "tensors/w.pt"
    (path / "tensor_manifest.json").unlink()
    assert refused(path, "is missing").file == "tensor_manifest.json"
    (path / "metadata.json").unlink()
    refused(path, "is missing")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [3]}, r"has shape \[2\], tensor_manifest.json says \[3\]"),
        ({"dtype": "torch.float64"}, "has dtype torch.float32, tensor_manifest.json says torch.float64"),
        ({"shape": None}, "tensor_manifest.json: tells no dtype and shape of 'w'"),
        ({"shape": [2**40]}, r"has shape \[2\], tensor_manifest.json says"),
        ({"dtype": "float32"}, "tells no dtype"),
    ],
    ids=str,
)
def test_another_tensor_than_promised(tmp_path, entry, message):
    path = write_old(tmp_path, tensors={"w": torch.ones(2)})
    edit_json(path / "tensor_manifest.json", lambda manifest: manifest["w"].update(entry))
    refused(path, message)


def test_a_tensors_file_of_a_hundred_gigabytes_is_refused_unread(tmp_path):
    path = write_old(tmp_path, tensors={"w": torch.ones(2)})
    os.truncate(path / "tensors/w.pt", 100 << 30)  # sparse
    with pytest.raises(CheckpointDamaged, match="w.pt: has 107374182400 bytes, at most 1073741832 are read"):
        CheckpointManager(tmp_path).restore_checkpoint(path.name)


def test_a_bool_that_is_none(tmp_path):
    odd = torch.tensor([1, 7], dtype=torch.uint8).view(torch.bool)
    path = write_old(tmp_path, tensors={"mask": odd})
    refused(path, "tensors/mask.pt: tensor 'mask.pt' has a bool that is neither 0 nor 1")


def test_two_tensors_in_one_file(tmp_path):
    """The package gives a.b and a_b the same file: the first is lost, which must not pass for the second."""
    path = write_old(tmp_path, tensors={"a.b": torch.ones(2), "a_b": torch.zeros(2)})
    refused(path, "'a.b' and 'a_b' share the file a_b.pt")


# ---- code that wants to run ----------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["KASMINA_TRAP"],)


def archive_of(data, compression=zipfile.ZIP_STORED):
    """The same members, with every pickle replaced by a trap or, with compression, as they are."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            trapped = compression == zipfile.ZIP_STORED and name.endswith("data.pkl")
            new.writestr(name, pickle.dumps(Trap(), protocol=2) if trapped else old.read(name))
    return out.getvalue()


@pytest.mark.parametrize("how", ["pickle", "archive", "module", "old torch.save", "numpy", "code in a subclass"])
def test_planted_pickles_do_not_run(tmp_path, monkeypatch, how):
    trap = tmp_path / "sprung"
    monkeypatch.setenv("KASMINA_TRAP", str(trap))
    path = write_old(tmp_path, tensors={"w": torch.ones(2)}) / "tensors/w.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif how == "archive":
        path.write_bytes(archive_of(path.read_bytes()))
    elif how == "module":
        torch.save(torch.nn.Linear(1, 1), path)
    elif how == "old torch.save":
        torch.save(torch.ones(2), path, _use_new_zipfile_serialization=False)
    elif how == "numpy":
        torch.save({"w": torch.ones(2)}, path)
    else:
        torch.save([torch.ones(2), Trap()], path)
    assert refused(path.parent.parent, "no archive|holds|no plain tensor").file == "tensors/w.pt"
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap()))  # it would have
    assert trap.exists()


def test_pickles_that_nobody_names_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("KASMINA_TRAP", str(tmp_path / "sprung"))
    path = write_old(tmp_path, tensors={"w": torch.ones(2)})
    for place in (path, path / "tensors"):
        (place / "malicious.pkl").write_bytes(pickle.dumps(Trap()))
        (place / "other.pt").write_bytes(pickle.dumps(Trap()))
    assert torch.equal(CheckpointManager(tmp_path).restore_checkpoint(NAME)["blueprint_state"]["w"], torch.ones(2))
    assert not (tmp_path / "sprung").exists()


def test_archives_that_would_grow(tmp_path):
    path = write_old(tmp_path, tensors={"w": torch.zeros(10_000)}) / "tensors/w.pt"
    small = archive_of(path.read_bytes(), zipfile.ZIP_DEFLATED)
    assert len(small) < 5000
    path.write_bytes(small)
    refused(path.parent.parent, "is compressed, which torch.save does not do")


def test_a_tensor_that_is_larger_than_its_data(tmp_path):
    """One number, expanded to 4 GB by its strides."""
    path = write_old(tmp_path, tensors={"w": torch.ones(1).expand(2**30)})
    assert (path / "tensors/w.pt").stat().st_size < 5000
    refused(path, "holds no plain tensor")


# ---- converting ----------------------------------------------------------------------------------


def test_converting(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    write_old(old, tensors=blueprint(), priority="critical")
    before = tree_of(old)
    legacy.convert(old, NAME, new)
    assert tree_of(old) == before
    assert {path.name for path in (new / NAME).iterdir()} == set(format.FILES)
    found, expected = (CheckpointManager(root).restore_checkpoint(NAME) for root in (new, old))
    assert found.pop("version") == 3 and expected.pop("version") == 2
    assert same(found, expected)
    before = tree_of(new)
    assert not legacy.convert(old, NAME, new)  # the very same is there
    shutil.rmtree(old)
    write_old(old, tensors={**blueprint(), "count": torch.tensor(6)}, priority="critical")
    with pytest.raises(OSError, match="File exists"):
        legacy.convert(old, NAME, new)
    assert tree_of(new) == before


def test_a_check_sees_what_the_manifest_promises(tmp_path):
    path = write_old(tmp_path, tensors=blueprint())
    seen = []
    with OpenDirectory(tmp_path, NAME) as directory:
        legacy.read(directory, check=lambda *told: seen.append(told))
    [(header, preview)] = seen
    assert header["layer_id"] == "layer1" and preview["state_data"]["blueprint_id"] == 42
    found = {key: (t.is_meta, t.dtype, t.shape) for key, t in preview["blueprint_state"].items()}
    assert found == {key: (True, t.dtype, t.shape) for key, t in blueprint().items()}
    manifest = json.loads((path / "tensor_manifest.json").read_text())
    for wrong in ({"dtype": "torch.load"}, {"shape": "x"}, {"shape": [-1]}, {"shape": [2**70]}, {"shape": [True]}):
        changed = {**manifest, "count": {**manifest["count"], **wrong}}
        (path / "tensor_manifest.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointDamaged), OpenDirectory(tmp_path, NAME) as directory:
            legacy.read(directory, check=lambda *_: None)


def test_converting_damage_writes_nothing(tmp_path):
    path = write_old(tmp_path / "old", tensors={"w": torch.ones(2)})
    (path / "tensors/w.pt").write_bytes(b"")
    with pytest.raises(CheckpointDamaged):
        legacy.convert(tmp_path / "old", NAME, tmp_path / "new")
    assert not (tmp_path / "new").exists()
