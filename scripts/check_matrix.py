"""One wheel against many (Python, torch): each pair in a fresh virtual environment, forward, backward and opcheck.

    python scripts/check_matrix.py 3.11:2.13.0 3.10:2.10.0 3.13:latest

Needs those Pythons (on PATH or under pyenv) and, for torch with CUDA, 10 GB of disk at a time and a fast network. Writes
benchmarks/results/matrix.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import evidence
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULT = evidence.ROOT / "benchmarks/results/matrix.json"
PROBE = evidence.ROOT / "scripts/matrix_probe.py"
DISK_NEEDED = 10 << 30

console = Console()


class MatrixError(Exception):
    """Why a pair could not be tried, or failed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH", help="e.g. 3.11:2.13.0 or 3.13:latest")
    parser.add_argument("--wheel", type=Path, help="the wheel to try (default: one built from this tree)")
    parser.add_argument("--work", type=Path, help="where the environments go (default: the system's temporary folder)")
    options = parser.parse_args()
    pairs = [pair.partition(":")[::2] for pair in options.pairs]
    if not all(python and torch for python, torch in pairs):
        parser.error("each pair is PYTHON:TORCH")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        wheel = options.wheel or build_wheel(Path(folder))
        record = {
            "wheel": wheel.name,
            "wheel_bytes": wheel.stat().st_size,
            "source_sha256": evidence.source_hash(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        rows = [try_pair(python, torch, wheel, Path(folder)) for python, torch in pairs]
    record["pairs"] = rows
    evidence.write_json(RESULT, record)
    console.print(table(wheel.name, rows))
    return 0 if all(row["passed"] for row in rows) else 1


def build_wheel(folder: Path) -> Path:
    """As a user would: isolated, without torch."""
    with console.status("building the wheel"):
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(evidence.ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_pair(python: str, torch: str, wheel: Path, folder: Path) -> dict:
    """One row; the environment is gone afterwards."""
    row = {"asked": f"{python}:{torch}", "passed": False, "problems": []}
    started = time.monotonic()
    place = folder / "venv"
    try:
        if shutil.disk_usage(folder).free < DISK_NEEDED:
            raise MatrixError(f"less than {DISK_NEEDED >> 30} GB free in {folder}")
        with console.status(f"Python {python}, torch {torch}: installing"):
            run(interpreter(python), "-m", "venv", str(place))
            wanted = "torch" if torch == "latest" else f"torch=={torch}"
            pip = (str(place / "bin/python"), "-m", "pip", "install", "-q", "--no-cache-dir")
            run(*pip, wanted, "numpy", str(wheel))
        with console.status(f"Python {python}, torch {torch}: checking"):
            output = run(str(place / "bin/python"), str(PROBE), cwd=folder)
        row |= json.loads(output.splitlines()[-1])
        row["passed"] = not row["problems"]
    except MatrixError as error:
        row["problems"].append(str(error))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    row["seconds"] = round(time.monotonic() - started)
    console.print(f"Python {python}, torch {torch}: {'passed' if row['passed'] else 'failed'} ({row['seconds']} s)")
    return row


def interpreter(version: str) -> str:
    """A Python of this version; MatrixError where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}*/bin/python"))]
    show = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    for candidate in filter(None, candidates):
        found = subprocess.run([candidate, "-c", show], capture_output=True, text=True).stdout.strip()
        if found == version or found.startswith(version + "."):
            return str(candidate)
    raise MatrixError(f"no Python {version} on PATH or under pyenv")


def run(*command: str, cwd: Path | None = None) -> str:
    """stdout; MatrixError with the end of stderr."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise MatrixError(f"{' '.join(command[:4])} ...: {' / '.join(lines[-3:])}")
    return done.stdout


def table(wheel: str, rows: list[dict]) -> Table:
    out = Table(title=wheel)
    for column in ("Python", "torch", "devices", "result", "seconds"):
        out.add_column(column)
    for row in rows:
        asked_python, asked_torch = row["asked"].split(":")
        result = "[green]passed[/]" if row["passed"] else f"[red]{escape(chr(10).join(row['problems']))}[/]"
        devices = ", ".join(row.get("devices", []))
        out.add_row(
            row.get("python", asked_python), row.get("torch", asked_torch), devices, result, str(row["seconds"])
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
