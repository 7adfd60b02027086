"""Seed files that are damaged, or that lie with a right sha256: refused with the reason, and the model is as it was."""

from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import save_file
from seed_file_cases import bits, everything, file_of, grow_, layers_of, network, owned_bits, parts_of, read_plainly
from torch import nn

import kasmina_ext as kx
from kasmina_ext.seed_file_format import SeedFileDamaged


@pytest.fixture
def path(tmp_path):
    return kx.save_seeds(grow_(network(), 1), tmp_path / "a.safetensors", metadata={"tenant": "anna"})


@pytest.fixture
def model():
    return grow_(network(), 2)


def refused(model: nn.Module, path, data: bytes, message: str | None = None, error: type = SeedFileDamaged) -> None:
    """For every way to load it; the model is as it was."""
    path.write_bytes(data)
    before = everything(model)
    for strict in (True, False):
        with pytest.raises(error, match=message) as caught:
            kx.load_seeds(model, path, strict=strict)
        assert str(path) in str(caught.value) and isinstance(caught.value, kx.CheckpointError)
    with pytest.raises(error, match=message):
        kx.load_seed_sets(model, {"a": path})
    assert everything(model) == before


# ---- damage that the sum finds -------------------------------------------------------------------


def test_each_byte(path):
    """One bit of every byte, another one from byte to byte."""
    data, model = path.read_bytes(), network()
    for k in range(len(data)):
        path.write_bytes(data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :])
        with pytest.raises(SeedFileDamaged):
            kx.load_seeds(model, path)
    assert everything(model) == everything(network())


def test_every_length(path):
    data, model = path.read_bytes(), network()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(SeedFileDamaged, match="cut off|its tensors need"):
            kx.load_seeds(model, path)
    for more in (b"\0", b"x" * 100):
        path.write_bytes(data + more)
        with pytest.raises(SeedFileDamaged, match=f"has {len(data + more)} bytes, its tensors need {len(data)}"):
            kx.load_seeds(model, path)
    assert everything(model) == everything(network())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"\xff" * 64, "cut off"),
        (struct.pack("<Q", 2) + b"{}", "not of this package"),
        (struct.pack("<Q", 2) + b"[]", "no object"),
        (struct.pack("<Q", 9) + b'{"a":1e9}', "no place"),
        (struct.pack("<Q", 20) + b'{"__metadata__":[1]}', "not text"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "nested"),
        (struct.pack("<Q", 4) + b"\xc3\xa4\xc3\xa4", "not ASCII"),
    ],
)
def test_other_files(model, path, data, message):
    refused(model, path, data, message)


def test_files_of_others(model, path):
    """A model's own file, and one that another library wrote of the same tensors."""
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    refused(model, path, path.read_bytes(), "is not of this package")
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(SeedFileDamaged, match="is no regular file"):
        kx.load_seeds(model, path)
    os.unlink(path)
    path.mkdir()
    with pytest.raises(SeedFileDamaged, match="is a directory"):
        kx.load_seeds(model, path)


def test_too_large_to_be_read(model, path):
    """A sparse file of a tebibyte: not read."""
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(SeedFileDamaged, match="bytes, at most"):
        kx.load_seeds(model, path)


# ---- lies that the sum does not find -------------------------------------------------------------


def lie(path, change) -> bytes:
    """The file after ``change(header, rows, tensors)``: header as a dict, rows as dicts, tensors in one bytearray."""
    header, body = parts_of(path)
    table = json.loads(header["__metadata__"]["layers"])
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    body = bytearray(body)
    change(header, rows, body)
    header["__metadata__"]["layers"] = json.dumps(
        {"columns": table["columns"], "rows": [list(row.values()) for row in rows]}, separators=(",", ":")
    )
    return file_of(header, bytes(body))


def put(name: str, index: int, kind: str, value: float):
    """A change of one number of a tensor."""

    def change(header, rows, body):
        start = header[name]["data_offsets"][0]
        struct.pack_into("<" + kind, body, start + index * struct.calcsize(kind), value)

    return change


def say(number: int, **fields):
    """A change of the table of layers."""
    return lambda header, rows, body: rows[number].update(fields)


def tell(**fields):
    """A change of the metadata."""
    return lambda header, rows, body: header["__metadata__"].update(fields)


def test_a_right_file_may_be_made_by_hand(path):
    model = network()
    path.write_bytes(lie(path, lambda header, rows, body: None))
    kx.load_seeds(model, path)
    assert [owned_bits(layer) for layer in layers_of(model)] == [
        owned_bits(layer) for layer in layers_of(grow_(network(), 1))
    ]


_LIES = {
    "a lifecycle that there is not": (put("state", 0, "i", 11), "state must be in \\[0, 10\\].*LIFECYCLE"),
    "a negative lifecycle": (put("state", 0, "i", -1), "'0': state must be in"),
    "a blueprint beyond the bank": (put("state", 4, "i", 2), "BLUEPRINT_ID"),
    "a strategy that there is not": (put("state", 12, "i", 4), "GRAFTING_STRATEGY"),
    "a lifecycle that most have and there is not": (put("common_state", 1, "i", 11), "'2': state must be in"),
    "an alpha that most have and cannot": (put("common_alpha", 0, "f", -0.5), "'0': alpha must be in"),
    "an alpha above 1": (put("alpha", 3, "f", 1.5), "'2': alpha must be in \\[0, 1\\]"),
    "an alpha that is no number": (put("alpha", 0, "f", float("nan")), "alpha must be in"),
    "a seed that there is not": (put("seeds", 1, "q", 5), "its seeds of '0'"),
    "a seed twice": (put("seeds", 3, "q", 0), "its seeds of '2'"),
    "a negative seed": (put("seeds", 0, "q", -1), "its seeds of '0'"),
    "a slice that there is not": (put("slices", 3, "q", 10), "its slices of '0'"),
    "a slice far away": (put("slices", 3, "q", 2**62), "its slices of '0'"),
    "slices out of order": (put("slices", 0, "q", 7), "its slices of '0'"),
    "more weights than slices": (say(0, stored_weights=33), "its tensors are not"),
    "fewer seeds": (say(0, stored_seeds=1), "its tensors are not"),
    "a count of another layer": (
        lambda h, rows, b: (rows[0].update(stored_seeds=1), rows[1].update(stored_seeds=3)),
        "not different numbers",
    ),
    "a negative count": (say(0, stored_slices=-4), "impossible row"),
    "a count beyond all": (say(0, stored_slices=2**63), "impossible row"),
    "features as text": (say(0, features="40"), "impossible row"),
    "features as truth": (say(0, features=True), "impossible row"),
    "an unknown chunking": (say(0, chunking="random"), "impossible row"),
    "an unknown strategy": (say(1, strategy="eval"), "impossible row"),
    "a dtype that is none": (say(0, dtype="int32"), "impossible row"),
    "another dtype": (say(0, dtype="float16"), "its tensors are not"),
    "a name as a number": (say(0, name=0), "impossible row"),
    "two layers of one name": (say(1, name="0"), "two layers of one name"),
    "a row too short": (lambda h, rows, b: rows[0].popitem(), "impossible row"),
    "no layers": (lambda h, rows, b: rows.clear(), "its tensors are not"),
    "another version": (tell(version="2"), "has version 2, this package reads 1"),
    "another format": (tell(format="kasmina_ext.checkpoint"), "not of this package"),
    "metadata that are no JSON": (tell(metadata="{"), "is not JSON"),
    "metadata that are no dict": (tell(metadata="[1]"), "no dict"),
    "metadata with a tensor": (tell(metadata='{"a":{"$tensor":"state"}}'), "not there"),
    "metadata with half a character": (tell(metadata="\ud800"), "not ASCII"),
    "a double key": (tell(metadata='{"a":1,"a":2}'), "twice"),
}


@pytest.mark.parametrize("name", _LIES)
def test_lies(model, path, name):
    change, message = _LIES[name]
    refused(model, path, lie(path, change), message)


@pytest.mark.parametrize("field", ["layers", "format", "version"])
def test_metadata_that_are_missing(model, path, field):
    header, body = parts_of(path)
    del header["__metadata__"][field]
    refused(model, path, file_of(header, body))


@pytest.mark.parametrize("table", ["[]", "{}", "null", '{"columns":[],"rows":[]}', '{"columns":["name"],"rows":5}'])
def test_no_table_of_layers(model, path, table):
    header, body = parts_of(path)
    header["__metadata__"]["layers"] = table
    refused(model, path, file_of(header, body), "no table of layers")


def test_headers_that_overlap(model, path):
    """Offsets that are not those of the tensors one after the other, in every way that a sum may still be right for."""
    header, body = parts_of(path)
    for name, offsets in (("alpha", [0, 16]), ("state", [8, 136]), ("seeds", [0, 10**18]), ("seeds", [32, 0])):
        changed = json.loads(json.dumps(header))
        changed[name]["data_offsets"] = offsets
        refused(model, path, file_of(changed, body), "its header is not as this package writes it")
    for shape in ([4, -1], [2**40, 2**40], "4", [1.5]):
        changed = json.loads(json.dumps(header))
        changed["alpha"]["shape"] = shape
        refused(model, path, file_of(changed, body), "shape")


def test_a_layer_that_is_said_to_be_huge(model, path):
    """Of a layer that the model does not have nothing is made, whatever it claims to be."""
    data = lie(path, say(1, name="other", features=2**60, seeds=2**60, rows=2**60))
    path.write_bytes(data)
    report = kx.load_seeds(model, path, strict=False)
    assert report.unexpected == ["other"]
    refused_to_fit = lie(path, say(0, features=2**60))
    path.write_bytes(refused_to_fit)
    with pytest.raises(ValueError, match="is of another structure"):
        kx.load_seeds(model, path, strict=False)


def test_random_lies(path):
    """What is accepted with a right sum means what a plain reader makes of the same file; nothing else ever happens."""
    generator, accepted = random.Random(0), 0
    header, body = parts_of(path)
    text = json.dumps(header)
    for _ in range(200):
        new_text, new_body = text, bytearray(body)
        if generator.random() < 0.3:
            k = generator.randrange(len(text))
            new_text = text[:k] + generator.choice("0123456789ab,]") + text[k + 1 :]
        for _ in range(generator.randrange(1, 4)):
            new_body[generator.randrange(len(body))] = generator.randrange(256)
        try:
            changed = json.loads(new_text)
            data = file_of(changed, bytes(new_body))
        except (ValueError, AttributeError, TypeError):
            continue
        path.write_bytes(data)
        model = network()
        try:
            kx.load_seeds(model, path)
        except kx.CheckpointError:
            assert everything(model) == everything(network())
            continue
        accepted += 1
        for layer, found in zip(layers_of(model), read_plainly(path).values(), strict=True):
            end = int(layer.seed_offsets[-1])
            assert bits(layer.state) == bits(found["state"]) and bits(layer.alpha) == bits(found["alpha"])
            assert bits(layer.blueprint_weights[:, :end]) == bits(found["blueprint_weights"][:, :end])
    assert accepted > 25
