"""Damage of every kind, believed or not: refused with the file and the reason, no code run, no memory taken."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import HEADER, edit, read_plainly, same, seal, seal_text, small_content, tree_of

from kasmina_ext.checkpoint import CheckpointManager, CheckpointRecovery, format, tensor_file
from kasmina_ext.checkpoint.errors import CheckpointDamaged, CheckpointSaveError, CheckpointVersionError

FILES = ("metadata.json", "tensors.safetensors", "checksum")


@pytest.fixture
def memory_path():
    """For many small files: in memory where the machine offers it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


@pytest.fixture
def path(memory_path):
    format.write(memory_path, "one", HEADER, small_content())
    return memory_path / "one"


def refused(path, message=None):
    """The error of reading it, which names a file, and changes nothing."""
    before = tree_of(path.parent)
    with pytest.raises(CheckpointDamaged, match=message) as caught:
        format.read(path.parent, path.name)
    assert str(caught.value).startswith(f"Integrity check failed for checkpoint {path.name}: {caught.value.file}: ")
    assert caught.value.reason
    assert tree_of(path.parent) == before
    return caught.value


# ---- damage that sums find -----------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_each_bit_of_each_byte(path, file):
    """One bit of every byte, another one from byte to byte, and the whole byte."""
    data = (path / file).read_bytes()
    for k in range(len(data)):
        for change in (1 << k % 8, 0xFF):
            (path / file).write_bytes(data[:k] + bytes([data[k] ^ change]) + data[k + 1 :])
            with pytest.raises(CheckpointDamaged, match="Integrity check failed for checkpoint one: "):
                format.read(path.parent, "one")
    (path / file).write_bytes(data)
    assert same(format.read(path.parent, "one"), (HEADER, small_content()))


@pytest.mark.parametrize("file", FILES)
def test_each_truncation_and_each_appended_byte(path, file):
    data = (path / file).read_bytes()
    for length in range(len(data)):
        (path / file).write_bytes(data[:length])
        with pytest.raises(CheckpointDamaged, match="Integrity check failed"):
            format.read(path.parent, "one")
    for more in (b"\0", b"\n", b" ", data):
        (path / file).write_bytes(data + more)
        refused(path)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(path, file):
    (path / file).unlink()
    assert refused(path, "is missing").file == file


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_checkpoint(path, file):
    format.write(path.parent, "two", HEADER, small_content(1))
    shutil.copy(path.parent / "two" / file, path / file)
    refused(path)


def test_a_whole_checkpoint_under_another_name(path):
    shutil.copytree(path, path.parent / "two")
    assert refused(path.parent / "two", "metadata.json: is of checkpoint 'one'")


@pytest.mark.parametrize("name", ["malicious.pkl", ".hidden", "tensors.pt", "checksum~"])
def test_an_extra_file(path, name):
    (path / name).write_bytes(pickle.dumps(Trap()))
    assert refused(path, "does not belong to a checkpoint").file == name


def test_an_extra_directory(path):
    (path / "tensors").mkdir()
    assert refused(path).file == "tensors"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_a_file_that_is_none(path, file, kind):
    outside = path.parent / "outside"
    shutil.move(path / file, outside)
    if kind == "link":
        (path / file).symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(path / file)
    else:
        (path / file).mkdir()
    assert refused(path, "is a symbolic link|is no regular file").file == file


def test_a_link_to_a_whole_checkpoint(path):
    (path.parent / "two").symlink_to(path)
    assert refused(path.parent / "two", "is a symbolic link")


class Trap:
    """Runs code when a pickle of it is loaded."""

    def __reduce__(self):
        return os.mkdir, (f"/tmp/kasmina-trap-{os.getpid()}",)


@pytest.mark.parametrize("file", FILES)
def test_pickles_in_place_of_files(path, file):
    (path / file).write_bytes(pickle.dumps(Trap()))
    if file == "tensors.safetensors":
        seal(path)
    refused(path)
    torch.save(Trap(), path / file)
    refused(path)
    assert not os.path.exists(f"/tmp/kasmina-trap-{os.getpid()}")


# ---- damage with sums that are right -------------------------------------------------------------


def metadata_of(path):
    return json.loads((path / "metadata.json").read_bytes())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", "is not of this package"),
        (b"null", "is not of this package"),
        (b'{"format": 1}', "is not of this package"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "the key 'b' is there twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "Infinity is not JSON"),
        (b'{"a": 1e999}', "the number 1e999 is out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer has 5000 digits"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        ('{"ä": 1}'.encode(), "byte 2 is not ASCII"),
        ('{"a": 1}'.encode("utf-16"), "is not ASCII"),
        (b"\xef\xbb\xbf{}", "byte 0 is not ASCII"),
        (b"{} {}", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": 01}', "is not JSON"),
        (b'{"a": "\n"}', "is not JSON"),
    ],
    ids=lambda value: value[:20].decode("ascii", "replace") if isinstance(value, bytes) else None,
)
def test_text_that_is_no_metadata(path, text, message):
    seal_text(path, text)
    assert refused(path, message).file == "metadata.json"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint_id": "two"}, "is of checkpoint 'two'"),
        ({"checkpoint_id": None}, "is of checkpoint 'None'"),
        ({"header": ["nope"]}, "names header fields that it does not have"),
        ({"header": ["layer_id", "layer_id"]}, "names a header field twice"),
        ({"header": ["format"]}, "names header fields"),
        ({"header": "layer_id"}, "names header fields"),
        ({"header": [["a"]]}, "names header fields"),
        ({"files": {}}, "does not describe tensors.safetensors alone"),
        ({"files": {"../tensors.safetensors": {"size": 1, "sha256": ""}}}, "does not describe"),
        ({"files": {"tensors.safetensors": {"size": 1}}}, "does not tell size and sha256"),
        ({"files": {"tensors.safetensors": {"size": True, "sha256": ""}}}, "does not tell size"),
        ({"files": {"tensors.safetensors": {"size": -1, "sha256": ""}}}, "promises -1"),
        ({"files": {"tensors.safetensors": {"size": 2**80, "sha256": ""}}}, "promises 1208925819614629174706176"),
        ({"$x": 1}, "starts with"),
        ({"state_data": {"$pickle": 1}}, "an object has the key '\\$pickle'"),
        ({"state_data": {"$tuple": [], "b": 1}}, "an object has the keys"),
        ({"state_data": {"$tuple": {}}}, "'\\$tuple'"),
        ({"state_data": {"$float": "1.0"}}, "'\\$float'"),
        ({"state_data": {"$float": ["nan"]}}, "'\\$float'"),
        ({"state_data": {"$dict": [[1, 2], [1, 3]]}}, "has a key twice"),
        ({"state_data": {"$dict": [[1, 2], [{"$float": "inf"}, 3], [True, 3]]}}, "has a key twice"),
        ({"state_data": {"$dict": [[{"$float": "nan"}, 2]]}}, "one that is none"),
        ({"state_data": {"$dict": [[[], 2]]}}, "one that is none"),
        ({"state_data": {"$dict": [[{"$tuple": [[]]}, 2]]}}, "one that is none"),
        ({"state_data": {"$dict": [[1]]}}, "is not a list of pairs"),
        ({"state_data": {"$dict": {}}}, "'\\$dict'"),
        ({"state_data": {"$tensor": "nope"}}, "tensor 'nope' is not there"),
        ({"state_data": {"$tensor": ["nope"]}}, "'\\$tensor'"),
        ({"state_data": 1}, "belongs to nothing"),
        ({"layer_id": {"$tensor": "blueprint_state.half"}}, "is not there, or belongs to two things"),
        ({"tensors": []}, "the tensors are not an object"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_fields_that_nobody_writes(path, fields, message):
    edit(path, **fields)
    refused(path, message)


@pytest.mark.parametrize("field", ["format", "version", "checkpoint_id", "header", "tensors", "files"])
def test_a_missing_field(path, field):
    metadata = metadata_of(path)
    del metadata[field]
    seal(path, metadata)
    refused(path)


@pytest.mark.parametrize("version", [1, 2, 4, 10**9, -3, "3", 3.0, None, True, [3]])
def test_other_versions(path, version):
    edit(path, version=version)
    assert isinstance(refused(path, "this package reads 3"), CheckpointVersionError)


def test_content_nested_too_deeply(path):
    value = 0
    for _ in range(150):
        value = [value]
    edit(path, more=value)
    refused(path, "nested more than 100 deep")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "is not described by dtype and shape"),
        ({"dtype": "F32"}, "is not described"),
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "is not described"),
        ({"dtype": "F128", "shape": [2, 3]}, "unknown dtype 'F128'"),
        ({"dtype": ["F32"], "shape": [2, 3]}, "unknown dtype"),
        ({"dtype": "F32", "shape": 6}, "impossible shape"),
        ({"dtype": "F32", "shape": [2, -3]}, "impossible shape"),
        ({"dtype": "F32", "shape": [2.0, 3]}, "impossible shape"),
        ({"dtype": "F32", "shape": [True, 6]}, "impossible shape"),
        ({"dtype": "F32", "shape": [2**62]}, "impossible shape"),
        ({"dtype": "F32", "shape": [2**33, 2**33]}, "impossible shape"),
        ({"dtype": "F32", "shape": [0, 2**61, 2**61]}, "impossible shape"),
        ({"dtype": "F32", "shape": [2**32, 2**27]}, "its tensors need"),
        ({"dtype": "F32", "shape": [6]}, "its header is not the one of the tensors in metadata.json"),
        ({"dtype": "I32", "shape": [2, 3]}, "its header is not the one"),
        ({"dtype": "I8", "shape": [24]}, "not in the order of the file"),
        ({"dtype": "F32", "shape": [2, 4]}, "its tensors need"),
        ({"dtype": "F32", "shape": [1] * 100_000}, "its tensors need"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_tables_that_do_not_fit(path, entry, message):
    metadata = metadata_of(path)
    metadata["tensors"]["blueprint_state.layer.weight"] = entry
    seal(path, metadata)
    refused(path, message)


def set_tensor_header(path, change):
    """Change the safetensors header and make all sums right."""
    data = (path / "tensors.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(start - 8) if len(text) <= start - 8 else text
    (path / "tensors.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    seal(path)


@pytest.mark.parametrize(
    "offsets", [[0, 24], [23, 47], [0, 2**63], [-8, 16], [24, 0], [2**64 - 24, 2**64], [25, 49]], ids=str
)
def test_ranges_that_overlap_or_leave_the_file(path, offsets):
    set_tensor_header(path, lambda header: header["blueprint_state.layer.weight"].update(data_offsets=offsets))
    refused(path, "its header is not the one|its tensors need")


def test_swapped_tensors(path):
    """The header swaps two tensors of the same size: the table stays, the ranges do not."""

    def swap(header):
        mask, scores = header["state_data.mask"], header["blueprint_state.half"]
        mask["data_offsets"], scores["data_offsets"] = scores["data_offsets"], mask["data_offsets"]

    set_tensor_header(path, swap)
    refused(path, "its header is not the one")


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1], ids=str)
def test_header_lengths(path, length):
    data = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
    seal(path)
    refused(path, "its header is not the one")


@pytest.mark.parametrize("name", ["__metadata__", "more"])
def test_entries_in_the_header_that_nobody_knows(path, name):
    set_tensor_header(
        path, lambda header: header.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    )
    refused(path, "its tensors need|its header is not the one")


def test_a_bool_that_is_none(tmp_path):
    format.write(tmp_path, "one", {}, {"mask": torch.ones(5, dtype=torch.bool)})
    data = (tmp_path / "one/tensors.safetensors").read_bytes()
    (tmp_path / "one/tensors.safetensors").write_bytes(data[:-1] + b"\2")
    seal(tmp_path / "one")
    refused(tmp_path / "one", "a bool that is neither 0 nor 1")


def test_a_valid_change_is_read_as_it_stands(path):
    """Sums find damage, not forgers: what somebody writes by the rules is what is read."""
    edit(path, state_data={"$tuple": [1, {"$tensor": "state_data.mask"}]}, blueprint_state=None)
    metadata = metadata_of(path)
    metadata["tensors"] = {"state_data.mask": metadata["tensors"]["state_data.mask"]}
    table = tensor_file.table_from_json(metadata["tensors"])
    (path / "tensors.safetensors").write_bytes(tensor_file.header_of(table) + b"\0\1\0")
    seal(path, metadata)
    seal(path)
    found = format.read(path.parent, "one")
    assert same(found, read_plainly(path))
    assert torch.equal(found[1]["state_data"][1], torch.tensor([False, True, False]))


# ---- sizes ---------------------------------------------------------------------------------------


def test_metadata_of_four_gigabytes_are_refused_unread(path):
    os.truncate(path / "metadata.json", 4 << 30)  # sparse
    started = time.monotonic()
    refused_error = pytest.raises(
        CheckpointDamaged, match="metadata.json: has 4294967296 bytes, at most 67108864 are read"
    )
    with refused_error:
        format.read(path.parent, "one")
    assert time.monotonic() - started < 1


def test_a_table_of_more_than_there_is_takes_no_memory(path):
    metadata = metadata_of(path)
    metadata["tensors"]["blueprint_state.layer.weight"] = {"dtype": "F32", "shape": [2**32, 2**20]}
    seal(path, metadata)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "its tensors need")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# ---- a manager among damage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "other"},
        {"kind": ["seed"]},
        {"timestamp": -1},
        {"timestamp": 10**16},
        {"timestamp": "1"},
        {"layer_id": 3},
        {"priority": "urgent"},
        {"priority": ["low"]},
        {"seed_id": -1},
        {"seed_id": None},
        {"lifecycle_state": 11},
        {"lifecycle_state": "GRAFTING"},
        {"lifecycle_state": True},
    ],
    ids=str,
)
def test_headers_that_no_manager_writes(tmp_path, header):
    manager = CheckpointManager(tmp_path)
    good = manager.save_checkpoint("layer", 3, {"good": True})
    bad = manager.save_checkpoint("layer", 3, {"good": False})
    edit(tmp_path / bad, **header)
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointDamaged, match="metadata.json: (is of|has)"):
        manager.restore_checkpoint(bad)
    assert [entry["checkpoint_id"] for entry in manager.list_checkpoints()] == [good]
    assert CheckpointRecovery(manager).recover_seed_state("layer", 3)["state_data"] == {"good": True}
    manager.save_checkpoint("layer", 3, {})


def test_other_content_than_the_kind_has(tmp_path):
    manager = CheckpointManager(tmp_path)
    name = manager.save_checkpoint("layer", 3, {})
    edit(tmp_path / name, more=1)
    with pytest.raises(CheckpointDamaged, match="other fields than a checkpoint of its kind"):
        manager.restore_checkpoint(name)


def test_recovery_passes_over_damage_of_every_kind(tmp_path):
    manager = CheckpointManager(tmp_path, 20)
    good = manager.save_checkpoint("layer", 3, {"good": True})
    spoil = [
        lambda path: (path / "checksum").unlink(),
        lambda path: (path / "metadata.json").unlink(),
        lambda path: (path / "tensors.safetensors").unlink(),
        lambda path: (path / "tensors.safetensors").write_bytes(b""),
        lambda path: (path / "extra").mkdir(),
        lambda path: shutil.rmtree(path),
        lambda path: [file.unlink() for file in path.iterdir()],
        lambda path: seal_text(path, b"{}"),
        lambda path: (shutil.rmtree(path), path.symlink_to(tmp_path / good)),
    ]
    for action in spoil:
        action(tmp_path / manager.save_checkpoint("layer", 3, {"good": False}))
    found = CheckpointRecovery(manager).recover_seed_state("layer", 3)
    assert found["checkpoint_id"] == good and found["state_data"] == {"good": True}


# ---- a full disk, really -------------------------------------------------------------------------


def save_too_much(root, blueprint, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        CheckpointManager(root).save_checkpoint("layer", 1, {"i": 1}, blueprint)
    except CheckpointSaveError as error:
        answer.put((error.errno, Path(error.filename).name, str(error)))


def test_a_limit_of_the_system_on_files(tmp_path):
    """The kernel itself says no, in the middle of a file."""
    manager = CheckpointManager(tmp_path)
    kept = manager.save_checkpoint("layer", 1, {"i": 0}, {"w": torch.ones(100)})
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=save_too_much, args=(tmp_path, {"w": torch.ones(100_000)}, answer), daemon=True)
    child.start()
    code, file, message = answer.get(timeout=30)
    child.join()
    assert (code, file) == (errno.EFBIG, "tensors.safetensors")
    assert "failed: File too large" in message
    assert [path.name for path in tmp_path.iterdir()] == [kept]
    assert manager.restore_checkpoint(kept)["state_data"] == {"i": 0}
