"""The record that a benchmark leaves: benchmarks/results/<name>_<device>.json, and a table on the screen."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timing
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
sys.path.append(str(ROOT / "scripts"))
import evidence  # noqa: E402

Row = dict[str, Any]
"""`case`, `gpu` or `cpu` (microseconds of a call by contestant), perhaps `eager`, `ratios`, `bytes`."""


def clocks() -> str:
    """Of the GPU's processors and memory now, in MHz."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def machine(device: str) -> dict[str, Any]:
    record = evidence.machine() | {"commit": evidence.commit(), "source_sha256": evidence.source_hash()}
    if device == "cuda":
        return record | {"clocks": clocks()}
    return record | {"device": f"cpu, {torch.get_num_threads()} threads", "driver": ""}


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one case, not for long: to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (default benchmarks/results)")
    return parser


def run(name: str, description: str | None, cases: dict[str, list], bench: Callable[[Any, str], Row]) -> None:
    """Runs ``bench`` for each of the device's cases."""
    options = arguments(description).parse_args()
    chosen = cases[options.device][:1] if options.quick else cases[options.device]
    keep(name, options, (bench(case, options.device) for case in chosen))


def keep(name: str, options: argparse.Namespace, rows: Iterable[Row]) -> None:
    """Prints rows as they come, then writes them all."""
    if options.quick:
        timing.patience = 0.02
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = []
    for row in rows:
        found.append(row)
        console.print(table(row))
        if options.device == "cuda":
            torch.cuda.empty_cache()
    record = machine(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    evidence.write_json(options.out / f"{name}_{options.device}.json", record | {"microseconds": found})
    console.print(f"{name}: {record['device']}, torch {record['torch']}, commit {record['commit']}")


def table(row: Row) -> Table:
    shown = Table(title=row["case"], title_justify="left", box=None)
    times = {kind: row[kind] for kind in ("gpu", "cpu", "eager") if kind in row}
    for column in ("contestant", *(f"{kind}, us: p20 / p50 / p80" for kind in times), "of the copy's speed"):
        shown.add_column(column, justify="left" if column == "contestant" else "right")
    for name in dict.fromkeys(name for measured in times.values() for name in measured):
        cells = [" / ".join(f"{t:g}" for t in measured.get(name, {}).values()) for measured in times.values()]
        share = row.get("share of copy speed", {}).get(name)
        shown.add_row(name, *cells, "" if share is None else f"{share:.0%}")
    return shown


def shares(times: dict[str, dict[str, float]], tensors: float = 2) -> dict[str, float]:
    """Bytes a second as a share of the copy's, for work that moves as many tensors; a copy moves two."""
    return {name: round(tensors / 2 * times["copy"]["p50"] / t["p50"], 4) for name, t in times.items()}
