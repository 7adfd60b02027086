"""What folding a model would do, found out before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kasmina_ext import reference
from kasmina_ext.folding.producers import production_of
from kasmina_ext.folding.targets import FLOATS, Change, Form, NotFoldable, changes_of, own_tensor
from kasmina_ext.folding.trial import checked_form
from kasmina_ext.graftable import plain_of
from kasmina_ext.layer import KasminaLayer


class FoldError(ValueError):
    """Names every module that stands in the way, and why. ``problems``: the same as a dict."""

    def __init__(self, action: str, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        lines = (f"{name or 'the model'}: {reason}" for name, reason in self.problems.items())
        super().__init__(f"cannot {action}, and nothing was changed:\n  " + "\n  ".join(lines))
        self._action = action

    def __reduce__(self) -> tuple:
        return FoldError, (self._action, self.problems)


class Folded(nn.Module):
    """In a folded layer, where its base was: whoever still calls the layer must not have a and b twice."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this layer was folded into its base layer, which took its place; unfold_ puts it back")


class Graph:
    """Who holds whom in a model, each module once; kept up to date by those who change it."""

    def __init__(self, root: nn.Module) -> None:
        if not isinstance(root, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(root).__name__}")
        self.root = root
        self.names: dict[nn.Module, str] = {module: name for name, module in root.named_modules()}
        self.holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {module: [] for module in self.names}
        for module in self.names:
            for key, child in module._modules.items():
                if child is not None:
                    self.holders[child].append((module, key))
        self.layers = {name: module for module, name in self.names.items() if isinstance(module, KasminaLayer)}
        self._memory: dict[int, list[tuple[int, int, nn.Module, str]]] | None = None

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """``new`` everywhere where ``old`` is."""
        for holder, key in self.holders[old]:
            holder._modules[key] = new
        self.holders[new], self.holders[old] = self.holders[old], []
        self.root = new if self.root is old else self.root

    def other_uses(self, module: nn.Module, holder: nn.Module, key: str) -> list[str]:
        """Names of places, other than this one, where the module is as well."""
        others = [place for place in self.holders[module] if place != (holder, key)]
        return [f"{self.names[other]}.{name}".lstrip(".") for other, name in others]

    def who_shares(self, module: nn.Module, name: str) -> str | None:
        """Another tensor in the model that lies in the same memory as this one of ``module``, by name."""
        if self._memory is None:
            self._memory = {}
            for owner in self.names:
                plain = ((key, value) for key, value in vars(owner).items() if isinstance(value, Tensor))
                for key, tensor in chain(owner._parameters.items(), owner._buffers.items(), plain):
                    span = _span(tensor)
                    if span is not None:
                        self._memory.setdefault(span[0], []).append((*span[1:], owner, key))
        span = _span(own_tensor(module, name))
        for start, stop, owner, key in self._memory[span[0]] if span else ():
            if (owner, key) != (module, name) and start < span[2] and span[1] < stop:
                return f"{self.names[owner]}.{key}".lstrip(".")
        return None


def _span(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """Its storage, and the first and last address; None where it has none that is known."""
    if tensor is None or tensor.numel() == 0:
        return None
    try:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        start = tensor.data_ptr()
        return tensor.untyped_storage().data_ptr(), start, start + reach * tensor.element_size()
    except (RuntimeError, NotImplementedError):  # sparse, quantised, fake
        return None


# ---- the plan --------------------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """A layer, and what is to be folded of it."""

    name: str
    layer: KasminaLayer
    a: Tensor
    """float64 ``[H]``, as ``b``."""
    b: Tensor
    base: str
    """Type of the base layer."""
    notes: list[str]
    target: nn.Module | None = None
    """None: there is nothing to fold."""
    form: Form | None = None
    """Of the target."""

    @property
    def changed(self) -> Tensor:
        return (self.a != 1) | (self.b != 0)


class Group(NamedTuple):
    """The layers that go into one module, the inner ones first."""

    target: nn.Module | None
    sites: list[Site]
    changes: list[Change]
    bound: float


class Plan(NamedTuple):
    groups: list[Group]
    problems: dict[str, str]
    """Of layers that are skipped."""
    graph: Graph

    @property
    def sites(self) -> list[Site]:
        """In an order in which a layer comes after those inside of it."""
        order = {name: number for number, name in enumerate(self.graph.layers)}
        return sorted((site for group in self.groups for site in group.sites), key=lambda site: -order[site.name])

    def rows(self, names: Mapping[nn.Module, str]) -> dict[str, dict[str, Any]]:
        """Of a :class:`~kasmina_ext.folding.report.FoldReport`; ``names`` of the modules that took a and b."""
        found = {site.name: (group, site) for group in self.groups for site in group.sites}
        rows = {}
        for name, layer in self.graph.layers.items():
            if name in found:
                rows[name] = _row(*found[name], names)
            elif name in self.problems:
                rows[name] = _skipped(layer, self.problems[name])
        return rows


def _row(group: Group, site: Site, names: Mapping[nn.Module, str]) -> dict[str, Any]:
    target = group.target
    return {
        "into": "" if target is None else names[target] or "(model)",
        "kind": site.base if target is None else type(target).__name__,
        "features": site.layer.hidden_dim,
        "changed": int(site.changed.sum()),
        "scale": (site.a - 1).abs().max().item(),
        "shift": site.b.abs().max().item(),
        "bound": group.bound,
        "added": ", ".join(change.name for change in group.changes if change.created is not None),
        "note": "; ".join(site.notes),
        "folded": True,
    }


def _skipped(layer: KasminaLayer, reason: str) -> dict[str, Any]:
    unknown = {"changed": 0, "scale": float("nan"), "shift": float("nan"), "bound": float("nan"), "added": ""}
    kind = type(plain_of(layer)).__name__
    return {"into": "", "kind": kind, "features": layer.hidden_dim, **unknown, "note": reason, "folded": False}


def plan(graph: Graph, *, strict: bool = True, chosen: Mapping[KasminaLayer, Tensor] | None = None) -> Plan:
    """Which tensors of which modules become what. Writes nothing; waits for the device.

    ``chosen``: bool ``[S]`` of each layer, the seeds to fold, which must be grafted or do nothing; None is all.
    FoldError where there are problems and ``strict``.
    """
    problems: dict[str, str] = {}
    together: dict[nn.Module, list[Site]] = {}
    groups: list[Group] = []
    for name, layer in reversed(graph.layers.items()):
        if chosen is not None and not bool(chosen[layer].any()):
            continue
        try:
            site = _site(graph, name, layer, chosen, problems)
        except NotFoldable as why:
            problems[name] = f"{type(plain_of(layer)).__name__}: {why}"
        else:
            if site.target is None:
                groups.append(Group(None, [site], [], 0.0))
            else:
                together.setdefault(site.target, []).append(site)
    for target, sites in together.items():
        try:
            groups.append(_group(graph, target, sites))
        except NotFoldable as why:
            problems |= {site.name: f"{type(target).__name__}: {why}" for site in sites}
    problems = {name: problems[name] for name in graph.layers if name in problems}
    if problems and strict:
        raise FoldError("fold" if chosen is None else "absorb", problems)
    return Plan(groups, problems, graph)


def _site(graph: Graph, name: str, layer: KasminaLayer, chosen, problems: Mapping[str, str]) -> Site:
    base = layer._modules["base_layer"]
    _check_layer(graph, layer, base)
    dtype = _dtype_inside(graph, layer)
    a, b = seed_effect(layer, dtype, None if chosen is None else chosen[layer])
    if not bool((torch.isfinite(a) & torch.isfinite(b)).all()):
        raise NotFoldable("a grafted seed's blueprint is not finite")
    if chosen is not None and "blueprint_weights" not in layer._parameters:
        raise NotFoldable("the layer's blueprint_weights is parametrized: its seeds cannot be made neutral")
    site = Site(name, layer, a, b, type(plain_of(base)).__name__, [])
    if not bool(site.changed.any()):
        return site
    for holder, key in graph.holders[layer]:
        if isinstance(holder, nn.MultiheadAttention):
            raise NotFoldable(f"MultiheadAttention uses {key}'s weight without calling it: its seeds never took part")
    production = production_of(base)
    for (_, holder), (_, inner) in zip(production.path, production.path[1:], strict=False):
        key = next(key for key, child in holder._modules.items() if child is inner)
        _check_single_use(graph, inner, holder, key)
    for _, inner in production.path[:-1]:
        if isinstance(inner, KasminaLayer):
            _check_inner(graph, site, inner, chosen, problems)
    form = checked_form(production.target, layer.feature_dim)
    if form.features != layer.hidden_dim:
        raise NotFoldable(f"{form.kind} puts out {form.features} features, the layer has {layer.hidden_dim}")
    if production.dropouts and bool((b != 0).any()):
        if any(dropout.training for dropout in production.dropouts):
            raise NotFoldable("a dropout comes after the weights and would drop what is added: call eval() first")
        site.notes.append("in training, dropout now drops what was added, too")
    hooks = sum(len(module._forward_hooks) for _, module in production.path)
    if hooks:
        site.notes.append(f"{hooks} forward hooks see the folded output")
    return site._replace(target=production.target, form=form)


def _check_layer(graph: Graph, layer: KasminaLayer, base: nn.Module) -> None:
    for method in ("forward", "_blend"):
        if getattr(type(layer), method) is not getattr(KasminaLayer, method) or method in vars(layer):
            raise NotFoldable(f"{type(layer).__name__} has its own {method}, which may do something else")
    if isinstance(base, Folded):
        raise NotFoldable("the layer has been folded already; its base took its place")
    _check_single_use(graph, base, layer, "base_layer")
    if any(type(holder).__name__ == "OptimizedModule" for holder, _ in graph.holders[layer]):
        raise NotFoldable("the layer itself was compiled: fold first, then compile")
    bank = layer.blueprint_weights
    if type(bank) not in (Tensor, nn.Parameter):
        raise NotFoldable(f"the layer's blueprint_weights is a {type(bank).__name__}: sharded, or no plain tensor")
    if bank.is_meta or layer._buffers["state"].is_meta:
        raise NotFoldable("the layer is on the meta device: it has no values")
    flags = (layer._is_full_backward_hook, base._is_full_backward_hook)
    if None not in flags and flags[0] != flags[1]:
        raise NotFoldable("layer and base layer have backward hooks of different kinds")


def _check_single_use(graph: Graph, module: nn.Module, holder: nn.Module, key: str) -> None:
    others = graph.other_uses(module, holder, key)
    if others:
        place = f"{graph.names[holder]}.{key}".lstrip(".")
        raise NotFoldable(f"{place} is also used as {', '.join(others)}")


def _check_inner(graph: Graph, outer: Site, inner: KasminaLayer, chosen, problems: Mapping[str, str]) -> None:
    """A layer on the way to the weights must be folded as well, or do nothing to the features in question."""
    name = graph.names[inner]
    if name in problems:
        raise NotFoldable(f"{name} lies in between and cannot be folded")
    if chosen is None:
        return
    a, b = seed_effect(inner, torch.float32, ~chosen[inner])
    if inner.hidden_dim == outer.layer.hidden_dim and bool((((a != 1) | (b != 0)) & outer.changed).any()):
        raise NotFoldable(f"live seeds of {name} lie in between")


def seed_effect(layer: KasminaLayer, dtype: torch.dtype, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of the layer's features, float64 ``[H]``, as its forward has them for activations of ``dtype``;
    1 and -0.0 for seeds that are not ``chosen`` (bool ``[S]``; None: all are).
    """
    buffers, bank = layer._buffers, layer.blueprint_weights.detach()
    offsets = buffers["seed_offsets"]
    a, b = reference.coefficients(offsets, buffers["state"], buffers["alpha"], bank, dtype)
    if chosen is not None:
        owner, owned = reference.feature_owner(offsets, layer.hidden_dim)
        taken = owned & chosen[owner]
        a, b = torch.where(taken, a, 1.0), torch.where(taken, b, -0.0)
    return a.double(), b.double()


def _dtype_inside(graph: Graph, layer: KasminaLayer) -> torch.dtype:
    """Of the base layer's weights, so of the activations (but for autocast, which does not compute in float64)."""
    base = plain_of(layer)
    tensors = chain(base.parameters(), base.buffers())
    inside = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
    return inside or _dtype_of_model(graph, layer) or torch.float32


def _group(graph: Graph, target: nn.Module, sites: list[Site]) -> Group:
    a, b = sites[0].a, sites[0].b
    for site in sites[1:]:
        a, b = site.a * a, site.a * b + site.b
    changes, bound = changes_of(target, sites[0].form, a, b, _dtype_of_model(graph, sites[0].layer))
    for change in changes:
        other = None if change.created is not None else graph.who_shares(target, change.name)
        if other is not None:
            raise NotFoldable(f"its {change.name} is tied: {other} lies in the same memory")
    return Group(target, sites, changes, bound.max().item())


def _dtype_of_model(graph: Graph, layer: KasminaLayer) -> torch.dtype | None:
    """The one dtype of all weights but banks; the bank's where there are none, None where there are several."""
    own = (p for module in graph.names if not isinstance(module, KasminaLayer) for p in module._parameters.values())
    dtypes = {parameter.dtype for parameter in own if parameter is not None and parameter.dtype in FLOATS}
    if not dtypes:
        return layer.blueprint_weights.dtype
    return dtypes.pop() if len(dtypes) == 1 else None
