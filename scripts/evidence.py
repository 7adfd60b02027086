"""What ties a result file to the sources that it was measured on: a hash, and facts about the machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPU_CHECK = ROOT / "benchmarks/results/gpu_check.json"
STACKS = ROOT / "benchmarks/results/stacks.json"

_FOLDERS = ("csrc", "kasmina_ext", "tests")
_SUFFIXES = {".c", ".h", ".cu", ".cuh", ".cpp", ".py"}
_GENERATED = {"kasmina_ext/_schema.py", "kasmina_ext/_build.py"}


def source_hash(root: Path = ROOT) -> str:
    """sha256 over the names and contents of every source in csrc, kasmina_ext and tests; needs no git."""
    digest = hashlib.sha256()
    for name in sorted(_source_names(root)):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _source_names(root: Path) -> list[str]:
    files = (path for folder in _FOLDERS for path in (root / folder).rglob("*") if path.suffix in _SUFFIXES)
    return [name for name in (path.relative_to(root).as_posix() for path in files) if name not in _GENERATED]


def gpu_check_staleness(record: Path = GPU_CHECK, root: Path = ROOT) -> str:
    """Why the recorded run of `make gpu-check` does not vouch for these sources, or ""."""
    try:
        content = json.loads(record.read_text())
        recorded, passed = content["source_sha256"], content["passed"]
    except FileNotFoundError:
        return f"{record.name} is missing: the CUDA kernels have no recorded run (make gpu-check)"
    except (ValueError, KeyError, TypeError):
        return f"{record.name} cannot be read (make gpu-check)"
    if recorded != source_hash(root):
        return f"{record.name} is stale: sources changed since `make gpu-check` ran"
    return "" if passed else f"{record.name} is the record of a failure (make gpu-check)"


def machine() -> dict[str, str]:
    """Device, driver and versions; torch is imported here, so that the hash does without."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def commit() -> str:
    """Which version this is; where sources travel without their history, KASMINA_COMMIT says it, else a hash of them."""
    if named := os.environ.get("KASMINA_COMMIT"):
        return named
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"(sources {source_hash()[:12]})"


def write_json(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
