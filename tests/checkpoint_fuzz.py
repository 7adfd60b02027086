"""Random changes to a checkpoint's files. With wrong sums none may be accepted; where the sums were made right again,
what is accepted must mean what a second, plain reader makes of the same files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from checkpoint_cases import HEADER, read_plainly, same, seal, seal_text, small_content

from kasmina_ext.checkpoint import format, tensor_file
from kasmina_ext.checkpoint.errors import CheckpointDamaged

FILES = (format.METADATA, format.TENSORS, format.CHECKSUM)
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


def odd_value(generator: random.Random) -> Any:
    """A new one: the next change may be to what is in it."""
    return copy.deepcopy(generator.choice(_ODD_VALUES))


class Fuzzer(ABC):
    """Changes what it has written, reads it, and counts what became of it."""

    COUNTED: ClassVar[tuple[str, ...]]
    FAILURES: ClassVar[tuple[str, ...]] = ("wrong_content", "crashes")
    """Those of COUNTED that must not be."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first = ""

    @abstractmethod
    def try_one(self, generator: random.Random) -> str:
        """One of COUNTED, with details after a colon. Everything is left as it was."""

    def one(self, generator: random.Random) -> str:
        """The same, counted."""
        outcome = self.try_one(generator)
        kind, _, detail = outcome.partition(": ")
        self.counts["inputs"] += 1
        self.counts[kind] += 1
        if kind in self.FAILURES and not self.first:
            self.first = f"input {self.counts['inputs']}: {detail or kind}"
        return outcome

    @property
    def failures(self) -> int:
        return sum(self.counts[kind] for kind in self.FAILURES)

    def record(self) -> dict[str, Any]:
        """The counts, and what the first failure was."""
        counts = {name: self.counts[name] for name in ("inputs", *self.COUNTED)}
        return counts | ({"first": self.first} if self.first else {})


class Files(Fuzzer):
    """Bytes and values in a checkpoint's three files, in every other input with their sums made right."""

    COUNTED = (
        "unchanged",
        "refused_with_wrong_sums",
        "refused_with_right_sums",
        "accepted_with_right_sums",
        "accepted_with_wrong_sums",
        "wrong_content",
        "crashes",
    )
    FAILURES = ("accepted_with_wrong_sums", "wrong_content", "crashes")

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._paths = [root / f"case{seed}" for seed in range(4)]
        for seed, path in enumerate(self._paths):
            format.write(root, path.name, HEADER, small_content(seed))
        self._originals = [{name: (path / name).read_bytes() for name in FILES} for path in self._paths]

    def try_one(self, generator: random.Random) -> str:
        path, original = generator.choice(list(zip(self._paths, self._originals, strict=True)))
        sealed = generator.randrange(2) == 1
        if sealed:
            change_sealed(path, original, generator)
        else:
            for name, data in change(original, self._originals, generator).items():
                (path / name).write_bytes(data)
        files = {name: (path / name).read_bytes() for name in FILES}
        outcome = judge(path.parent, path.name, same_files=files == original, sealed=sealed)
        for name, data in original.items():
            (path / name).write_bytes(data)
        return outcome


def judge(root: Path, name: str, same_files: bool, sealed: bool) -> str:
    """What became of one input."""
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


def places_in(tree: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Everything in nested dicts and lists, as what it is in and its key there."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(tree)
    return places


def change_value(metadata: dict[str, Any], generator: random.Random) -> None:
    """Replace, remove, add, swap or rename something in a random place of the tree."""
    places = places_in(metadata)
    parent, key = generator.choice(places)
    action = generator.randrange(5)
    if action == 0:
        parent[key] = odd_value(generator)
    elif action == 1:
        del parent[key]
    elif action == 2:
        other, other_key = generator.choice(places)
        if other_key in other if isinstance(other, dict) else other_key < len(other):
            parent[key] = json.loads(json.dumps(other[other_key]))
    elif action == 3 and isinstance(parent, dict):
        parent[generator.choice(["", "more", "$tuple", "$tensor", "dtype", "a\0"])] = parent.pop(key)
    elif isinstance(parent, dict):
        parent["added"] = odd_value(generator)
    else:
        parent.insert(0, odd_value(generator))


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
