"""Which features a base layer has, and how they are cut into chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNKINGS = ("uniform", "balanced")

# Attributes that say how many features a module puts out, and in which dimension they lie.
_LAST, _SECOND = -1, 1
_FEATURE_ATTRIBUTES = {
    "out_features": _LAST,
    "out_channels": _SECOND,
    "normalized_shape": _LAST,
    "num_features": _SECOND,  # batch and instance norm
    "num_channels": _SECOND,  # group norm
    "embedding_dim": _LAST,
    "nf": _LAST,  # transformers' Conv1D, a Linear
}


class OutputFeatures(NamedTuple):
    """What is known of a base layer's output before it has run."""

    hidden_dim: int
    feature_dim: int
    unbatched_rank: int
    """Rank of the output for an input without batch dimension, where the base takes one (convolutions), else -1."""
    module: nn.Module
    """The module that says so; its parameters lie where the output will."""


def output_features(
    base_layer: nn.Module, hidden_dim: int | None = None, feature_dim: int | None = None
) -> OutputFeatures:
    """Features of ``base_layer``'s output: its own attributes, else those of the last module inside that has them.

    What is given wins over what is found inside; ValueError where nothing is found, or what is
    given contradicts the base layer itself.
    """
    found = _described_by(base_layer)
    if found is not None and hidden_dim is not None and found[0] != hidden_dim:
        raise ValueError(f"hidden_dim is {hidden_dim}, but {type(base_layer).__name__} puts out {found[0]} features")
    module = base_layer
    if found is None:
        for inner in reversed(list(base_layer.modules())[1:]):
            found = _described_by(inner)
            if found is not None:
                module = inner
                break
    if found is None and hidden_dim is None:
        raise ValueError(
            f"cannot tell how many features {type(base_layer).__name__} puts out: neither it nor a "
            f"module inside has out_features, out_channels or normalized_shape; pass hidden_dim"
        )
    found_dim, found_feature_dim = found if found is not None else (hidden_dim, _LAST)
    hidden_dim = found_dim if hidden_dim is None else hidden_dim
    if hidden_dim < 1:
        lazy = "; run a lazy module once before wrapping it" if hidden_dim == 0 else ""
        raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}{lazy}")
    feature_dim = found_feature_dim if feature_dim is None else feature_dim
    unbatched_rank = -1
    if feature_dim == _SECOND and isinstance(module, nn.modules.conv._ConvNd):
        unbatched_rank = len(module.kernel_size) + 1
    elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
        unbatched_rank = module._get_no_batch_dim()
    return OutputFeatures(hidden_dim, feature_dim, unbatched_rank, module)


def _described_by(module: nn.Module) -> tuple[int, int] | None:
    for name, feature_dim in _FEATURE_ATTRIBUTES.items():
        value = getattr(module, name, None)
        if name == "normalized_shape" and isinstance(value, (tuple, list)) and value:
            value = value[-1]
        if isinstance(value, int) and not isinstance(value, bool):
            return value, feature_dim
    return None


def chunk_size_of(hidden_dim: int, num_seeds: int) -> int:
    """Features in a chunk, at least; the remainder is unowned (uniform) or spread (balanced)."""
    return max(1, hidden_dim // num_seeds)


def chunk_offsets(hidden_dim: int, num_seeds: int, chunking: str) -> Tensor:
    """int32 ``[S + 1]`` on the CPU: seed ``s`` owns the features ``[offsets[s], offsets[s + 1])``.

    ``uniform``: seed i owns ``[i c, (i + 1) c)`` with ``c = max(1, H // S)``, what is left over is
    unowned, and so are the chunks of seeds beyond H. ``balanced``: the first ``H mod S`` chunks own
    one feature more, all are owned.
    """
    index = torch.arange(num_seeds + 1, dtype=torch.int64, device="cpu")
    if chunking == "uniform":
        offsets = (index * chunk_size_of(hidden_dim, num_seeds)).clamp(max=hidden_dim)
    elif chunking == "balanced":
        size, remainder = divmod(hidden_dim, num_seeds)
        offsets = index * size + index.clamp(max=remainder)
    else:
        raise ValueError(f"chunking must be one of {', '.join(CHUNKINGS)}, got {chunking!r}")
    return offsets.to(torch.int32)
