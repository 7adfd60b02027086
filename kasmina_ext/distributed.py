"""Models in jobs of several processes: DDP and FSDP2, telemetry of all ranks, seeds that stay the same on all of them.

What every rank must do alike is change seeds. Either all ranks make the same requests, by numbers that are the same
(:func:`merged_telemetry`; a :class:`~kasmina_ext.controller.GrowthController` does), or one rank decides and
:func:`sync_lifecycle` tells the others. DDP's own broadcast of buffers is no help with the latter: it brings state and
alpha to the other ranks, but neither the blueprints that began with it nor the optimizer's moments.

    model = DistributedDataParallel(kx.distributed.prepare_ddp(model))
    ...
    if kx.distributed.sync_lifecycle(model, optimizer=optimizer):
        print("this rank had diverged")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_ext import across_ranks
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.measure import Layers, seed_layers
from kasmina_ext.ranks import Ranks

_LOCAL = ("telemetry", "grad_telemetry")
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def prepare_ddp(model: nn.Module) -> nn.Module:
    """Keep each rank's telemetry its own under DistributedDataParallel; returns ``model``, to be wrapped next.

    DDP broadcasts the buffers of rank 0 before each forward, which would overwrite what the other
    ranks have seen. The names go on the list that DDP looks for in the module that it is given,
    beside what is there already, so this must be that module and have all its layers by now.
    ValueError where there is no KasminaLayer, or for a model that is wrapped already.

    State and alpha stay among what is broadcast, so that a model that rank 0 alone has loaded is the
    same everywhere. Two forwards before a backward (a contrastive loss, say) may then be autograd's
    in-place error: torch 2.11 takes the broadcast before the second one for a change, 2.13 does
    not. ``DistributedDataParallel(..., broadcast_buffers=False)`` works with both; it leaves out the
    first broadcast as well, so let :func:`sync_lifecycle` run once before.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("prepare_ddp must see the model before DistributedDataParallel does: DDP(prepare_ddp(model))")
    seed_layers(model)
    ignored = list(getattr(model, _IGNORED, ()))
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, KasminaLayer):
            names = [f"{prefix}.{name}" if prefix else name for name in _LOCAL]
            # The second: as torch.compile(model), which may come before DDP, would call them.
            ignored += [name for own in names for name in (own, f"_orig_mod.{own}") if name not in ignored]
            for buffer in module._buffers.values():
                buffer._ddp_ignored = True  # DDP's mixed precision casts all other buffers, integers too
    setattr(model, _IGNORED, ignored)
    return model


def sync_telemetry(layers: Layers, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """:meth:`KasminaLayer.sync_telemetry` of all layers in one exchange, by name.

    A checkpoint has one rank's telemetry. To go on with that of all: save this, and when loading
    give it to one rank, ``layer.telemetry.copy_(...)``, and ``layer.reset_telemetry()`` on the
    others, however many there are then.
    """
    found, ranks = _checked(layers, group)
    return dict(zip(found, across_ranks.merged_telemetry(list(found.values()), ranks), strict=True))


def sync_grad_telemetry(layers: Layers, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """:meth:`KasminaLayer.sync_grad_telemetry` of all layers in one exchange, by name."""
    found, ranks = _checked(layers, group)
    return dict(zip(found, across_ranks.merged_gradients(list(found.values()), ranks), strict=True))


@contextlib.contextmanager
def merged_telemetry(layers: Layers, group: dist.ProcessGroup | Literal[False] | None = None) -> Iterator[None]:
    """Inside, the layers' telemetry and gradient telemetry are those of all ranks, so that all decide alike by it.

    For :func:`~kasmina_ext.telemetry.potential`, a report, or the germination of MIXED seeds, which
    start at the mean of what was seen. What is inside is a copy: what is collected or reset there is
    lost. All ranks must enter; waits for no CUDA device under NCCL.
    """
    found, ranks = list(seed_layers(layers).values()), Ranks(group)
    if ranks.size == 1:
        yield
        return
    merged = zip(across_ranks.merged_telemetry(found, ranks), across_ranks.merged_gradients(found, ranks), strict=True)
    with contextlib.ExitStack() as stack:
        for layer, tensors in zip(found, merged, strict=True):
            for name, tensor in zip(_LOCAL, tensors, strict=True):
                stack.callback(layer._buffers.__setitem__, name, layer._buffers[name])
                layer._buffers[name] = tensor
        yield


def lifecycle_digest(layers: Layers) -> str:
    """:meth:`KasminaLayer.lifecycle_digest` of all layers together, their names included."""
    return across_ranks.digest(seed_layers(layers))


def sync_lifecycle(
    layers: Layers, src: int = 0, group: dist.ProcessGroup | None = None, *, optimizer: Optimizer | None = None
) -> list[str]:
    """:meth:`KasminaLayer.sync_lifecycle` of all layers together; the names of those of this rank that were healed."""
    return across_ranks.heal(seed_layers(layers), Ranks(group), src, optimizer)


def _checked(layers: Layers, group: dist.ProcessGroup | None) -> tuple[dict[str, KasminaLayer], Ranks]:
    found, ranks = seed_layers(layers), Ranks(group)
    ranks.agree("layers", ", ".join(f"{name}: {layer.num_seeds} seeds" for name, layer in found.items()))
    return found, ranks
