"""The processes of a job, as few collectives as need be: what each holds, in rank order, and what one of them decides."""

from __future__ import annotations

import hashlib
from textwrap import shorten
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of ``group`` (None: all of the job), or this one alone: where it is False, or torch.distributed is
    not initialized.

    Every method is a collective: all ranks call it, with tensors of the same shape and dtype. Under
    NCCL nothing waits for a CUDA device but where it is said. ValueError for a process that is not in
    the group.
    """

    def __init__(self, group: dist.ProcessGroup | Literal[False] | None = None) -> None:
        self._group = None if group is False else group
        self.rank, self.size, self._members = 0, 1, [0]
        if group is False or not dist.is_available() or not dist.is_initialized():
            return
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group")
        self._members = dist.get_process_group_ranks(group)
        self.size = len(self._members)

    def index(self, rank: int) -> int:
        """Where in the group the process with this rank in the whole job is; ValueError where it is not."""
        if rank not in self._members:
            raise ValueError(f"rank {rank} is not in the group")
        return self._members.index(rank)

    def gather(self, tensor: Tensor) -> Tensor:
        """``[ranks, ...]``, in rank order, on the tensor's device."""
        if self.size == 1 or tensor.numel() == 0:
            return tensor.expand(self.size, *tensor.shape)
        carried = tensor.to(self._carrier(tensor)).contiguous()
        pieces = carried.new_empty((self.size, *carried.shape))
        dist.all_gather(list(pieces.view(self.size, -1)), carried.view(-1), group=self._group)
        return pieces.to(tensor.device)

    def gather_lengths(self, tensor: Tensor) -> list[Tensor]:
        """Of each rank its tensor ``[n]``, where every rank has another ``n``. Waits for the device."""
        if self.size == 1:
            return [tensor]
        lengths = self.gather(torch.tensor(tensor.numel(), device=tensor.device)).tolist()
        padded = tensor.new_zeros(max(lengths))
        padded[: tensor.numel()] = tensor
        return [piece[:length] for piece, length in zip(self.gather(padded), lengths, strict=True)]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """What the group's ``source``-th process holds."""
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        carried = tensor.to(self._carrier(tensor), copy=True).contiguous()
        dist.broadcast(carried, group_src=source, group=self._group)
        return carried.to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, added in rank order: the same bits everywhere, which all_reduce does not promise."""
        pieces = self.gather(tensor)
        result = pieces[0].clone()
        for piece in pieces[1:]:
            result += piece
        return result

    def agree(self, what: str, text: str) -> None:
        """RuntimeError on all ranks unless all give the same ``text``. Waits for the device."""
        if self.size == 1:
            return
        mine = fingerprint(text.encode())
        found = self.gather(torch.tensor(mine)).tolist()
        if found.count(found[0]) < self.size:
            raise RuntimeError(f"the ranks do not have the same {what}; rank {self.rank} has {shorten(text, 500)}")

    def _carrier(self, tensor: Tensor) -> torch.device:
        """The device that this group's backends send from: the tensor's own, if they can."""
        backends = dict(part.split(":") for part in dist.get_backend_config(self._group).split(","))
        kind = tensor.device.type
        if backends.get(kind, "gloo") != "gloo":
            return tensor.device
        return torch.device("cpu" if "cpu" in backends else next(iter(backends)))


def fingerprint(data: bytes) -> int:
    """64 bits of the SHA-256, as a signed number that fits into an int64 tensor."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)
