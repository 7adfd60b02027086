"""Loading state_dicts: checks before a layer takes one, the layouts of the Triton package, names with wrappers in them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kasmina_ext.checkpoint.values import problem_of, problem_of_vector
from kasmina_ext.chunking import chunk_offsets
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.names import WRAPPERS as TORCH_WRAPPERS
from kasmina_ext.state import state_range
from kasmina_ext.state_layout import StateVar, fill_fresh, new_state

if TYPE_CHECKING:
    from kasmina_ext.layer import KasminaLayer

WRAPPERS = ("module", *TORCH_WRAPPERS)
"""With what DataParallel and DistributedDataParallel call what they wrap."""
TRITON_VECTORS = {
    "lifecycle_states": StateVar.LIFECYCLE_STATE,
    "blueprint_ids": StateVar.BLUEPRINT_ID,
    "grafting_strategies": StateVar.GRAFTING_STRATEGY,
}
"""What the Triton package saves of a layer's seeds: vectors ``[S]``."""
# Plain numbers: a tensor compared with a member of an enumeration is False to the compiler.
_FIRST_GRAFTED, _LAST_GRAFTED = map(int, (ExtendedLifecycle.GRAFTING, ExtendedLifecycle.FOSSILIZED))


# ---- what KasminaLayer asks before it loads ------------------------------------------------------


def problems_in(layer: KasminaLayer, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """Why what ``state_dict`` has of the layer's own tensors cannot be loaded; [] where it can. Looks only."""
    problems = []
    for name in (*layer.BUFFER_DTYPES, "blueprint_weights"):
        key = prefix + name
        own = layer._buffers.get(name, layer._parameters.get(name))
        if key not in state_dict or own is None:
            continue
        value = state_dict[key]
        if isinstance(value, Tensor) and value.shape != own.shape:
            problems.append(
                f"size mismatch for {key}: the shape in the state_dict is {list(value.shape)}, "
                f"in this layer {list(own.shape)}."
            )
        elif (problem := problem_of(layer, name, value)) is not None:
            problems.append(f'"{key}" {problem}')
    return problems


def unwrap_keys(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """``{prefix}module.state`` becomes ``{prefix}state``, and so on: the layer was saved in a wrapper. In place."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        while "." in rest and (first := rest.partition("."))[0] in WRAPPERS and first[0] not in layer._modules:
            rest = first[2]
        if prefix + rest not in state_dict:
            state_dict[prefix + rest] = state_dict.pop(key)


def forget_overflows(layer: KasminaLayer, state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """In a ``state_dict`` that was cast to float16, counts and sums beyond 65504 are infinite: what these seeds have seen is
    lost, so it starts afresh. In place; what does not fit the layer is for :func:`problems_in`.
    """
    for name in ("telemetry", "grad_telemetry"):
        seen = state_dict.get(f"{prefix}{name}")
        if isinstance(seen, Tensor) and seen.dtype == torch.float16 and seen.shape == layer._buffers[name].shape:
            lost = seen.isinf().any(1, keepdim=True)
            state_dict[f"{prefix}{name}"] = torch.where(lost, torch.zeros_like(seen), seen)


def adopt_triton_layout(
    layer: KasminaLayer, state_dict: MutableMapping[str, Any], prefix: str, missing_keys: list[str]
) -> tuple[list[str], list[str]]:
    """If ``state_dict`` has this layer's seeds in the Triton package's layout, give it all tensors of ours, in place.

    What that layout lacks starts afresh: epochs, history, telemetry, metrics; alpha is 1. Returns
    why it cannot be loaded, and the keys that it need not have (the bank: the layer keeps its own);
    warns where it can. Vectors of any integer dtype are taken, and of whole floats.
    """
    found = {name: state_dict[prefix + name] for name in TRITON_VECTORS if prefix + name in state_dict}
    if not found or f"{prefix}state" in state_dict:
        return [], []
    missing_keys += [prefix + name for name in TRITON_VECTORS if name not in found]
    problems = [
        f'"{prefix}{name}" {problem}'
        for name, vector in found.items()
        if (problem := problem_of_vector(vector, layer.num_seeds, *_range_of(layer, name))) is not None
    ]
    if problems:
        return problems, []
    for name in found:
        del state_dict[prefix + name]
    fresh = fresh_tensors(layer, next(iter(found.values())).device)
    for name, vector in found.items():
        fresh["state"][TRITON_VECTORS[name]] = vector
    others = ("alpha", "telemetry", "grad_telemetry", "history", "performance_metrics")
    kept = [name for name in others if prefix + name not in state_dict]
    for name, tensor in fresh.items():
        state_dict.setdefault(prefix + name, tensor)
    bank = f"{prefix}blueprint_weights"
    bankless = bank not in state_dict and not layer.blueprint_weights.is_meta
    _warn(layer, prefix, kept, fresh["state"], bankless)
    return [], [bank] if bankless else []


def _range_of(layer: KasminaLayer, name: str) -> tuple[int, int]:
    return state_range(TRITON_VECTORS[name], layer.num_blueprints)


def fresh_tensors(layer: KasminaLayer, device: torch.device | str) -> dict[str, Tensor]:
    """The buffers of a layer like this one whose seeds have done nothing yet, as new tensors."""
    seeds = layer.num_seeds
    fresh = new_state(seeds, device)
    fill_fresh(fresh)
    fresh["state"][StateVar.GRAFTING_STRATEGY] = int(layer.strategy)
    fresh["seed_offsets"] = chunk_offsets(layer.hidden_dim, seeds, layer.chunking).to(device)
    fresh["alpha"] = torch.ones(seeds, dtype=torch.float32, device=device)
    for name in ("telemetry", "grad_telemetry"):
        fresh[name] = torch.zeros(layer._buffers[name].shape, dtype=layer.BUFFER_DTYPES[name], device=device)
    return fresh


def _warn(layer: KasminaLayer, prefix: str, kept: list[str], state: Tensor, bankless: bool) -> None:
    text = (
        f"{prefix.rstrip('.') or type(layer).__name__}: loaded lifecycle, blueprint ids and strategies of the Triton "
        f"package's layout; it has no more, so these start afresh: epochs, {', '.join(kept)}"
    )
    if bankless:
        lifecycle = state[StateVar.LIFECYCLE_STATE]
        grafted = 0 if state.is_meta else int(((lifecycle >= _FIRST_GRAFTED) & (lifecycle <= _LAST_GRAFTED)).sum())
        text += ". blueprint_weights stay as they are in the layer"
        if grafted:
            text += f": {grafted} of its seeds are grafted and need the weights that they had, copy them there"
    if layer.chunking != "uniform" and layer.hidden_dim % layer.num_seeds:
        text += f". That package cuts features with chunking='uniform', this layer with {layer.chunking!r}"
    warnings.warn(text, UserWarning, stacklevel=2)


# ---- the small layers ----------------------------------------------------------------------------


def vector_problems(
    state_dict: Mapping[str, Any], prefix: str, ranges: Mapping[str, tuple[int, int]], num_seeds: int
) -> list[str]:
    """Why those of these vectors ``[S]`` that ``state_dict`` has cannot be loaded: whole numbers in the given ranges."""
    found = {name: state_dict[prefix + name] for name in ranges if prefix + name in state_dict}
    problems = {name: problem_of_vector(vector, num_seeds, *ranges[name]) for name, vector in found.items()}
    return [f'"{prefix}{name}" {problem}' for name, problem in problems.items() if problem is not None]


# ---- whole models --------------------------------------------------------------------------------


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """``model.load_state_dict(...)``, whatever wrapped the model when it was saved, and whatever wraps it now.

    Names may have ``module.`` (DataParallel, DistributedDataParallel), ``_orig_mod.``
    (torch.compile), ``_fsdp_wrapped_module.`` and ``_checkpoint_wrapped_module.`` anywhere in them,
    in ``state_dict``, in ``model`` or in both. A name that the model has as it is written is never
    changed. Arguments, result and errors are those of :meth:`torch.nn.Module.load_state_dict`.
    """
    renamed = renamed_for(model, state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:  # versions of modules, by the modules' names
        places = (_name_in(model, f"{name}." if name else "").removesuffix(".") for name in metadata)
        renamed._metadata = OrderedDict(zip(places, metadata.values(), strict=True))
    return model.load_state_dict(renamed, strict=strict, assign=assign)


def renamed_for(model: nn.Module, tensors: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """``tensors`` with the names that they have in ``model``; two never become one."""
    renamed: OrderedDict[str, Any] = OrderedDict()
    for key, value in tensors.items():
        name = _name_in(model, key)
        renamed[key if name in renamed or (name != key and name in tensors) else name] = value
    return renamed


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a module in ``model`` without the wrappers in it: the same whatever wraps the model."""
    path, here = [], model
    for part in filter(None, name.split(".")):
        if wrapped_by(here) != part:
            path.append(part)
        here = here._modules[part]
    return ".".join(path)


def _name_in(model: nn.Module, key: str) -> str:
    """``key`` with the wrappers that ``model`` has, and without those that it has not."""
    path, here = [], model
    *modules, name = key.split(".")
    for part in modules:
        if here is None:
            path.append(part)
            continue
        inside = _down_to(here, lambda module, part=part: module._modules.get(part) is not None)
        if inside is None and part in WRAPPERS:
            continue
        way, module = inside or _innermost(here)
        path += [*way, part]
        here = module._modules.get(part)
    if here is not None:
        known = (lambda m: name in m._parameters or name in m._buffers) if name else lambda m: False
        path += (_down_to(here, known) or _innermost(here))[0]
    return ".".join([*path, name])


def _down_to(module: nn.Module, found: Callable[[nn.Module], bool]) -> tuple[list[str], nn.Module] | None:
    """The way through wrappers, from ``module`` on, to the first module where ``found``, and that module."""
    way: list[str] = []
    while not found(module):
        inner = wrapped_by(module)
        if inner is None:
            return None
        way.append(inner)
        module = module._modules[inner]
    return way, module


def _innermost(module: nn.Module) -> tuple[list[str], nn.Module]:
    return _down_to(module, lambda inner: wrapped_by(inner) is None)


def wrapped_by(module: nn.Module) -> str | None:
    """What a wrapper calls the module in it: that is all it has; None for any other module."""
    names = [name for name, child in module._modules.items() if child is not None]
    return names[0] if len(names) == 1 and names[0] in WRAPPERS and not module._parameters else None
