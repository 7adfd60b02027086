"""The report of ``python -m kasmina_ext``."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kasmina_ext
from kasmina_ext import __main__ as report
from kasmina_ext import _native, flags

pytestmark = pytest.mark.stack("introspection: python -m kasmina_ext")


def test_as_a_module():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "kasmina_ext", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["kasmina_ext"] == kasmina_ext.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["module"]["loaded"] is _native.available
    assert facts["devices"][0]["device"] == "cpu"


def test_each_device_has_a_path_and_a_reason(capsys, monkeypatch):
    properties = SimpleNamespace(name="Big GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    answers = {"cpu": (True, ""), "cuda:0": (True, ""), "cuda:1": (False, "no kernel image")}
    monkeypatch.setattr(_native, "has_kernel", lambda device: answers[str(device)])
    assert report.main(["--json"]) == 0
    devices = {row["device"]: row for row in json.loads(capsys.readouterr().out)["devices"]}
    assert list(devices) == ["cpu", "cuda:0", "cuda:1"]
    assert devices["cuda:0"]["path"] == "compiled"
    assert devices["cuda:0"]["description"] == "Big GPU, capability 9.0, 80 GiB"
    assert (devices["cuda:1"]["path"], devices["cuda:1"]["why"]) == ("reference", "no kernel image")
    assert report.main([]) == 0
    out = capsys.readouterr().out
    assert "cuda:1 (Big GPU, capability 9.0, 80 GiB): reference: no kernel image" in out


def test_this_machines_device(device):
    """Whatever the machine has is listed with its path, and the reason is the one that the layer goes by."""
    where = "cpu" if device.type == "cpu" else f"cuda:{torch.cuda.current_device()}"
    [row] = (row for row in report.collect()["devices"] if row["device"] == where)
    compiled, why = flags.compiled_path(where)
    assert row["path"] == ("compiled" if compiled else "reference")
    assert compiled or row["why"] == why


def test_the_driver(device, monkeypatch):
    """Which CUDA it can run at most; on a machine without one, or with one that answers nothing, that."""
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    found = report.collect()["versions"]["driver_cuda"]
    if device.type == "cuda":
        assert tuple(map(int, found.split("."))) >= (11, 0)
        return
    assert found == "none (no driver)" or torch.cuda.is_available()

    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version):
            version._obj.value = 13010
            return self.code

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    for Driver.code, answer in ((0, "13.1"), (999, "unknown (RuntimeError: cuDriverGetVersion returned 999)")):
        assert report.collect()["versions"]["driver_cuda"] == answer
    monkeypatch.setattr(torch.version, "cuda", None)
    assert report.collect()["versions"]["driver_cuda"] == "none (this torch has no CUDA)"


def test_packages_and_settings(capsys, monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    facts = report.collect()
    assert facts["packages"] == {"torch": importlib.metadata.version("torch"), "no-such-package": "not installed"}
    assert facts["settings"]["CUDA_LAUNCH_BLOCKING"] == "1"
    assert report.main([]) == 0
    out = capsys.readouterr().out
    assert "no-such-package: not installed" in out and "CUDA_LAUNCH_BLOCKING: 1" in out


def test_switched_off(capsys):
    with flags.override(triton_kernels=False):
        report.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["flag"]["triton_kernels"] is False
    assert facts["devices"][0]["path"] == "reference"
    assert "switched off" in facts["devices"][0]["why"]


def broken(*args, **kwargs):
    raise RuntimeError("driver on fire")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.cuda, "device_count"),
        (torch.accelerator, "current_accelerator"),
        (torch.backends.cpu, "get_cpu_capability"),
        (_native, "has_kernel"),
        (report, "_driver_version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_machine_is_reported_not_raised(owner, name, capsys, monkeypatch):
    monkeypatch.setattr(owner, name, broken)
    assert report.main([]) == 0
    if name != "current_accelerator":
        assert "driver on fire" in capsys.readouterr().out


def test_a_device_that_cannot_be_asked(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert report.main([]) == 0
    assert "cuda:0 (unknown (RuntimeError: driver on fire))" in capsys.readouterr().out


def test_tables_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert report.main([]) == 0
    out = capsys.readouterr().out
    assert kasmina_ext.__version__ in out and "devices" in out and "cpu" in out


def test_lines_on_a_terminal_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert report.main([]) == 0
    assert "versions\n" in capsys.readouterr().out


def test_unknown_arguments_are_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["--jsn"])
    assert stop.value.code == 2
    assert "python -m kasmina_ext" in capsys.readouterr().err
