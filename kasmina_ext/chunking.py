"""Which features a base layer has, and how they are cut into chunks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kasmina_ext.arguments import positive
from kasmina_ext.seed_arguments import integers

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
        if hasattr(value, "__index__") and not isinstance(value, (bool, Tensor)):  # NumPy's integers, too
            return value.__index__(), feature_dim
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


# ---- chunks of any tensor ------------------------------------------------------------------------


class ChunkStatistics(NamedTuple):
    """Of every row and chunk, ``[..., num_chunks]``; float32, or float64 for float64 input.

    A pair, ``mean, variance = statistics``, that is also read by name, ``statistics["mean"]``.
    """

    mean: Tensor
    variance: Tensor
    """Biased: divided by the number of elements."""

    def __getitem__(self, key: str | int | slice) -> Tensor | tuple[Tensor, ...]:
        if isinstance(key, str):
            if key not in self._fields:
                raise KeyError(f"{key!r}; known are {', '.join(self._fields)}")
            return getattr(self, key)
        return tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def keys(self) -> tuple[str, ...]:
        return self._fields


class ChunkManager:
    """The last dimension of tensors, ``layer_dim`` wide, as ``num_chunks`` chunks of nearly equal size.

    The first ``remainder`` chunks own ``chunk_size + 1`` features, the others ``chunk_size``; with
    more chunks than features the last ones own none. ``chunk_starts`` and ``chunk_ends`` are int64
    ``[num_chunks]``, ``chunk_indices`` is int64 ``[layer_dim]``, the chunk of each feature; they lie
    on ``device``, by default the CPU. Tensors that are handed in may lie anywhere. ValueError for
    one whose last dimension is not ``layer_dim``.
    """

    def __init__(self, layer_dim: int, num_chunks: int, device: torch.device | str | None = None) -> None:
        self.layer_dim = positive("layer_dim", layer_dim)
        self.num_chunks = positive("num_chunks", num_chunks)
        self.chunk_size, self.remainder = divmod(self.layer_dim, self.num_chunks)
        offsets = chunk_offsets(self.layer_dim, self.num_chunks, "balanced").long()
        self._offsets: list[int] = offsets.tolist()
        self.chunk_starts, self.chunk_ends = offsets[:-1].clone(), offsets[1:].clone()
        self.chunk_indices = torch.arange(self.num_chunks, device="cpu").repeat_interleave(offsets.diff())
        self.to("cpu" if device is None else device)

    def to(self, device: torch.device | str) -> ChunkManager:
        """Move the index tensors; returns self."""
        self.device = torch.device(device)
        self.chunk_starts = self.chunk_starts.to(device)
        self.chunk_ends = self.chunk_ends.to(device)
        self.chunk_indices = self.chunk_indices.to(device)
        return self

    def get_chunk_size(self, chunk_id: int) -> int:
        """How many features the chunk owns; ValueError unless 0 <= chunk_id < num_chunks."""
        if not 0 <= chunk_id < self.num_chunks:
            raise ValueError(f"chunk_id must be in [0, {self.num_chunks}), got {chunk_id}")
        return self._offsets[chunk_id + 1] - self._offsets[chunk_id]

    def split_tensor(self, tensor: Tensor) -> list[Tensor]:
        """The chunks ``[..., size]``, as views: writing them is writing the tensor."""
        self._expect_layer_dim(tensor)
        return [tensor[..., start:end] for start, end in pairwise(self._offsets)]

    def concatenate_chunks(self, chunks: Sequence[Tensor]) -> Tensor:
        """The reverse of :meth:`split_tensor`, as a new tensor; ValueError where number or sizes do not fit."""
        sizes, expected = [chunk.size(-1) for chunk in chunks], [end - start for start, end in pairwise(self._offsets)]
        if sizes != expected:
            raise ValueError(f"chunks must be {_shortened(expected)} features wide, got {_shortened(sizes)}")
        return torch.cat(list(chunks), -1)

    def apply_to_chunks(
        self,
        tensor: Tensor,
        operation: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
        chunk_ids: Iterable[int] | Tensor | None = None,
    ) -> Tensor:
        """The tensor with ``operation(chunk)`` in place of every chunk, or of those named only.

        An operation with two required arguments is given the chunk's number as well; a sequence has
        one operation for each chunk. The result is a new tensor; its chunks may be of other widths.
        """
        chunks = self.split_tensor(tensor)
        named = range(self.num_chunks) if chunk_ids is None else self._numbers(chunk_ids)
        operations = [operation] * self.num_chunks if callable(operation) else list(operation)
        if len(operations) != self.num_chunks:
            raise ValueError(f"{len(operations)} operations for {self.num_chunks} chunks")
        for number in named:
            takes_number = _takes_two(operations[number])
            arguments = (chunks[number], number) if takes_number else (chunks[number],)
            chunks[number] = operations[number](*arguments)
        return torch.cat(chunks, -1)

    def create_chunk_mask(self, chunk_ids: int | Iterable[int] | Tensor) -> Tensor:
        """bool ``[layer_dim]`` on ``device``: the features of these chunks (ids, or a bool mask ``[num_chunks]``)."""
        chosen = torch.zeros(self.num_chunks, dtype=torch.bool, device=self.device)
        chosen[self._numbers(chunk_ids)] = True
        return chosen[self.chunk_indices]

    def parallel_chunk_operation(self, tensor: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
        """``operation`` on all chunks of one size at once, ``[..., n, size]``: two calls at most, however many chunks.

        A result ``[..., n, width]`` is laid out as features again, ``[..., sum of widths]``; one that
        is reduced to ``[..., n]`` becomes ``[..., num_chunks]``.
        """
        results = [operation(group) for group in self._groups(tensor)]
        if all(result.dim() == tensor.dim() + 1 for result in results):
            results = [result.flatten(-2) for result in results]
        return torch.cat(results, -1)

    def get_chunk_statistics(self, tensor: Tensor) -> ChunkStatistics:
        """Mean and biased variance of every row and chunk, ``[..., num_chunks]``; NaN for a chunk without features."""
        wide = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        mean = self.parallel_chunk_operation(wide, lambda group: group.mean(-1))
        variance = self.parallel_chunk_operation(
            wide, lambda group: (group - group.mean(-1, keepdim=True)).square().mean(-1)
        )
        return ChunkStatistics(mean, variance)

    def _groups(self, tensor: Tensor) -> list[Tensor]:
        """Views ``[..., n, size]``: the larger chunks, and the others."""
        self._expect_layer_dim(tensor)
        large = self.remainder * (self.chunk_size + 1)
        groups = []
        if self.remainder:
            groups.append(tensor[..., :large].unflatten(-1, (self.remainder, self.chunk_size + 1)))
        if self.num_chunks > self.remainder:
            groups.append(tensor[..., large:].unflatten(-1, (self.num_chunks - self.remainder, self.chunk_size)))
        return groups

    def _expect_layer_dim(self, tensor: Tensor) -> None:
        if tensor.dim() == 0 or tensor.size(-1) != self.layer_dim:
            raise ValueError(f"the last dimension must be layer_dim = {self.layer_dim}, got shape {list(tensor.shape)}")

    def _numbers(self, chunk_ids: int | Iterable[int] | Tensor) -> list[int]:
        chosen = integers(chunk_ids, "chunk_ids").cpu()
        if chosen.dtype == torch.bool:
            if chosen.shape != (self.num_chunks,):
                raise ValueError(f"a mask of chunks must have shape [{self.num_chunks}], got {list(chosen.shape)}")
            chosen = chosen.nonzero()
        numbers = list(dict.fromkeys(chosen.flatten().tolist()))
        for number in numbers:
            self.get_chunk_size(number)
        return numbers

    def __repr__(self) -> str:
        return f"ChunkManager(layer_dim={self.layer_dim}, num_chunks={self.num_chunks}, device={str(self.device)!r})"


def _takes_two(operation: Callable[..., Tensor]) -> bool:
    try:
        parameters = inspect.signature(operation).parameters.values()
    except (TypeError, ValueError):  # many of torch's own functions do not say
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) >= 2


def _shortened(sizes: list[int]) -> str:
    return str(sizes) if len(sizes) <= 8 else f"{len(sizes)} of [{', '.join(map(str, sizes[:8]))}, ...]"
