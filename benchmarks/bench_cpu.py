"""chunked_forward with telemetry on the CPU, by threads and instruction set, against memcpy and torch.compile.

memcpy's speed is that of a copy into memory that is already there (`copy_`), and of one that allocates its result, as
the operators do (`clone`). Both in processes whose allocator keeps what it once had: with the C library's defaults every
large tensor is new to the process, and most of the time of `clone` and of ours would be page faults.

For each instruction set the kernels are compiled once more, for it alone, into build/bench_cpu; the module that ships
chooses by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import bench_chunked_forward as forward
import peers
import timing
import torch
from results import ROOT, Row, arguments, chosen, keep
from timing import timed
from torch._inductor import config
from workload import Case, Truth, make_data

SETS = {"AVX2": "haswell", "AVX-512": "skylake-avx512"}
SHIPPED = "as shipped"
THREADS = (16, 2)
CASES = (
    Case(8192, 4096, 512, torch.float32),
    Case(8192, 4096, 512, torch.bfloat16),
    Case(2048, 1024, 128, torch.float32),
)
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"


def build(instructions: str) -> dict[str, str]:
    """The environment in which the package is one that was compiled for this instruction set alone."""
    there = ROOT / "build/bench_cpu" / SETS[instructions]
    sources = [path for folder in ("csrc", "kasmina_ext") for path in (ROOT / folder).rglob("*.[chp]*")]
    newest = max(path.stat().st_mtime for path in sources if path.suffix in (".c", ".h", ".py"))
    built = there / "kasmina_ext/_C.abi3.so"
    if built.exists() and built.stat().st_mtime > newest:
        return {"PYTHONPATH": str(there)}
    shutil.copytree(
        ROOT / "kasmina_ext", there / "kasmina_ext", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so")
    )
    flags = f"-DKASMINA_NO_CLONES -march={SETS[instructions]}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(there), "-t", str(there / "objects")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CFLAGS": flags, "KASMINA_CUDA": "0"}, check=True)
    return {"PYTHONPATH": str(there)}


@dataclass
class Worker:
    """A process that measures the cases: how many threads OpenMP starts with is decided before torch is loaded."""

    threads: int
    instructions: str  # "" for the module that ships
    options: argparse.Namespace
    environment: dict[str, str]
    part: str = "0/1"  # of the cases
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, __file__, "--inside", f"{self.threads},{self.instructions or SHIPPED}"]
        command += ["--part", self.part]
        command += ["--compile-only"] if self.options.compile_only else ["--quick"] * self.options.quick
        environment = os.environ | self.environment | {"OMP_NUM_THREADS": str(self.threads)}
        environment["GLIBC_TUNABLES"] = KEEP_MEMORY
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_until_ready(self) -> None:
        self.process.stdout.readline()

    def rows(self) -> Iterator[Row]:
        """Measured now; until then the process has only got ready."""
        self.process.stdin.write("now\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        errors = self.process.stderr.read()
        if self.process.wait():
            raise SystemExit(errors)


def measure(threads: int, instructions: str, case: Case) -> Row:
    data = make_data(case, "cpu")
    first, truth = data[0], Truth.of(data[0])
    results = [torch.empty_like(d.x) for d in data]
    calls = {
        "copy": [lambda d=d, y=y: y.copy_(d.x) for d, y in zip(data, results, strict=True)],
        "clone": [d.x.clone for d in data],
        "kasmina_ext": forward.verified(case, data),
    }
    if instructions == SHIPPED:
        peer = peers.compiled(case, first, "by column")
        truth.check_forward("torch.compile", first.x, peer.forward(first.x))
        calls["torch.compile"] = [lambda d=d: peer.forward(d.x) for d in data]
    times = timed(calls, "cpu")
    row: Row = {"case": f"{case.name}, {threads} threads, {instructions}", "bytes": 2 * case.bytes, "cpu": times}
    row["of memcpy's speed"] = round(times["copy"]["p50"] / times["kasmina_ext"]["p50"], 4)
    row["of a clone's speed"] = round(times["clone"]["p50"] / times["kasmina_ext"]["p50"], 4)
    if "torch.compile" in times:
        row["times best"] = forward.ratio(times, "torch.compile")
    return row


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One process after the other, all of which were started before."""
    threads = [n for n in THREADS if n <= (os.cpu_count() or 1)] or [1]
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    sets = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f")) if f" {flag}" in known]
    index, count = options.part
    if options.compile_only:
        if index == 0:
            for name in sets:
                build(name)
        whole = [(n, f"{case}/{len(CASES)}") for case in range(len(CASES)) for n in threads]
        workers = [Worker(n, "", options, {}, part) for n, part in whole[index::count]]
    else:
        builds = {} if options.quick else {name: build(name) for name in sets}
        numbers = chosen(threads, options)
        workers = [Worker(n, name, options, env) for name, env in ({"": {}} | builds).items() for n in numbers]
    try:
        for worker in workers:
            worker.wait_until_ready()
        for worker in workers:
            yield from worker.rows()
    finally:
        for worker in workers:
            worker.process.kill()


def inside(given: str, options: argparse.Namespace) -> None:
    threads, instructions = given.split(",")
    torch.set_num_threads(int(threads))
    timing.patience = 0.3
    config.cpp_cache_precompile_headers = False  # a minute for what is compiled once
    cases = chosen(CASES if instructions == SHIPPED else CASES[:1], options)
    print("ready", flush=True)
    sys.stdin.readline()
    for case in cases:
        print(json.dumps(measure(int(threads), instructions, case)), flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--inside", metavar="THREADS,SET", help="measure this, in this process, when a line is read")
    options = parser.parse_args()
    options.device = "cpu"
    if options.inside:
        inside(options.inside, options)
    else:
        keep("bench_cpu", options, rows(options))


if __name__ == "__main__":
    main()
