"""Runs a case on a backend and compares the results with the oracle; shared by the tests and scripts/run_oracle.py."""

from __future__ import annotations

from types import ModuleType

import oracle
import pytest
import torch
from cases import CASES, Case, Inputs, build

from kasmina_ext import _native, ops, reference

BACKENDS: dict[str, ModuleType] = {"ops": ops, "reference": reference}


def backends(function):
    """Runs a test for each backend: the dispatcher (compiled kernels where there are any) and plain PyTorch."""
    return pytest.mark.parametrize("backend", BACKENDS)(function)


def with_cases(function):
    """Runs a test for each case of the table, named by what it is."""
    return pytest.mark.parametrize("case", CASES, ids=str)(function)


def kernel_for(device: torch.device) -> tuple[bool, str]:
    """Whether a compiled kernel serves the device, and if not why."""
    return _native.has_kernel(torch.device(device))


def compiled(backend: str, device: torch.device) -> bool:
    """Whether a compiled kernel runs, which copies idle features bit by bit (the others may change a NaN's payload)."""
    return backend == "ops" and kernel_for(device)[0]


def free_memory(device: torch.device) -> float:
    """GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    with open("/proc/meminfo") as file:
        kilobytes = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
    return int(kilobytes) / 2**20


def needs_memory(device: torch.device, gib: int) -> None:
    """Skips where a device is too small for a test, or only the reference (which makes float64 copies) would run."""
    if not compiled("ops", device):
        pytest.skip(f"needs a compiled kernel for {device}: {kernel_for(device)[1]}")
    if free_memory(device) < gib:
        pytest.skip(f"needs {gib} GiB of free memory on {device}, has {free_memory(device):.0f}")


def check_forward(inputs: Inputs, backend: str) -> list[str]:
    """chunked_forward: y and telemetry."""
    telemetry = inputs.telemetry.clone()
    y = BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, telemetry, inputs.grad_telemetry)
    payload = compiled(backend, inputs.x.device)
    return oracle.check_forward(inputs.problem(), inputs.x, y, payload) + _check_telemetry(inputs, telemetry)


def check_update(inputs: Inputs, backend: str) -> list[str]:
    """telemetry_update: telemetry."""
    telemetry = inputs.telemetry.clone()
    BACKENDS[backend].telemetry_update(inputs.x, inputs.offsets, telemetry)
    return _check_telemetry(inputs, telemetry)


def _check_telemetry(inputs: Inputs, telemetry: torch.Tensor) -> list[str]:
    if inputs.telemetry.numel() == 0:
        return [] if telemetry.numel() == 0 else ["telemetry was off"]
    problem = inputs.problem()
    rows = problem.rows if problem.features else 0  # a call without elements returns at once
    before = inputs.telemetry.cpu().numpy()
    return oracle.check_telemetry(oracle.telemetry_after(before, problem.x, problem.blend.chunks, rows), telemetry)


def check_backward(inputs: Inputs, backend: str) -> list[str]:
    """chunked_backward: all gradients and the gradient telemetry."""
    problem, grad_telemetry = inputs.problem(), inputs.grad_telemetry.clone()
    dx, dw, dalpha = BACKENDS[backend].chunked_backward(
        inputs.grad_y, inputs.x, *inputs.seeds, grad_telemetry, True, True, True
    )
    sums = oracle.sums_of(problem)
    complaints = oracle.check_grad_x(problem, inputs.x, dx, compiled(backend, inputs.x.device))
    complaints += oracle.check_grad_weights(problem, sums, dw)
    complaints += oracle.check_grad_alpha(problem, sums, dalpha)
    if inputs.grad_telemetry.numel() and inputs.x.numel():
        complaints += oracle.check_grad_telemetry(problem, sums, inputs.grad_telemetry, grad_telemetry)
    elif not torch.equal(grad_telemetry, inputs.grad_telemetry):
        complaints.append("a backward without elements changed the gradient telemetry")
    return complaints


def check_case(case: Case, backend: str, device: torch.device) -> list[str]:
    """All of the above: what the random cases run."""
    inputs = build(case, device)
    complaints = check_forward(inputs, backend) + check_backward(inputs, backend)
    return complaints + [f"telemetry_update: {text}" for text in check_update(inputs, backend)]


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; NaNs match any NaN."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return not oracle.compare_bits("", first, oracle.bits_of(second))


# ---- more than 2^31 elements -----------------------------------------------------------------------------------------


def _big(device: torch.device) -> tuple[torch.Tensor, ...]:
    """(x, offsets, state, alpha, weights): x bfloat16, 0 but for its last row of 2; seed 1 multiplies by 3.

    On the CPU the 4.3 GB of x are zero pages, which cost nothing until they are written.
    """
    features = 4096
    x = torch.zeros(2**31 // features + 3, features, dtype=torch.bfloat16, device=device)
    x[-1] = 2
    offsets = torch.tensor([0, 8, features], dtype=torch.int32, device=device)
    state = torch.zeros(8, 2, dtype=torch.int32, device=device)
    state[0, 1] = 5
    weights = torch.full((1, features), 3.0, dtype=torch.bfloat16, device=device)
    return x, offsets, state, torch.ones(2, device=device), weights


def _check_big_telemetry(x: torch.Tensor, telemetry: torch.Tensor) -> list[str]:
    expected = []
    for owned in (8, x.shape[1] - 8):
        count, mean = x.shape[0] * owned, oracle.LONG(2) / x.shape[0]
        expected.append(oracle.Moments(count, mean, 4 * owned - count * mean**2, 1, 0))
    return oracle.check_telemetry(expected, telemetry)


def _check_big_rows(what: str, rows: torch.Tensor) -> list[str]:
    """The last row is 2 and 6, the others 0: looked at where 32-bit indices would go wrong."""
    zero = all(rows[i].eq(0).all() for i in (0, 1, 2, 2**31 // rows.shape[1], -2))
    right = zero and rows[-1, :8].eq(2).all() and rows[-1, 8:].eq(6).all()
    return [] if right else [f"{what} of more than 2^31 elements is wrong"]


def check_big_update(device: torch.device) -> list[str]:
    x, offsets, *_ = _big(device)
    telemetry = torch.zeros(2, 5, dtype=torch.float64, device=device)
    ops.telemetry_update(x, offsets, telemetry)
    return _check_big_telemetry(x, telemetry)


def check_big_forward(device: torch.device) -> list[str]:
    x, *seeds = _big(device)
    telemetry = torch.zeros(2, 5, dtype=torch.float64, device=device)
    y = ops.chunked_forward(x, *seeds, telemetry, telemetry.new_empty(0))
    return _check_big_rows("y", y) + _check_big_telemetry(x, telemetry)


def check_big_backward(device: torch.device, grad_x: bool) -> list[str]:
    """x is its own gradient: u = 4 and v = 2 for every feature, from the last row."""
    x, *seeds = _big(device)
    grad_telemetry = torch.zeros(2, 3, dtype=torch.float64, device=device)
    dx, dw, dalpha = ops.chunked_backward(x, x, *seeds, grad_telemetry, grad_x, True, True)
    complaints = _check_big_rows("dx", dx) if grad_x else []
    grown = x.shape[1] - 8
    if not (dw[0, :8].eq(0).all() and dw[0, 8:].eq(4).all() and dalpha.tolist() == [0, 2 * 4 * grown]):
        complaints.append("gradients of more than 2^31 elements are wrong")
    if grad_telemetry.tolist() != [[16 * 8, 4 * 8, 1], [16 * grown, 4 * grown, 1]]:
        complaints.append("gradient telemetry of more than 2^31 elements is wrong")
    return complaints
