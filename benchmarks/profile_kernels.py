"""What limits each CUDA kernel, by the profiler's counters (ncu): bytes of memory, sectors, warps at work, why they wait.

Each case is one call of an operator, with cold caches; PyTorch's own element-by-element kernel stands beside them as what
a copy looks like in the same counters. Leaves profile_cuda.json; scripts/render_benchmarks.py makes the table.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import bench_chunked_backward as gradients
import bench_layouts as layouts
import bench_state_update as updates
import timing
import torch
from bench_chunked_forward import FLOAT16, HALF, SINGLE, ours, sized
from results import arguments, evidence, folder, machine
from workload import Case, Data, make_data

from kasmina_ext import TransitionRules, ops

MARK = "spin_kernel"  # torch.cuda._sleep: one before each case
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard",
    "sleeping", "tex_throttle", "wait",
)  # fmt: skip
AROUND = 20  # seconds that the profiler takes before the first and after the last case
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "ns": "gpu__time_duration.sum",
    "bytes read": "dram__bytes_read.sum",
    "bytes written": "dram__bytes_write.sum",
    "% of the memory's speed": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 sectors read": "lts__t_sectors_op_read.sum",
    "L2 sectors written": "lts__t_sectors_op_write.sum",
    "L1 sectors loaded": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "L1 sectors stored": "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "% of warps active": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "% of issue slots used": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread",
    "shared bytes": "launch__shared_mem_per_block",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
}


@dataclass(frozen=True)
class Profiled:
    name: str
    elements: int
    bytes: int
    """That the call must move."""
    call: Callable[[], object]


def one(case: Case) -> Data:
    return make_data(case, "cuda")[0]


def forward(name: str, data: Data) -> Profiled:
    return Profiled(f"forward, {name}", data.x.numel(), 2 * data.x.nbytes, ours(data))


def cases(quick: bool) -> Iterator[Profiled]:
    large = sized(256, 8192, 1024, HALF)
    data = one(large)
    yield Profiled("copy by a kernel, 256 MiB bf16", data.x.numel(), 2 * data.x.nbytes, data.x.abs)
    yield forward("256 MiB bf16, 1024 seeds", data)
    if quick:
        return
    yield backward("256 MiB bf16, 1024 seeds", data)
    yield forward("256 MiB bf16, 1 seed", one(replace(large, seeds=1)))
    yield forward("256 MiB bf16, chunks of 1", one(replace(large, seeds=large.features)))
    yield forward("256 MiB fp16, 1024 seeds", one(replace(large, dtype=FLOAT16)))
    single = sized(256, 4096, 1024, SINGLE)
    data = one(single)
    yield forward("256 MiB fp32, 1024 seeds", data)
    yield backward("256 MiB fp32, 1024 seeds", data)
    moments = torch.zeros(single.features, 6, dtype=torch.float64, device="cuda")
    target = torch.randn_like(data.x)
    size = data.x.numel(), 2 * data.x.nbytes
    yield Profiled("pair_moments, 256 MiB fp32", *size, lambda: ops.pair_moments(data.x, target, moments))
    data.state[0], data.state[3] = 2, 0  # TRAINING, MULTIPLICATIVE
    offsets, state, _, weights = data.seeds
    loss = lambda: ops.reconstruction_loss(data.x, target, offsets, state, weights)  # noqa: E731
    yield Profiled("reconstruction_loss, 256 MiB fp32", *size, loss)
    data = one(sized(64, 4096, 512, HALF))
    yield forward("64 MiB bf16, 512 seeds", data)
    yield backward("64 MiB bf16, 512 seeds", data)
    yield forward("8 MiB bf16, 128 seeds", one(sized(8, 1024, 128, HALF)))
    yield forward("32 x 512 fp32, 100 seeds", one(Case(32, 512, 100, SINGLE)))
    aligned = replace(large, seeds=512)
    for name in ("one feature less", "address off by one element", "NCHW", "channels_last", "uneven chunks"):
        yield forward(f"256 MiB bf16, {name}", layouts.VARIANTS[name](aligned, "cuda")[0])
    yield forward("256 MiB bf16, 1,000,000 seeds", one(Case(128, 1 << 20, 1_000_000, HALF)))
    seeds = 1_000_000
    lived, batches = updates.make(seeds, "cuda")
    rules = TransitionRules.any().on(torch.device("cuda"))
    size = seeds, seeds * (updates.REQUEST + updates.SEED)
    update = lambda: ops.state_update(*lived, *batches[0], rules, updates.BLUEPRINTS)  # noqa: E731
    yield Profiled("state_update, 1,000,000 requests", *size, update)


def backward(name: str, data: Data) -> Profiled:
    call = gradients.backward(data, torch.randn_like(data.x))
    return Profiled(f"backward, {name}", data.x.numel(), 3 * data.x.nbytes, call)


def inside(quick: bool, order: Path, seconds: float) -> None:
    """Under the profiler: every case, a mark before each, while there is time."""
    started = time.monotonic()
    timing.compile_only = True  # one copy of the data is enough
    with open(order, "w", newline="") as file:
        writer = csv.writer(file)
        for case in cases(quick):
            if not case.name.startswith("state_update"):  # a second time, nothing changes
                case.call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            case.call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            writer.writerow([case.name, case.elements, case.bytes])
            file.flush()
            torch.cuda.empty_cache()
            if time.monotonic() - started > seconds:
                return


def profiler() -> str:
    found = shutil.which("ncu") or next((str(p) for p in (Path("/usr/local/cuda/bin/ncu"),) if p.exists()), "")
    return found or next((str(path) for path in sorted(Path("/opt/nvidia").glob("nsight-compute/*/ncu"))), "ncu")


def profile(quick: bool, seconds: float) -> tuple[list[dict[str, str]], list[list[str]]]:
    """Rows of the profiler's table, and the cases in their order. A case that failed is the last one."""
    with tempfile.TemporaryDirectory() as folder:
        table, order = Path(folder) / "table.csv", Path(folder) / "order.csv"
        metrics = ",".join([*METRICS.values(), *map(STALL.format, STALLS)])
        command = [profiler(), "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
        command += ["--print-units", "base", "--log-file", str(table), "--metrics", metrics]
        command += [sys.executable, __file__, "--inside", str(order), *(["--quick"] if quick else [])]
        command += ["--seconds", str(seconds - AROUND)]
        environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        try:
            done = subprocess.run(command, env=environment, timeout=seconds, capture_output=True, text=True)
            said = done.stdout + done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired:
            said = f"stopped after {seconds:g} s"
        except OSError as error:
            raise SystemExit(f"{command[0]}: {error}") from None
        text = table.read_text() if table.exists() else ""
        lines = [line for line in text.splitlines() if line.startswith('"')]
        if said:
            print(said, "\n".join(line for line in text.splitlines() if not line.startswith('"')), file=sys.stderr)
        if not lines:
            raise SystemExit("the profiler left no table")
        rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
        return rows[1:], list(csv.reader(order.open()))  # the first has the units


def number(text: str | None) -> float:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return 0.0


def kernel_name(signature: str) -> str:
    """Of "void a::(anonymous namespace)::name<...>(...)"."""
    plain = signature.replace("(anonymous namespace)::", "").replace("<unnamed>::", "").removeprefix("void ")
    return re.split(r"[<(]", plain)[0].split("::")[-1]


def kernels(rows: list[dict[str, str]], order: list[list[str]]) -> Iterator[dict]:
    """A line for each kernel of ours, with what its case is."""
    case = -1
    for row in rows:
        name = kernel_name(row["Kernel Name"])
        if name == MARK:
            case += 1
            continue
        if not 0 <= case < len(order):
            continue
        title, elements, size = order[case]
        found = {"case": title, "kernel": name, "elements": int(elements), "bytes needed": int(size)}
        found |= {key: number(row.get(metric)) for key, metric in METRICS.items()}
        found["instructions per element"] = round(32 * found["instructions"] / int(elements), 3)
        stalls = {stall: number(row.get(STALL.format(stall))) for stall in STALLS}
        yield found | {"waits": {s: round(v, 2) for s, v in sorted(stalls.items(), key=lambda item: -item[1])[:4] if v}}


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--inside", type=Path, metavar="FILE", help="run the cases, and list them in this file")
    options = parser.parse_args()
    if options.inside:
        inside(options.quick, options.inside, options.seconds)
        return
    if options.compile_only:
        timing.compile_only = True
        index, count = options.part
        for case in itertools.islice(cases(options.quick), index, None, count):
            case.call()
        torch.cuda.synchronize()
        return
    found = list(kernels(*profile(options.quick, min(options.seconds, 600))))
    evidence.write_json(folder(options) / "profile_cuda.json", machine("cuda") | {"kernels": found})
    for line in found:
        print({key: value for key, value in line.items() if key not in ("elements", "bytes needed")})


if __name__ == "__main__":
    main()
