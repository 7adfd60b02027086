"""Random changes to a checkpoint's files. With wrong sums none may be accepted; where the sums were made right again,
what is accepted must mean what a second, plain reader makes of the same files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_cases import HEADER, read_plainly, same, seal, seal_text, small_content

from kasmina_ext.checkpoint import format, tensor_file
from kasmina_ext.checkpoint.errors import CheckpointDamaged

FILES = (format.METADATA, format.TENSORS, format.CHECKSUM)
COUNTED = (
    "inputs",
    "unchanged",
    "refused_with_wrong_sums",
    "refused_with_right_sums",
    "accepted_with_right_sums",
    "accepted_with_wrong_sums",
    "wrong_content",
    "crashes",
)
_ODD_BYTES = [
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"$",
    b"\\u0000",
    b"1e999",
    b"NaN",
    b"-1",
]
_ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, 1.5, -0.0, 1e308, "", "one", "F32"),
    *("../x", "a\0b", "$tensor", [], {}, [[]], {"$tensor": "blueprint_state.half"}, {"$float": "nan"}, {"$tuple": []}),
    *({"$dict": [[1, 2]]}, {"dtype": "F32", "shape": [2, 3]}, {"dtype": "BOOL", "shape": [3]}, [0, 24], "I64", "BF16"),
]


def fuzz(
    root: Path, inputs: int, generator: random.Random, told: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Counts over ``inputs`` changed checkpoints, half of them with their sums made right; ``first`` describes the
    first failure.
    """
    counts: Counter[str] = Counter()
    first = ""
    for seed in range(4):
        format.write(root, f"case{seed}", HEADER, small_content(seed))
    originals = [{name: (root / f"case{k}" / name).read_bytes() for name in FILES} for k in range(4)]
    for number in range(inputs):
        k = generator.randrange(4)
        path, original = root / f"case{k}", originals[k]
        sealed = number % 2 == 1
        files = change_sealed(path, original, generator) if sealed else change(original, originals, generator)
        if sealed:
            files = {name: (path / name).read_bytes() for name in FILES}
        else:
            for name, data in files.items():
                (path / name).write_bytes(data)
        counts["inputs"] += 1
        outcome = judge(root, path.name, same_files=files == original, sealed=sealed)
        kind, _, detail = outcome.partition(": ")
        counts[kind] += 1
        if kind in ("crashes", "wrong_content", "accepted_with_wrong_sums") and not first:
            first = f"input {number}: {detail or kind}"
        for name, data in original.items():
            (path / name).write_bytes(data)
        if told is not None:
            told(number + 1)
    return {name: counts[name] for name in COUNTED} | ({"first": first} if first else {})


def judge(root: Path, name: str, same_files: bool, sealed: bool) -> str:
    """What became of one input, as one of COUNTED, with details after a colon."""
    sums = "right" if sealed else "wrong"
    try:
        found = format.read(root, name)
    except CheckpointDamaged as error:
        if same_files:
            return f"crashes: what was not changed was refused: {error}"
        named = error.file in (*FILES, ".") and error.reason
        return f"refused_with_{sums}_sums" if named else f"crashes: no file or reason in {error}"
    except BaseException as error:
        return f"crashes: {type(error).__name__}: {error}"
    if same_files:
        return "unchanged"
    if not sealed:
        return "accepted_with_wrong_sums"
    try:
        right = same(found, read_plainly(root / name))
    except Exception as error:
        return f"wrong_content: the plain reader fails: {type(error).__name__}: {error}"
    return "accepted_with_right_sums" if right else "wrong_content"


# ---- changes -------------------------------------------------------------------------------------


def change(original: dict[str, bytes], others: list[dict[str, bytes]], generator: random.Random) -> dict[str, bytes]:
    """One to three changes of bytes, anywhere; now and then a file of another checkpoint."""
    files = dict(original)
    for _ in range(generator.choice([1, 1, 2, 3])):
        name = generator.choice(FILES)
        if generator.random() < 0.05:
            files[name] = generator.choice(others)[name]
        else:
            files[name] = changed_bytes(files[name], generator)
    return files


def changed_bytes(data: bytes, generator: random.Random) -> bytes:
    at = generator.randrange(len(data) + 1)
    end = min(len(data), at + generator.choice([1, 1, 2, 8, 100]))
    kind = generator.randrange(7)
    if kind == 0 and data:
        at = generator.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + generator.randbytes(end - at) + data[end:]
    if kind == 2:
        return data[:at] + generator.choice(_ODD_BYTES) + data[at:]
    if kind == 3:
        return data[:at] + data[end:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + data[at:end] + data[at:]
    return data + generator.randbytes(generator.randrange(1, 40))


def change_sealed(path: Path, original: dict[str, bytes], generator: random.Random) -> None:
    """Changes whose sums are made right: bytes of the tensors, bytes of the metadata, values in the metadata."""
    kind = generator.randrange(4)
    if kind == 0:
        (path / format.TENSORS).write_bytes(changed_bytes(original[format.TENSORS], generator))
        seal(path)
    elif kind == 1:
        seal_text(path, changed_bytes(original[format.METADATA], generator))
    else:
        metadata = json.loads(original[format.METADATA])
        for _ in range(generator.choice([1, 1, 2])):
            change_value(metadata, generator)
        if kind == 3:
            _rebuild(path, metadata, generator)
        seal_text(path, json.dumps(metadata, separators=(",", ":")).encode())


def change_value(metadata: dict[str, Any], generator: random.Random) -> None:
    """Replace, remove, add, swap or rename something in a random place of the tree."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(metadata)
    parent, key = generator.choice(places)
    action = generator.randrange(5)
    if action == 0:
        parent[key] = generator.choice(_ODD_VALUES)
    elif action == 1:
        del parent[key]
    elif action == 2:
        other, other_key = generator.choice(places)
        if other_key in other if isinstance(other, dict) else other_key < len(other):
            parent[key] = json.loads(json.dumps(other[other_key]))
    elif action == 3 and isinstance(parent, dict):
        parent[generator.choice(["", "more", "$tuple", "$tensor", "dtype", "a\0"])] = parent.pop(key)
    elif isinstance(parent, dict):
        parent["added"] = generator.choice(_ODD_VALUES)
    else:
        parent.insert(0, generator.choice(_ODD_VALUES))


def _rebuild(path: Path, metadata: dict[str, Any], generator: random.Random) -> None:
    """Write the file of tensors that the changed table asks for, where it asks for one, so that it may be accepted."""
    try:
        table = tensor_file.table_from_json(metadata["tensors"])
        size = tensor_file.bytes_of(table)
        if size > 1 << 20:
            return
        data = tensor_file.header_of(table) + generator.randbytes(size)
    except (KeyError, TypeError, ValueError):
        return
    (path / format.TENSORS).write_bytes(data)
    metadata["files"] = {format.TENSORS: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
