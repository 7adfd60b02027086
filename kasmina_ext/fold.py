"""Shipping: what the seeds have learnt goes into the weights, and the network is a plain one again.

A grafted seed makes ``y = a x + b`` of its features. Where x is the output of a module that is linear in its weight
and bias, the same comes from ``W <- diag(a) W`` and ``bias <- a bias + b``. Both are computed in float64 from the a and
b that the forward uses, and rounded once, to nearest even, to the weight's dtype, of unit roundoff u: 2^-24 for
float32, 2^-11 for float16, 2^-8 for bfloat16, 2^-53 for float64. So, with all arithmetic exact, an output feature
``y = sum_k W_k x_k + bias`` of the folded module is off by at most ``u (sum_k |W_k| |x_k| + |bias|)``, W and bias being
the folded ones before they are rounded. (float64: the product ``a bias`` is rounded as well and adds its own u. Where
W_k is subnormal, which happens in float16, half of the smallest step takes the place of ``u |W_k|``.) What a kernel
rounds when it sums comes on top, as it did before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kasmina_ext.folding import undo
from kasmina_ext.folding.plan import FoldError, Graph, plan
from kasmina_ext.folding.report import FoldReport
from kasmina_ext.folding.targets import apply_changes
from kasmina_ext.handle import SeedHandle, model_of
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.report import counted
from kasmina_ext.seed_arguments import SeedIds
from kasmina_ext.selection import Selection
from kasmina_ext.state_layout import NO_ID

__all__ = ["FoldError", "FoldReport", "absorb", "fold_", "fold_report", "unfold_"]

_FOSSILIZED, _DORMANT = int(ExtendedLifecycle.FOSSILIZED), int(ExtendedLifecycle.DORMANT)
_reports: WeakKeyDictionary[nn.Module, FoldReport] = WeakKeyDictionary()


def fold_(model: nn.Module | SeedHandle, *, strict: bool = True, keep: bool = True) -> nn.Module:
    """Fold all grafted seeds of all layers in ``model`` into its weights, in place, and take the layers out.

    Returns the model; where the model is itself a layer, its base, which is the result. Every
    :class:`~kasmina_ext.layer.KasminaLayer`'s base stands where the layer stood: names and
    state_dict keys are those from before there were seeds (but for a bias that had to be added),
    parameters are the same objects, and ``requires_grad``, training mode and hooks are as they
    were; hooks of a layer are its base's now. Gradients and what an optimizer remembers are not
    touched: fold when training is over. :func:`fold_report` tells what was done. Waits for the
    device.

    ========================================  ==============================================================
    base layer                                what takes a and b
    ========================================  ==============================================================
    Linear, Bilinear, transformers' Conv1D    weight, bias
    Conv1d to 3d, ConvTranspose1d to 3d       the same, with groups
    BatchNorm, InstanceNorm, GroupNorm,       the same; running statistics are of the input and stay, in
    LayerNorm                                 training as well. One without weights becomes affine
    RMSNorm                                   weight; it has no place for a b
    Embedding                                 weight, in every row, that of ``padding_idx`` too
    one of your own with ``weight [H]``, or   weight and bias, if its output is linear in ``weight`` or
    of a class made from one of these         ``1 + weight``, which is found out by running a copy of it
    Sequential, torch's attention and its     the module inside that makes the output (of a tuple, the first
    post-norm transformer layers, blocks      element). Blocks are traced with ``torch.fx``, as called with all
                                              arguments, without the optional ones, and with each of them
    any, if its seeds do nothing              nothing: it is only put back
    ========================================  ==============================================================

    Arguments:
        strict: FoldError, a ValueError that names every module that cannot be folded and says why, before
            anything is changed. False folds the others, and the report names these.
        keep: remember what :func:`unfold_` needs: the layers, and a copy of each weight that changed,
            on its device and for as long as its module lives. It is in a table of this process and not
            on the modules: a deepcopy, a pickle or a state_dict has nothing of it and cannot be
            unfolded. False keeps nothing, so that there is no way back either where writing fails (for want of
            memory, or Ctrl-C); else the weights are then as they were.

    Refused are also weights that another module uses (tied, as an embedding that is the head as well;
    ties are seen within ``model``, so give the whole of it; code that reads a weight without a module of its own,
    as ``x @ self.embed.weight.T``, is not seen), parametrized, quantised, sparse, sharded
    and meta ones, values beyond the dtype's range, seeds that are not finite, and a base layer that
    is used elsewhere, too. A folded layer raises an error when it is called. Compiled models compile
    anew; CUDA graphs must be captured again where something was added. ValueError where there is no
    layer.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph = _graph_with_layers(model)
        _check_wrappers(graph, "fold")
        planned = plan(graph, strict=strict)
        # Copied before anything is written: there may not be memory for all of it.
        records = [undo.new_record(group) if keep else None for group in planned.groups]
        with contextlib.ExitStack() as way_back:
            for group, record in zip(planned.groups, records, strict=True):
                if record is not None:
                    way_back.callback(undo.put_weights_back, record)
                if group.target is not None:
                    apply_changes(group.target, group.changes)
            way_back.pop_all()
        record_of = {
            site.layer: record for group, record in zip(planned.groups, records, strict=True) for site in group.sites
        }
        for site in planned.sites:
            undo.take_out(graph, site.layer, record_of[site.layer])
        result = graph.root
    kept = sum(record.nbytes for record in records if record is not None)
    title = f"{len(planned.sites)} of {len(graph.layers)} layers folded into {type(result).__name__}"
    _reports[result] = FoldReport(planned.rows(Graph(result).names), title, kept)
    return result


def unfold_(model: nn.Module | SeedHandle, *, discard_changes: bool = False) -> nn.Module:
    """Put back the layers that :func:`fold_` took out of ``model``, with every bit of weights, banks and state.

    Returns the model, or the layer where ``model`` was its base. The layers are the objects that they
    were, on the device and in the training mode of their base; what folding added goes. If the model
    was folded several times, all of it is undone.

    FoldError, and nothing is changed, where a weight is no longer what folding made of it (trained,
    loaded, cast). ``discard_changes=True`` puts the kept weights back all the same, but for those
    whose dtype or shape changed. ValueError where nothing was kept: it was not folded, or with
    ``keep=False``, or is a copy of what was.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph = Graph(model_of(model))
        records = undo.records_in(graph)
        if not records:
            raise ValueError(
                "there is nothing to unfold: the model was not folded, or with keep=False, or is a copy of one that was"
            )
        _check_wrappers(graph, "unfold")
        undo.check_records(graph, records, discard_changes)
        undo.undo(graph, records)
    _reports.pop(model_of(model), None)
    return graph.root


def fold_report(model: nn.Module | SeedHandle) -> FoldReport:
    """What the last :func:`fold_` that returned ``model`` did; ValueError where there was none, or it was undone."""
    model = model_of(model)
    report = _reports.get(model)
    if report is None:
        raise ValueError(f"this {type(model).__name__} is not what fold_ returned, or was unfolded again")
    return report


def absorb(model: nn.Module | SeedHandle, seeds: SeedIds | Mapping[str, SeedIds] | Selection = None) -> FoldReport:
    """Fold FOSSILIZED seeds into their base layers, for good, and free their slots.

    The layers stay, and all other seeds go on as they are. The output changes by one rounding of the
    weights at most (see :mod:`kasmina_ext.fold`, and ``bound`` in the report). An absorbed seed is DORMANT, with
    its blueprint and strategy ids, a neutral blueprint, alpha 1, and nothing else of its past but
    the history: its telemetry starts anew, since its features are others now. No rule leads out of
    FOSSILIZED; absorption is a write and no transition that one could ask for, and is recorded as
    FOSSILIZED -> DORMANT, which nothing else records. It cannot be undone.

    Arguments:
        model: a layer, or a model. Ties between weights are seen within what is given.
        seeds: which of a layer's fossils; None is all of them. For a model, a dict by layers' names, or
            a selection from its handle, ``seeds[...]``.

    FoldError, and nothing is changed, as in :func:`fold_`, and where a layer within the base has live seeds between a
    fossil and the weights. ValueError for a seed that is not FOSSILIZED, a name that is none, or a model
    without layers.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph = _graph_with_layers(model)
        chosen = _fossils(graph, seeds)
        planned = plan(graph, chosen=chosen)
        for group in planned.groups:
            with contextlib.ExitStack() as way_back:  # module by module: of one at a time there is a copy
                way_back.callback(undo.put_weights_back, undo.new_record(group))
                if group.target is not None:
                    apply_changes(group.target, group.changes)
                way_back.pop_all()
            for site in group.sites:
                _free(site.layer, chosen[site.layer])
        count = sum(int(mask.sum()) for mask in chosen.values())
    return FoldReport(planned.rows(graph.names), f"{counted(count, 'fossil')} absorbed")


def _graph_with_layers(model: nn.Module | SeedHandle) -> Graph:
    graph = Graph(model_of(model))
    if not graph.layers:
        raise ValueError("there is no KasminaLayer in the model: nothing to fold")
    return graph


def _check_wrappers(graph: Graph, action: str) -> None:
    wrapped = [module for module in graph.names if isinstance(module, nn.parallel.DistributedDataParallel)]
    if wrapped:
        reason = (
            f"DistributedDataParallel counts on the parameters that it has: {action} its .module, and wrap that anew"
        )
        raise FoldError(action, {graph.names[module]: reason for module in wrapped})


def _fossils(graph: Graph, seeds: SeedIds | Mapping[str, SeedIds] | Selection) -> dict[KasminaLayer, Tensor]:
    """bool ``[S]`` for each layer."""
    fossils = {layer: layer.lifecycle_states == _FOSSILIZED for layer in graph.layers.values()}
    if seeds is None:
        return fossils
    if isinstance(seeds, Selection):
        seeds = {graph.names.get(part.layer, ""): part.local for part in seeds.parts}
    if not isinstance(seeds, Mapping):
        if not isinstance(graph.root, KasminaLayer):
            raise ValueError(
                "seeds of a model must be a dict of layers' names and their seeds, or a selection, seeds[...]"
            )
        seeds = {"": seeds}
    unknown = [name for name in seeds if name not in graph.layers]
    if unknown:
        raise ValueError(f"there is no layer named {unknown[0]!r}; there are {', '.join(map(repr, graph.layers))}")
    chosen = {layer: torch.zeros_like(mask) for layer, mask in fossils.items()}
    for name, ids in seeds.items():
        layer = graph.layers[name]
        chosen[layer] = layer._chosen(ids)
        others = (chosen[layer] & ~fossils[layer]).nonzero().flatten().tolist()
        if others:
            raise ValueError(f"only FOSSILIZED seeds can be absorbed; these of {name!r} are not: {others[:10]}")
    return chosen


def _free(layer: KasminaLayer, chosen: Tensor) -> None:
    """What a new seed is like, but for blueprint and strategy ids and the history."""
    buffers = layer._buffers
    for name in ("telemetry", "grad_telemetry", "performance_metrics"):
        buffers[name].masked_fill_(chosen[:, None], 0)
    layer.telemetry_resets += 1
    buffers["alpha"].masked_fill_(chosen, 1.0)
    layer._make_neutral(chosen)
    fresh = {"lifecycle": _DORMANT, "epochs": 0, "checkpoint": NO_ID, "evaluation_score": 0, "error_count": 0}
    layer.extended_state.update_state(chosen, fresh)
