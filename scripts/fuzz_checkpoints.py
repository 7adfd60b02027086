"""Random changes to checkpoints: each must be refused, with the file and the reason, or mean what its files say; counts.

Three campaigns. "files": bytes and values in a checkpoint's files, in every other input with the sums made right
again, so that the layers behind them are reached. "layers": what is in the checkpoint of a layer with its controller
and optimizer (values, shapes, types, names), sums right, loaded into another layer, which is as it was before unless
all of it is loaded. "old_directories": those of the Triton package. What is accepted must mean exactly what a second,
plain reader (json, safetensors, torch.load) makes of the same files. The results are the entries "fuzz_..." of
benchmarks/results/crash.json.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import evidence
import torch
from crash_checkpoints import RESULTS, facts
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_oracle import save

sys.path[:0] = [str(evidence.ROOT / "tests"), str(evidence.ROOT)]
from checkpoint_fuzz import Files, Fuzzer  # noqa: E402
from checkpoint_fuzz_layer import Layers  # noqa: E402
from checkpoint_fuzz_legacy import OldDirectories  # noqa: E402

CAMPAIGNS: dict[str, type[Fuzzer]] = {"files": Files, "layers": Layers, "old_directories": OldDirectories}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="in each campaign (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--only", choices=CAMPAIGNS, help="one campaign")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default benchmarks/results/crash.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # all tensors are small
    warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)  # of planted pickles
    console = Console()
    failures = 0
    for name in [options.only] if options.only else CAMPAIGNS:
        started = time.monotonic()
        fuzzer = run(CAMPAIGNS[name], name, options, console)
        result = fuzzer.record() | facts(started) | {"seed": options.seed}
        save(options.out, f"fuzz_{name}", result)
        console.print(f"{name}: {result}", markup=False)
        failures += fuzzer.failures
    return bool(failures)


def run(kind: type[Fuzzer], name: str, options: argparse.Namespace, console: Console) -> Fuzzer:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # many small files
    generator = random.Random(options.seed)
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory(dir=memory) as root:
        fuzzer = kind(Path(root))
        for _ in progress.track(range(options.inputs), description=name.replace("_", " ")):
            fuzzer.one(generator)
    return fuzzer


if __name__ == "__main__":
    sys.exit(main())
