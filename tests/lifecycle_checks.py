"""What the tests of the operators of the lifecycle and of calibration share: where a backend keeps an operator, and the largest of calls."""

from __future__ import annotations

from collections.abc import Callable

import checks
import torch

from kasmina_ext import ops, reference, reference_calibration, reference_lifecycle

HOMES = {"ops": (ops, torch.ops.kasmina), "reference": (reference, reference_lifecycle, reference_calibration)}


def function(backend: str, op: str) -> Callable:
    """An operator of a backend: the reference's lie in three modules, and `ops` has no functions for derivatives."""
    return next(getattr(home, op) for home in HOMES[backend] if hasattr(home, op))


def check_big_reconstruction(device: torch.device) -> list[str]:
    """More than 2^31 elements. Seed 1 is to reconstruct x with a weight of 3: residuals of 4 in the last row, 0 elsewhere."""
    x, offsets, state, _, weights = checks._big(device)
    state[0, 1], rows, grown = 2, x.shape[0], x.shape[1] - 8
    weights.requires_grad_()
    loss = ops.reconstruction_loss(x, x, offsets, state, weights)
    loss.sum().backward()
    expected = torch.tensor([0, 16 / rows], device=device)
    slope = torch.tensor(16 / (rows * grown), dtype=weights.dtype, device=device)
    right = torch.equal(loss.detach(), expected) and weights.grad[0, 8:].eq(slope).all()
    return [] if right and not weights.grad[0, :8].any() else ["the loss of more than 2^31 elements is wrong"]
