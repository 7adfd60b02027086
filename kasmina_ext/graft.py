"""Growing into a model that there is: its modules get seeds where they stand, and are given back as they were."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kasmina_ext.arguments import positive
from kasmina_ext.folding.plan import Graph
from kasmina_ext.graftable import Site, num_features, seeds_for, sites_in
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.handle import SeedHandle, model_of
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.names import matches
from kasmina_ext.seeds import Seeds

Which = str | Callable[[str, nn.Module], object] | type[nn.Module] | nn.Module | Iterable
"""Modules: a pattern of names, a predicate of name and module, a class, a module, or several of these."""

_OWN_SETTINGS = {"base_layer", "chunk_size", "num_seeds", "strategy", "hidden_dim", "feature_dim", "device"}
_SETTINGS = set(inspect.signature(KasminaLayer).parameters) - _OWN_SETTINGS
_MAX_NAMES = 40

# Not on the modules, which are the user's. By the module that a parameter is of: that is there for as long as it matters,
# while parameters may be replaced.
_required_gradients: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def graft_(
    model: nn.Module | SeedHandle,
    which: Which,
    *,
    chunk_size: int = 16,
    strategy: GraftingStrategy | int | str = "affine",
    freeze: bool = True,
    exclude: Which = (),
    table: bool = True,
    **settings: Any,
) -> Seeds:
    """Give seeds to modules of a model, in place, and freeze what it has learnt: the model computes what it did, and grows.

    .. code-block:: python

        seeds = kasmina_ext.graft_(model, "*.mlp.*")
        optimizer = torch.optim.AdamW(kasmina_ext.param_groups(model, lr=5e-3))

    A :class:`~kasmina_ext.layer.KasminaLayer` takes the place of each module and has it as
    ``base_layer``, on its device and in its mode; the names in a state_dict get that part, and those
    of the seeds' tensors beside it. Whatever is asked of the layer and is not its own
    (``weight``, ``in_features``, ...) the module answers. Code that looks at a module's class sees
    the layer, which is none: transformers' ``resize_token_embeddings`` refuses an embedding with
    seeds (resize first), and ``save_pretrained`` a head with seeds that is tied to the embedding
    (leave it out, or save the seeds alone, or what :func:`kasmina_ext.fold_` gives).

    ============================================  ============================================================
    kinds of modules that can have seeds          features
    ============================================  ============================================================
    Linear, Bilinear, transformers' Conv1D,       ``out_features``, ``nf``; last
    what says ``in_features``, ``out_features``
    Conv1d to 3d, ConvTranspose1d to 3d           ``out_channels``; dimension 1
    BatchNorm, InstanceNorm, GroupNorm            the channels; dimension 1
    LayerNorm, RMSNorm                            the last dimension; dimension 1 in a class of your own that
                                                  ends in 1d to 3d or has ``data_format="channels_first"``
    a class of your own called ...Norm...         as long as its weight; last, or as above
    Embedding                                     ``embedding_dim``; last
    ============================================  ============================================================

    Everything else is wrapped by hand, with ``KasminaLayer(module, hidden_dim=...)``.

    Arguments:
        model: any module, also one that torch.compile has wrapped, which compiles anew.
        which: an ``fnmatch`` pattern of names as in ``named_modules`` (``"*.mlp.*"``, ``"lm_head"``),
            a function of a name and a module, a class (``torch.nn.Linear``), a module (and all
            inside of it), or a list of these, of which each must find something. Names are those
            without ``base_layer`` and what else wrappers put in. A module that is registered under
            several names is one, with one layer everywhere; weights that are tied stay tied.
        chunk_size: features per seed, at most: a module of H features gets H / chunk_size seeds,
            rounded up, which own nearly equal numbers.
        strategy: of the seeds; see :class:`~kasmina_ext.grafting.GraftingStrategy`.
        freeze: whether all other parameters of the model stop to require a gradient, and lose the
            one they have, so that no optimizer moves them. :func:`ungraft_` brings back which did
            before there were layers; :func:`kasmina_ext.fold_` leaves them frozen.
        exclude: modules that are left out, written as ``which``. A pattern that finds nothing here, or a module,
            is an error as well: it would go unnoticed that what it was to keep out has seeds. Classes and
            functions may find nothing.
        table: whether to print :meth:`Seeds.table`.
        settings: more arguments for every layer: ``alpha_schedule``, ``ramp_epochs``, ... The bank has
            as many rows as the strategy takes if ``num_blueprints`` does not say otherwise.

    Returns the handle on all seeds of the model. Modules that have seeds already stay as they are,
    and modules that cannot have any are left out, such as the ``out_proj`` of nn.MultiheadAttention, whose
    weight is read but which is never called; ``Seeds.skipped`` and the table say which and why. It is an error
    for a module that was named itself, not by a pattern.

    ValueError where nothing is left to graft, with the names that there are; for a model that is wrapped for
    several processes already (DDP, FSDP: graft before); TypeError for an argument of the wrong kind.
    After an error the model is as it was.
    """
    model = model_of(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chunk_size, strategy = positive("chunk_size", chunk_size), GraftingStrategy.parse(strategy)
    unknown = settings.keys() - _SETTINGS
    if unknown:
        raise TypeError(f"graft_ has no setting {sorted(unknown)[0]!r}; there are {', '.join(sorted(_SETTINGS))}")
    if settings.get("num_blueprints") is None:
        settings["num_blueprints"] = strategy.rows
    _check_not_wrapped(model, "graft")
    sites = sites_in(model)
    chosen, skipped = _choose(model, sites, which, exclude)
    is_first = not any(site.is_grafted for site in sites)
    with torch.inference_mode(False), contextlib.ExitStack() as undo:
        layers = {site: _layer_for(site, chunk_size, strategy, settings) for site in chosen}
        for site, layer in layers.items():
            for holder, key in site.places:
                undo.callback(holder._modules.__setitem__, key, site.module)
                holder._modules[key] = layer
        if freeze:
            undo.callback(_restore, [(p, p.requires_grad, p.grad) for p in model.parameters()])
            before = _freeze(model)
        seeds = Seeds(model)
        seeds.skipped = skipped
        if table:
            seeds.table().show()  # which may fail, too
        undo.pop_all()
    if freeze:
        for module, flags in before.items():
            known = {} if is_first else _required_gradients.get(module, {})
            _required_gradients[module] = flags | known
    return seeds


def ungraft_(model: nn.Module | SeedHandle) -> nn.Module:
    """Take all layers out of a model: the modules that they wrap stand where they did, the same objects, bit for bit.

    Returns the model; where it is itself a layer, what that wraps. Parameters that :func:`graft_`
    froze require a gradient again if they did before. (A deepcopy or a pickle of the model knows
    nothing of that: there they stay as they are.) All layers go, also those that were made by hand,
    and with them what the seeds have learnt: :func:`kasmina_ext.fold_` puts that into the weights
    instead, and :func:`kasmina_ext.save_seeds` keeps it. Hooks that were put on a layer go with it.

    ValueError where there is no layer, for DDP and FSDP as in :func:`graft_`, and where a layer was compiled
    by itself. Nothing is changed then.
    """
    model = model_of(model)
    graph = Graph(model)
    if not graph.layers:
        raise ValueError("there is no KasminaLayer in the model: nothing to ungraft")
    _check_not_wrapped(model, "ungraft")
    for name, layer in graph.layers.items():
        if any(type(holder).__name__ == "OptimizedModule" for holder, _ in graph.holders[layer]):
            raise ValueError(f"cannot ungraft {name!r}: the layer was compiled by itself")
    for layer in graph.layers.values():  # outer ones first: a layer within a layer is then where that was
        graph.replace(layer, layer._modules["base_layer"])
    for module in graph.root.modules():
        for name, required in _required_gradients.pop(module, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad = required
    return graph.root


def _layer_for(site: Site, chunk_size: int, strategy: GraftingStrategy, settings: dict[str, Any]) -> KasminaLayer:
    try:
        seeds = seeds_for(num_features(site), chunk_size)
        layer = KasminaLayer(site.module, num_seeds=seeds, strategy=strategy, **site.arguments, **settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot graft {site.name!r}: {error}") from error
    layer.training = layer.calls_only.training = site.module.training
    return layer


# ---- freezing ----------------------------------------------------------------------------------------------------


def _freeze(model: nn.Module) -> dict[nn.Module, dict[str, bool]]:
    """All parameters but those of layers; which of them required a gradient, by the modules that have them."""
    layers = [module for module in model.modules() if isinstance(module, KasminaLayer)]
    own = {id(p) for layer in layers for name, p in layer.named_parameters() if not name.startswith("base_layer.")}
    before: dict[nn.Module, dict[str, bool]] = {}
    for module in model.modules():
        flags = {name: p.requires_grad for name, p in module._parameters.items() if p is not None and id(p) not in own}
        if flags:
            before[module] = flags
    for module, flags in before.items():
        for name in flags:
            parameter = module._parameters[name]
            parameter.requires_grad = False  # not requires_grad_, which a lazy one has not
            parameter.grad = None  # else an optimizer that knows it would go on
    return before


def _restore(parameters: list[tuple[nn.Parameter, bool, torch.Tensor | None]]) -> None:
    for parameter, required, gradient in parameters:
        parameter.requires_grad = required
        parameter.grad = gradient


def _check_not_wrapped(model: nn.Module, action: str) -> None:
    """ValueError for what counts on the parameters that it has found."""
    kinds: tuple[type, ...] = (nn.parallel.DistributedDataParallel,)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        kinds += (FSDPModule, FullyShardedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            kind = "fully_shard" if len(kinds) > 1 and isinstance(module, kinds[1]) else type(module).__name__
            where = f"{name!r}" if name else "the model"
            raise ValueError(f"{where} is wrapped for several processes by {kind}: {action} it before that")


# ---- which modules -----------------------------------------------------------------------------------------------


class _Wanted(NamedTuple):
    """One entry of what the user asked for."""

    text: str
    finds: Callable[[Site], bool]
    is_named: Callable[[Site], bool]
    """Whether it means this very module."""
    pattern: str = ""
    is_particular: bool = True
    """A pattern or a module, which is a mistake where it finds nothing; a class or a predicate may suit many models."""
    module: nn.Module | None = None


def _choose(model: nn.Module, sites: list[Site], which: Which, exclude: Which) -> tuple[list[Site], dict[str, str]]:
    """The modules to graft, and by name why others that were found are not."""
    parts = set(model.modules())  # any of them may be excluded, also those that could not be grafted
    wanted, unwanted = list(_wanted(which, "which")), list(_wanted(exclude, "exclude"))
    if not wanted:
        raise ValueError("which is empty: give a pattern, a predicate, a class, a module or a list of these")
    chosen: dict[Site, None] = {}
    skipped: dict[str, str] = {}
    for entry in wanted:
        found = [site for site in sites if entry.finds(site)]
        if not found:
            raise ValueError(_nothing_found(entry, sites, ""))
        for site in found:
            if any(other.finds(site) for other in unwanted):
                continue
            if site.is_grafted:
                skipped[site.name] = "it has seeds already"
            elif site.refused and entry.is_named(site):
                raise ValueError(f"cannot graft {site.name or '(model)'!r}: {site.refused}")
            elif site.refused:
                skipped[site.name] = site.refused
            else:
                chosen[site] = None
    for entry in unwanted:
        if entry.is_particular and entry.module not in parts and not any(entry.finds(site) for site in sites):
            raise ValueError(_nothing_found(entry, sites, "exclude: "))
    if not chosen:
        reasons = [f"{name or '(model)'}: {reason}" for name, reason in skipped.items()]
        reasons = reasons or ["everything found is excluded"]
        raise ValueError("there is nothing left to graft:\n  " + _lines(reasons))
    return [site for site in sites if site in chosen], skipped


def _wanted(which: Which, what: str) -> Iterator[_Wanted]:
    if isinstance(which, str):
        yield _Wanted(
            repr(which),
            lambda site: any(matches(name, which) for name in site.names),
            lambda site: which in site.names,
            which,
        )
    elif isinstance(which, nn.Module):
        inside = set(which.modules())
        yield _Wanted(
            f"the {type(which).__name__} given",
            lambda site: site.module in inside or site.plain in inside,
            lambda site: site.module is which,
            module=which,
        )
    elif isinstance(which, Iterable):
        for entry in which:
            if isinstance(entry, Iterable) and not isinstance(entry, (str, nn.Module)):
                raise TypeError(f"{what} must be a flat list, it has a {type(entry).__name__} in it")
            yield from _wanted(entry, what)
    elif isinstance(which, type) and issubclass(which, nn.Module):
        yield _Wanted(
            which.__name__, lambda site: isinstance(site.plain, which), lambda site: False, is_particular=False
        )
    elif callable(which) and not isinstance(which, type):
        yield _Wanted(
            "the predicate",
            lambda site: any(which(name, site.plain) for name in site.names),
            lambda site: False,
            is_particular=False,
        )
    else:
        raise TypeError(
            f"{what} must be a pattern, a predicate, a class, a module or a list, got {type(which).__name__}"
        )


def _nothing_found(entry: _Wanted, sites: list[Site], where: str) -> str:
    if not sites:
        return (
            f"{where}{entry.text} finds nothing: there is no module in the model that can have seeds by itself; "
            "KasminaLayer(module, hidden_dim=...) wraps others by hand"
        )
    groups: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for site in sites:
        # Blocks that are all alike take one line; it is a pattern, too.
        groups[re.sub(r"(?<![^.])\d+(?![^.])", "*", site.name)][type(site.plain).__name__] += 1
    known = [
        f"{name}  ({', '.join(f'{count} {kind}' if count > 1 else kind for kind, count in kinds.items())})"
        for name, kinds in groups.items()
    ]
    hint = _near(entry.pattern, sites) if entry.pattern else ""
    return f"{where}{entry.text} finds none of the modules that can have seeds{hint}, which are:\n  " + _lines(known)


def _near(pattern: str, sites: list[Site]) -> str:
    """What may have been meant: the modules inside, or, by a part of a name or a regular expression, a pattern."""
    inside, part = f"{pattern}.*", pattern.strip(".*^$\\")
    if any(matches(name, inside) for site in sites for name in site.names):
        return f" ({inside!r} finds what is inside of it)"
    found = sum(any(matches(name, f"*{part}*") for name in site.names) for site in sites)
    return f" (patterns are of whole names: '*{part}*' finds {found})" if part and found else ""


def _lines(lines: list[str]) -> str:
    more = [f"... and {len(lines) - _MAX_NAMES} more"] if len(lines) > _MAX_NAMES else []
    return "\n  ".join(lines[:_MAX_NAMES] + more)
