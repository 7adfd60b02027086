"""Results of 32 MiB and more are written past the caches on the CPU: every bit arrives, from odd addresses too."""

from __future__ import annotations

import pytest
import torch

from kasmina_ext import ops, reference

ROWS, FEATURES, SEEDS = 4099, 4099, 37
IDLE, GRAFTING = 0, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grafted", ["all", "some", "none"])
def test_large_results_have_the_bits_of_the_reference(dtype, grafted):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(ROWS * FEATURES + 1, generator=generator).to(dtype)
    x = numbers[1:].view(ROWS, FEATURES)
    offsets = torch.linspace(0, FEATURES, SEEDS + 1).to(torch.int32)
    state = torch.zeros(8, SEEDS, dtype=torch.int32)
    state[0] = torch.arange(SEEDS) % 2 * GRAFTING if grafted == "some" else GRAFTING if grafted == "all" else IDLE
    state[3] = torch.arange(SEEDS) % 3
    alpha, weights = torch.rand(SEEDS, generator=generator), torch.randn(2, FEATURES, generator=generator)
    seeds, nothing = (offsets, state, alpha, weights), torch.empty(0, dtype=torch.float64)
    assert torch.equal(
        ops.chunked_forward(x, *seeds, nothing, nothing), reference.chunked_forward(x, *seeds, nothing, nothing)
    )
    grad = x.flip(0)
    got = ops.chunked_backward(grad, x, *seeds, nothing, True, False, False)[0]
    assert torch.equal(got, reference.chunked_backward(grad, x, *seeds, nothing, True, False, False)[0])
