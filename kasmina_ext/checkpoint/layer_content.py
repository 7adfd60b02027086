"""What a layer's checkpoint holds: made from a layer, checked against one, and written into one, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext.checkpoint.errors import CheckpointMismatch
from kasmina_ext.checkpoint.forks import without_lost_threads
from kasmina_ext.checkpoint.optimizer_state import load_optimizer, optimizer_problems, undo_of
from kasmina_ext.checkpoint.state_dict import problems_in, renamed_for
from kasmina_ext.checkpoint.values import oddity_of, problem_of
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.placement import is_sharded
from kasmina_ext.state_layout import StateVar

if TYPE_CHECKING:
    from kasmina_ext.controller import GrowthController
    from kasmina_ext.layer import KasminaLayer

FORMAT = 1
_PARTS = frozenset({"format", "configuration", "layer", "base", "controller", "optimizer"})
_BANK = "blueprint_weights"
# What a checkpoint and a layer must agree in (as must the seeds' offsets) ...
_STRUCTURE = {"num_seeds": "seeds", "hidden_dim": "features", "num_blueprints": "blueprints"}
# ... and what the layer may have otherwise: then its own goes on to hold.
_BEHAVIOUR = ("feature_dim", "strategy", "alpha_schedule", "ramp_epochs", "auto_advance")


# ---- making --------------------------------------------------------------------------------------


@without_lost_threads()
def pack(
    layer: KasminaLayer,
    *,
    include_base: bool,
    controller: GrowthController | None,
    optimizer: Optimizer | None,
) -> dict[str, Any]:
    """The layer's tensors themselves, not copies, and what else was asked for. Waits for no device.

    TypeError or ValueError, naming it, for what no checkpoint can hold.
    """
    problem = unwritable(layer)
    if problem is not None:
        raise ValueError(f"a layer cannot be saved whose {problem}")
    content = {
        "format": FORMAT,
        "configuration": configuration_of(layer),
        "layer": {name: layer._buffers[name] for name in layer.BUFFER_DTYPES} | {_BANK: layer.whole_bank()},
        "base": _base_tensors(layer) if include_base else None,
        "controller": None if controller is None else controller._state(lambda tensor: tensor),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }
    for path, tensor in _tensors_in(content):
        odd = oddity_of(tensor)
        if odd is not None:
            raise ValueError(f"a layer cannot be saved whose {'.'.join(map(str, path))} {odd}")
    return content


def _tensors_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(item, (*path, name))


def configuration_of(layer: KasminaLayer) -> dict[str, Any]:
    """The layer's arguments, as JSON."""
    names = ("hidden_dim", "num_seeds", "num_blueprints", "chunk_size", "chunking", "feature_dim")
    return {
        "class": type(layer).__name__,
        "base_layer": type(layer._modules["base_layer"]).__name__,
        **{name: getattr(layer, name) for name in names},
        "strategy": layer.strategy.name.lower(),
        "alpha_schedule": layer.alpha_schedule.name.lower(),
        "ramp_epochs": layer.ramp_epochs,
        "auto_advance": layer.auto_advance,
        "telemetry": layer.telemetry_enabled,
        "blueprint_dtype": str(layer.blueprint_weights.dtype).removeprefix("torch."),
    }


@without_lost_threads()
def summary_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What lists show of it. Waits for the device where the tensors are on one."""
    configuration = content["configuration"]
    names = ("class", "base_layer", "num_seeds", "hidden_dim", "chunking", "strategy", "blueprint_dtype")
    counts = content["layer"]["state"][StateVar.LIFECYCLE_STATE].cpu().long().clamp(min=0).bincount().tolist()
    known = zip(ExtendedLifecycle, counts, strict=False)
    return {
        **{name: configuration[name] for name in names},
        "states": {state.name: count for state, count in known if count},
        "with": [part for part in ("base", "controller", "optimizer") if content[part] is not None],
    }


def _base_tensors(layer: KasminaLayer) -> dict[str, Tensor]:
    tensors = dict(layer._modules["base_layer"].state_dict())
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"base_layer.{name} is no tensor but of type {type(value).__name__}, save it on its own")
    return tensors


def unwritable(layer: KasminaLayer, *, sharded: bool = False) -> str | None:
    """Why the layer's own tensors cannot be saved or written, said after "whose"; None where they can. ``sharded``: a bank
    in parts (FSDP2) will do.
    """
    bank = layer._parameters.get(_BANK)
    if bank is None:
        return "blueprint_weights are parametrized: what is written to them would be lost"
    if is_sharded(layer.lasting_bank) and not sharded:
        return "blueprint_weights are sharded: use torch.distributed.checkpoint with its state_dict"
    if bank.shape != (layer.num_blueprints, layer.hidden_dim):
        return "blueprint_weights are flattened by FullyShardedDataParallel: save the whole model's state_dict"
    if bank.is_meta or layer._buffers["state"].is_meta:
        return "tensors are on the meta device: to_empty first"
    return None


def _of_inference(layer: KasminaLayer) -> str | None:
    own = chain(layer.parameters(), layer.buffers())
    if torch.is_inference_mode_enabled() or not any(tensor.is_inference() for tensor in own):
        return None
    return "tensors were made in inference mode: load it in torch.inference_mode()"


@without_lost_threads()
def refuse_unloadable(layer: KasminaLayer, content: Mapping[str, Any]) -> None:
    """ValueError where the layer's tensors hold what no load would take (written into them behind its back). Waits for
    the device.
    """
    problems = list(_layer_problems(layer, content["layer"], content["configuration"]))
    if problems:
        raise ValueError(f"what could not be loaded again is not saved: {'; '.join(problems)}")


# ---- checking ------------------------------------------------------------------------------------


@without_lost_threads()
def problems_with(
    content: Any,
    layer: KasminaLayer,
    controller: GrowthController | None = None,
    optimizer: Optimizer | None = None,
    *,
    shapes_only: bool = False,
) -> list[str]:
    """Why ``content`` cannot be written into this layer (controller, optimizer), each as a sentence; [] where it can.

    It may come from anybody: nothing in it is believed. Changes nothing; waits for the device. With ``shapes_only`` its
    tensors are on the device "meta", and what needs their values is not judged yet.
    """
    if not isinstance(content, dict) or content.keys() != _PARTS or not _is(content["format"], FORMAT):
        return [f"is no layer's checkpoint of format {FORMAT}"]
    theirs, ours = content["configuration"], configuration_of(layer)
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        return ["does not tell its layer's configuration"]
    differs = [
        f"has {str(theirs[name])[:40]} {what}, this layer {ours[name]}"
        for name, what in _STRUCTURE.items()
        if not _is(theirs[name], ours[name])
    ]
    if differs:
        return differs
    untold = [name for name in ours if type(theirs[name]) is not type(ours[name])]
    if untold:
        return [f"does not tell its layer's configuration: {untold[0]} is a {type(theirs[untold[0]]).__name__}"]
    if (reason := unwritable(layer) or _of_inference(layer)) is not None:
        return [f"cannot be loaded into a layer whose {reason}"]
    return [
        *_layer_problems(layer, content["layer"], theirs),
        *_base_problems(layer, content["base"]),
        *_controller_problems(controller, content["controller"], shapes_only),
        *_optimizer_problems(optimizer, content["optimizer"]),
    ]


def _is(theirs: Any, ours: Any) -> bool:
    """Equal and of one type: what compares in ways of its own (a tensor) is not even asked."""
    return type(theirs) is type(ours) and theirs == ours


def behaviour_differs(content: Mapping[str, Any], layer: KasminaLayer) -> list[str]:
    """Arguments that need not agree and do not: the layer's go on to hold."""
    theirs, ours = content["configuration"], configuration_of(layer)
    return [f"{name}={theirs[name]!r} (now {ours[name]!r})" for name in _BEHAVIOUR if theirs[name] != ours[name]]


def _layer_problems(layer: KasminaLayer, tensors: Any, theirs: Mapping[str, Any]) -> Iterator[str]:
    names = {*layer.BUFFER_DTYPES, _BANK}
    if not isinstance(tensors, dict) or tensors.keys() != names:
        yield f"does not hold the layer's tensors {', '.join(sorted(names))}"
        return
    for name, value in tensors.items():
        problem = problem_of(layer, name, value)
        if problem is not None and name == "seed_offsets" and theirs["chunking"] != layer.chunking:
            problem = f"are cut with chunking={theirs['chunking']!r}, in this layer with {layer.chunking!r}"
        if problem is not None:
            yield f"{name} {problem}"


def _base_problems(layer: KasminaLayer, tensors: Any) -> Iterator[str]:
    if tensors is None:
        return
    base = layer._modules["base_layer"]
    ours = base.state_dict()
    if isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors):
        tensors = renamed_for(base, tensors)
    if not isinstance(tensors, dict) or tensors.keys() != ours.keys():
        theirs = set(tensors) if isinstance(tensors, dict) else set()
        odd = sorted(map(str, theirs ^ ours.keys()))[:3]
        yield f"holds another base layer: {', '.join(odd)} is not in both"
        return
    for name, value in tensors.items():
        mine = ours[name]
        if not isinstance(value, Tensor) or not isinstance(mine, Tensor):
            yield f"base_layer.{name} is no tensor"
        elif (odd := oddity_of(mine)) is not None:
            yield f"cannot be loaded into a base layer whose {name} {odd}"
        elif value.shape != mine.shape:
            yield f"base_layer.{name} has shape {list(value.shape)}, in this layer {list(mine.shape)}"
        elif _kind(value) != _kind(mine):
            yield f"base_layer.{name} is {value.dtype}, in this layer {mine.dtype}"
    for path, inner in base.named_modules():
        if hasattr(inner, "BUFFER_DTYPES"):  # a layer of ours looks at values when it loads
            yield from problems_in(inner, tensors, f"{path}." if path else "")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _controller_problems(controller: GrowthController | None, state: Any, shapes_only: bool) -> Iterator[str]:
    if controller is None:
        return
    if state is None:
        yield "holds no controller's state: it was saved without controller="
        return
    if shapes_only:
        return
    try:
        controller.check_state_dict(state)
    except Exception as error:  # whatever the state is made of
        yield f"does not fit the controller: {error}"


def _optimizer_problems(optimizer: Optimizer | None, state: Any) -> Iterator[str]:
    if optimizer is None:
        return
    if state is None:
        yield "holds no optimizer's state: it was saved without optimizer="
        return
    for problem in optimizer_problems(optimizer, state):
        yield f"does not fit the optimizer: {problem}"


# ---- writing -------------------------------------------------------------------------------------


@without_lost_threads()
def apply(
    content: Mapping[str, Any],
    layer: KasminaLayer,
    controller: GrowthController | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Write what :func:`problems_with` found nothing wrong with. Tensors are written in place: parameters stay the same
    objects, in their dtype and where they are.

    All or nothing: where one of them refuses it after all, :class:`CheckpointMismatch`, and all is as it was.
    """
    exchange = Exchange()
    undo, part = [undo_of_layer(layer, content["base"] is not None, with_buffers=False), exchange.undo], "layer"
    if controller is not None:
        undo.append(_undo_of_controller(controller))
    if optimizer is not None:
        undo.append(undo_of(optimizer))
    try:
        if optimizer is not None:
            part = "optimizer"
            load_optimizer(optimizer, content["optimizer"])
        if controller is not None:
            part = "controller"
            controller.load_state_dict(content["controller"])
        if content["base"] is not None:
            part = "base layer"
            base = layer._modules["base_layer"]
            base.load_state_dict(renamed_for(base, content["base"]))
        part = "layer"
        write_layer(layer, content["layer"], exchange.write)
    except BaseException as error:
        for put_back in undo:
            put_back()
        if not isinstance(error, Exception) or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise CheckpointMismatch(f"the checkpoint does not fit the {part}: {error}") from error


def undo_of_layer(layer: KasminaLayer, with_base: bool, with_buffers: bool = True) -> Callable[[], None]:
    """What puts back all that :func:`write_layer` writes and, with its base, the base layer. Without buffers: an
    :class:`Exchange` keeps these.
    """
    base, loaded = layer._modules["base_layer"], layer._loaded_history_count
    own = [*((layer._buffers[name] for name in layer.BUFFER_DTYPES) if with_buffers else ()), layer.blueprint_weights]
    if layer.lasting_bank is not layer.blueprint_weights:
        own.append(layer.lasting_bank)
    kept = [(tensor, tensor.detach().clone()) for tensor in own]
    if with_base:  # on the host: it may be large
        both = chain(base.parameters(), base.buffers())
        kept += [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in both if oddity_of(tensor) is None]

    def undo() -> None:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)
        layer._loaded_history_count = loaded

    return undo


def _undo_of_controller(controller: GrowthController) -> Callable[[], None]:
    """Its loading replaces values, and writes into none."""
    attributes, snapshots = (
        dict(vars(controller)),
        [blueprints.snapshots for blueprints in controller._blueprints.values()],
    )
    recorded = {} if controller.record is None else dict(vars(controller.record))

    def undo() -> None:
        vars(controller).update(attributes)
        if controller.record is not None:
            vars(controller.record).update(recorded)
        for blueprints, of_layer in zip(controller._blueprints.values(), snapshots, strict=True):
            blueprints.snapshots = of_layer

    return undo


class Exchange:
    """Writes tensors into others so that it can be taken back. What was there goes where the new values came from, where
    that is alike: in a large layer new memory costs more than all the rest of loading.
    """

    def __init__(self) -> None:
        self._written: list[tuple[Tensor, Tensor]] = []

    def write(self, own: Tensor, given: Tensor) -> None:
        plain = all(tensor.is_cpu and tensor.is_contiguous() for tensor in (own, given))
        if not plain or own.dtype != given.dtype:
            self._written.append((own, own.clone()))
            own.copy_(given)
            return
        step = own.new_empty(min(own.numel(), _STEP))
        for here, there in zip(own.view(-1).split(_STEP), given.view(-1).split(_STEP), strict=True):
            kept = step[: here.numel()].copy_(here)
            try:  # an interrupt may come after any call
                self._written.append((here, there))
                here.copy_(there)
            finally:
                there.copy_(kept)

    def undo(self) -> None:
        with torch.no_grad():
            for own, kept in self._written:
                own.copy_(kept)


_STEP = 32_000  # numbers: they stay in a core's cache, and torch asks no other thread for so few


def write_layer(
    layer: KasminaLayer, tensors: Mapping[str, Tensor], write: Callable[[Tensor, Tensor], object] = Tensor.copy_
) -> None:
    """All of the layer's own tensors, in place; ``write`` writes each buffer."""
    with torch.no_grad():
        for name in layer.BUFFER_DTYPES:
            write(layer._buffers[name], tensors[name])
    layer._write_bank(None, tensors[_BANK])
    layer._mark_loaded()
