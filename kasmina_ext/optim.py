"""Optimizers and seeds: no decay for banks, and moments that start afresh where a blueprint begins or ends."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.seed_arguments import SeedIds
from kasmina_ext.state_layout import HISTORY_LENGTH

# On entering these a blueprint begins or ends, and the moments of what it was have no say any more.
RESETTING = tuple(map(int, (ExtendedLifecycle.GERMINATED, ExtendedLifecycle.FOSSILIZED, ExtendedLifecycle.CULLED)))


def param_groups(
    model: nn.Module, lr: float | Tensor | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: the banks of all layers in ``model`` without weight decay, then all the rest.

    Only parameters that require a gradient, each once; a group that would be empty is left out.
    ``lr`` goes into both groups and ``weight_decay`` into the second; None leaves the optimizer's
    default. Decay would pull every blueprint to 0, which is neutral for none but ADDITIVE, and
    would change fossils, whose gradient is 0.

    The layers are looked after from then on: at each step of an optimizer that trains their banks,
    :func:`reset_optimizer_state` runs first for the seeds that were GERMINATED, FOSSILIZED or
    CULLED since the step before. (Not inside a compiled step or a CUDA graph: there call it
    yourself.)
    """
    layers = _layers_in(model)
    banks = [layer.blueprint_weights for layer in layers]
    _look_after(layers)
    taken = {id(bank) for bank in banks}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    groups = [
        {"params": _trained(banks), "lr": lr, "weight_decay": 0.0},
        {"params": _trained(rest), "lr": lr, "weight_decay": weight_decay},
    ]
    return [{key: value for key, value in group.items() if value is not None} for group in groups if group["params"]]


def reset_optimizer_state(optimizer: Optimizer, seed_ids: SeedIds, layer: KasminaLayer | None = None) -> None:
    """Zero what ``optimizer`` remembers of the blueprints that these seeds of ``layer`` use.

    See :meth:`KasminaLayer.reset_optimizer_state`, which this calls. ``layer`` may be left out where
    the optimizer was made from :func:`param_groups` of a model with one layer.
    """
    if layer is None:
        trained = [watched for watched in _watched if _trains(optimizer, watched)]
        if len(trained) != 1:
            raise ValueError(f"say which layer: the optimizer is known to train the banks of {len(trained)} layers")
        layer = trained[0]
    layer.reset_optimizer_state(optimizer, seed_ids)


def _layers_in(model: nn.Module) -> list[KasminaLayer]:
    return [module for module in model.modules() if isinstance(module, KasminaLayer)]


def _trained(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters if p.requires_grad}.values())


# ---- layers that are looked after ----------------------------------------------------------------


class _Seen(NamedTuple):
    """A layer's state at an optimizer's last step."""

    version: tuple[int, int]  # changes with every write of the state, and is known without asking the device
    history_count: Tensor
    loaded: Tensor | None  # the layer's mark of the last load: what was loaded has a past of its own


_watched: WeakKeyDictionary[KasminaLayer, WeakKeyDictionary[Optimizer, _Seen]] = WeakKeyDictionary()
_saved_in_time: WeakSet[Optimizer] = WeakSet()


@functools.cache
def _listen() -> RemovableHandle:
    """One hook for all optimizers, from the first use on: an optimizer does not exist yet when its groups are made."""
    return register_optimizer_step_pre_hook(_before_step)


def _look_after(layers: list[KasminaLayer]) -> None:
    if layers:
        _listen()
    for layer in layers:
        _watched.setdefault(layer, WeakKeyDictionary())


def _before_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """At each step of any optimizer: a few comparisons, and work only for layers whose state was written."""
    if torch.compiler.is_compiling():
        return
    if optimizer not in _saved_in_time and any(_trains(optimizer, layer) for layer in list(_watched)):
        # What is due at the next step must not be forgotten when the run goes on elsewhere.
        optimizer.register_state_dict_pre_hook(_before_step)
        _saved_in_time.add(optimizer)
    for layer, seen in list(_watched.items()):
        state = layer._buffers["state"]
        version = (state.data_ptr(), state._version)
        last, loaded = seen.get(optimizer), layer._loaded_history_count
        if last is not None and last.loaded is not loaded:
            last = None
        if (last is not None and last.version == version) or not _trains(optimizer, layer):
            continue
        if state.is_cuda and torch.cuda.is_current_stream_capturing():
            continue
        count = layer._buffers["history_count"]
        since = loaded if last is None else last.history_count
        since = count if since is None else since.to(count.device)
        layer.reset_optimizer_state(optimizer, _begun_or_ended(layer, since))
        seen[optimizer] = _Seen(version, count.clone(), loaded)


def _trains(optimizer: Optimizer, layer: KasminaLayer) -> bool:
    bank = layer.blueprint_weights
    return any(parameter is bank for group in optimizer.param_groups for parameter in group["params"])


def _begun_or_ended(layer: KasminaLayer, since: Tensor) -> Tensor:
    """bool ``[S]``: seeds that are in one of RESETTING, or were there after their ``since``-th transition.

    Those that still are have no gradient there, so their moments may be zeroed again.
    """
    count = layer._buffers["history_count"]
    slot = torch.arange(HISTORY_LENGTH, device=count.device)
    age = (count[:, None] - 1 - slot) % HISTORY_LENGTH  # 0 is the newest transition
    entered = torch.where(age < (count - since)[:, None], layer._buffers["history"][:, :, 1], -1)
    states = torch.cat((entered, layer.lifecycle_states[:, None]), 1)
    masks = [states == state for state in RESETTING]
    return torch.stack(masks).any(0).any(1)
