"""Optimizers and seeds: no decay for banks, and moments that start afresh where a blueprint begins or ends."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from kasmina_ext.bank import BlueprintBank
from kasmina_ext.handle import SeedHandle
from kasmina_ext.lifecycle import begins_or_ends
from kasmina_ext.placement import write
from kasmina_ext.seed_arguments import SeedIds
from kasmina_ext.state_layout import HISTORY_LENGTH, StateVar

if TYPE_CHECKING:
    from kasmina_ext.layer import KasminaLayer


def param_groups(
    model: nn.Module | SeedHandle, lr: float | Tensor | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: the banks of all layers in ``model`` without weight decay, then all the rest.

    ``model`` may be a handle on seeds, which stands for the modules that it was made of.
    Only parameters that require a gradient, each once; a group that would be empty is left out.
    ``lr`` goes into both groups and ``weight_decay`` into the second; None leaves the optimizer's
    default. Decay would pull every blueprint to 0, which is neutral for none but ADDITIVE, and
    would change fossils, whose gradient is 0.

    With or without these groups, every layer is looked after: at each step of an optimizer that
    trains its bank, :func:`reset_optimizer_state` runs first for the seeds whose blueprint began
    (GERMINATED) or ended (FOSSILIZED, CULLED, CANCELLED, ROLLED_BACK) since the step before, and what
    ``.grad`` has of them from before is not applied any more. (Not inside a compiled step or a CUDA
    graph, nor for states that DDP's broadcast of buffers brought: there call it yourself.)

    Adam counts its steps for a whole bank, not for a seed: where a seed germinates late, moments
    start at 0 without the correction that a new optimizer makes, and with betas (0.9, 0.999) the
    seed's first steps are three to six times ``lr``. Where that is too much, give the banks' group
    ``betas=(0.9, 0.95)``, with which no step of a steady gradient is much longer than ``lr``.
    """
    roots = list(model.roots.values()) if isinstance(model, SeedHandle) else [model]
    if not all(isinstance(root, nn.Module) for root in roots):
        raise TypeError(f"model must be a torch.nn.Module or a handle on seeds, got {type(model).__name__}")
    banks = [each.lasting_bank for root in roots for each in root.modules() if isinstance(each, BlueprintBank)]
    taken = {id(bank) for bank in banks}
    rest = [parameter for root in roots for parameter in root.parameters() if id(parameter) not in taken]
    groups = [
        {"params": _trained(banks), "lr": lr, "weight_decay": 0.0},
        {"params": _trained(rest), "lr": lr, "weight_decay": weight_decay},
    ]
    return [{key: value for key, value in group.items() if value is not None} for group in groups if group["params"]]


def reset_optimizer_state(
    optimizer: Optimizer, seed_ids: SeedIds, layer: KasminaLayer | SeedHandle | None = None
) -> None:
    """Zero what ``optimizer`` remembers of the blueprints that these seeds of ``layer`` use.

    See :meth:`KasminaLayer.reset_optimizer_state`, which this calls. ``layer`` may be left out where
    the optimizer trains the bank of one layer only; it may be a handle on the seeds of several, which
    then are its numbers.
    """
    if layer is None:
        trained = [layer for layer in list(_looked_after) if _trains(optimizer, layer)]
        if len(trained) != 1:
            raise ValueError(f"say which layer: the optimizer trains the banks of {len(trained)} layers")
        layer = trained[0]
    layer.reset_optimizer_state(optimizer, seed_ids)


def _trained(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters if p.requires_grad}.values())


# ---- layers that are looked after ----------------------------------------------------------------


class _Seen(NamedTuple):
    """What an optimizer's last step found of a layer."""

    bank: int
    """Identity of the parameter."""
    trained: int
    """Parameters of the optimizer."""
    loaded: Tensor | None
    """The layer's mark of the last load: what was loaded has a past of its own."""
    state: ref[Tensor] | None
    """None: the optimizer does not train the bank."""
    version: int | float | None
    """Of the state."""
    history_count: Tensor | None


_looked_after: WeakKeyDictionary[KasminaLayer, WeakKeyDictionary[Optimizer, _Seen]] = WeakKeyDictionary()
_saved_in_time: WeakSet[Optimizer] = WeakSet()


def look_after(layer: KasminaLayer) -> None:
    """From now on, and as long as it lives, see to it that no optimizer's step uses what is of another blueprint."""
    _listen()
    _looked_after.setdefault(layer, WeakKeyDictionary())


@functools.cache
def _listen() -> RemovableHandle:
    """One hook for all optimizers: there is no telling which will train a layer."""
    return register_optimizer_step_pre_hook(settle)


def settle(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Do what :func:`param_groups` promises of a step. Called before each step of any optimizer: a few comparisons, and
    work only for layers whose state was written.
    """
    if torch.compiler.is_compiling():
        return
    trained = sum([len(group["params"]) for group in optimizer.param_groups])
    due: dict[KasminaLayer, Tensor] = {}
    for reference in _looked_after.keyrefs():  # a copy: another thread may make a layer meanwhile
        layer = reference()
        if layer is None:
            continue
        seen = _looked_after[layer]
        bank, state = layer.own_bank, layer._buffers["state"]
        last, loaded = seen.get(optimizer), layer._loaded_history_count
        known = last is not None and last.bank == id(bank) and last.loaded is loaded
        if known and last.trained == trained:
            if last.state is None or (last.state() is state and last.version == _version(state)):
                continue
        if not _trains(optimizer, layer):
            seen[optimizer] = _Seen(id(bank), trained, loaded, None, None, None)
            continue
        if optimizer not in _saved_in_time:
            # What is due at the next step must not be forgotten when the run goes on elsewhere.
            optimizer.register_state_dict_pre_hook(settle)
            _saved_in_time.add(optimizer)
        if state.is_cuda and torch.cuda.is_current_stream_capturing():
            continue
        count = layer._buffers["history_count"]
        since = last.history_count if known and last.history_count is not None else loaded
        layer.check_own_bank()
        due[layer] = count if since is None else since.to(count.device, non_blocking=True)
    if due:
        _forget_what_ended(optimizer, due, trained)


def _forget_what_ended(optimizer: Optimizer, due: dict[KasminaLayer, Tensor], trained: int) -> None:
    """Of these layers, each with its ``since`` of :func:`_begun_or_ended`."""
    from kasmina_ext.side_by_side import Sides  # not above: it imports the layer, which imports this module

    for side in Sides(list(due)):
        state, count = side.buffer("state"), side.buffer("history_count")
        lifecycle, since = state[StateVar.LIFECYCLE_STATE], side.join([due[layer] for layer in side.layers])
        begun_or_ended = _begun_or_ended(lifecycle, side.buffer("history"), count, since)
        side.forget(state, begins_or_ends(lifecycle), begun_or_ended, optimizer)
        for layer, of_layer in zip(side.layers, count.split(side.sizes), strict=True):
            own = layer._buffers["state"]
            seen = _Seen(id(layer.own_bank), trained, layer._loaded_history_count, ref(own), _version(own), of_layer)
            _looked_after[layer][optimizer] = seen


def forget(layer: KasminaLayer) -> None:
    """Zero the ``.grad`` of the layer's bank, and what all optimizers that have trained it remember of it: other seeds have
    taken the place of those that these were of. Allocates nothing, and does not wait for the device.
    """
    for optimizer, seen in list(_looked_after.get(layer, {}).items()):
        if seen.state is not None:
            for moment in layer.moments(optimizer):
                write(moment, 0.0)
    if layer.gathers_gradient:
        write(layer.lasting_bank.grad, 0.0)


def _version(state: Tensor) -> int | float:
    """Changes with every write, and is known without asking the device; of a tensor that has none, equal to nothing."""
    return math.nan if state.is_inference() else state._version


def _trains(optimizer: Optimizer, layer: KasminaLayer) -> bool:
    bank = layer.own_bank
    if bank is None:
        return False
    return any(parameter is bank for group in optimizer.param_groups for parameter in group["params"])


def _begun_or_ended(lifecycle: Tensor, history: Tensor, count: Tensor, since: Tensor) -> Tensor:
    """bool ``[S]``: seeds in a state in which a blueprint begins or ends, or that entered one after their ``since``-th
    transition.

    Those that still are have no gradient there, so their moments may be zeroed again.
    """
    slot = torch.arange(HISTORY_LENGTH, device=count.device)
    age = (count[:, None] - 1 - slot) % HISTORY_LENGTH  # 0 is the newest transition
    entered = torch.where(age < (count - since)[:, None], history[:, :, 1], -1)
    states = torch.cat((entered, lifecycle[:, None]), 1)
    return begins_or_ends(states).any(1)
