"""What the ranks of a job hold of the same layers: telemetry merged, lifecycles compared and made equal again."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext import ops, placement
from kasmina_ext.ranks import Ranks, fingerprint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from kasmina_ext.layer import KasminaLayer

LIFECYCLE = ("state", "history", "history_count", "alpha")


class AcrossRanks:
    """The part of :class:`~kasmina_ext.layer.KasminaLayer` for jobs of several processes, each with the same layer.

    ``group`` is one of torch.distributed's, None for all processes; where torch.distributed is not
    initialized there is one rank, this process. But for :meth:`lifecycle_digest`, all ranks of the
    group must call these, in the same order. For all layers of a model at once, there are functions
    of the same names in :mod:`kasmina_ext.distributed`.
    """

    def sync_telemetry(self, group: ProcessGroup | None = None) -> Tensor:
        """float64 ``[S, 5]``: the telemetry of all ranks, as if one had seen it all. The layer's own is left alone.

        Merged in rank order by Chan's formula, so all ranks get the same bits.
        """
        return merged_telemetry([self], Ranks(group))[0]

    def sync_grad_telemetry(self, group: ProcessGroup | None = None) -> Tensor:
        """float64 ``[S, 3]``: the gradient telemetry of all ranks, each backward pass of each rank counted.

        Added in rank order, so all ranks get the same bits. The layer's own is left alone.
        """
        return merged_gradients([self], Ranks(group))[0]

    def lifecycle_digest(self) -> str:
        """16 hexadecimal digits of state, history, their count and alpha: equal on two ranks (or devices, or days)
        where every bit of these is. Nothing is sent; waits for the device.
        """
        return digest({"": self})

    def sync_lifecycle(
        self, src: int = 0, group: ProcessGroup | None = None, *, optimizer: Optimizer | None = None
    ) -> bool:
        """Make the seeds of all ranks as those of rank ``src`` (of the whole job) are; whether this rank was healed.

        That is state, history, alpha, performance metrics and the bank (a rank that germinated on
        its own has written it, too) and, of an ``optimizer`` that is given, its moments of the bank.
        Only digests are exchanged where all is well; else what differs is broadcast. Waits for the
        device; call it between an optimizer's step and the next forward. Telemetry is each rank's
        own. RuntimeError on all ranks, and nothing written, where the layers are not alike.
        """
        return bool(heal({"": self}, Ranks(group), src, optimizer))


# ---- telemetry -------------------------------------------------------------------------------------------------------


def merged_telemetry(layers: Sequence[KasminaLayer], ranks: Ranks) -> list[Tensor]:
    """``[S, 5]`` for each layer, by one exchange."""
    of_each_rank = ranks.gather(_joined(layers, "telemetry"))
    merged = of_each_rank[0].clone()
    for other in of_each_rank[1:]:
        ops.telemetry_merge(merged, other)
    return _split(merged, layers)


def merged_gradients(layers: Sequence[KasminaLayer], ranks: Ranks) -> list[Tensor]:
    """``[S, 3]`` for each layer, by one exchange."""
    return _split(ranks.total(_joined(layers, "grad_telemetry")), layers)


def _joined(layers: Sequence[KasminaLayer], name: str) -> Tensor:
    return torch.cat([layer._buffers[name].to(layers[0].device) for layer in layers])


def _split(joined: Tensor, layers: Sequence[KasminaLayer]) -> list[Tensor]:
    pieces = joined.split([layer.num_seeds for layer in layers])
    return [piece.to(layer.device) for piece, layer in zip(pieces, layers, strict=True)]


# ---- lifecycles ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Something of a layer that all ranks should have the same bits of."""

    layer: str
    what: str
    values: Tensor
    """Whole, whatever the placement."""
    write: Callable[[Tensor], None]
    """Puts others in their place."""

    @property
    def description(self) -> str:
        return f"{self.layer or 'layer'}.{self.what} {str(self.values.dtype).removeprefix('torch.')} {list(self.values.shape)}"


def digest(layers: Mapping[str, KasminaLayer]) -> str:
    """Of all layers; see :meth:`AcrossRanks.lifecycle_digest`."""
    parts = [part for name, layer in layers.items() for part in _buffers(name, layer, LIFECYCLE)]
    described = "\n".join(part.description for part in parts).encode()
    return hashlib.sha256(described + b"".join(_contents(parts))).hexdigest()[:16]


def heal(layers: Mapping[str, KasminaLayer], ranks: Ranks, src: int, optimizer: Optimizer | None) -> list[str]:
    """Names of the layers of this rank that were not as rank ``src``'s; see :meth:`AcrossRanks.sync_lifecycle`."""
    source = ranks.index(src)
    parts = []
    for name, layer in layers.items():
        parts += _buffers(name, layer, (*LIFECYCLE, "performance_metrics"))
        if "blueprint_weights" in layer._parameters:  # else it is computed of something that is not ours
            parts.append(_Part(name, "blueprint_weights", layer.whole_bank(), partial(layer._write_bank, None)))
    healed = _equalize(parts, ranks, source)
    if optimizer is not None:
        from kasmina_ext import optim  # not above: it imports the layer, which imports this module

        # First what each optimizer would reset at its next step: it would undo some of the healing.
        optim.settle(optimizer)
        healed += _equalize(list(_moments(layers, optimizer)), ranks, source)
    return list(dict.fromkeys(healed))


def _buffers(name: str, layer: KasminaLayer, buffers: Sequence[str]) -> Iterator[_Part]:
    for buffer in buffers:
        tensor = layer._buffers[buffer]
        yield _Part(name, buffer, tensor.detach(), partial(placement.write, tensor))


def _moments(layers: Mapping[str, KasminaLayer], optimizer: Optimizer) -> Iterator[_Part]:
    for name, layer in layers.items():
        for number, moment in enumerate(layer.moments(optimizer)):
            yield _Part(name, f"moment {number}", placement.whole(moment), partial(placement.write, moment))


def _equalize(parts: list[_Part], ranks: Ranks, source: int) -> list[str]:
    """Layers of the parts that were not the source's, in this rank. Sends what differs anywhere, else only digests."""
    ranks.agree("layers and optimizers", "; ".join(part.description for part in parts))
    if not parts:
        return []
    prints = ranks.gather(torch.tensor([fingerprint(content) for content in _contents(parts)])).tolist()
    unequal = [k for k in range(len(parts)) if any(row[k] != prints[source][k] for row in prints)]
    if not unequal:
        return []
    sent = ranks.broadcast(_packed([parts[k] for k in unequal]), source)
    healed = []
    for k, content in zip(unequal, sent.split([parts[k].values.nbytes for k in unequal]), strict=True):
        part = parts[k]
        if prints[ranks.rank][k] != prints[source][k]:
            part.write(content.clone().view(part.values.dtype).view(part.values.shape).to(part.values.device))
            healed.append(part.layer)
    return healed


def _packed(parts: Sequence[_Part]) -> Tensor:
    """uint8: the bytes of all of them, one after the other, on the first one's device."""
    values = [part.values.contiguous().flatten().view(torch.uint8) for part in parts]
    return torch.cat([each.to(values[0].device) for each in values])


def _contents(parts: Sequence[_Part]) -> list[bytes]:
    """The bytes of each; one copy from the device for all."""
    everything = _packed(parts).cpu()
    data = ctypes.string_at(everything.data_ptr(), everything.numel())  # without NumPy, which torch does not need
    ends = list(accumulate(part.values.nbytes for part in parts))
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
