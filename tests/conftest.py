"""Shared by all tests: devices, fixed random seeds, and a warning when the recorded GPU run is out of date."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import stacks
import threads
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import evidence  # noqa: E402

HAS_CUDA = torch.cuda.is_available()
torch.backends.cudnn.allow_tf32 = False  # convolutions with all of float32's digits


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sanitizer: small cases of the kernels, also run under compute-sanitizer")
    stacks.register(config)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine may have, in turn."""
    return torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """See threads.one_thread()."""
    with threads.one_thread():
        yield


@pytest.fixture
def data_parallel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel as on a machine without GPUs: where there are some, it moves a model to them by itself."""
    module = sys.modules["torch.nn.parallel.data_parallel"]  # beside it lies a function of that name
    monkeypatch.setattr(module, "_get_available_device_type", lambda: None)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An address in a name differs from process to process: they would not agree on what there is to run."""
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"tests are named by an address: {named}")


def pytest_report_header() -> list[str]:
    name = torch.cuda.get_device_name() if HAS_CUDA else "none"
    return [f"torch {torch.__version__}, CUDA device: {name}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"skipped: {count} ({reason})")
    stale = evidence.gpu_check_staleness()
    if stale:
        terminalreporter.write_line(f"warning: {stale}", yellow=True)
