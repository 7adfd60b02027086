"""What vouches for the CUDA kernels where there is no GPU: the hash of the sources, and how sanitizer logs are read."""

from __future__ import annotations

import json

import evidence
import gpu_check
import pytest

REPORTS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void (anonymous namespace)::blend_kernel<2>(float *)+0x160
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f0 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x1234] in libcudart.so
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::elementwise_kernel<128, 4>(int)+0x10
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Program hit cudaErrorInvalidValue (error 1) due to "invalid argument" on CUDA API call to cudaLaunchKernel.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: [0x1234] in _C.abi3.so
=========
========= ERROR SUMMARY: 3 errors
"""


def test_sanitizer_errors_are_told_apart():
    assert gpu_check.count_errors(REPORTS, ["blend_kernel"]) == (2, 1)


def test_clean_sanitizer_log():
    assert gpu_check.count_errors("========= COMPUTE-SANITIZER\n3 passed\n========= ERROR SUMMARY: 0 errors\n", []) == (
        0,
        0,
    )
    assert gpu_check.count_errors("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", []) == (
        0,
        0,
    )


def test_every_kernel_is_checked():
    names = gpu_check.kernel_names()
    sources = [path.read_text() for path in (evidence.ROOT / "csrc/cuda").iterdir()]
    assert len(names) - 1 == sum(text.count("__global__ ") for text in sources) > 0


def test_errors_that_cannot_be_read_count_as_ours():
    assert gpu_check.count_errors("========= ERROR SUMMARY: 3 errors\n", []) == (3, 0)


@pytest.fixture
def tree(tmp_path):
    for name in ("csrc/cpu/a.c", "csrc/b.cu", "kasmina_ext/c.py", "tests/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_hash_follows_the_sources_alone(tree):
    before = evidence.source_hash(tree)
    for name in (
        "kasmina_ext/_schema.py",
        "kasmina_ext/_C.abi3.so",
        "kasmina_ext/c.pyc",
        "README.md",
        "csrc/b.cu.orig",
    ):
        (tree / name).write_text("new")
    assert evidence.source_hash(tree) == before
    (tree / "csrc/cpu/a.c").write_text("changed")
    changed = evidence.source_hash(tree)
    (tree / "csrc/cpu/a.c").rename(tree / "csrc/a.c")
    assert len({before, changed, evidence.source_hash(tree)}) == 3


def test_stale_and_missing_evidence_is_said(tree):
    record = tree / "gpu_check.json"
    assert "is missing" in evidence.gpu_check_staleness(record, tree)
    record.write_text("{")
    assert "cannot be read" in evidence.gpu_check_staleness(record, tree)
    record.write_text(json.dumps({"source_sha256": evidence.source_hash(tree), "passed": False}))
    assert "failure" in evidence.gpu_check_staleness(record, tree)
    record.write_text(json.dumps({"source_sha256": evidence.source_hash(tree), "passed": True}))
    assert evidence.gpu_check_staleness(record, tree) == ""
    (tree / "tests/d.py").write_text("changed")
    assert "is stale" in evidence.gpu_check_staleness(record, tree)
