"""Reads the checkpoint directories of the Triton package, and writes them anew in the format of this one.

What is taken for such a directory, named by its checkpoint's identifier:

``metadata.json``
    ``version`` (1 or 2), ``checkpoint_id``, ``layer_id``, ``seed_id``, ``timestamp`` (milliseconds), ``priority``
    (not in version 1: normal), ``state_data``, and ``checksum``: the sha256 of the JSON of all the other fields
    with sorted keys and Python's default separators. In version 1, ``state_data`` has ``state`` where version 2
    has ``lifecycle_state``.
``tensor_manifest.json``
    only where there is a blueprint: for each of its keys ``file``, ``shape``, ``dtype`` (``torch.float32``) and
    ``device``.
``tensors/<file>``
    what ``torch.save`` made of one tensor: a zip archive with a pickle in it.

Pickles are read with ``weights_only=True``, always: it builds tensors and runs nothing else. The old checksum covers
neither the manifest nor the tensors; what can be checked of them is: names, types, shapes, and the sums inside each
archive. Other files are never opened. Everything is taken or nothing; two keys that share one file are refused, since
one of the two tensors is lost.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import re
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.checkpoint import format
from kasmina_ext.checkpoint.content import ContentError, Encoder, from_text
from kasmina_ext.checkpoint.errors import CheckpointError, CheckpointSaveError, CheckpointVersionError
from kasmina_ext.checkpoint.files import OpenDirectory
from kasmina_ext.checkpoint.forks import without_lost_threads
from kasmina_ext.checkpoint.header import lifecycle_of, problem_with, seed_header
from kasmina_ext.checkpoint.tensor_file import TensorFileError, check_values

MANIFEST, TENSORS = "tensor_manifest.json", "tensors"
VERSION = 2
"""Version 1 becomes this one when it is read."""

MAX_MORE_BYTES = 1 << 30
"""A tensor's file that is larger than the promised tensor by more is refused unread. It may be larger: of a part of a
tensor, torch.save writes all."""

_FILE = re.compile(r"[a-zA-Z0-9_-]*\.pt")
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_REQUIRED = ("version", "checkpoint_id", "layer_id", "seed_id", "timestamp", "state_data", "checksum")


def is_legacy(directory: OpenDirectory) -> bool:
    """Whether it has the Triton package's files and none of ours."""
    names = directory.names()
    return format.METADATA in names and format.CHECKSUM not in names and format.TENSORS not in names


def read(
    directory: OpenDirectory, *, max_bytes: int | None = None, check: format.Check | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(header, content)`` as the manager's own seed checkpoints have them; ``content`` has ``state_data`` and
    ``blueprint_state`` (None without a blueprint), tensors on the CPU.

    ``max_bytes`` bounds the tensors' files together; ``check`` sees what the manifest promises before any of them is
    read. Errors as :func:`kasmina_ext.checkpoint.format.read`.
    """
    header, state_data = _read_metadata(directory)
    manifest = _read_manifest(directory)
    promised = None if manifest is None else _promised_by(directory, manifest)
    if check is not None:
        check(dict(header), {"state_data": deepcopy(state_data), "blueprint_state": promised})
    blueprint = None if manifest is None else _read_blueprint(directory, manifest, promised, max_bytes)
    return header, {"state_data": state_data, "blueprint_state": blueprint}


def read_header(directory: OpenDirectory) -> dict[str, Any]:
    """The header alone; the blueprint is not looked at."""
    return {**_read_metadata(directory)[0], "version": VERSION, "size": None}


@without_lost_threads()
def convert(source: Path, checkpoint_id: str, target: Path) -> bool:
    """Read ``source / checkpoint_id`` and write it as ``target / checkpoint_id``, all or nothing. False where the target
    has the very same already.

    Errors of reading, and :class:`CheckpointSaveError` (also where the target has another one of that name).
    """
    with OpenDirectory(Path(source), checkpoint_id) as directory:
        header, content = read(directory)
    try:
        format.write(Path(target), checkpoint_id, header, content)
    except CheckpointSaveError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not _has(target, checkpoint_id, header, content):
            raise
        return False
    return True


def _has(target: Path, checkpoint_id: str, header: dict[str, Any], content: dict[str, Any]) -> bool:
    try:
        there = format.read(Path(target), checkpoint_id)
    except (CheckpointError, OSError):
        return False
    ours, theirs = Encoder(), Encoder()
    if ours.encode([header, content], "c") != theirs.encode(list(there), "c"):
        return False
    pairs = zip(ours.tensors.values(), theirs.tensors.values(), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and _bits_equal(a, b) for a, b in pairs)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    """NaN, too, equals itself."""
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


# ---- metadata ------------------------------------------------------------------------------------


def _read_metadata(directory: OpenDirectory) -> tuple[dict[str, Any], Any]:
    text = directory.read(format.METADATA, format.MAX_METADATA_BYTES)
    metadata = _parse(directory, format.METADATA, text)
    if metadata.get("format") == format.FORMAT:
        raise directory.damaged(format.CHECKSUM, "is missing")
    missing = [name for name in _REQUIRED if name not in metadata]
    if missing:
        raise directory.damaged(format.METADATA, f"has no field {missing[0]!r}")
    if metadata["checksum"] != _checksum(metadata):
        raise directory.damaged(format.METADATA, "its checksum is wrong")
    version = metadata["version"]
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointVersionError(
            directory.checkpoint_id, format.METADATA, f"has version {str(version)[:40]}; old ones are 1 and {VERSION}"
        )
    if metadata["checkpoint_id"] != directory.checkpoint_id:
        raise directory.damaged(format.METADATA, f"is of checkpoint {str(metadata['checkpoint_id'])[:140]!r}")
    state_data = metadata["state_data"]
    if version == 1 and isinstance(state_data, dict) and "lifecycle_state" not in state_data:
        state_data = {name: value for name, value in state_data.items() if name != "state"}
        state_data["lifecycle_state"] = metadata["state_data"].get("state", 0)
    timestamp = metadata["timestamp"]
    header = seed_header(
        layer_id=metadata["layer_id"],
        seed_id=metadata["seed_id"],
        timestamp=int(timestamp) if isinstance(timestamp, float) and math.isfinite(timestamp) else timestamp,
        priority=metadata.get("priority", "normal"),
        lifecycle_state=lifecycle_of(state_data),
    )
    problem = problem_with(header)
    try:
        Encoder().encode(state_data, "state_data")  # for its bounds
    except ValueError as error:
        problem = problem or str(error)
    if problem:
        raise directory.damaged(format.METADATA, problem)
    return header, state_data


def _checksum(metadata: dict[str, Any]) -> str | None:
    rest = {name: value for name, value in metadata.items() if name != "checksum"}
    try:
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        return None


def _parse(directory: OpenDirectory, name: str, text: bytes) -> dict[str, Any]:
    try:
        value = from_text(text, allow_nan=True)  # as that package wrote it
    except ContentError as error:
        raise directory.damaged(name, str(error)) from None
    if not isinstance(value, dict):
        raise directory.damaged(name, "is not an object")
    return value


# ---- tensors -------------------------------------------------------------------------------------


def _read_manifest(directory: OpenDirectory) -> dict[str, Any] | None:
    """Each key's entry, of which ``file`` was checked; None without a blueprint."""
    names = directory.names()
    if MANIFEST not in names:
        if TENSORS in names:
            raise directory.damaged(MANIFEST, "is missing")
        return None
    manifest = _parse(directory, MANIFEST, directory.read(MANIFEST, format.MAX_METADATA_BYTES))
    owners: dict[str, str] = {}
    for key, entry in manifest.items():
        file = _file_of(directory, key, entry)
        if file in owners:
            raise directory.damaged(MANIFEST, f"{owners[file]!r} and {key!r} share the file {file}: one is lost")
        owners[file] = key
    return manifest


def _promised_by(directory: OpenDirectory, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of the manifest's types and shapes, without memory."""
    promised = {}
    for key, entry in manifest.items():
        dtype, shape = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None or not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise directory.damaged(MANIFEST, f"tells no dtype and shape of {key[:80]!r}")
        try:
            promised[key] = torch.empty(shape, dtype=dtype, device="meta")
        except (RuntimeError, OverflowError, TypeError) as error:
            raise directory.damaged(MANIFEST, f"{key[:80]!r} cannot be made: {str(error)[:200]}") from None
    return promised


def _read_blueprint(
    directory: OpenDirectory, manifest: dict[str, Any], promised: dict[str, Tensor], max_bytes: int | None
) -> dict[str, Tensor]:
    blueprint, left = {}, max_bytes
    for key, entry in manifest.items():
        path = f"{TENSORS}/{entry['file']}"
        limit = promised[key].nbytes + MAX_MORE_BYTES
        data = directory.read(path, limit if left is None else min(limit, left))
        left = None if left is None else left - len(data)
        blueprint[key] = _load_tensor(directory, path, data, entry)
    return blueprint


def _file_of(directory: OpenDirectory, key: str, entry: Any) -> str:
    file = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(file, str):
        raise directory.damaged(MANIFEST, f"names no file for {key[:80]!r}")
    if not _FILE.fullmatch(file):
        raise directory.damaged(MANIFEST, f"{file[:80]!r} is no file of {TENSORS}/")
    return file


def _load_tensor(directory: OpenDirectory, path: str, data: bytes, entry: dict[str, Any]) -> Tensor:
    problem = _problem_with_archive(data)
    if problem:
        raise directory.damaged(path, problem)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it stumbles over: it is not a tensor
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise directory.damaged(path, f"holds no plain tensor: {reason[0][:200]}") from None
    if not isinstance(tensor, Tensor):
        raise directory.damaged(path, f"holds {type(tensor).__name__}, not a tensor")
    found = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
    for name, value in found.items():
        if entry.get(name) != value:
            raise directory.damaged(path, f"has {name} {value}, {MANIFEST} says {str(entry.get(name))[:80]}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() * tensor.element_size() > len(data):
        raise directory.damaged(path, "holds no plain tensor")
    try:
        check_values({entry["file"]: tensor})
    except TensorFileError as error:
        raise directory.damaged(path, str(error)) from None
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _problem_with_archive(data: bytes) -> str:
    """Why these bytes are no whole, uncompressed archive, or "". Compressed ones could grow beyond all bounds."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                return "is compressed, which torch.save does not do"
            if sum(m.file_size for m in members) > len(data):
                return "holds more than it can"
            broken = archive.testzip()
    except Exception as error:  # zipfile has many ways to say it
        return f"is no archive that torch.save made: {str(error)[:200] or type(error).__name__}"
    return f"is damaged: the sum of {broken} is wrong" if broken else ""
