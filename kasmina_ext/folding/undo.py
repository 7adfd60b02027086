"""Taking layers out of a model, and what is kept to put them back."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from kasmina_ext.folding.plan import Folded, FoldError, Graph, Group
from kasmina_ext.folding.targets import Change, own_tensor, revert_changes
from kasmina_ext.layer import KasminaLayer

# What forward and backward run; a layer's own run outside of its base's.
_HOOKS_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_pre_hooks")
_HOOKS_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks")
_KIND_OF_HOOKS = "_is_full_backward_hook"


@dataclass
class _Place:
    """A layer that was taken out, and the module that stands there now."""

    number: int
    """Of all that were ever taken out."""
    layer: KasminaLayer
    plain: ref[nn.Module]
    own_hooks: list[tuple[str, Any]]
    """Attributes of the plain module as they were, before it was given the layer's."""
    hooks_added: list[tuple[str, list[int]]]
    """Hooks of the layer beside those of the plain module, by their keys."""


@dataclass(eq=False)
class Record:
    """What one fold did to one module, and the layers that it was for."""

    generation: int
    target: ref[nn.Module] | None
    changes: list[Change]
    originals: dict[str, Tensor]
    places: list[_Place] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the weights and the layers that are kept."""
        layers = (place.layer for place in self.places)
        own = (tensor for layer in layers for tensor in (*layer._parameters.values(), *layer._buffers.values()))
        return sum(tensor.nbytes for tensor in (*self.originals.values(), *own) if tensor is not None)


_numbers = itertools.count()
# Not on the modules: those are plain now, for pickle as well. By the module that stands where layers stood.
_kept: WeakKeyDictionary[nn.Module, list[Record]] = WeakKeyDictionary()


def new_record(group: Group) -> Record:
    """With copies of the weights that will change."""
    existing = (change.name for change in group.changes if change.created is None)
    originals = {name: own_tensor(group.target, name).detach().clone() for name in existing}
    target = None if group.target is None else ref(group.target)
    return Record(next(_numbers), target, group.changes, originals)


def take_out(graph: Graph, layer: KasminaLayer, record: Record | None) -> None:
    """The base layer where the layer was; layers inside of it have been taken out before."""
    plain = layer._modules["base_layer"]
    own, added = _hand_on_hooks(layer, plain)
    graph.replace(layer, plain)
    layer._modules["base_layer"] = Folded()
    if record is not None:
        record.places.append(_Place(next(_numbers), layer, ref(plain), own, added))
        records = _kept.setdefault(plain, [])
        if record not in records:
            records.append(record)


def _hand_on_hooks(layer: KasminaLayer, plain: nn.Module) -> tuple[list[tuple[str, Any]], list[tuple[str, list[int]]]]:
    own, added = [], []
    for name in (*_HOOKS_BEFORE, *_HOOKS_AFTER):
        hooks: OrderedDict = getattr(layer, name)
        there: OrderedDict = getattr(plain, name)
        if hooks and not there:  # the very dict: the handles that remove hooks know no other
            own.append((name, there))
            setattr(plain, name, hooks)
        elif hooks:
            there.update(hooks)
            added.append((name, list(hooks)))
            if name in _HOOKS_BEFORE:
                for key in reversed(hooks):
                    there.move_to_end(key, last=False)
    if getattr(layer, _KIND_OF_HOOKS) is not None:
        own.append((_KIND_OF_HOOKS, getattr(plain, _KIND_OF_HOOKS)))
        setattr(plain, _KIND_OF_HOOKS, getattr(layer, _KIND_OF_HOOKS))
    return own, added


def records_in(graph: Graph) -> list[Record]:
    """Of what stands in this model, the last fold first."""
    found = {id(record): record for module in graph.names for record in _kept.get(module, ())}
    return sorted(found.values(), key=lambda record: -record.generation)


def check_records(graph: Graph, records: list[Record], discard_changes: bool) -> None:
    """FoldError unless all can be undone: everything is there, and every weight is what folding made of it."""
    problems: dict[str, str] = {}
    # A module that was folded into twice: its weights as they will be once the later fold is undone.
    then: dict[tuple[nn.Module, str], Tensor | None] = {}
    for record in records:
        for place in record.places:
            if place.plain() not in graph.names:
                problems[type(place.layer).__name__] = (
                    "layers were folded together, and not all are here: give the whole"
                )
        target = None if record.target is None else record.target()
        if record.target is not None and target not in graph.names:
            problems["a module"] = "that was folded into is not in this model any more"
            continue
        for change in record.changes:
            key = (target, change.name)
            tensor = then[key] if key in then else own_tensor(target, change.name)
            original = record.originals.get(change.name)
            reason = _difference(change, original, tensor, discard_changes)
            if reason:
                problems[graph.names[target]] = f"{type(target).__name__}: its {change.name} {reason}"
            then[key] = original
    if problems:
        raise FoldError("unfold", problems)


def _difference(change: Change, original: Tensor | None, tensor: Tensor | None, discard_changes: bool) -> str:
    """Why ``tensor`` cannot be taken for what folding made; "" where it can."""
    made = change.created if original is None else original
    if tensor is None:
        return "is not there any more"
    if tensor.dtype != made.dtype or tensor.shape != made.shape:
        kinds = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (made, tensor))
        return "was {} when it was folded, and is {} now".format(*kinds)
    if discard_changes:
        return ""
    change = change.on(tensor.device)
    if original is None:
        same = _same_bits(tensor, change.new_values(tensor))
    else:
        old = original.to(tensor.device)
        same = all(_same_bits(tensor[where], new) for where, new in change.pieces(old))
    return "" if same else "has changed since it was folded (discard_changes=True puts back what was kept)"


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Of NaN and of the sign of zeros, too."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.detach().view(integers), y.detach().view(integers))


def put_weights_back(record: Record) -> None:
    """The bits that they had, wherever writing them has come to."""
    target = None if record.target is None else record.target()
    if target is not None:
        revert_changes(target, record.changes, record.originals)


def undo(graph: Graph, records: list[Record]) -> None:
    """What :func:`check_records` agreed to, in its order."""
    for record in records:
        put_weights_back(record)
    places = [(place, record) for record in records for place in record.places]
    for place, record in sorted(places, key=lambda pair: -pair[0].number):
        _put_back(graph, place)
        plain = place.plain()
        _kept[plain] = [kept for kept in _kept.get(plain, ()) if kept is not record]
        if not _kept[plain]:
            del _kept[plain]


def _put_back(graph: Graph, place: _Place) -> None:
    layer, plain = place.layer, place.plain()
    for name, keys in place.hooks_added:
        for key in keys:
            getattr(plain, name).pop(key, None)
    for name, own in place.own_hooks:
        setattr(plain, name, own)
    tensor = next((t for t in (*plain.parameters(), *plain.buffers())), None)
    if tensor is not None and tensor.device != layer.device:
        layer.to(tensor.device)
    layer.training = plain.training
    graph.replace(plain, layer)
    layer._modules["base_layer"] = plain
    graph.holders[plain] = [(layer, "base_layer")]
