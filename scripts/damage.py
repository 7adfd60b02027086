"""What can befall the weights of a network, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def prune_(weight: Tensor, share: float) -> None:
    """The ``share`` of the weights that are smallest become 0."""
    smallest = weight.abs().flatten().argsort()[: round(share * weight.numel())]
    weight.view(-1)[smallest] = 0


@torch.no_grad()
def quantize_(weight: Tensor, bits: int, *, per_row: bool = False) -> None:
    """Weights become the nearest of ``2 ** bits`` levels, evenly spaced between the extremes of the matrix (of each row, an
    output channel, with ``per_row``) and symmetric about 0. No data is looked at.
    """
    half = 2 ** (bits - 1)
    largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
    step = largest.clamp_min(torch.finfo(weight.dtype).tiny) / (half - 0.5)
    weight.copy_(((weight / step - 0.5).round().clamp(-half, half - 1) + 0.5) * step)


def random_gains(count: int, generator: torch.Generator) -> Tensor:
    """float32 ``[count]``: exp of standard normal numbers."""
    return torch.randn(count, generator=generator).exp()


@torch.no_grad()
def scale_outputs_(layer: nn.Linear, gains: Tensor) -> None:
    """Every unit's output is scaled by its gain."""
    layer.weight.mul_(gains[:, None])
    layer.bias.mul_(gains)
