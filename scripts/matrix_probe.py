"""Run by check_matrix.py in a fresh environment: the installed package against its own reference; prints one JSON line.

Forward and backward of every strategy through autograd, and torch.library.opcheck of every operator.
"""

from __future__ import annotations

import json
import platform

import torch

from kasmina_ext import _native, ops, reference

ROWS, FEATURES, SEEDS, BLUEPRINTS = 64, 96, 8, 3
STRATEGIES, GRAFTING = 4, 3


def arguments(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry; two seeds of each strategy."""
    torch.manual_seed(0)
    state = torch.zeros(8, SEEDS, dtype=torch.int32)
    state[0] = GRAFTING
    state[3] = torch.arange(SEEDS) % STRATEGIES
    tensors = [
        torch.randn(ROWS, FEATURES).to(dtype),
        torch.linspace(0, FEATURES, SEEDS + 1).to(torch.int32),
        state,
        torch.rand(SEEDS),
        torch.randn(BLUEPRINTS, FEATURES).to(dtype),
        torch.ones(SEEDS, 5, dtype=torch.float64),
        torch.zeros(SEEDS, 3, dtype=torch.float64),
    ]
    return [tensor.to(device) for tensor in tensors]


def train(backend, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One forward and backward: everything that comes out."""
    x, offsets, state, alpha, weights, telemetry, grad_telemetry = arguments(device, dtype)
    x, alpha, weights = (tensor.requires_grad_() for tensor in (x, alpha, weights))
    y = backend.chunked_forward(x, offsets, state, alpha, weights, telemetry, grad_telemetry)
    y.backward(torch.ones_like(y))
    result = {"y": y, "dx": x.grad, "dw": weights.grad, "dalpha": alpha.grad}
    return result | {"telemetry": telemetry, "grad_telemetry": grad_telemetry}


def check_training(device: str, dtype: torch.dtype) -> list[str]:
    """What differs from the reference: y and dx bit for bit, sums to rounding."""
    got, want = train(ops, device, dtype), train(reference, device, dtype)
    problems = [name for name in ("y", "dx") if not torch.equal(got[name], want[name])]
    for name in ("dw", "dalpha", "telemetry", "grad_telemetry"):
        tolerance = {"rtol": 2e-2, "atol": 1e-3} if got[name].dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        if not torch.allclose(got[name], want[name], **tolerance):
            problems.append(name)
    return [f"{name} ({device}, {dtype})" for name in problems]


def check_operators(device: str) -> list[str]:
    """Operators that torch.library.opcheck does not accept."""
    x, offsets, state, alpha, weights, telemetry, grad_telemetry = arguments(device, torch.float32)
    backward = (torch.randn_like(x), x, offsets, state, alpha, weights, grad_telemetry, True, True, True)
    trained = [tensor.clone().requires_grad_() for tensor in (x, alpha, weights)]
    calls = {
        "chunked_forward": (trained[0], offsets, state, *trained[1:], telemetry, grad_telemetry),
        "chunked_backward": backward,
        "telemetry_update": (x, offsets, telemetry),
        "telemetry_reduce": (telemetry,),
        "telemetry_merge": (telemetry, telemetry.clone()),
    }
    problems = []
    for name, call in calls.items():
        try:
            torch.library.opcheck(getattr(torch.ops.kasmina, name).default, call)
        except Exception as error:
            problems.append(f"opcheck {name} ({device}): {error}")
    return problems


def main() -> None:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    problems = [] if _native.available else [_native.reason]
    for device in devices:
        runs, why = _native.has_kernel(device)
        problems += [] if runs else [why]
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            problems += check_training(device, dtype)
        problems += check_operators(device)
    facts = {"python": platform.python_version(), "torch": torch.__version__, "devices": devices}
    print(json.dumps(facts | {"problems": problems}))


if __name__ == "__main__":
    main()
