"""One checkpoint: what goes in comes out, other readers agree, and what cannot be saved is refused before it is."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import sys
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from checkpoint_cases import HEADER, read_plainly, same, small_content, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from kasmina_ext.checkpoint import content as contents
from kasmina_ext.checkpoint import files, format, tensor_file
from kasmina_ext.checkpoint.errors import CheckpointDamaged, CheckpointNotFound
from kasmina_ext.checkpoint.files import OpenDirectory

DTYPES = list(tensor_file.DTYPES.values())


def random_tensor(dtype, shape, seed=0):
    """Any bits that are legal in the type."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def roundtrip(root, content, header=HEADER):
    format.write(root, "one", header, content)
    found = format.read(root, "one")
    format_files = {path.name for path in (root / "one").iterdir()}
    assert format_files == {"metadata.json", "tensors.safetensors", "checksum"}
    return found


# ---- there and back ------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path):
    content = small_content()
    header, found = roundtrip(tmp_path, content)
    assert same(header, HEADER)
    assert same(found, content)


def test_the_files_are_what_is_promised(tmp_path):
    roundtrip(tmp_path, small_content())
    path = tmp_path / "one"
    text, tensors = (path / "metadata.json").read_bytes(), (path / "tensors.safetensors").read_bytes()
    metadata = json.loads(text)
    assert (path / "checksum").read_text() == hashlib.sha256(text).hexdigest()
    promised = {"size": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()}
    assert metadata["files"] == {"tensors.safetensors": promised}
    assert metadata["checkpoint_id"] == "one"
    assert metadata["layer_id"] == "layer"
    assert metadata["state_data"]["lifecycle_state"] == 3
    assert text.isascii()


def test_a_second_reader_agrees(tmp_path):
    content = small_content()
    roundtrip(tmp_path, content)
    assert same(read_plainly(tmp_path / "one"), (HEADER, content))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (5, 1, 2)], ids=str)
def test_every_type_and_shape(tmp_path, shape):
    tensors = {str(dtype).removeprefix("torch."): random_tensor(dtype, shape) for dtype in DTYPES}
    assert same(roundtrip(tmp_path, {"t": tensors})[1]["t"], tensors)
    loaded = load_file(tmp_path / "one/tensors.safetensors")
    assert all(same(loaded[f"t.{name}"], tensor) for name, tensor in tensors.items())


def test_the_library_writes_the_same_tensors(tmp_path):
    """Its header may differ in order and padding; the data and their addresses may not, where the order is the same."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(7)}
    roundtrip(tmp_path, tensors)
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = (tmp_path / "one/tensors.safetensors").read_bytes(), (tmp_path / "theirs").read_bytes()

    def parts(data):
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]

    assert parts(ours) == parts(theirs)


def test_tensors_are_aligned(tmp_path):
    roundtrip(tmp_path, {"t": [random_tensor(dtype, (3,)) for dtype in reversed(DTYPES)]})
    data = (tmp_path / "one/tensors.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for entry in header.values():
        assert (start + entry["data_offsets"][0]) % tensor_file.DTYPES[entry["dtype"]].itemsize == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1:],
        lambda t: t[:, :1].expand(4, 9),
        lambda t: nn.Parameter(t),
        lambda t: (t * t.requires_grad_()).detach(),
        lambda t: torch.complex(t, t).conj(),
        lambda t: torch.complex(t, t).conj().imag,
        lambda t: t.to(memory_format=torch.contiguous_format)[None, None].to(memory_format=torch.channels_last),
    ],
)
def test_views_become_plain_tensors(tmp_path, make):
    tensor = make(torch.randn(4, 6))
    found = roundtrip(tmp_path, {"t": tensor})[1]["t"]
    assert type(found) is torch.Tensor
    assert torch.equal(found, tensor.detach())
    assert found.is_contiguous() and not found.requires_grad and not found.is_conj() and not found.is_neg()


def test_each_tensor_has_memory_of_its_own(tmp_path):
    """So that a small one does not keep a large file alive, and writing one changes no other."""
    one = torch.randn(4)
    found = roundtrip(tmp_path, {"t": [one, one, one.view(2, 2)]})[1]["t"]
    assert [t.untyped_storage().nbytes() for t in found] == [16, 16, 16]
    found[0].zero_()
    assert torch.equal(found[1], one)


def test_tensors_from_a_device(tmp_path, device):
    tensor = torch.randn(100, 3, device=device)
    assert torch.equal(roundtrip(tmp_path, {"t": tensor})[1]["t"], tensor.cpu())


def test_a_default_device_does_not_matter(tmp_path):
    with torch.device("meta"):
        found = roundtrip(tmp_path, {"t": torch.ones(3, device="cpu")})[1]["t"]
    assert torch.equal(found, torch.ones(3))


def test_a_large_tensor_and_its_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_PROGRESS_STEP", 1 << 20)
    seen = []
    tensor = torch.arange(1 << 20)
    format.write(tmp_path, "one", {}, {"t": tensor, "u": tensor}, progress=lambda *args: seen.append(args))
    assert seen == [(k << 20, 16 << 20) for k in range(1, 17)]
    assert torch.equal(format.read(tmp_path, "one")[1]["u"], tensor)


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    TWO = 2


class Name(str, enum.Enum):
    N = "text"


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        (Number.TWO, 2),
        (Name.N, "text"),
        (np.float64(0.1), 0.1),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(5), 5),
        (np.bool_(True), True),
        (np.float32("nan"), math.nan),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (Point(1, 2), (1, 2)),
        (torch.Size([1, 2]), (1, 2)),
        ({Number.TWO: 1, Name.N: 2}, {2: 1, "text": 2}),
        ("\ud800 \x00 \x1b[31m ü 𝄞", "\ud800 \x00 \x1b[31m ü 𝄞"),
        ({"": {"": []}}, {"": {"": []}}),
        (2**8000, 2**8000),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "replace").decode().replace("\0", ""),
)
def test_what_is_nearly_json(tmp_path, given_value, expected):
    assert same(roundtrip(tmp_path, {"v": given_value})[1]["v"], expected)


JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([torch.ones(2), torch.empty(0)]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["$tensor", "$dict", "$", "a.b"]), inner, max_size=4)
        | st.dictionaries(st.integers() | st.booleans() | st.floats(allow_nan=False) | st.none(), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(value=JSON_LIKE)
def test_any_value_survives_its_text(value):
    encoder = contents.Encoder()
    text = contents.to_text(encoder.encode(value, "v"))
    decoder = contents.Decoder(encoder.tensors)
    assert same(decoder.decode(contents.from_text(text)), value)
    decoder.finish()


def test_names_of_tensors_never_collide(tmp_path):
    t = [torch.full((1,), float(k)) for k in range(6)]
    content = {"a": {"b": t[0], "c.d": t[1], "c": {"d": t[2]}}, "a.b": t[3], "ä": t[4], "tensor.2": t[5]}
    assert same(roundtrip(tmp_path, content)[1], content)


# ---- what cannot be saved ------------------------------------------------------------------------


def cycle():
    value = []
    value.append(value)
    return value


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (b"bytes", TypeError, r"v\.x is of type bytes"),
        ({1, 2}, TypeError, r"v\.x is of type set"),
        (Colour.RED, TypeError, "type Colour"),
        (torch.float32, TypeError, "type dtype"),
        (1j, TypeError, "type complex"),
        (np.zeros(3), TypeError, "type ndarray"),
        (nn.Linear(1, 1), TypeError, "type Linear"),
        ({(torch.ones(1),): 1}, TypeError, r"a key of v\.x is of type Tensor"),
        ({b"k": 1}, TypeError, r"a key of v\.x is of type bytes"),
        ({math.nan: 1}, ValueError, r"a key of v\.x is NaN"),
        ({(1, (math.nan,)): 1}, ValueError, r"a key of v\.x is NaN"),
        (torch.ones(2).to_sparse(), TypeError, r"v\.x is a tensor of the kind sparse_coo float32"),
        (torch.empty(2, device="meta"), TypeError, r"v\.x is a tensor of the kind meta"),
        (cycle(), ValueError, "nested more than 100 deep, or contains itself"),
        (deep(101), ValueError, "nested more than 100 deep"),
        (1 << 9000, ValueError, "an integer of 9001 bits"),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " ") if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_saved_is_named(tmp_path, value, error, message):
    with pytest.raises(error, match=message):
        format.write(tmp_path, "one", HEADER, {"v": {"x": value}})
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("header", "content", "message"),
    [
        ({}, {"format": 1}, "'format' cannot be the name of a field"),
        ({"files": 1}, {}, "'files' cannot be"),
        ({}, {"$x": 1}, r"'\$x' cannot be"),
        ({}, {3: 1}, "3 cannot be"),
        ({"a": 1}, {"a": 2}, "both have 'a'"),
    ],
)
def test_names_that_are_taken(tmp_path, header, content, message):
    with pytest.raises(ValueError, match=message):
        format.write(tmp_path, "one", header, content)
    assert tree_of(tmp_path) == {}


def test_other_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="content must be a dict, got list"):
        format.write(tmp_path, "one", {}, [1])
    with pytest.raises(TypeError, match="the header holds the tensor t"):
        format.write(tmp_path, "one", {"t": torch.ones(1)}, {})
    assert tree_of(tmp_path) == {}


def test_metadata_that_would_not_be_read_back_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "MAX_METADATA_BYTES", 2000)
    roundtrip(tmp_path, {"v": "x" * 1000})
    with pytest.raises(ValueError, match="put large data into tensors"):
        format.write(tmp_path, "two", {}, {"v": "x" * 2000})
    assert {path.name for path in tmp_path.iterdir()} == {"one"}


def test_a_tensor_that_changes_shape_meanwhile(tmp_path):
    tensor = torch.ones(4)
    with pytest.raises(RuntimeError, match="t changed while it was saved"):
        format.write(
            tmp_path, "one", {}, {"s": torch.ones(9).double(), "t": tensor}, progress=lambda *_: tensor.resize_(2)
        )
    assert tree_of(tmp_path) == {}


def test_tensors_that_are_trained_meanwhile(tmp_path, monkeypatch):
    """Which values are saved is the caller's affair; that they are whole is ours."""
    tensor = torch.zeros(1000)
    real_write = os.write

    def write(fd, data):
        tensor.add_(1)
        return real_write(fd, data)

    monkeypatch.setattr(files.os, "write", write)
    found = roundtrip(tmp_path, {"t": tensor})[1]["t"]
    assert found.eq(found[0]).all() and tensor[0] > found[0]


# ---- reading -------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFound):
        format.read(tmp_path, "one")


def test_the_header_alone(tmp_path):
    roundtrip(tmp_path, small_content())
    size = (tmp_path / "one/tensors.safetensors").stat().st_size
    with OpenDirectory(tmp_path, "one") as directory:
        assert format.read_header(directory) == {**HEADER, "version": 3, "size": size}


def test_a_limit(tmp_path):
    roundtrip(tmp_path, small_content())
    size = (tmp_path / "one/tensors.safetensors").stat().st_size
    format.read(tmp_path, "one", max_bytes=size)
    with pytest.raises(CheckpointDamaged, match=f"tensors.safetensors: has {size} bytes, at most {size - 1} are read"):
        format.read(tmp_path, "one", max_bytes=size - 1)


def test_no_numpy_and_no_safetensors_are_needed(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("numpy", "safetensors")]:
        monkeypatch.setitem(sys.modules, name, None)
    content = small_content()
    assert same(roundtrip(tmp_path, content)[1], content)
