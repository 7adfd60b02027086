"""Which modules of a model can be given seeds, where they stand, and why some cannot."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import ParametrizationList

from kasmina_ext.chunking import output_features
from kasmina_ext.folding.targets import own_tensor
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.names import original_name
from kasmina_ext.placement import is_sharded
from kasmina_ext.wrapper import CallsOnly

_KINDS = (nn.Linear, nn.Bilinear, _ConvNd, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding)
_CHANNELS_FIRST = re.compile(r"(batch|instance|group)norm|[123]d$", re.IGNORECASE)


@dataclass(eq=False)
class Site:
    """A module that has seeds, or could have."""

    module: nn.Module
    """A KasminaLayer where there are seeds already."""
    arguments: dict[str, Any]
    """Of the layer: what the module itself does not say about its features."""
    refused: str
    """Why it cannot be wrapped; "" where it can."""
    names: list[str] = field(default_factory=list)
    """Without what wrappers put in. Several, where it is registered several times."""
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Whose children it is, under which keys; none for the model itself."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_grafted(self) -> bool:
        return isinstance(self.module, KasminaLayer)

    @property
    def plain(self) -> nn.Module:
        """The module that is, or would be, wrapped."""
        return plain_of(self.module)


def plain_of(module: nn.Module) -> nn.Module:
    """The module inside of a layer, or of layers around layers; itself where it is none."""
    while isinstance(module, KasminaLayer):
        module = module._modules["base_layer"]
    return module


def sites_in(model: nn.Module) -> list[Site]:
    """Every module of a kind that can have seeds, each once, in the model's order."""
    found: dict[nn.Module, Site] = {}
    for name, module, holder in _walk(model, "", None):
        site = found.get(module)
        if site is None:
            arguments = {} if isinstance(module, KasminaLayer) else features_of(module)
            if arguments is None:
                continue
            site = found[module] = Site(module, arguments, "" if isinstance(module, KasminaLayer) else _refused(module))
        site.names.append(original_name(name))
        if holder is None:
            site.refused = site.refused or "it is the model itself: KasminaLayer(model) wraps it"
        else:
            place = (holder, name.rpartition(".")[2])
            site.places += [place] if place not in site.places else []
            site.refused = site.refused or _refused_by(holder)
    return list(found.values())


def _walk(
    module: nn.Module, name: str, holder: nn.Module | None, above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Names, modules and who holds them, every place of a module on its own. What a layer wraps is part of the layer,
    but what is inside of that is not.
    """
    # The first two are never called as they stand, and what is compiled to TorchScript has no place for a layer.
    if isinstance(module, (CallsOnly, ParametrizationList, torch.jit.ScriptModule)) or module in above:
        return
    if not isinstance(holder, KasminaLayer):
        yield name, module, holder
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, module, (*above, module))


# ---- kinds of modules --------------------------------------------------------------------------------------------


def features_of(module: nn.Module) -> dict[str, Any] | None:
    """Arguments for a layer around the module, where it does not say itself how its features lie; None for a module that
    is of no kind that can have seeds.
    """
    kind = type(module).__name__
    if isinstance(module, _KINDS):
        rewritten = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and type(module).forward not in (
            nn.LayerNorm.forward,
            nn.RMSNorm.forward,
        )
        return {"feature_dim": 1} if rewritten and _is_channels_first(module) else {}
    if any(isinstance(inner, _KINDS) for inner in module.modules()):  # which are what is wrapped
        return None
    if _is_integer(module, "in_features") and _is_integer(module, "out_features"):  # quantised ones, mostly
        return {}
    weight = own_tensor(module, "weight")
    if any(module.children()):
        return None
    if _is_integer(module, "nf") and weight is not None and weight.dim() == 2:  # transformers' Conv1D
        return {}
    if "norm" in kind.lower() and weight is not None and weight.dim() == 1 and weight.numel():
        # RMSNorm as every model has its own; it knows its features by its weight alone.
        return {"hidden_dim": weight.numel(), "feature_dim": 1 if _is_channels_first(module) else -1}
    return None


def _is_integer(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))


def _is_channels_first(norm: nn.Module) -> bool:
    """By its class's name, as in LayerNorm2d, or its ``data_format``, as in ConvNeXt."""
    layout = getattr(norm, "data_format", None)
    return layout == "channels_first" if isinstance(layout, str) else bool(_CHANNELS_FIRST.search(type(norm).__name__))


def num_features(site: Site) -> int:
    """Of what the module puts out."""
    return output_features(site.module, **site.arguments).hidden_dim


def seeds_for(features: int, chunk_size: int) -> int:
    """So that no seed owns more than ``chunk_size`` features."""
    return max(1, math.ceil(features / chunk_size))


# ---- why not -----------------------------------------------------------------------------------------------------


def _refused(module: nn.Module) -> str:
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return _NEVER_CALLED
    if any(isinstance(tensor, UninitializedTensorMixin) for tensor in tensors):
        return "it is lazy and not initialized: run the model once"
    if any(is_sharded(tensor) for tensor in tensors):
        return "its parameters are sharded: graft before fully_shard"
    if any(tensor.is_complex() for tensor in tensors):
        return "its weights are complex, and seeds are for real activations"
    if hasattr(module, "_hf_hook") and any(tensor.is_meta for tensor in tensors):
        return "accelerate keeps its weights elsewhere between calls: graft a model that fits, or before dispatch_model"
    return ""


_NEVER_CALLED = (
    "nn.MultiheadAttention reads its weight and never calls it: wrap the attention itself, whose output is the same, "
    "with KasminaLayer"
)


def _refused_by(holder: nn.Module) -> str:
    if type(holder).__name__ == "OptimizedModule":
        return "it was compiled by itself: graft first, then compile"
    if isinstance(holder, nn.MultiheadAttention) and type(holder).forward is nn.MultiheadAttention.forward:
        return _NEVER_CALLED
    return ""
