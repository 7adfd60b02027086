"""chunked_forward with telemetry on the CPU, by threads and instruction set, against memcpy and torch.compile.

memcpy's speed is that of a copy into memory that is already there (`copy_`), and of one that allocates its result, as
the operators do (`clone`). For each instruction set the kernels are compiled once more, for it alone, into
build/bench_cpu; the module that ships chooses by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

import bench_chunked_forward as forward
import peers
import torch
from results import ROOT, Row, arguments, keep
from timing import timed
from workload import Case, Truth, make_data

SETS = {"AVX2": "haswell", "AVX-512": "skylake-avx512"}
CASES = (
    Case(2048, 1024, 128, torch.float32),
    Case(2048, 1024, 128, torch.bfloat16),
    Case(8192, 4096, 512, torch.float32),
    Case(8192, 4096, 512, torch.bfloat16),
)


@dataclass(frozen=True)
class Run:
    threads: int
    instructions: str  # "" for the module that ships


def build(instructions: str) -> dict[str, str]:
    """The environment in which the package is one that was compiled for this instruction set alone."""
    if not instructions:
        return {}
    there = ROOT / "build/bench_cpu" / SETS[instructions]
    shutil.copytree(
        ROOT / "kasmina_ext", there / "kasmina_ext", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so")
    )
    flags = f"-DKASMINA_NO_CLONES -march={SETS[instructions]}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(there), "-t", str(there / "objects")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CFLAGS": flags, "KASMINA_CUDA": "0"}, check=True)
    return {"PYTHONPATH": str(there)}


def measure(run: Run, case: Case, compile_too: bool) -> Row:
    torch.set_num_threads(run.threads)
    data = make_data(case, "cpu")
    first, truth = data[0], Truth.of(data[0])
    truth.check_forward(case.name, first.x, forward.ours(first)())
    results = [torch.empty_like(d.x) for d in data]
    calls = {
        "copy": [lambda d=d, y=y: y.copy_(d.x) for d, y in zip(data, results, strict=True)],
        "clone": [d.x.clone for d in data],
        "kasmina_ext": [forward.ours(d) for d in data],
    }
    if compile_too:
        peer = peers.compiled(case, first, "by column")
        truth.check_forward("torch.compile", first.x, peer.forward(first.x))
        calls["torch.compile"] = [lambda d=d: peer.forward(d.x) for d in data]
    times = timed(calls, "cpu")
    set_ = run.instructions or "as shipped"
    row: Row = {"case": f"{case.name}, {run.threads} threads, {set_}", "bytes": 2 * case.bytes, "cpu": times}
    row["of memcpy's speed"] = round(times["copy"]["p50"] / times["kasmina_ext"]["p50"], 4)
    row["of a clone's speed"] = round(times["clone"]["p50"] / times["kasmina_ext"]["p50"], 4)
    if compile_too:
        row["times best"] = round(times["kasmina_ext"]["p50"] / times["torch.compile"]["p50"], 4)
    return row


def rows(quick: bool):
    threads = [n for n in (1, 2, 16) if n <= (os.cpu_count() or 1)]
    sets = ["", *(name for name, flag in SETS.items() if name == "AVX2" or "avx512f" in open("/proc/cpuinfo").read())]
    for name in sets[:1] if quick else sets:
        environment = os.environ | build(name)
        for number in threads[:1] if quick else threads:
            for index in range(1 if quick else len(CASES)):
                inner = json.dumps(asdict(Run(number, name)) | {"case": index, "compile": not name})
                # The number of threads that OpenMP starts with is the number that everything runs with.
                environment["OMP_NUM_THREADS"] = str(number)
                command = [sys.executable, __file__, "--inner", inner]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--inner", help="one measurement, as JSON, in a process of its own")
    options = parser.parse_args()
    if options.inner:
        given = json.loads(options.inner)
        case, compile_too = CASES[given.pop("case")], given.pop("compile")
        print(json.dumps(measure(Run(**given), case, compile_too)))
        return
    options.device = "cpu"
    keep("bench_cpu", options, rows(options.quick))


if __name__ == "__main__":
    main()
