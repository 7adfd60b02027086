"""What the demo has measured so far, on disk after every part: Ctrl-C, or a crash, loses one part at most."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1


class JournalError(Exception):
    """A run that cannot be gone on with; the message says why and what to do."""


class Journal:
    """``run.json`` in a folder: the configuration, and a result for each part that is done.

    A part is computed from the configuration and its own random seed alone, so that a run that goes on ends with the
    same numbers as one that was never stopped.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, resume: bool) -> None:
        self.folder, self.config = folder, config
        self.path = folder / "run.json"
        self.parts: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            self.parts = self._load()
        else:
            self._save()

    def _load(self) -> dict[str, dict[str, Any]]:
        try:
            saved = json.loads(self.path.read_text())
            version, config, parts = saved["format"], saved["config"], saved["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{self.path} is not a saved run ({error}); start anew without --resume") from None
        if version != FORMAT:
            raise JournalError(f"{self.path} has format {version}, this is {FORMAT}; start anew without --resume")
        for name, value in self.config.items():
            if _comparable(config.get(name)) != _comparable(value):
                raise JournalError(
                    f"{self.path} was begun with {name} = {config.get(name)!r}, this is {value!r}; "
                    "start anew without --resume, or in another folder (--out)"
                )
        # What is shown is the commit that the run began with.
        self.config = config
        return parts

    def _save(self) -> None:
        document = {"format": FORMAT, "config": self.config, "parts": self.parts}
        write_atomically(self.path, json.dumps(document, indent=1).encode())

    def record(self, part: str, result: dict[str, Any]) -> None:
        self.parts[part] = result
        self._save()

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        write_atomically(self.folder / name, buffer.getvalue())

    def load_tensors(self, name: str, device: torch.device) -> dict[str, Tensor]:
        return torch.load(self.folder / name, map_location=device, weights_only=True)


def _comparable(value: Any) -> Any:
    """A commit is the same one with and without local changes (the README that the demo itself updates, say)."""
    return value.removesuffix("-dirty") if isinstance(value, str) else value


def write_atomically(path: Path, content: bytes) -> None:
    """The whole new file or the whole old one, whenever the process or the machine stops."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
