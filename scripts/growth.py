#!/usr/bin/env python3
"""Does growth earn its keep? On the demo's digits, several kinds of damage and random seeds, with paired intervals:

where to grow   seeds grown by potential, at random and by the shift of their activations, at equal numbers
who helped      credit against Shapley values by Monte Carlo, and its sum against the true gain
what to cull    accuracy left when half of the seeds go: the controller's way, at random, by credit, by greedy
                leave-one-out
repair          a network grown by the controller alone, against the frozen one and the last layer, retrained

Writes benchmarks/results/growth.json. Ctrl-C loses nothing but the parts at work; --resume goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
try:
    import kasmina_ext  # noqa: F401
except ModuleNotFoundError:  # not installed: run from the checkout
    sys.path.insert(0, str(ROOT))

import evidence  # noqa: E402
import torch  # noqa: E402
from demo_journal import Journal, JournalError  # noqa: E402
from demo_report import into_readme  # noqa: E402
from growth_experiments import DAMAGES, EXPERIMENTS, QUICK, Sizes  # noqa: E402
from growth_report import markdown, show, summary  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

BEGIN, END = "<!-- growth:begin -->", "<!-- growth:end -->"
RESULTS = ROOT / "benchmarks/results/growth.json"


def work(experiment: str, kind: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """One part, in a process of its own: a function of its arguments alone."""
    # One thread: the matrices are too small to share, and the same sums come out on any number of cores.
    torch.set_num_threads(1)
    begun = time.perf_counter()
    return {**EXPERIMENTS[experiment](kind, seed, sizes), "seconds": time.perf_counter() - begun}


def measure(journal: Journal, parts: list[tuple[str, str, int]], sizes: Sizes, jobs: int, console: Console) -> None:
    """Do what is not in the journal yet, ``jobs`` parts at a time, with a progress bar."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(bar_width=40), MofNCompleteColumn(), TimeElapsedColumn())
    missing = [part for part in parts if name_of(*part) not in journal.parts]
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        bar = progress.add_task("", total=len(parts), completed=len(parts) - len(missing))
        try:
            running = {pool.submit(work, *part, sizes): part for part in missing}
            for done in as_completed(running):
                experiment, kind, seed = running[done]
                journal.record(name_of(experiment, kind, seed), done.result())
                progress.update(bar, advance=1, description=f"{experiment}: {kind}, seed {seed}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        progress.update(bar, description="all")


def name_of(experiment: str, kind: str, seed: int) -> str:
    return f"{experiment}/{kind}/{seed}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, default=6, metavar="N", help="random seeds of each kind of damage (default: 6)")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes (default: 2 at most)")
    add("--work", type=Path, default=ROOT / "build/growth", metavar="DIR", help="where parts are kept (build/growth)")
    add("--out", type=Path, default=RESULTS, metavar="FILE", help="default: benchmarks/results/growth.json")
    add("--resume", action="store_true", help="go on with the run in --work; it ends with the same numbers")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: show what this file holds")
    add("--readme", action="store_true", help="put the table into README.md, too")
    add("--quick", action="store_true", help="to see that all works: the figures mean nothing, so give --out, too")
    options = parser.parse_args(argv)
    if min(options.seeds, options.jobs) < 1:
        parser.error("arguments --seeds and --jobs: at least 1")
    if options.quick and (options.out == RESULTS or options.readme):
        parser.error("argument --quick: its figures mean nothing, give another --out, and no --readme")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(highlight=False)
    if options.source:
        record = json.loads(options.source.read_text())
        report(record, console, options.readme)
        return 0
    sizes = QUICK if options.quick else Sizes()
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(sizes).items()}
    config = {"seeds": options.seeds, "sizes": plain, "torch": torch.__version__, "commit": evidence.commit()}
    try:
        journal = Journal(options.work, config, resume=options.resume)
    except JournalError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    parts = [(name, kind, seed) for seed in range(options.seeds) for kind in DAMAGES for name in EXPERIMENTS]
    begun = time.perf_counter()
    try:
        measure(journal, parts, sizes, options.jobs, console)
    except KeyboardInterrupt:
        console.print(
            f"\nInterrupted: {len(journal.parts)} of {len(parts)} parts are saved; --resume goes on from there."
        )
        return 130
    found = {name: {kind: [journal.parts[name_of(name, kind, seed)] for seed in range(options.seeds)] for kind in DAMAGES}
             for name in EXPERIMENTS}  # fmt: skip
    record = {
        "config": journal.config,
        "machine": evidence.machine(),
        "wall_seconds": round(time.perf_counter() - begun, 1),
        "summary": summary(found),
        "parts": found,
    }
    evidence.write_json(options.out, record)
    report(record, console, options.readme)
    console.print(f"Results: {options.out}", soft_wrap=True)
    return 0


def report(record: dict[str, Any], console: Console, readme: bool) -> None:
    show(record["summary"], console)
    if readme:
        into_readme(ROOT / "README.md", markdown(record["summary"], record["config"]), BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
