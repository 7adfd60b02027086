"""Repair without labels: every feature is fitted to what the undamaged network makes of the same inputs."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_ext import reference as plain
from kasmina_ext._dispatch import calibration_ops
from kasmina_ext.activations import (
    Forward,
    ModelTargets,
    Passes,
    Recorded,
    RecordedTargets,
    StopForward,
    Targets,
    hooked,
    progress_bar,
    tensor_of,
    unwrapped,
)
from kasmina_ext.arguments import positive
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.handle import SeedHandle, model_of
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.least_squares import FITTED, Fit, explained, fit
from kasmina_ext.lifecycle import ExtendedLifecycle, TransitionRules
from kasmina_ext.measure import seed_layers
from kasmina_ext.names import original_name
from kasmina_ext.report import TableReport, cell, counted
from kasmina_ext.state_layout import StateVar

_S = ExtendedLifecycle
_AT_ONCE = TransitionRules.strict().scaled(0)  # the graph of the lifecycle, without its least epochs
_WAY = (_S.GERMINATED, _S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING)
_ADDITIVE = int(GraftingStrategy.ADDITIVE)


class CalibrationReport(TableReport):
    """``{layer name: row}`` in forward order; printed, it is a table.

    A row has ``features``, ``seeds`` (that were fitted), ``pairs`` (the most that a feature had),
    the explained variance over all of the layer's features ``before`` (of the base layer, in the
    network as it was given), ``in_turn`` (of the base layer, when the layers before it had been
    calibrated) and ``after`` (of the layer, measured with all seeds in place), ``neutral`` (features
    of the fitted seeds that were left as they were) and ``nonfinite`` (pairs that were left out).
    NaN is for what was not measured.

    Explained variance is 1 - sum (t - y)^2 / M2_t: 1 is perfect, and below 0 a constant would do better.
    """

    short_names = MappingProxyType({"in_turn": "in turn"})
    text_columns = ("layer",)

    def __init__(self, rows: Mapping[str, dict[str, Any]], passes: Mapping[str, int], batches: int) -> None:
        super().__init__(rows)
        self.passes = dict(passes)
        """Over all batches: ``reference``, ``whole`` and ``partial`` ones of the model."""
        self.batches = batches

    @property
    def title(self) -> str:
        """What was done, in a line."""
        seeds = sum(row["seeds"] for row in self.values())
        times = "{whole} + {partial} partial passes, reference {reference}".format(**self.passes)
        batches = f"{self.batches} batch" + ("es" if self.batches != 1 else "")
        return f"explained variance: {counted(seeds, 'seed')} of {counted(len(self), 'layer')}, {batches}; {times}"

    def __reduce__(self) -> tuple:
        return CalibrationReport, (dict(self), self.passes, self.batches)

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        rarely = ("neutral", "nonfinite")  # in a table only where there are any
        names = [
            name for name in next(iter(self.values())) if name not in rarely or any(r[name] for r in self.values())
        ]
        rows = [[layer or "(model)", *(cell(row[name]) for name in names)] for layer, row in self.items()]
        return ["layer", *names], rows, ""


def calibrate_(
    model: nn.Module | SeedHandle,
    reference: nn.Module | SeedHandle | Recorded,
    batches: Iterable[Any],
    *,
    ridge: float = 1e-4,
    least_pairs: int = 8,
    forward: Forward | None = None,
    optimizer: Optimizer | None = None,
    memory: int = 2**30,
    stop_early: bool = True,
    progress: bool | None = None,
) -> CalibrationReport:
    """Repair a damaged network without labels: fit the seeds of its KasminaLayers to an undamaged one, in place.

    .. code-block:: python

        report = kasmina_ext.calibrate_(damaged, healthy, [images[:20]])
        report.show()

    Layer by layer in forward order, each feature of the base layer's output x (with all layers
    before it calibrated) is fitted to t, what the undamaged network's module of the same name puts
    out: a = C_xt / (M2_x + ridge M2_t), b = mean_t - a mean_x, by least squares over all positions
    of all batches. Seeds of MULTIPLICATIVE strategy get the best scale alone, ADDITIVE ones the best
    shift. See :func:`kasmina_ext.least_squares.fit`.

    Arguments:
        model: the damaged network, with KasminaLayers in it; nothing else of it changes.
        reference: the undamaged network, with modules of the same names (what wrappers put into
            names is left out: ``base_layer``, ``_orig_mod``, ...), or recorded activations: a dict
            from these names to a list with a tensor for each call, or one tensor of all batches
            joined along dimension 0. See :func:`kasmina_ext.record_activations`.
        batches: inputs, in any iterable; walked through once and kept. A tensor is passed as
            ``model(x)``, a tuple or list as ``model(*x)``, a dict as ``model(**x)``; every pass gets copies,
            since a model may work in place.
        ridge: relative to the target's sum of squares, so without dimension: no feature is scaled
            by more than 1 / (2 sqrt(ridge)), 50 times by default. 0 is plain least squares.
        least_pairs: features with fewer finite pairs stay neutral: two pairs fit any line.
        forward: a function of the model and a batch that passes it through, for all other cases, as where
            batches have labels: ``lambda model, batch: model(batch[0])``.
        optimizer: what trains the banks, if it is to forget what it knew of the seeds that are fitted.
        memory: bytes of the reference's activations that may be kept, where they lie; those of a
            single batch are held in any case.
        stop_early: end a pass when the layers that it is for have run, by an exception (a
            BaseException) from within the forward. False for models that must not be left half-way
            (sharded by FSDP, say).
        progress: a bar on stderr, drawn by rich; None: on a terminal, and where rich is installed.

    Passes over all batches, for L layers: the model's are one whole one that finds the order and
    measures what there was, a partial one for each layer but the first (up to that layer, half a
    pass on average; layers that read the very same tensor, as queries, keys and values do, share
    one), and a whole one that measures what has become. The reference has one if the activations of
    all L layers fit into ``memory``; otherwise one for each run of layers whose activations do, and
    one more to measure.

    Every seed that owns features is fitted, but for fossils, which are frozen. What a seed was
    before ends (ROLLED_BACK or CANCELLED, then DORMANT), and it goes through the legal transitions
    to EVALUATING, all at once, each recorded in the history, with alpha 1. EVALUATING because that
    is what is true of it: it is in the output and can be trained, nobody has shown yet that it
    earns its keep, and a controller's next evaluation judges it (whose budget must have room for all
    of them). In GRAFTING an alpha schedule would start anew; FINE_TUNING is for seeds that have been
    judged. A layer that the batches never reach, and a seed without a single usable feature, stay as
    they are.

    A module that runs several times in a forward is fitted once, to all its calls as they are
    before that. The order is that of first calls.

    All runs in eval mode, without gradients and telemetry, with compiled modules run eagerly; modes,
    telemetry, random numbers and hooks are afterwards as they were, whatever happens. On an error,
    or Ctrl-C, seeds and banks are as they were, too. Waits for the device. Ranks of a distributed
    job that hold the same seeds need the same batches.

    Raises ValueError where there is no KasminaLayer, the reference has no module (or activations)
    for one, shapes or numbers of calls differ, a seed's strategy is MIXED or its rows are not in the
    bank, or no layer runs; TypeError for a batch that cannot be passed.
    """
    model, reference = model_of(model), model_of(reference)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(reference, (nn.Module, Mapping)):
        raise TypeError(f"reference must be a model or a dict of activations, got {type(reference).__name__}")
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be several of them: a single one is [batch], got a {type(batches).__name__}")
    if not isinstance(optimizer, (Optimizer, type(None))):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(ridge, Real):
        raise TypeError(f"ridge must be a number, got {type(ridge).__name__}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number of at least 0, got {ridge}")
    if not isinstance(memory, Real) or not memory >= 0:
        raise ValueError(f"memory must be a number of bytes, at least 0, got {memory!r}")
    least_pairs = positive("least_pairs", least_pairs)
    model = unwrapped(model)
    layers = _layers_of(model)
    chosen = {name: _seeds_to_fit(name, layer) for name, layer in layers.items()}
    models = [model]
    if isinstance(reference, nn.Module):
        reference = unwrapped(reference)
        models.append(reference)
    with Passes(models, batches, forward) as passes, progress_bar("calibrating", progress) as show:
        if isinstance(reference, nn.Module):
            targets: Targets = ModelTargets(reference, list(layers), passes, memory)
            for name, module in targets.modules.items():
                if module is layers[name]:
                    raise ValueError(
                        f"reference and model share {name!r}: the reference must be another, undamaged network"
                    )
        else:
            targets = RecordedTargets(reference, layers)
        sweep = _Sweep(model, layers, targets, passes, stop_early, show)
        with _all_or_nothing(layers.values()):
            before = sweep.survey()
            if not sweep.order:
                raise ValueError(f"none of the model's KasminaLayers ran: {', '.join(map(repr, layers))}")
            fits, in_turn = {}, {}
            for moments in sweep.groups(before):
                in_turn |= moments
                for name, found in moments.items():
                    fits[name] = _graft_fit(layers[name], found, chosen[name], ridge, least_pairs)
            after = sweep.measure()
        for name, (_, seeds) in fits.items() if optimizer is not None else ():
            layers[name].reset_optimizer_state(optimizer, seeds)
        rows = {}
        for name in [*sweep.order, *(name for name in layers if name not in sweep.order)]:
            rows[name] = _row(
                layers[name], before[name], in_turn.get(name), after[name], sweep.rows[name], fits.get(name)
            )
        counts = {"reference": targets.passes, "whole": 2, "partial": sweep.partial}
        return CalibrationReport(rows, counts, len(passes.batches))


def _layers_of(model: nn.Module) -> dict[str, KasminaLayer]:
    layers: dict[str, KasminaLayer] = {}
    for name, layer in seed_layers(model).items():
        if original_name(name) in layers:
            raise ValueError(f"{name!r} and another KasminaLayer wrap the same module: there is one target for both")
        layers[original_name(name)] = layer
    return layers


def _seeds_to_fit(name: str, layer: KasminaLayer) -> Tensor:
    """bool ``[S]``. ValueError where one has a strategy that cannot be fitted."""
    state, owns = layer._buffers["state"], layer._buffers["seed_offsets"].diff() > 0
    lifecycle, strategy = state[StateVar.LIFECYCLE_STATE], state[StateVar.GRAFTING_STRATEGY]
    chosen = owns & (lifecycle >= 0) & (lifecycle < len(_S)) & (lifecycle != _S.FOSSILIZED)
    for number in strategy[chosen].unique().tolist():
        known = GraftingStrategy(number) if 0 <= number < len(GraftingStrategy) else None
        if number not in FITTED:
            raise ValueError(
                f"{name!r} has seeds of strategy {known.name if known is not None else number}, for which there is no fit: "
                "set_strategy gives them another (AFFINE, MULTIPLICATIVE or ADDITIVE)"
            )
        if known.rows > layer.num_blueprints:
            raise ValueError(
                f"{name!r} has seeds of strategy {known.name}, which takes {known.rows} rows of the bank, and "
                f"num_blueprints is {layer.num_blueprints}: set_strategy gives them another"
            )
    return chosen


# ---- passes over the batches -------------------------------------------------------------------------------------


class _Sweep:
    """The passes: one to survey, one for each group of layers, one to measure."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, KasminaLayer],
        targets: Targets,
        passes: Passes,
        stop_early: bool,
        show: Callable[[int, int | None], None],
    ) -> None:
        self.order: list[str] = []
        """Names of the layers that run, in the order of their first calls."""
        self.partial = 0
        self.rows: Counter[str] = Counter()
        """Positions that each layer saw in a pass."""
        self._model, self._layers, self._targets, self._passes = model, layers, targets, passes
        self._stop_early, self._show = stop_early, show
        self._done, self._total = 0, None
        self._bases = {name: layer._modules["base_layer"] for name, layer in layers.items()}
        self._calls: list[Counter[str]] = []  # for each batch
        self._shares: dict[str, set[str | None]] = defaultdict(set)  # whose input a layer reads, too

    def survey(self) -> dict[str, Tensor]:
        """Moments of every layer's x and t as the network is, and which layers run, in what order and how often."""
        moments = self._fresh(self._layers)
        last: list[Any] = [None, None, None]  # the layer that ran last, its input, and that tensor's version

        def hook(name: str, args: tuple, kwargs: dict, output: Any) -> None:
            x = tensor_of(output, name)
            self._add(name, x, moments[name])
            self.rows[name] += x.numel() // max(self._layers[name].hidden_dim, 1)
            calls = self._calls[-1]
            if not calls:
                last[:] = None, None, None
            if name not in self.order:
                # Right behind the one that ran before it: what earlier batches ran later may depend on both.
                self.order.insert(self.order.index(last[0]) + 1 if calls else 0, name)
            calls[name] += 1
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and self._is_leaf(name)
            alone = alone and not args[0].is_inference()  # which counts no versions
            now = [name, args[0], args[0]._version] if alone else [name, None, None]
            # The very tensor that the layer before it has read, and not written since?
            shared = alone and calls[name] == 1 and now[1] is last[1] and now[2] == last[2]
            self._shares[name].add(last[0] if shared else None)
            last[:] = now

        self._pass(list(self._layers), list(self._layers), self._bases, hook, count=True)
        return moments

    def _is_leaf(self, name: str) -> bool:
        return next(self._bases[name].children(), None) is None

    def groups(self, surveyed: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Moments of layers whose x is not affected by each other, in forward order; fit them before the next are asked for."""
        groups: list[list[str]] = []
        for name in self.order:
            if groups and self._shares[name] == {groups[-1][-1]}:
                groups[-1].append(name)
            else:
                groups.append([name])
        self._total = len(self._passes.batches) * (len(groups) + 1)
        for number, group in enumerate(groups):
            if number == 0:  # nothing was calibrated before it
                yield {name: surveyed[name] for name in group}
                continue
            self.partial += 1
            moments, left = self._fresh(group), Counter()

            def hook(name: str, args: tuple, kwargs: dict, output: Any, moments=moments, left=left) -> None:
                self._add(name, tensor_of(output, name), moments[name])
                left[name] -= 1
                if self._stop_early and not any(left.values()):
                    raise StopForward

            later = [name for each in groups[number + 1 :] for name in each]
            self._pass(group, later, {name: self._bases[name] for name in group}, hook, left)
            yield moments

    def measure(self) -> dict[str, Tensor]:
        """Moments of what every layer puts out and t, as the network has become."""
        moments = self._fresh(self._layers)

        def hook(name: str, args: tuple, kwargs: dict, output: Any) -> None:
            self._add(name, tensor_of(output, name), moments[name])

        self._pass(list(self._layers), [], self._layers, hook)
        return moments

    def _pass(
        self,
        wanted: Sequence[str],
        later: Sequence[str],
        modules: Mapping[str, nn.Module],
        hook: Callable[[str, tuple, dict, Any], None],
        left: Counter[str] | None = None,
        count: bool = False,
    ) -> None:
        """``left``: is set to the calls that are to come, batch by batch. ``count``: counts them instead."""
        self._targets.begin(wanted, later)
        for number, batch in enumerate(self._passes.batches):
            if count:
                self._calls.append(Counter())
            elif left is not None:
                left.update({name: self._calls[number][name] for name in wanted})
            self._targets.start(number)
            if left is None or any(left.values()):
                with hooked(modules, hook):
                    self._passes.run(self._model, batch)
            if left is not None and any(left.values()):
                names = ", ".join(repr(name) for name, calls in left.items() if calls)
                raise ValueError(f"{names} ran another number of times for batch {number} than before")
            self._targets.finish_batch()
            self._done += 1
            self._show(self._done, self._total)
        self._targets.finish()

    def _fresh(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {
            name: torch.zeros(self._layers[name].hidden_dim, 6, dtype=torch.float64, device=self._layers[name].device)
            for name in names
        }

    def _add(self, name: str, x: Tensor, moments: Tensor) -> None:
        t, layer = self._targets.take(name, x), self._layers[name]
        if t.shape != x.shape:
            raise ValueError(f"{name!r} puts out {list(x.shape)}, the reference {list(t.shape)}")
        dtype = x.dtype if x.dtype == t.dtype else torch.promote_types(x.dtype, t.dtype)
        x, t = (layer._features_last(each.detach().to(x.device, dtype)) for each in (x, t))
        calibration_ops(x.device, dtype, layer.enable_kernels).pair_moments(x, t, moments)


# ---- what a fit does to a layer ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _all_or_nothing(layers: Iterable[KasminaLayer]) -> Iterator[None]:
    """On any exception the layers' seeds and banks get back what they were."""
    kept = []
    for layer in layers:
        tensors = [layer._buffers[name] for name in ("state", "alpha", "history", "history_count")]
        if "blueprint_weights" in layer._parameters:  # else it cannot be written
            tensors.append(layer.blueprint_weights)
        kept += [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        raise


def _graft_fit(
    layer: KasminaLayer, moments: Tensor, chosen: Tensor, ridge: float, least_pairs: int
) -> tuple[Fit, Tensor]:
    """Fit the seeds where ``chosen [S]``; returns the fit, and bool ``[S]``: the seeds that are grafted now."""
    owner, owned = plain.feature_owner(layer._buffers["seed_offsets"], layer.hidden_dim)
    strategy = layer.grafting_strategies[owner]
    found = fit(moments, strategy, ridge, least_pairs, layer.blueprint_weights.dtype)
    useful = torch.zeros_like(chosen).index_put_((owner,), owned & ~found.neutral, accumulate=True)
    chosen = chosen & useful
    _bring_to_evaluating(layer, chosen)
    _, is_first, is_second = layer._rows_of(chosen)
    first = torch.where(strategy == _ADDITIVE, found.shift, found.scale)
    layer._write_bank(is_first | is_second, torch.where(is_first, first, found.shift))
    layer.set_alpha(chosen, 1.0)
    return Fit(*(each[owned & chosen[owner]] for each in found)), chosen


def _bring_to_evaluating(layer: KasminaLayer, chosen: Tensor) -> None:
    """By legal requests: what these seeds were ends, and they go all the way from DORMANT."""
    state = layer._buffers["state"]
    blueprint, strategy = state[StateVar.BLUEPRINT_ID], state[StateVar.GRAFTING_STRATEGY]
    rows = 1 + (strategy == int(GraftingStrategy.AFFINE)).int()
    valid = (blueprint >= 0) & (blueprint + rows <= layer.num_blueprints)
    blueprints = torch.where(valid, blueprint, 0)
    for end in (_S.ROLLED_BACK, _S.CANCELLED):
        layer.request_state_transitions(chosen, end, rules=_AT_ONCE)
    layer.recycle(chosen)
    for target in _WAY:
        given = blueprints if target is _S.GERMINATED else None
        layer.request_state_transitions(chosen, target, given, rules=_AT_ONCE)


def _row(
    layer: KasminaLayer,
    before: Tensor,
    in_turn: Tensor | None,
    after: Tensor,
    rows: int,
    fitted: tuple[Fit, Tensor] | None,
) -> dict[str, Any]:
    found, seeds = fitted if fitted is not None else (None, None)
    count = before[:, 0]
    return {
        "features": layer.hidden_dim,
        "seeds": 0 if seeds is None else int(seeds.sum()),
        "pairs": int(count.max()) if count.numel() else 0,
        "before": explained(before).item(),
        "in_turn": math.nan if in_turn is None else explained(in_turn).item(),
        "after": explained(after).item(),
        "neutral": 0 if found is None else int(found.neutral.sum()),
        "nonfinite": rows * layer.hidden_dim - int(count.sum()),
    }
