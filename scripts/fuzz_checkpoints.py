"""Random changes to the files of checkpoints: all must be refused, with the file and the reason; keeps the count.

In every other input the sums are made right again, so that the layers behind them are reached: what is then accepted
must mean exactly what a second, plain reader (json and safetensors) makes of the same files. The result is the entry
"fuzz" of benchmarks/results/crash.json.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import evidence
from crash_checkpoints import RESULTS, facts
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_oracle import save

sys.path[:0] = [str(evidence.ROOT / "tests"), str(evidence.ROOT)]
import checkpoint_fuzz  # noqa: E402

MUST_BE_ZERO = ("accepted_with_wrong_sums", "wrong_content", "crashes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default benchmarks/results/crash.json")
    options = parser.parse_args()
    console, started = Console(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # many small files
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory(dir=memory) as root:
        task = progress.add_task("inputs", total=options.inputs)
        result = checkpoint_fuzz.fuzz(
            Path(root),
            options.inputs,
            random.Random(options.seed),
            lambda number: progress.update(task, completed=number),
        )
    result |= facts(started) | {"seed": options.seed}
    save(options.out, "fuzz", result)
    console.print(result, markup=False)
    return any(result[name] for name in MUST_BE_ZERO)


if __name__ == "__main__":
    sys.exit(main())
