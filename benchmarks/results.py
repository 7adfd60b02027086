"""The record that a benchmark leaves: benchmarks/results/<name>_<device>.json, and a table on the screen."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, QUICK = ROOT / "benchmarks/results", ROOT / "build/quick"
sys.path += [str(ROOT), str(ROOT / "scripts")]  # behind what is installed
import evidence  # noqa: E402

Row = dict[str, Any]
"""`case`, `gpu` or `cpu` (microseconds of a call by contestant), perhaps `eager`, `ratios`, `bytes`."""


def clocks() -> str:
    """Of the GPU's processors and memory at work, and the most that they can run at, in MHz."""
    here = f"GPU-{torch.cuda.get_device_properties().uuid}"
    query = ["--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem", "--format=csv,noheader", f"--id={here}"]
    torch.cuda._sleep(2_000_000_000)  # a second of work: an idle GPU lowers its clocks
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=True, timeout=20)
        sm, memory, most_sm, most_memory = done.stdout.strip().split(", ")
        return f"SM {sm} of {most_sm}, memory {memory} of {most_memory}"
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""


def machine(device: str) -> dict[str, Any]:
    record = evidence.machine() | {"commit": evidence.commit(), "source_sha256": evidence.source_hash()}
    if device == "cuda":
        return record | {"clocks": clocks()}
    return record | {"device": f"{processor()}, {torch.get_num_threads()} threads", "driver": ""}


def processor() -> str:
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in known.splitlines() if line.startswith("model name")]
    return f"{names[0]} (CPU)" if names else "cpu"


def part(text: str) -> tuple[int, int]:
    index, count = map(int, text.split("/"))
    return index, count


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one case, not for long: to see that it works")
    parser.add_argument(
        "--out", type=Path, help="folder of the record (default benchmarks/results; --quick: build/quick)"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other case after this time")
    parser.add_argument(
        "--compile-only", action="store_true", help="verify and compile, time nothing: a later run finds it in caches"
    )
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="every N-th case, beginning with I")
    return parser


def folder(options: argparse.Namespace) -> Path:
    """Of records. What was only tried stays out of those that the pages are made from."""
    return options.out or (QUICK if options.quick else RESULTS)


def chosen(cases: Sequence, options: argparse.Namespace) -> Sequence:
    """The cases that the options leave."""
    timing.compile_only = options.compile_only
    index, count = options.part
    cases = cases[index::count]
    if options.quick:
        timing.patience = 0.02
        cases = cases[:1]
    return cases


def run(name: str, description: str | None, cases: dict[str, list], bench: Callable[[Any, str], Row]) -> None:
    """Runs ``bench`` for each of the device's cases."""
    options = arguments(description).parse_args()
    keep(name, options, (bench(case, options.device) for case in chosen(cases[options.device], options)))


def keep(name: str, options: argparse.Namespace, rows: Iterable[Row]) -> None:
    """Prints rows as they come, and writes the record with each of them: who is stopped leaves what there is."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    path = folder(options) / f"{name}_{options.device}.json"
    record: dict[str, Any] = {}
    found: list[Row] = []
    started = time.monotonic()
    for row in rows:
        seconds = time.monotonic() - started
        if not options.compile_only:
            found.append(row)
            console.print(table(row))
            record = record or machine(options.device)
            record["seconds"], record["complete"] = round(seconds, 1), False
            evidence.write_json(path, record | {"microseconds": found})
        torch.compiler.reset()  # one function's variants are limited in number
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if seconds > options.seconds:
            print(f"{name}: its {options.seconds:g} seconds are over, cases may be missing")
            return
    if found:
        record["complete"] = True
        evidence.write_json(path, record | {"microseconds": found})
        console.print(
            f"{name}: {record['device']}, torch {record['torch']}, commit {record['commit']}, {seconds:.0f} s"
        )


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
    """Bytes a second as a share of the copy's, for work that moves ``tensors`` of x's size; a copy moves two."""
    return {
        name: round((1 if name.startswith("copy") else tensors / 2) * times["copy"]["p50"] / t["p50"], 4)
        for name, t in times.items()
    }
