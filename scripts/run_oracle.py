"""Random calls of the operators against the float64 oracle of the tests; counts failures, keeps the count.

Each case draws shapes, strides, chunk maps, dtypes, states (bad ids too) and values (NaN, Inf, denormals, raw bits), runs
chunked_forward, chunked_backward and telemetry_update, and compares y and dx bit for bit, all sums within the error that
an order of summation may make; then one call with more than 2^31 elements. The result is written to
benchmarks/results/oracle.json, one entry per backend and device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import evidence
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path[:0] = [str(evidence.ROOT / "tests"), str(evidence.ROOT)]
import cases  # noqa: E402
import checks  # noqa: E402

RESULTS = evidence.ROOT / "benchmarks/results/oracle.json"
SHOWN = 5
BIG_GIB = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default %(default)s)")
    parser.add_argument("--backend", choices=checks.BACKENDS, default="ops", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default %(default)s)")
    parser.add_argument("--only", type=int, metavar="N", help="run case N alone and print all that is wrong with it")
    parser.add_argument("--skip-big", action="store_true", help="leave out the call with more than 2^31 elements")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default benchmarks/results/oracle.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.backend == "ops" and not checks.kernel_for(device)[0]:
        parser.error(f"no compiled kernel for {device}: {checks.kernel_for(device)[1]}")

    console = Console()
    if options.only is not None:
        complaints = run(options.only, options.seed, options.backend, device)
        console.print("\n".join(complaints) or "no complaint", markup=False)
        return bool(complaints)

    started, failed = time.monotonic(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{options.backend} on {device}", total=options.cases)
        for index in range(options.cases):
            complaints = run(index, options.seed, options.backend, device)
            if complaints:
                failed.append(index)
                if len(failed) <= SHOWN:
                    progress.console.print(f"case {index}:", *complaints[:4], sep="\n  ", markup=False)
            progress.advance(task)
    seconds = round(time.monotonic() - started, 1)
    record = {
        "cases": options.cases,
        "failures": len(failed),
        "more_than_2_31_elements": "not run" if options.skip_big else run_big(options.backend, device, console),
        "failed_cases": failed[:100],
        "seed": options.seed,
        "seconds": seconds,
        "device": device_name(device),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source_sha256": evidence.source_hash(),
    }
    save(options.out, f"{options.backend}/{device.type}", record)
    console.print(f"{len(failed)} failures in {options.cases} cases, {seconds} s", markup=False)
    return bool(failed) or record["more_than_2_31_elements"] == "wrong"


def run_big(backend: str, device: torch.device, console: Console) -> str:
    """The forward and backward of a tensor with more than 2^31 elements: "right", "wrong", or why not run."""
    if backend != "ops":
        return "not run: the reference makes float64 copies"
    if checks.free_memory(device) < BIG_GIB:
        return f"not run: needs {BIG_GIB} GiB"
    complaints = checks.check_big_forward(device) + checks.check_big_backward(device, grad_x=True)
    console.print(*complaints, sep="\n", markup=False)
    return "wrong" if complaints else "right"


def run(index: int, seed: int, backend: str, device: torch.device) -> list[str]:
    """What is wrong with case `index`: the draw depends on nothing else but the seed."""
    case = cases.draw_case(cases.NumpyDraw(np.random.default_rng([seed, index])))
    try:
        complaints = checks.check_case(case, backend, device)
    except Exception as error:  # a call that raises is a failure like any other
        complaints = [f"{type(error).__name__}: {error}"]
    return [repr(case), *complaints] if complaints else []


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return device.type


def save(path: Path, key: str, record: dict) -> None:
    """Adds or replaces one entry, leaves the others."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    evidence.write_json(path, {**entries, key: record})


if __name__ == "__main__":
    sys.exit(main())
