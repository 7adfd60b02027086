"""Kills processes while they save checkpoints; counts what was lost, which must be nothing, and keeps the count.

Three campaigns: one process that is killed (kill -9) at 1,000 random instants; two that share a directory, killed in
turns; and one on a disk that is full now and then, killed besides. After every kill all listed checkpoints and the
last acknowledged one must load with the content that was saved. The result is written to
benchmarks/results/crash.json, one entry a campaign.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import evidence
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_oracle import device_name, save

sys.path[:0] = [str(evidence.ROOT / "tests"), str(evidence.ROOT)]
import checkpoint_crashes  # noqa: E402

RESULTS = evidence.ROOT / "benchmarks/results/crash.json"
DISK_BYTES = 6 << 20
SPARED = 300_000  # bytes that the filler leaves, at most: the largest checkpoint takes 250,000
SHOWN = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="in each campaign (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--directory", type=Path, help="where to save; by default a temporary one")
    parser.add_argument("--only", choices=["one_process", "two_processes", "full_disk"], help="one campaign")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default benchmarks/results/crash.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the forked processes must not wait for threads of this one

    console = Console()
    bad = 0
    for name in [options.only] if options.only else ["one_process", "two_processes", "full_disk"]:
        started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name.replace("_", " "), total=options.kills)
            result = run(name, options, lambda kills, task=task, bar=progress: bar.update(task, completed=kills))
        result |= facts(started) | {"seed": options.seed}
        save(options.out, name, result)
        console.print(f"{name}: {result}", markup=False)
        bad += result.get("problems", 0)
    return bool(bad)


def run(name: str, options: argparse.Namespace, told: Callable[[int], None]) -> dict:
    if name == "full_disk":
        return run_full_disk(options, told)
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        writers = 2 if name == "two_processes" else 1
        campaign = checkpoint_crashes.Campaign(Path(root), writers=writers, seed=options.seed)
        return campaign.run(options.kills, told).record() | {"file_system": file_system_of(Path(root))}


def run_full_disk(options: argparse.Namespace, told: Callable[[int], None]) -> dict:
    """A small file system in memory, nearly filled by a file of another size before each save."""
    with small_disk(DISK_BYTES) as disk:
        if disk is None:
            return {"kills": 0, "problems": 0, "not_run": "no permission to mount a small file system"}

        filler = disk / "filler"

        def fill(generator: random.Random) -> None:
            filler.unlink(missing_ok=True)
            room = os.statvfs(disk)
            free = room.f_bavail * room.f_frsize
            with open(filler, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - generator.randrange(SPARED)))

        (disk / "root").mkdir()
        campaign = checkpoint_crashes.Campaign(
            disk / "root", seed=options.seed, longest=0.08, fill=fill, make_room=lambda: filler.unlink(missing_ok=True)
        )
        return campaign.run(options.kills, told).record() | {"file_system": f"tmpfs of {DISK_BYTES >> 20} MiB"}


@contextmanager
def small_disk(size: int) -> Iterator[Path | None]:
    """A mounted tmpfs; None where that is not allowed."""
    with tempfile.TemporaryDirectory() as name:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "kasmina-full-disk", name]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def file_system_of(path: Path) -> str:
    found = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def facts(started: float) -> dict:
    return {
        "seconds": round(time.monotonic() - started, 1),
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source_sha256": evidence.source_hash(),
    }


if __name__ == "__main__":
    sys.exit(main())
