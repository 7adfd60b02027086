"""The benchmarks run, refuse to time what is wrong, and their records become the pages' tables."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from kasmina_ext import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import bench_state_update  # noqa: E402
import profile_kernels  # noqa: E402
import render_benchmarks  # noqa: E402
import timing  # noqa: E402
from workload import Case, Truth, make_data  # noqa: E402

WITHOUT_COMPILER = ("bench_layouts", "bench_state_update")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_all_at_once_leaves_records_and_a_bundle(tmp_path):
    """With the folder of one of them in the way of its record: the other is not stopped by its failure."""
    (tmp_path / "out/bench_layouts_cpu.json").mkdir(parents=True)
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path / "out"), "--tar", str(tmp_path / "all.tar.gz")]
    done = run("run_all", *options, "--only", *WITHOUT_COMPILER)
    assert done.returncode == 1 and "1 of 2 done" in done.stdout, done.stdout + done.stderr
    assert "bench_layouts" in done.stdout and "IsADirectoryError" in done.stdout
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"bench_state_update_cpu.json", "bench_layouts.log"} <= set(archive.getnames())
    record = json.loads((tmp_path / "out/bench_state_update_cpu.json").read_text())
    assert record["source_sha256"] and record["torch"] == torch.__version__ and record["complete"]
    for row in record["microseconds"]:
        for times in row["cpu"].values():
            assert 0 < times["p20"] <= times["p50"] <= times["p80"]
    assert render_benchmarks.table(record).count("kasmina_ext") == 1


def test_a_benchmark_can_verify_without_timing(tmp_path):
    done = run("bench_layouts", "--device", "cpu", "--compile-only", "--part", "1/4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("seeds", [1, 7, 64, 100])
def test_the_stated_gradients_are_those_of_autograd(seeds):
    data = make_data(Case(30, 64, seeds, torch.float64), "cpu")[0]
    grad = torch.randn_like(data.x)
    alpha, weights = data.alpha.clone().requires_grad_(), data.weights.clone().requires_grad_()
    nothing = data.telemetry[:0]
    y = reference.chunked_forward(data.x, data.offsets, data.state, alpha, weights, nothing, nothing)
    expected = torch.autograd.grad(y, (weights, alpha), grad)
    for got, truth in zip(Truth.of(data).parameter_gradients(data, grad), expected, strict=True):
        torch.testing.assert_close(got, truth.double(), rtol=1e-6, atol=1e-6)


def test_every_applied_request_is_a_change():
    """In whatever order the two batches come, as long as they alternate."""
    lived, batches = bench_state_update.make(500, "cpu")
    rules = bench_state_update.TransitionRules.any().tensor
    for turn in range(5):
        before = lived[2].sum()
        verdicts = bench_state_update.ops.state_update(*lived, *batches[turn % 2], rules, bench_state_update.BLUEPRINTS)
        assert lived[2].sum() - before == (verdicts == 0).sum() > 250
        assert set(verdicts.tolist()) == {0, 1, 4, 6}  # applied, no such seed, no such blueprint, superseded


def test_contestants_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 1)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.eager_rounds(calls, "cpu", calls=1, rounds=3)
    assert order == list("abcbcacababc")
    assert {len(spent) for spent in times.values()} == {3}


def test_kernels_of_a_profile_belong_to_the_case_before():
    def kernel(name: str, **metrics: str) -> dict[str, str]:
        return {"Kernel Name": name, **metrics}

    wait, instructions = profile_kernels.STALL.format("wait"), profile_kernels.METRICS["instructions"]
    ours = "void kasmina::(anonymous namespace)::forward_kernel<(kasmina_dtype)2, (bool)1>(forward_params)"
    mark = kernel("spin_kernel(long)")
    rows = [
        mark,
        kernel(ours, **{instructions: "1,600", wait: "2.5"}),
        kernel("merge_kernel(p)"),
        mark,
        kernel("x(int)"),
    ]
    found = list(profile_kernels.kernels(rows, [["first", "3200", "6400"], ["second", "10", "20"]]))
    assert [(k["case"], k["kernel"]) for k in found] == [
        ("first", "forward_kernel"), ("first", "merge_kernel"), ("second", "x"),
    ]  # fmt: skip
    assert found[0]["instructions per element"] == 16 and found[0]["waits"] == {"wait": 2.5}
    page = render_benchmarks.limits({"device": "a GPU", "torch": "2.0", "kernels": found})
    assert page.count("`forward_kernel`") == 1 and page.count("| first |") == 1


def record_of(**row) -> dict:
    machine = {"device": "a GPU", "torch": "2.0", "driver": "1.0", "commit": "abc"}
    times = {"copy": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "kasmina_ext": {"p20": 1.0, "p50": 2.5, "p80": 3.0}}
    return machine | {"microseconds": [{"case": "small, 8 seeds, bfloat16", "bytes": 2 << 20, "gpu": times} | row]}


@pytest.mark.parametrize(("ratio", "sign"), [(1.24, "✓"), (1.26, "✗")])
def test_targets_are_judged_by_the_worst_row(ratio, sign):
    record = record_of(**{"times copy": 1.1, "times best": 0.5})
    record["microseconds"].append(record["microseconds"][0] | {"case": "worse", "times copy": ratio})
    lines = render_benchmarks.targets({render_benchmarks.FORWARD: record}).splitlines()
    line = next(line for line in lines if "1 to 64 MiB" in line)
    assert f"| {ratio:.3g} | worse | {sign} |" in line
    assert any("64 MiB | ≤ 1.12 × copy | not measured" in line for line in lines)
    assert "a GPU, torch 2.0, driver 1.0, commit abc" in lines[-1]


def test_whoever_is_faster_is_named():
    record = record_of()
    times = record["microseconds"][0]["gpu"]
    times |= {
        "torch.compile, one": {"p20": 1.0, "p50": 2.0, "p80": 3.0},
        "PyTorch": {"p20": 3.0, "p50": 4.0, "p80": 5.0},
    }
    lines = render_benchmarks.wins({"bench": record}).splitlines()
    assert len(lines) == 1 and "**torch.compile, one** in 1 of 1 cases" in lines[0] and "1.25 ×" in lines[0]


def test_pages_and_picture(tmp_path):
    assert importlib.util.find_spec("matplotlib")
    results, tree = tmp_path / "results", tmp_path / "tree"
    for page in ("README.md", "benchmarks/README.md"):
        (tree / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tree / page)
    (tree / "docs").mkdir()
    results.mkdir()
    record = record_of(**{"times copy": 1.2, "times best": 0.5})
    (results / f"{render_benchmarks.FORWARD}.json").write_text(json.dumps(record))
    for _ in range(2):  # the second time replaces the first
        command = [sys.executable, "scripts/render_benchmarks.py", "--results", str(results), "--into", str(tree)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    page = (tree / "benchmarks/README.md").read_text()
    assert page.count("| small, 8 seeds, bfloat16 | 2 | 1 / 2.5 / 3 | 1.2 | 0.5 |") == 1
    assert (tree / "README.md").read_text().count("| 1.2 | small, 8 seeds, bfloat16 | ✓ |") == 1
    assert (tree / "docs/benchmarks.png").read_bytes().startswith(b"\x89PNG")
