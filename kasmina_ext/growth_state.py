"""What a growth controller's state must look like before it is taken: it may come from a file, of anybody's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.arguments import at_least
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.policy import checked_budget

FORMAT = 1
_ENTRIES = {
    "layers", "budget", "steps", "ticks", "lives", "losses", "watched", "reconstruction", "snapshots",
}  # fmt: skip


def taken_from(
    state: Mapping[str, Any],
    layers: Sequence[KasminaLayer],
    sizes: Mapping[str, int],
    lives: Tensor,
    losses: Tensor,
    watched: Sequence[Tensor],
) -> dict[str, Any]:
    """The entries of :meth:`GrowthController.state_dict`, checked, their tensors copied to where these layers are.

    ``sizes`` are the layers' names and numbers of seeds; the tensors are those of a controller of
    these layers, for their shapes and dtypes. ValueError for anything that does not fit.
    """
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise ValueError(f"this is no controller's state of format {FORMAT}")
    missing = _ENTRIES - state.keys()
    if missing:
        raise ValueError(f"the state has no {', '.join(sorted(missing))}")
    if state["layers"] != sizes:
        raise ValueError(f"the state is of layers {state['layers']}, the controller drives {sizes}")
    devices = [layer.device for layer in layers]
    per_layer = [torch.empty(layer.num_seeds, dtype=torch.float64, device="meta") for layer in layers]
    given, of_layers = state["reconstruction"], _as_many("snapshots", state["snapshots"], layers)
    snapshots = [_moved_snapshots(each, layer) for each, layer in zip(of_layers, layers, strict=True)]
    if len({len(each) for each in snapshots}) > 1:
        raise ValueError("snapshots in the state are of different ticks")
    return {
        "budget": checked_budget(state["budget"]),
        "steps": at_least("steps", state["steps"], 0),
        "ticks": at_least("ticks", state["ticks"], 0),
        "lives": _moved("lives", [state["lives"]], [lives], devices[:1])[0],
        "losses": _moved("losses", [state["losses"]], [losses], devices[:1])[0],
        "watched": _moved("watched", state["watched"], watched, devices),
        "reconstruction": None if given is None else _moved("reconstruction", given, per_layer, devices),
        "snapshots": snapshots,
    }


def _moved(name: str, tensors: Any, like: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Copies of a state's tensors on these devices; ValueError unless they are tensors of the shapes and dtypes given."""
    for tensor, expected in zip(_as_many(name, tensors, like), like, strict=True):
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            what = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} in the state must be {expected.dtype} {list(expected.shape)}, got {what}")
    return [tensor.to(device, copy=True) for tensor, device in zip(tensors, devices, strict=True)]


def _moved_snapshots(given: Any, layer: KasminaLayer) -> list[Tensor]:
    shape, device = layer.blueprint_weights.shape, layer.device
    known = isinstance(given, (list, tuple)) and len(given) <= 2
    if not known or not all(isinstance(one, Tensor) and one.shape == shape for one in given):
        raise ValueError("snapshots in the state are of other banks")
    return [one.to(device, copy=True) for one in given]


def _as_many(name: str, values: Any, like: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(values, (list, tuple)) or len(values) != len(like):
        raise ValueError(f"{name} in the state must be a list of {len(like)}")
    return values
