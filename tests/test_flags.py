"""The switch for the compiled kernels, and which path a layer takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from kasmina_ext import _native, flags, ops, reference
from kasmina_ext.layer import KasminaLayer, TritonChunkedKasminaLayer

VARIABLE = "MORPHOGENETIC_FEATURE_TRITON_KERNELS"


@pytest.mark.parametrize("word", ["true", "TRUE", " True ", "1", "yes", "on", ""])
def test_environment_says_yes(word):
    assert flags.read_environment({VARIABLE: word}) is True


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "OFF"])
def test_environment_says_no(word):
    assert flags.read_environment({VARIABLE: word}) is False


def test_environment_says_nothing():
    assert flags.read_environment({}) is True


@pytest.mark.parametrize("word", ["maybe", "2", "tru e"])
def test_environment_says_neither(word):
    with pytest.raises(ValueError, match=f"{VARIABLE} must be true or false, got '{word}'"):
        flags.read_environment({VARIABLE: word})


def test_environment_is_read_at_import():
    code = "import kasmina_ext.flags as flags; print(flags.triton_kernels)"
    environment = {**os.environ, VARIABLE: "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("value", ["true", 1, None])
def test_flag_takes_nothing_but_a_bool(value):
    before = flags.triton_kernels
    with pytest.raises(TypeError, match="triton_kernels must be True or False, got"):
        flags.triton_kernels = value
    assert flags.triton_kernels is before


def test_override_ends_with_its_block():
    before = flags.triton_kernels
    with pytest.raises(KeyError), flags.override(triton_kernels=not before):
        assert flags.triton_kernels is not before
        with flags.override(triton_kernels=before):
            assert flags.triton_kernels is before
        raise KeyError
    assert flags.triton_kernels is before
    with pytest.raises(TypeError), flags.override(triton_kernels="no"):
        pass
    assert flags.triton_kernels is before


@pytest.fixture
def paths(monkeypatch):
    """Which path each forward took, in order; every device and dtype passes for one with a kernel."""
    taken = []

    def spy(name, function):
        def called(*args):
            taken.append(name)
            return function(*args)

        return called

    monkeypatch.setattr(flags, "_cached", {})
    monkeypatch.setattr(_native, "has_kernel", lambda device: (True, ""))
    monkeypatch.setattr(ops, "chunked_forward", spy("compiled", ops.chunked_forward))
    monkeypatch.setattr(reference, "chunked_forward", spy("reference", reference.chunked_forward))
    return taken


def test_path_follows_flag_layer_and_device(paths, monkeypatch):
    layer, x = TritonChunkedKasminaLayer(nn.Linear(4, 8), 2), torch.randn(3, 4)
    layer(x)
    with flags.override(triton_kernels=False):
        layer(x)
        assert not layer.get_performance_summary()["triton_enabled"]
    layer.enable_triton = False
    layer(x)
    assert layer.enable_triton is False and not layer.get_performance_summary()["triton_enabled"]
    layer.enable_triton = True
    layer(x)
    assert layer.get_performance_summary()["triton_enabled"] is True
    monkeypatch.setattr(flags, "_cached", {})
    monkeypatch.setattr(_native, "has_kernel", lambda device: (False, "no such thing"))
    layer(x)
    assert not layer.get_performance_summary()["triton_enabled"]
    assert paths == ["compiled", "reference", "reference", "compiled", "reference"]


def test_a_layer_built_without_kernels(paths):
    KasminaLayer(nn.Linear(4, 8), enable_kernels=False)(torch.randn(3, 4))
    TritonChunkedKasminaLayer(nn.Linear(4, 8), 2, None, None, False)(torch.randn(3, 4))
    assert paths == ["reference", "reference"]


def test_device_is_asked_once(monkeypatch):
    asked = []

    def has_kernel(device):
        asked.append(device)
        return True, ""

    monkeypatch.setattr(flags, "_cached", {})
    monkeypatch.setattr(_native, "has_kernel", has_kernel)
    for _ in range(3):
        assert flags.has_kernel(torch.device("cuda:7"), torch.float16)
    assert asked == [torch.device("cuda:7")]
    assert not flags.has_kernel(torch.device("cpu"), torch.int64)


def test_compiled_path_says_why_not(monkeypatch):
    monkeypatch.setattr(_native, "has_kernel", lambda device: (False, f"nothing for {device}"))
    assert flags.compiled_path("cuda:1") == (False, "nothing for cuda:1")
    compiled, why = flags.compiled_path("cpu", torch.complex64)
    assert not compiled and "complex64" in why
    with flags.override(triton_kernels=False):
        compiled, why = flags.compiled_path("cpu")
    assert not compiled and "switched off" in why and VARIABLE in why
    monkeypatch.setattr(_native, "has_kernel", lambda device: (True, ""))
    assert flags.compiled_path("cpu") == (True, "")
