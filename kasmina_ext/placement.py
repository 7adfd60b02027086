"""Tensors that several processes hold a part of each (DTensor, as FSDP2 makes them), beside whole ones.

The functions take either kind, and values ``[P, H]`` that are whole and the same on every process: each writes its part,
and nothing is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor."""
    # The usual kinds first: the import takes most of a second.
    if tensor is None or type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of it, as a constant. Of a sharded one every process must ask: the parts are gathered."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor
    return _on_mesh(tensor, tensor.device_mesh.device_type).full_tensor()


def gathered(tensor: Tensor) -> Tensor:
    """:func:`whole`, differentiable: the gradient is averaged over the processes, as FSDP2 does."""
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    everything = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if everything.requires_grad:
        everything.register_hook(lambda gradient: _averaged(gradient, tensor))
    return everything


def _averaged(gradient: Tensor, sharded: Tensor) -> Tensor:
    if gradient.is_cuda and sharded.grad is not None:
        # FSDP2 may still be writing it, on a stream of its own, when this gradient is added.
        torch.cuda.synchronize(gradient.device)
    return gradient / sharded.device_mesh.size()


def write(target: Tensor, values: Tensor | float, mask: Tensor | None = None) -> None:
    """Write ``values``, a number or a tensor of the target's shape, where ``mask``, also of that shape, is True."""
    with torch.no_grad():
        if is_sharded(target):
            mask = None if mask is None else _own_part(mask, target)
            values = _own_part(values, target) if isinstance(values, Tensor) else values
            target = target.to_local()
        if isinstance(values, Tensor):
            values = values.to(target)
            target.copy_(values if mask is None else torch.where(mask.to(target.device), values, target))
        elif mask is None:
            target.fill_(values)
        else:
            target.masked_fill_(mask.to(target.device), values)


def _own_part(values: Tensor, like: Tensor) -> Tensor:
    """What this process holds of ``values`` where they are laid out as ``like``."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    values = _on_mesh(values, mesh.device_type)
    replicated = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()


def _on_mesh(tensor: Tensor, device_type: str) -> Tensor:
    """To the kind of device that the mesh communicates from: where parameters are offloaded they lie elsewhere."""
    return tensor if tensor.device.type == device_type else tensor.to(device_type)
