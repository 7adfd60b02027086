"""Random changes to checkpoints: to files, to what is in a layer's, to the Triton package's directories.

scripts/fuzz_checkpoints.py does this at length; here hypothesis chooses, and shrinks what it finds.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_fuzz import Files, Fuzzer
from checkpoint_fuzz_layer import Layers
from checkpoint_fuzz_legacy import OldDirectories
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """For many small files: in memory where the machine offers it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


@pytest.mark.parametrize("kind, inputs", [(Files, 200), (Layers, 100), (OldDirectories, 150)])
def test_random_changes_that_hypothesis_chooses(memory_path, kind: type[Fuzzer], inputs: int):
    fuzzer = kind(memory_path)

    @settings(max_examples=inputs, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.randoms(use_true_random=False))
    def changed(generator: random.Random) -> None:
        outcome = fuzzer.one(generator)
        assert outcome.partition(":")[0] not in fuzzer.FAILURES, outcome

    changed()
    assert fuzzer.counts["inputs"] >= inputs


@pytest.mark.parametrize(
    "kind, inputs, seen",
    [
        (Files, 1000, {"refused_with_wrong_sums": 300, "refused_with_right_sums": 100, "accepted_with_right_sums": 10}),
        (Layers, 150, {"refused": 60, "accepted": 15}),
        (OldDirectories, 300, {"refused": 100, "same_where_sums_cover": 5, "accepted_where_none_do": 10}),
    ],
)
def test_random_changes(memory_path, kind: type[Fuzzer], inputs: int, seen: dict[str, int]):
    fuzzer, generator = kind(memory_path), random.Random(0)
    for _ in range(inputs):
        fuzzer.one(generator)
    assert fuzzer.failures == 0, fuzzer.record()
    assert all(fuzzer.counts[name] >= count for name, count in seen.items()), fuzzer.record()
    assert sum(fuzzer.counts[name] for name in fuzzer.COUNTED) == fuzzer.counts["inputs"] == inputs
