"""The benchmarks run, refuse to time what is wrong, and their records become the pages' tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import render_benchmarks  # noqa: E402
from workload import Case, Truth, make_data  # noqa: E402

WITHOUT_COMPILER = ("bench_layouts", "bench_state_update")


def run(name: str, device: str, folder: Path) -> dict:
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--device", device, "--out", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / f"{name}_{device}.json").read_text())


@pytest.mark.parametrize("name", WITHOUT_COMPILER)
def test_a_benchmark_leaves_a_record(name, tmp_path):
    record = run(name, "cpu", tmp_path)
    assert record["source_sha256"] and record["torch"] == torch.__version__
    for row in record["microseconds"]:
        for times in row["cpu"].values():
            assert 0 < times["p20"] <= times["p50"] <= times["p80"]
    assert render_benchmarks.table(record).count("| kasmina_ext") >= 1


def test_every_operator_has_a_benchmark_of_its_name():
    """telemetry_update is chunked_forward without y, telemetry_reduce stands beside telemetry_merge."""
    operators = {path.stem for path in (ROOT / "csrc/ops").glob("*.c")} - {"common", "validate"}
    timed = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert operators - timed == {"telemetry_update", "telemetry_reduce"}


def test_what_is_wrong_is_not_timed():
    data = make_data(Case(40, 64, 8, torch.float32), "cpu")[0]
    truth = Truth.of(data)
    y = (truth.a * data.x.double() + truth.b).float()
    truth.check_forward("right", data.x, y)
    y[39, 63] += 1e-4
    with pytest.raises(SystemExit, match="wrong: y is wrong"):
        truth.check_forward("wrong", data.x, y)
    values = data.x.view(40, 8, 8).double()
    mean, variance = values.mean((0, 2)), values.var((0, 2), correction=0)
    truth.check_moments("right", data.x, mean, variance)
    with pytest.raises(SystemExit, match="statistics"):
        truth.check_moments("wrong", data.x, mean + 0.01, variance)
    with pytest.raises(SystemExit, match="dx is wrong"):
        truth.check_backward("wrong", data.x, data.x)


def record_of(**row) -> dict:
    machine = {"device": "a GPU", "torch": "2.0", "driver": "1.0", "commit": "abc"}
    times = {"copy": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "kasmina_ext": {"p20": 1.0, "p50": 2.5, "p80": 3.0}}
    return machine | {"microseconds": [{"case": "small", "bytes": 2 << 20, "gpu": times} | row]}


@pytest.mark.parametrize(("ratio", "sign"), [(1.24, "✓"), (1.26, "✗")])
def test_targets_are_judged_by_the_worst_row(ratio, sign):
    record = record_of(**{"times copy": 1.1, "times best": 0.5})
    record["microseconds"].append(record["microseconds"][0] | {"case": "worse", "times copy": ratio})
    lines = render_benchmarks.targets({render_benchmarks.FORWARD: record}).splitlines()
    line = next(line for line in lines if "1 to 64 MiB" in line)
    assert f"| {ratio:.3g} | worse | {sign} |" in line
    assert any("64 MiB | ≤ 1.12 × copy | not measured" in line for line in lines)
    assert "a GPU, torch 2.0, driver 1.0, commit abc" in lines[-1]


def test_pages_and_picture(tmp_path):
    results, tree = tmp_path / "results", tmp_path / "tree"
    for page in ("README.md", "benchmarks/README.md"):
        (tree / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tree / page)
    (tree / "docs").mkdir()
    results.mkdir()
    shares = {"copy": 1.0, "kasmina_ext": 0.8, "torch.compile, by column": 0.4}
    record = record_of(**{"times copy": 1.2, "times best": 0.5, "share of copy speed": shares})
    (results / f"{render_benchmarks.FORWARD}.json").write_text(json.dumps(record))
    for _ in range(2):  # the second time replaces the first
        command = [sys.executable, "scripts/render_benchmarks.py", "--results", str(results), "--into", str(tree)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    page = (tree / "benchmarks/README.md").read_text()
    assert page.count("| kasmina_ext | 1 / 2.5 / 3 |") == 1 and page.count("**small**") == 1
    assert (tree / "README.md").read_text().count("| 1.2 | small | ✓ |") == 1
    assert (tree / "docs/benchmarks.png").read_bytes().startswith(b"\x89PNG")
