"""Results of 16 MiB and more are written past the caches on the CPU: every bit arrives, in each width of vectors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kasmina_ext import ops, reference

ROWS, SEEDS = 4099, 37
WHOLE_LINES, ODD = 4128, 4099  # only rows that begin with a line are streamed
IDLE, GRAFTING = 0, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def differences(features: int, dtype: torch.dtype, grafted: str) -> list[str]:
    """What differs in a bit from the reference, of y and dx, taken with and without sums."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(ROWS * features + 1, generator=generator).to(dtype)
    x = numbers[1:].view(ROWS, features)
    offsets = torch.linspace(0, features, SEEDS + 1).to(torch.int32)
    state = torch.zeros(8, SEEDS, dtype=torch.int32)
    state[0] = torch.arange(SEEDS) % 2 * GRAFTING if grafted == "some" else GRAFTING if grafted == "all" else IDLE
    state[3] = torch.arange(SEEDS) % 3
    alpha, weights = torch.rand(SEEDS, generator=generator), torch.randn(2, features, generator=generator)
    seeds, nothing = (offsets, state, alpha, weights), torch.empty(0, dtype=torch.float64)
    grad = x.flip(0)
    y = reference.chunked_forward(x, *seeds, nothing, nothing)
    grad_x = reference.chunked_backward(grad, x, *seeds, nothing, True, False, False)[0]
    wrong = []
    for sums in (False, True):
        telemetry = torch.zeros(SEEDS, 5, dtype=torch.float64) if sums else nothing
        if not torch.equal(ops.chunked_forward(x, *seeds, telemetry, nothing), y):
            wrong.append(f"y, {dtype}, {features} features, {grafted} grafted, telemetry: {sums}")
        got = ops.chunked_backward(grad, x, *seeds, nothing, True, sums, sums)[0]
        if not torch.equal(got, grad_x):
            wrong.append(f"dx, {dtype}, {features} features, {grafted} grafted, sums: {sums}")
    return wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grafted", ["all", "some", "none"])
@pytest.mark.parametrize("features", [WHOLE_LINES, ODD])
def test_large_results_have_the_bits_of_the_reference(features, dtype, grafted):
    assert differences(features, dtype, grafted) == []


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_vectors_give_the_same_bits(capability):
    """Torch's own variable holds for the kernels too; it is read once."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


if __name__ == "__main__":
    found = [
        line for dtype in DTYPES for features in (WHOLE_LINES, ODD) for line in differences(features, dtype, "some")
    ]
    print("".join(line + "\n" for line in found), end="")
