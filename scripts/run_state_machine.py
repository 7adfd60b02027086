"""Random orders to a layer's seeds against a plain-Python model; counts divergences, keeps the count.

Each run makes a layer and gives it up to 50 orders (single and batched requests, recycling, epochs, writes through views,
saving, loading, copying, moving between dtypes); after each the state, history, alpha and bank must be the model's. The
result is written to benchmarks/results/state_machine.json, one entry per device.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import evidence
import torch
from hypothesis import Phase, seed
from hypothesis.stateful import run_state_machine_as_test
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_oracle import device_name, save

sys.path[:0] = [str(evidence.ROOT / "tests"), str(evidence.ROOT)]
import checks  # noqa: E402
import lifecycle_machine  # noqa: E402

RESULTS = evidence.ROOT / "benchmarks/results/state_machine.json"
RUNS = {"cpu": 5000, "cuda": 500}
BLOCK = 100
SHOWN = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="how many (default 5000 on the CPU, 500 on CUDA)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first block (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default benchmarks/results/state_machine.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    wanted = options.runs or RUNS.get(device.type, RUNS["cuda"])

    console = Console()
    started, diverged, runs, steps = time.monotonic(), [], 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"runs on {device}", total=wanted)
        block = options.seed
        while runs < wanted:
            complaint, made, taken = run_block(block, min(BLOCK, wanted - runs), device)
            runs, steps = runs + made, steps + taken
            if complaint:
                diverged.append(block)
                if len(diverged) <= SHOWN:
                    progress.console.print(f"block {block}:", complaint, sep="\n", markup=False)
            progress.update(task, completed=min(runs, wanted))
            block += 1
    seconds = round(time.monotonic() - started, 1)
    record = {
        "runs": runs,
        "most_steps_a_run": lifecycle_machine.STEPS,
        "comparisons": steps,
        "divergences": len(diverged),
        "blocks_with_a_divergence": diverged[:100],
        "seed": options.seed,
        "compiled_kernels": checks.kernel_for(device)[0],
        "seconds": seconds,
        "device": device_name(device),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source_sha256": evidence.source_hash(),
    }
    save(options.out, device.type, record)
    console.print(f"{len(diverged)} divergences in {runs} runs, {steps} comparisons, {seconds} s", markup=False)
    return bool(diverged)


def run_block(number: int, runs: int, device: torch.device) -> tuple[str, int, int]:
    """(the first divergence or "", runs, comparisons); hypothesis ends a block at its first divergence."""
    machine = seed(number)(lifecycle_machine.machine_on(device))
    complaint = ""
    try:
        run_state_machine_as_test(machine, settings=lifecycle_machine.run_settings(runs, phases=[Phase.generate]))
    except Exception as error:  # an order that raises is a divergence like any other
        complaint = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return complaint, max(1, machine.runs), machine.steps


if __name__ == "__main__":
    sys.exit(main())
