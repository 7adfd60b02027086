"""Runs all benchmarks, the most important ones first: a record for each in a folder, a line for each on the screen.

First everything is compiled, many processes at once, into caches of this run's own; then one benchmark at a time is
measured, each in a process of its own that has its time. One that fails or is late takes nothing from the others.
--check --quick shows within a minute or two whether all of it would run: every case is verified, one of each is timed,
as many at once as there are cores (so these times mean nothing).
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOGS = ROOT / "build/benchmarks"
RESULTS, QUICK = HERE / "results", ROOT / "build/quick"
CHECKED_PARTS = 2  # of those that need no compiler, where all cases are only verified
GRACE = 12  # seconds that a benchmark has to get ready and to end the case that it is in


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int
    """It begins no case after this time on a GPU."""
    parts: int = 0
    """Processes that compile for it at the same time; 0: it needs no compiler."""
    devices: tuple[str, ...] = ("cuda", "cpu")


STEPS = (
    Step("bench_chunked_forward", 60, parts=6),
    Step("bench_chunked_backward", 25, parts=3),
    Step("bench_report", 30, parts=7),
    Step("bench_layer", 25, parts=2),
    Step("bench_layouts", 25),
    Step("bench_scaling", 25),
    Step("bench_state_update", 12),
    Step("bench_training", 30, parts=2),
    Step("profile_kernels", 60, devices=("cuda",)),
    Step("bench_cpu", 75, parts=6),
    Step("bench_pair_moments", 10, parts=2),
    Step("bench_reconstruction_loss", 10, parts=2),
    Step("bench_telemetry_merge", 8),
    Step("bench_lifecycle_step", 8),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="one case of each, not for long")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, in this order, e.g. bench_report")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds that all of it may take")
    parser.add_argument(
        "--out", type=Path, help="folder of the records (default benchmarks/results; with --quick build/quick)"
    )
    parser.add_argument("--tar", type=Path, help="also bundle the records and logs of this run in this file (.tar.gz)")
    parser.add_argument("--check", action="store_true", help="first verify all cases of all benchmarks, many at once")
    parser.add_argument("--no-compile-ahead", action="store_true", help="each benchmark compiles what it needs")
    options = parser.parse_args()
    started = time.monotonic()
    deadline = started + options.limit

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    options.out = (options.out or (QUICK if options.quick else RESULTS)).resolve()
    set_caches()
    load()
    device = options.device or found_device()
    steps = [step for step in STEPS if device in step.devices]
    if options.only:
        steps = [step for name in options.only for step in steps if step.name == name]
    print(f"{device}, {time.monotonic() - started:.0f} s to load", flush=True)
    common = ["--device", device, "--out", str(options.out)]
    if options.check or device == "cuda" and not options.no_compile_ahead:
        parts = [(s, part) for s in steps for part in range(s.parts or (CHECKED_PARTS if options.check else 0))]
        if options.quick and not options.check:
            parts = [(step, part) for step, part in parts if part == 0]
        # Of each benchmark, the cases with peers come first, and there are as many parts as these.
        compile_ahead(
            parts, [] if options.check else ["--quick"], common, min(deadline - 4 * GRACE, time.monotonic() + 150)
        )

    common += ["--quick"] if options.quick else []
    before = {path: path.stat().st_mtime_ns for path in options.out.glob("*.json")}
    failed = [step.name for step in steps]
    try:
        measure(steps, common, deadline, device, together=options.check and options.quick, failed=failed)
    finally:  # also when this process is told to end: what there is, is kept
        for job in list(Job.running):
            job.stop()
        records = [path for path in sorted(options.out.glob("*.json")) if before.get(path) != path.stat().st_mtime_ns]
        if options.tar:
            bundle(options.tar, [*records, *sorted(LOGS.glob("*.log"))])
    done = len(steps) - len(failed)
    print(f"{done} of {len(steps)} done, {len(records)} records, {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


def measure(
    steps: list[Step], common: list[str], deadline: float, device: str, together: bool, failed: list[str]
) -> None:
    """One after the other, or all ``together``; takes those that are done off ``failed``."""
    jobs = []
    for step in steps:
        left = deadline - time.monotonic()
        if left < GRACE:
            print(f"{step.name}: not run, the time is over", flush=True)
            continue
        budget = min(step.seconds, left - GRACE) if device == "cuda" else step.seconds * 10
        arguments = [*common, "--seconds", f"{budget:.0f}"]
        jobs.append(Job(step.name, arguments, LOGS / f"{step.name}.log", budget + GRACE))
        if not together and jobs.pop().ended() == 0:
            failed.remove(step.name)
    for job in jobs:
        if job.ended() == 0:
            failed.remove(job.name)


def bundle(archive: Path, files: list[Path]) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for path in files:
            tar.add(path, path.name)


def set_caches() -> None:
    """What compilers keep: apart from what other runs left, and without the choices that a busy GPU made them take."""
    cache = ROOT / "build/bench_compiled"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # no threads in the process that forks


def load() -> None:
    """What every benchmark imports and nothing that asks for a GPU: processes are forked from this one."""
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    sys.path.insert(0, str(HERE))


def found_device() -> str:
    """Asked in another process: one that has asked itself can have no forks that use a GPU."""
    question = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if not shutil.which("nvidia-smi"):
        return "cpu"
    return "cuda" if subprocess.run([sys.executable, "-c", question]).returncode == 0 else "cpu"


class Job:
    """A script in a fork of this process, with a log."""

    running: ClassVar[list[Job]] = []

    def __init__(self, name: str, arguments: list[str], log: Path, limit: float = float("inf")):
        self.name, self.log, self.limit, self.begun = name, log, limit, time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments)
        Job.running.append(self)

    def _run(self, arguments: list[str]) -> None:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            file = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = [str(HERE / f"{self.name}.py"), *arguments]
            if sys.modules["torch"].cuda._is_in_bad_fork():  # something that was imported has asked for a GPU
                os.execv(sys.executable, [sys.executable, *sys.argv])
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else bool(exit.code)
            if exit.code and not isinstance(exit.code, int):
                print(exit.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code))

    def done(self) -> int | None:
        """Its exit status, None while it runs; 124 where it had to be stopped."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            Job.running.remove(self)
            return os.waitstatus_to_exitcode(status)
        return self.stop() if time.monotonic() - self.begun > self.limit else None

    def ended(self) -> int:
        """Waits for it, says how it went, and returns its exit status."""
        while (code := self.done()) is None:
            time.sleep(0.05)
        said = f", failed ({code}): {self.last_line()}" if code else ""
        print(f"{self.name}: {time.monotonic() - self.begun:.0f} s{said}", flush=True)
        return code

    def stop(self) -> int:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        Job.running.remove(self)
        return 124

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")[:160]


def compile_ahead(waiting: list[tuple[Step, int]], which: list[str], common: list[str], deadline: float) -> None:
    """All benchmarks' compilations, as many at once as there are cores. ``which``: of a part's cases."""
    begun = time.monotonic()
    waiting = sorted(waiting, key=lambda job: -job[0].seconds)  # those with the longest compilations first
    running: list[Job] = []
    count, failed = len(waiting), []
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < max(1, (os.cpu_count() or 1) - 1):
            step, part = waiting.pop(0)
            arguments = [*common, "--compile-only", "--part", f"{part}/{step.parts or CHECKED_PARTS}", *which]
            running.append(Job(step.name, arguments, LOGS / f"compile-{step.name}-{part}.log"))
        time.sleep(0.05)
        for job in list(running):
            if (code := job.done()) is not None:
                running.remove(job)
                failed += [f"{job.log.stem}: {job.last_line()}"] if code else []
    for job in running:
        job.stop()
    for choice in (ROOT / "build/bench_compiled").rglob("*.best_config"):
        choice.unlink()  # measured beside others: who uses the kernel measures again
    late = len(running) + len(waiting)
    print(f"compiled {count - late} of {count} in {time.monotonic() - begun:.0f} s", *failed, sep="\n  ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
