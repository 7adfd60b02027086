"""Directories of the Triton package with random changes to metadata, manifest and tensors.

Their sums cover the metadata, and each tensor inside its own archive: changed bytes there must be refused, or mean what
was there before. Where the sums were made right again, and in the manifest, which has none, what is accepted must mean
what a second, plain reader makes of the same files. Whatever is read can be converted, and means the same afterwards.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import STATE, same, seal_old, write_old
from checkpoint_fuzz import Fuzzer, change_value, changed_bytes, odd_value

from kasmina_ext.checkpoint import CheckpointDamaged, CheckpointManager, legacy

METADATA, MANIFEST = "metadata.json", "tensor_manifest.json"
TRAP = "/tmp/kasmina-trap-of-a-pickle"
_HEADER = ("checkpoint_id", "layer_id", "seed_id")


class Trap:
    """Runs code when a pickle of it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (TRAP,)


# ---- a second reader -------------------------------------------------------------------------------------------------


def read_plainly(path: Path) -> dict[str, Any]:
    """What is in it, by the description of the format and without checks."""
    metadata = json.loads((path / METADATA).read_text())
    state = metadata["state_data"]
    if metadata["version"] == 1 and isinstance(state, dict) and "lifecycle_state" not in state:
        state = {key: value for key, value in state.items() if key != "state"} | {
            "lifecycle_state": state.get("state", 0)
        }
    blueprint = None
    if (path / MANIFEST).exists():
        blueprint = {
            key: torch.load(path / "tensors" / entry["file"], map_location="cpu", weights_only=True)
            .detach()
            .contiguous()
            for key, entry in json.loads((path / MANIFEST).read_text()).items()
        }
    header = {name: metadata[name] for name in _HEADER}
    header |= {"timestamp": int(metadata["timestamp"]), "priority": metadata.get("priority", "normal")}
    return {"version": 2, **header, "state_data": state, "blueprint_state": blueprint}


# ---- judging ---------------------------------------------------------------------------------------------------------


class OldDirectories(Fuzzer):
    """Of both versions, with and without a blueprint."""

    COUNTED = (
        "unchanged",
        "refused",
        "same_where_sums_cover",
        "accepted_where_none_do",
        "wrong_content",
        "crashes",
    )

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        generator = torch.Generator().manual_seed(0)
        blueprint = {
            "layer1.weight": torch.randn(3, 5, generator=generator),
            "half": torch.randn(7, generator=generator).half(),
            "count": torch.tensor(5),
            "mask": torch.tensor([True, False]),
        }
        first = {"state": 3} | {name: value for name, value in STATE.items() if name != "lifecycle_state"}
        version1 = {"state": first, "version": 1, "priority": ..., "timestamp": 1_600_000_000_000.5}
        self._paths = [
            write_old(root, "case0", tensors=blueprint, priority="high"),
            write_old(root, "case1", tensors=blueprint, **version1),
            write_old(root, "case2"),
            write_old(root, "case3", tensors={}, **version1),
        ]
        self._files = [_files_of(path) for path in self._paths]
        self._expected = [read_plainly(path) for path in self._paths]
        self._weights = [4, 4, 1, 1]
        shutil.rmtree(TRAP, ignore_errors=True)

    def try_one(self, generator: random.Random) -> str:
        k = generator.choices(range(len(self._paths)), self._weights)[0]
        path, before = self._paths[k], self._files[k]
        resealed = generator.randrange(2) == 1
        if resealed:
            for _ in range(generator.choice([1, 1, 2])):
                change_meaning(path, generator)
        else:
            change_bytes(path, before, generator)
        now = _files_of(path)
        covered = not resealed and now.get(MANIFEST) == before.get(MANIFEST)
        outcome = self._judge(path, k, covered, unchanged=now == before)
        _restore(path, before)
        return outcome

    def _judge(self, path: Path, k: int, covered: bool, unchanged: bool) -> str:
        manager = CheckpointManager(self._root)
        try:
            found = manager.restore_checkpoint(path.name)
        except CheckpointDamaged as error:
            if unchanged:
                return f"crashes: what was not changed was refused: {error}"
            named = error.file in (METADATA, MANIFEST, ".", "checksum", "tensors") or error.file.startswith("tensors/")
            return "refused" if named and error.reason else f"crashes: no file or reason in {error}"
        except BaseException as error:
            return f"crashes: {type(error).__name__}: {error}"
        finally:
            if os.path.exists(TRAP):
                raise SystemExit("a planted pickle has run code")
        if unchanged:
            return "unchanged" if same(found, self._expected[k]) else "wrong_content: though nothing was changed"
        try:
            if covered and not same(found, self._expected[k]):
                return f"wrong_content: changed bytes were accepted as {found}"
            if not same(found, read_plainly(path)):
                return "wrong_content: the plain reader finds something else"
            problem = self._conversion_problem(path, found)
        except Exception as error:
            return f"crashes: {type(error).__name__}: {error}"
        if problem:
            return f"wrong_content: {problem}"
        return "same_where_sums_cover" if covered else "accepted_where_none_do"

    def _conversion_problem(self, path: Path, found: dict[str, Any]) -> str:
        target = self._root / "converted"
        try:
            legacy.convert(self._root, path.name, target)
        except TypeError as error:
            return "" if "cannot be saved" in str(error) else str(error)  # a dtype that only pickles have
        try:
            converted = CheckpointManager(target).restore_checkpoint(path.name)
            return "" if same(converted | {"version": 2}, found) else "it is another one when it was converted"
        finally:
            shutil.rmtree(target)


def _files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _restore(path: Path, files: dict[str, bytes]) -> None:
    for file in sorted(path.rglob("*"), reverse=True):
        if file.is_symlink() or (file.is_file() and str(file.relative_to(path)) not in files):
            file.unlink()
        elif file.is_dir() and file.name != "tensors":
            file.rmdir()
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)


# ---- changes ---------------------------------------------------------------------------------------------------------


def change_bytes(path: Path, files: dict[str, bytes], generator: random.Random) -> None:
    """Of one or two files, as a failing disk would."""
    for _ in range(generator.choice([1, 1, 2])):
        name = generator.choice(sorted(files))
        (path / name).write_bytes(changed_bytes(files[name], generator))


def change_meaning(path: Path, generator: random.Random) -> None:
    """As somebody would who knows the format, and wants to be believed."""
    names = [name for name in sorted(_files_of(path)) if name.startswith("tensors/")]
    kind = generator.randrange(8 if names else 2)
    if kind == 0:
        metadata = json.loads((path / METADATA).read_text())
        change_value(metadata, generator)
        (path / METADATA).write_text(json.dumps(seal_old(metadata)))
        return
    if kind <= 2 and (path / MANIFEST).exists():
        manifest = json.loads((path / MANIFEST).read_text())
        if isinstance(manifest, dict) and manifest:
            change_value(manifest, generator)
        (path / MANIFEST).write_text(json.dumps(manifest))
        return
    if kind <= 2:
        (path / MANIFEST).write_text(json.dumps(odd_value(generator)))
        return
    file = path / generator.choice(names)
    if kind == 3:
        file.write_bytes(rewritten_archive(file.read_bytes(), generator))
    elif kind == 4:
        torch.save(generator.choice(_ODD_OBJECTS)(), file)
    elif kind == 5:
        file.write_bytes((path / generator.choice(names)).read_bytes())
    elif kind == 6:
        file.write_bytes(pickle.dumps(Trap()) if generator.randrange(2) else b"")
    else:
        file.unlink()
        if generator.randrange(2):
            file.symlink_to(path / METADATA)


def rewritten_archive(data: bytes, generator: random.Random) -> bytes:
    """With one member changed and all sums right; of its pickle any byte, so that it may ask for anything."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            members = old.namelist()
            changed = generator.choice(members + [name for name in members if name.endswith(".pkl")])
            for name in members:
                content = old.read(name)
                if name == changed:
                    content = generator.choice([changed_bytes(content, generator), pickle.dumps(Trap())])
                if name != changed or generator.randrange(10):
                    new.writestr(name, content)
    except (zipfile.BadZipFile, OSError):  # was changed before
        return changed_bytes(data, generator)
    return out.getvalue()


_ODD_OBJECTS: list[Callable[[], Any]] = [
    lambda: torch.randn(3, 5),
    lambda: torch.randn(5, 3).T,
    lambda: torch.randn(100, 5)[10:13],
    lambda: torch.zeros(1).expand(3, 5),
    lambda: torch.randn(3, 5, dtype=torch.complex64),
    lambda: torch.nn.Parameter(torch.randn(3, 5)),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.empty(3, 5, device="meta"),
    lambda: torch.tensor(6),
    lambda: torch.tensor([False, True]),
    lambda: torch.randn(7).half(),
    lambda: [torch.randn(3, 5)],
    lambda: {"weight": torch.randn(3, 5)},
    lambda: 5,
    lambda: None,
    Trap,
]
