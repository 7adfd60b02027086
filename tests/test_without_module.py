"""All operators where no compiled module can be loaded: defined in Python, with the results of the compiled ones."""

from __future__ import annotations

import subprocess
import sys

import checks
import pytest
import torch

from kasmina_ext import ops
from kasmina_ext._schema import SCHEMAS

CALLS = """
def everything(ops, torch):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32)

    offsets, seeds, nothing = ints([0, 5, 5, 12, 20]), 4, torch.empty(0, dtype=torch.float64)
    state = torch.zeros(8, seeds, dtype=torch.int32)
    state[0], state[3] = ints([3, 5, 2, 2]), ints([3, 0, 1, 3])
    x, target = normal(7, 3, 20), normal(7, 3, 20)
    bank, alpha = normal(2, 20).requires_grad_(), torch.rand(seeds, generator=generator).requires_grad_()
    x.requires_grad_()
    telemetry, grads = torch.zeros(seeds, 5, dtype=torch.float64), torch.zeros(seeds, 3, dtype=torch.float64)
    y = ops.chunked_forward(x, offsets, state, alpha, bank, telemetry, grads)
    y.square().sum().backward()
    found = [y.detach(), x.grad, alpha.grad.clone(), bank.grad.clone(), telemetry, grads]
    found += ops.chunked_backward(target, x.detach(), offsets, state, alpha.detach(), bank.detach(), nothing)
    bank.grad = None
    loss = ops.reconstruction_loss(x, target, offsets, state, bank)
    (loss * torch.arange(1.0, 1 + seeds)).sum().backward()
    found += [loss.detach(), bank.grad]
    more = torch.zeros_like(telemetry)
    ops.telemetry_update(target, offsets, more)
    ops.telemetry_merge(more, telemetry)
    found += [more, ops.telemetry_reduce(more)]
    history, count = torch.zeros(seeds, 10, 2, dtype=torch.int32), torch.zeros(seeds, dtype=torch.int32)
    rules = torch.zeros(11, 11, dtype=torch.int32)
    values = ints([[4, 0, 0, 0], [6, 9, 0, 0], [8, 0, 3, 2]])
    verdicts = ops.state_update(state, history, count, ints([0, 1, 2]), values, ints([1, 3, 15]), rules, 2)
    with torch.no_grad():
        ops.lifecycle_step(state, history, count, alpha, 2, 5, True)
    moments = torch.zeros(20, 6, dtype=torch.float64)
    ops.pair_moments(x, target, moments)
    return [*found, moments, verdicts, state, history, count, alpha.detach()]
"""

CHILD = (
    CALLS
    + """
import sys
import torch
sys.modules["kasmina_ext._C"] = None
from kasmina_ext import _native, ops
assert not _native.available
torch.save(everything(ops, torch), sys.argv[1])
"""
)


def test_every_operator(tmp_path):
    if not checks.compiled("ops", torch.device("cpu")):
        pytest.skip("needs a compiled kernel for this device to compare with")
    assert all(f"ops.{op}(" in CALLS for op in SCHEMAS if op != "reconstruction_loss_backward"), "called by autograd"
    path = tmp_path / "found.pt"
    run = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names: dict = {}
    exec(CALLS, names)
    for found, want in zip(torch.load(path), names["everything"](ops, torch), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, equal_nan=True)
