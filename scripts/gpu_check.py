"""The evidence from a machine with a GPU: builds, runs all tests, then the kernels under compute-sanitizer.

Writes benchmarks/results/gpu_check.json, tied to the sources by their hash (evidence.py), and into stacks.json beside it
what the tests prove of CUDA (tests/stacks.py). Exits with 1 if anything failed, was skipped for want of a CUDA device, or
could not be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import evidence

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LOGS = evidence.ROOT / "build/gpu_check"

THREADS = 4  # of a process
CORES_FOR_BOTH = 16  # tests and sanitizers
MODULE = "_C.abi3.so"
CANARY = "kasmina_canary"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default=os.environ.get("OUT", ""), help="also copy the results and logs to this folder"
    )
    parser.add_argument("--limit", type=int, default=570, help="seconds that all of it may take (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes of the tests (default %(default)s)")
    parser.add_argument("--skip-sanitizer", action="store_true", help="only build and test; writes no record")
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit

    LOGS.mkdir(parents=True, exist_ok=True)
    record = {"source_sha256": evidence.source_hash(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    problems = build()
    if not problems:
        record |= evidence.machine()
        with ThreadPoolExecutor(1) as beside:
            # Mostly waiting, so beside the tests where there are cores to spare.
            spare = (os.cpu_count() or 1) >= CORES_FOR_BOTH and not options.skip_sanitizer
            sanitized = beside.submit(run_sanitizer, deadline) if spare else None
            record["tests"], problems = run_tests(deadline, options.jobs)
            if not options.skip_sanitizer:
                record["sanitizer"], found = sanitized.result() if sanitized else run_sanitizer(deadline)
                problems += found
    record |= {"passed": not problems, "problems": problems}
    if not options.skip_sanitizer:
        evidence.write_json(evidence.GPU_CHECK, record)
    if options.out:
        copy_results(Path(options.out))
    for problem in problems:
        print(f"gpu_check: {problem}", file=sys.stderr)
    print("gpu_check: failed" if problems else f"gpu_check: all clean on {record['device']}")
    return 1 if problems else 0


def build() -> list[str]:
    """What ships is what is tested: every default target, installed as the package that runs here."""
    environment = os.environ | {"KASMINA_CUDA": "1", "KASMINA_WERROR": "1", "KASMINA_CUDA_ARCHS": ""}
    compiled = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    installed = [sys.executable, "-m", "pip", "install", "-q", "-e", ".", "--no-build-isolation", "--no-deps"]
    for command in (compiled, installed):
        if subprocess.run(command, cwd=evidence.ROOT, env=environment).returncode != 0:
            return [f"{' '.join(command[1:])} failed"]
    probe = "import torch, kasmina_ext._native as n; print(torch.cuda.is_available(), *n.has_kernel('cuda'))"
    run = subprocess.run([sys.executable, "-c", probe], cwd=evidence.ROOT, capture_output=True, text=True)
    if run.stdout.startswith("True True"):
        return []
    return ["no CUDA kernel runs here: " + (run.stdout + run.stderr).strip()]


def default_jobs() -> int:
    """As many as have their threads' cores, and memory for the largest tests; one where pytest-xdist is missing."""
    return max(1, min(6, (os.cpu_count() or 1) // THREADS)) if importlib.util.find_spec("xdist") else 1


def run_tests(deadline: float, jobs: int) -> tuple[dict[str, int], list[str]]:
    """The whole suite; counts of passed, failed, skipped."""
    report = LOGS / "pytest.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *(["-n", str(jobs)] if jobs > 1 else [])]
    log = LOGS / "pytest.log"
    # Threads that outnumber the cores wait for each other: a suite of minutes becomes one of hours.
    threads = max(1, min(THREADS, (os.cpu_count() or 1) // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "KASMINA_STACKS": str(evidence.STACKS)}
    code = run_logged(command, log, deadline, environment)
    if not report.exists():
        return {}, [f"pytest ended with {code} and no report (see {log.name})"]
    counts = count_tests(report)
    problems = [] if code == 0 else [f"pytest: {counts['failed']} failed, exit status {code}"]
    if "no CUDA device" in log.read_text():
        problems.append("tests were skipped for want of a CUDA device")
    return counts, problems


def count_tests(report: Path) -> dict[str, int]:
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    reasons = [skip.get("type") for suite in suites for skip in suite.iter("skipped")]
    known = reasons.count("pytest.xfail")  # failures that are known and said
    return {
        "passed": total - failed - skipped,
        "failed": failed,
        "known_failures": known,
        "skipped": skipped - known,
    }


def run_sanitizer(deadline: float) -> tuple[dict[str, dict], list[str]]:
    """Every tool, beside each other (they wait for the host most of the time)."""
    if not shutil.which("compute-sanitizer"):
        return {}, ["compute-sanitizer is not on PATH"]
    canary = LOGS / "canary"
    source = evidence.ROOT / "tests/sanitize/canary.cu"
    nvcc = shutil.which("nvcc") or "nvcc"
    built = subprocess.run([nvcc, "-arch=native", "-o", str(canary), str(source)], capture_output=True, text=True)
    if built.returncode != 0:
        return {}, [f"the canary does not compile: {built.stderr.strip()}"]
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        results = dict(zip(TOOLS, pool.map(lambda tool: check_with(tool, canary, deadline), TOOLS), strict=True))
    problems = [f"{tool}: {result['problem']}" for tool, result in results.items() if result["problem"]]
    return results, problems


def check_with(tool: str, canary: Path, deadline: float) -> dict:
    """One tool: first the planted bug, then the tests marked `sanitizer`."""
    started = time.monotonic()
    base = ["compute-sanitizer", "--tool", tool, "--print-limit", "0", "--ignore-getprocaddress-notfound"]
    kernels = kernel_names()
    if tool != "initcheck":  # which must see torch's kernels write what ours read
        base += [word for name in kernels for word in ("--kernel-name", f"kns={name}")]
    canary_log, log = LOGS / f"canary-{tool}.log", LOGS / f"{tool}.log"
    run_logged([*base, str(canary), tool], canary_log, deadline, echo=False)
    found = count_errors(canary_log.read_text(), kernels)[0]
    # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "sanitizer", "-k", "cuda", "-p", "no:cacheprovider"]
    report = LOGS / f"{tool}.xml"
    report.unlink(missing_ok=True)
    code = run_logged([*base, *tests, f"--junitxml={report}"], log, deadline, environment, echo=False)
    errors, foreign = count_errors(log.read_text(), kernels)
    counts = count_tests(report) if report.exists() else {"passed": 0, "failed": 0, "known_failures": 0, "skipped": 0}
    problem = ""
    if not found:
        problem = "did not find the planted bug"
    elif errors:
        problem = f"{errors} errors"
    elif code or not counts["passed"] or counts["failed"]:
        problem = f"exit status {code}, tests {counts}"
    seconds = round(time.monotonic() - started)
    print(f"gpu_check: {tool}: {problem or 'clean'} ({counts['passed']} tests, {seconds} s)", flush=True)
    return {
        "errors": errors,
        "errors_outside_this_package": foreign,
        "planted_bug_found": bool(found),
        "tests": counts,
        "seconds": seconds,
        "problem": problem,
    }


def kernel_names() -> list[str]:
    """Every kernel of csrc/cuda, and the canary's."""
    text = "".join(path.read_text() for path in sorted((evidence.ROOT / "csrc/cuda").iterdir()))
    text = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", " ", text)
    return [*re.findall(r"__global__\s+void\s+(\w+)\s*\(", text), CANARY]


def count_errors(text: str, kernels: list[str]) -> tuple[int, int]:
    """Errors that compute-sanitizer reports in or below this package's code, and all others.

    A report is a heading ("========= Invalid __global__ write of size 4 bytes"), indented details, a blank line. Where
    none can be told from the rest, the tool's own count is taken.
    """
    ours = foreign = 0
    for report in re.split(r"^=========[ \t]*$", text, flags=re.MULTILINE):
        details = "\n".join(line for line in report.splitlines() if line.startswith("=========     "))
        if MODULE in details or any(re.search(rf"\b{name}", details) for name in kernels):
            ours += 1
        elif details:
            foreign += 1
    if not ours and not foreign:
        ours = sum(map(int, re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)))
    return ours, foreign


def run_logged(
    command: list[str], log: Path, deadline: float, environment: dict[str, str] | None = None, echo: bool = True
) -> int:
    """Run with stdout and stderr in ``log`` (and on screen); 124 where it had to be stopped at the deadline."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=evidence.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = 124
    if echo:
        print(log.read_text(), flush=True)
    return code


def copy_results(folder: Path) -> None:
    """At most eight files: the records, pytest's log, each tool's."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (evidence.GPU_CHECK, evidence.STACKS, LOGS / "pytest.log", *(LOGS / f"{tool}.log" for tool in TOOLS)):
        if path.exists():
            shutil.copy(path, folder)


if __name__ == "__main__":
    sys.exit(main())
