"""Shared by the tests and scripts for checkpoints: content, an equality that forgets nothing, damage, a system that fails."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from kasmina_ext.checkpoint import format

HEADER = {"kind": "seed", "layer_id": "layer", "seed_id": 3, "timestamp": 5, "priority": "normal", "lifecycle_state": 3}


def small_content(seed: int = 0) -> dict[str, Any]:
    """As the manager saves it: few bytes, all that JSON lacks, several types of tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "state_data": {
            "lifecycle_state": 3,
            "loss": math.nan,
            "bounds": (-math.inf, -0.0, 1e-300, 2**70),
            "by_id": {0: "zero", 1: None, "$odd": True},
            "mask": torch.tensor([True, False, True]),
            "scores": [torch.randn(3, generator=generator).double(), {"deep": torch.tensor(7, dtype=torch.int16)}],
        },
        "blueprint_state": {
            "layer.weight": torch.randn(2, 3, generator=generator),
            "half": torch.randn(5, generator=generator).bfloat16(),
            "none": torch.empty(0, 4),
        },
    }


def same(a: Any, b: Any) -> bool:
    """The same types, keys in order, bits of floats and of tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.numel() == 0 or torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    return a == b


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


# ---- a second reader -----------------------------------------------------------------------------


def read_plainly(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, content) of a checkpoint, by the description of the format, with json and safetensors and no checks."""
    metadata = json.loads((path / "metadata.json").read_bytes())
    tensors = load((path / "tensors.safetensors").read_bytes())
    own = ("format", "version", "checkpoint_id", "header", "tensors", "files")
    fields = {name: _plain(value, tensors) for name, value in metadata.items() if name not in own}
    header = {name: fields.pop(name) for name in metadata["header"]}
    return header, fields


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_plain(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$complex" in value:
        return torch.view_as_complex(tensors[value["$complex"]])
    if "$tuple" in value:
        return tuple(_plain(item, tensors) for item in value["$tuple"])
    if "$float" in value:
        return float(value["$float"])
    if "$dict" in value:
        return {_plain(key, tensors): _plain(item, tensors) for key, item in value["$dict"]}
    return {key: _plain(item, tensors) for key, item in value.items()}


# ---- damage --------------------------------------------------------------------------------------


def seal(path: Path, metadata: dict | None = None) -> None:
    """Make all sums right again, as somebody would who wants damage to be believed."""
    if metadata is None:
        metadata = json.loads((path / format.METADATA).read_bytes())
        data = (path / format.TENSORS).read_bytes()
        metadata["files"] = {format.TENSORS: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    seal_text(path, json.dumps(metadata, separators=(",", ":")).encode())


def seal_text(path: Path, text: bytes) -> None:
    (path / format.METADATA).write_bytes(text)
    (path / format.CHECKSUM).write_bytes(hashlib.sha256(text).hexdigest().encode())


def edit(path: Path, **fields: Any) -> None:
    """Change fields of the metadata and seal them."""
    metadata = json.loads((path / format.METADATA).read_bytes())
    seal(path, metadata | fields)


def tree_of(root: Path) -> dict[str, bytes | str | None]:
    """Everything below ``root``, hidden files too: content by path, targets of links, None for the rest."""
    return {str(path.relative_to(root)): _what_is_at(path) for path in sorted(root.rglob("*"))}


def _what_is_at(path: Path) -> bytes | str | None:
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() else None


# ---- the Triton package's directories ------------------------------------------------------------

OLD_NAME = "layer1_10_1700000000000_normal"
STATE = {
    "lifecycle_state": 3,
    "blueprint_id": 42,
    "metrics": {"loss": 0.1, "worst": math.inf, "none": None},
    "list": [1],
}


def seal_old(metadata: dict[str, Any]) -> dict[str, Any]:
    """With the old checksum: over the JSON with sorted keys of all fields but itself."""
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    return {**rest, "checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def write_old(
    root: Path, name: str = OLD_NAME, state: Any = STATE, tensors: dict[str, Tensor] | None = None, **fields: Any
) -> Path:
    """A directory as the package left it, version 2 unless ``fields`` say otherwise."""
    path = root / name
    path.mkdir(parents=True)
    metadata = {
        "version": 2,
        "checkpoint_id": name,
        "layer_id": "layer1",
        "seed_id": 10,
        "timestamp": 1_700_000_000_000,
        "priority": "normal",
        "state_data": state,
    }
    metadata |= fields
    metadata = {key: value for key, value in metadata.items() if value is not ...}
    (path / "metadata.json").write_text(json.dumps(seal_old(metadata), indent=2))
    if tensors is not None:
        (path / "tensors").mkdir()
        manifest = {}
        for key, tensor in tensors.items():
            file = "".join(c for c in key.replace(".", "_").replace("/", "_") if c.isalnum() or c in "_-") + ".pt"
            torch.save(tensor, path / "tensors" / file)
            manifest[key] = {"file": file, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "device": "cuda:0"}
        (path / "tensor_manifest.json").write_text(json.dumps(manifest, indent=2))
    return path


# ---- a system that fails -------------------------------------------------------------------------


class FailingSystem:
    """``os``, but the ``fail_at``-th of the calls that change something raises ``code``; with ``short_writes``, write
    takes a few bytes at a time. ``calls`` lists what was called.

    It goes where files.py has its ``os``.
    """

    CHANGING = ("open", "mkdir", "write", "fsync", "rename", "unlink", "rmdir")

    def __init__(self, fail_at: int = -1, code: int = errno.ENOSPC, short_writes: bool = False) -> None:
        self.calls: list[str] = []
        self._fail_at, self._code, self._short = fail_at, code, short_writes

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CHANGING:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or (len(args) > 1 and args[1] & os.O_CREAT):
                self.calls.append(name)
                if len(self.calls) - 1 == self._fail_at:
                    raise OSError(self._code, os.strerror(self._code))
            if name == "write" and self._short:
                return real(args[0], memoryview(args[1])[:7])
            return real(*args, **kwargs)

        return call
