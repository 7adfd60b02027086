"""Nested tensors: the rows of all their components, as one ordinary tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def over_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(rows [N, H]) -> [N, H]`` over a nested tensor ``[B, *, H]`` of either layout; like ``x``, differentiable.

    A jagged one is not copied and keeps its offsets, so that it can be added to ``x``. One of the old strided layout,
    which nn.TransformerEncoder makes of a padding mask, is copied twice.
    """
    if x.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(
            function(x.values()), offsets=x.offsets(), lengths=x.lengths(), jagged_dim=x._ragged_idx
        )
    parts = x.unbind()
    rows = [part.flatten(0, -2) for part in parts]
    y = function(torch.cat(rows)).split([part.size(0) for part in rows])
    return torch.nested.as_nested_tensor([new.view(part.shape) for new, part in zip(y, parts, strict=True)])
