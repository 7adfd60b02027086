"""Losses at other alphas than the present ones, measured so that nothing notices."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from kasmina_ext.activations import copied
from kasmina_ext.compat import TritonKasminaLayer
from kasmina_ext.handle import SeedHandle
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.names import unwrapped_name
from kasmina_ext.ranks import Ranks
from kasmina_ext.state_layout import StateVar

Layers = nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module] | SeedHandle
"""A KasminaLayer, a model that contains some, several of either, with names of your own in a dict, or a handle on seeds."""
LossFunction = Callable[[Any], Tensor]
"""The loss of one batch: a number or, from which errors are known better, a number for each sample."""


def roots_of(layers: Layers) -> dict[str, nn.Module]:
    """The modules given, by name: "" for a single one, numbers in a list. TypeError for anything else."""
    if isinstance(layers, SeedHandle):
        roots = dict(layers.roots)
    elif isinstance(layers, Mapping):
        roots = dict(layers)
    elif isinstance(layers, nn.Module):
        roots = {"": layers}
    elif isinstance(layers, Iterable):
        roots = {str(number): root for number, root in enumerate(layers)}
    else:
        raise TypeError(f"layers must be a module or several, got {type(layers).__name__}")
    for root in roots.values():
        if not isinstance(root, nn.Module):
            raise TypeError(f"layers must be modules, got {type(root).__name__}")
    return roots


def seed_layers(layers: Layers) -> dict[str, KasminaLayer]:
    """The KasminaLayers in ``layers``, each once, in order, by their names in the model (by number in a list).

    ValueError where there is none, TypeError as :func:`roots_of`.
    """
    found: dict[str, KasminaLayer] = {}
    seen: set[nn.Module] = set()
    for prefix, root in roots_of(layers).items():
        for name, module in root.named_modules(memo=seen):
            if isinstance(module, KasminaLayer):
                found[".".join(part for part in (prefix, unwrapped_name(name)) if part)] = module
    if not found:
        raise ValueError("there is no KasminaLayer in what was given: graft_ gives a model seeds")
    return found


class Layout:
    """Where the seeds of several layers lie in one tensor of all of them, ``[T]``."""

    def __init__(self, layers: Sequence[KasminaLayer]) -> None:
        self.layers = list(layers)
        self.sizes = [layer.num_seeds for layer in self.layers]
        self.total = sum(self.sizes)

    @property
    def device(self) -> torch.device:
        """Where joined tensors live: with the first layer."""
        return self.layers[0].device

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One ``[T, ...]`` of one ``[S, ...]`` for each layer. Waits for no device."""
        device = self.device
        return torch.cat([tensor.detach().to(device, non_blocking=True) for tensor in tensors])

    def split(self, joined: Tensor) -> list[Tensor]:
        """The reverse of :meth:`join`, each on its layer's device."""
        pieces = joined.split(self.sizes)
        return [piece.to(layer.device, non_blocking=True) for piece, layer in zip(pieces, self.layers, strict=True)]

    def buffer(self, name: str) -> Tensor:
        """A buffer of all layers, joined along the seeds (``state``: ``[8, T]``)."""
        tensors = [layer._buffers[name] for layer in self.layers]
        return self.join([t.t() for t in tensors]).t() if name == "state" else self.join(tensors)


class Moments:
    """Weighted mean and its standard error over batches, of ``[T]`` values at once (West, 1979).

    Values that are not finite are left out.
    """

    def __init__(self, like: Tensor) -> None:
        self._mean, self._m2, self._weight, self._count = (
            torch.zeros_like(like, dtype=torch.float64) for _ in range(4)
        )

    def add(self, values: Tensor, weight: float) -> None:
        finite = torch.isfinite(values)
        delta = torch.where(finite, values.double() - self._mean, 0.0)
        weights = torch.where(finite, float(weight), 0.0)
        self._count += finite.double()
        self._weight += weights
        share = torch.where(finite, weights / self._weight, 0.0)
        self._mean += delta * share
        self._m2 += weights * delta * delta * (1 - share)

    @property
    def mean(self) -> Tensor:
        """float64 ``[T]``; NaN where no batch gave a finite value."""
        return torch.where(self._count > 0, self._mean, torch.nan)

    @property
    def error(self) -> Tensor:
        """Standard error of the mean, float64 ``[T]``; NaN from fewer than two batches."""
        variance = self._m2 / (self._weight * (self._count - 1))
        return torch.where(self._count > 1, variance.sqrt(), torch.nan)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Of a sample: its mean, and the mean's standard error (NaN for a single value)."""
    mean = values.mean().item()
    return mean, (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


class Slopes(NamedTuple):
    """Of one batch."""

    losses: Tensor
    """float64 ``[n]``, at the last of the alphas."""
    slopes: list[Tensor]
    """float64 ``[T]``: ``dL/dalpha`` of the losses' mean at each of the alphas."""
    whole: bool
    """Whether none of the batch's losses is left out: if one is, it may have spoilt the derivative."""


class Measurement:
    """A context in which the same batches can be passed through a network again and again, at alphas of one's choice.

    Inside, every module given or run is in eval mode (recurrent ones excepted, whose backward needs
    training mode) and collects no telemetry; every batch starts from the same random numbers. After
    it, modes, telemetry, BatchNorm statistics, torch's random state, alphas and all ``.grad`` are as
    they were: alphas are swapped, not written, and gradients are taken with respect to them alone.

    ``batches`` are walked through once and kept, and every pass gets copies of their tensors (also of those in lists
    and dicts), since a model may work in place; ``loss_fn(batch)`` gives the loss, a scalar or one value
    for each sample, which are then averaged over all batches alike. Where there are several
    ``ranks``, each brings as many batches of its own, all make the same passes, and all get what all
    have measured.
    """

    alpha: Tensor
    """float32 ``[T]``: as it was on entering."""
    num_batches: int
    """Of those given, by all ranks, the ones that are not left out altogether."""

    def __init__(
        self, layers: Layers, batches: Iterable[Any], loss_fn: LossFunction, ranks: Ranks | None = None
    ) -> None:
        self._ranks = Ranks(False) if ranks is None else ranks
        self._roots = roots_of(layers)
        named = seed_layers(self._roots)
        self.names, self.layout = list(named), Layout(list(named.values()))
        self._given, self._loss_fn = batches, loss_fn
        self._batches: list[Any] = []
        self._seen: dict[int, nn.Module] = {}

    # ---- leaving no trace ----------------------------------------------------------------------------------------

    def __enter__(self) -> Measurement:
        layers = self.layout.layers
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            self._cuda = sorted({layer.device.index or 0 for layer in layers if layer.device.type == "cuda"})
            stack.enter_context(torch.random.fork_rng(self._cuda))
            self._batches = list(self._given)  # shuffling takes random numbers, too
            self.num_batches = self._count_batches()
            # Of each batch, of each rank: how many losses, whether there are any, whether all that there were.
            self._sizes: list[tuple[int, ...]] = []
            self._some, self._whole = ([[True] * self._ranks.size for _ in self._batches] for _ in range(2))
            self._kept: list[Tensor | None] = [None] * len(self._batches)
            self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in self._cuda]
            self.alpha = self.layout.buffer("alpha").clone()
            for layer in layers:
                for name in ("alpha", "state"):
                    stack.callback(layer._buffers.__setitem__, name, layer._buffers[name])
            self._modes: list[tuple[nn.Module, str]] = []
            stack.callback(self._restore_modes)
            for root in self._roots.values():
                self._quieten(root)
            # The hook may run once more for a compiled module; it does no more then.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
            hook = register_module_forward_pre_hook(lambda module, _: self._quieten(module))
            stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def _count_batches(self) -> int:
        counts = self._ranks.gather(torch.tensor(len(self._batches))).tolist()
        if not all(counts):
            raise ValueError("there are no batches to measure on")
        if len(set(counts)) > 1:
            raise ValueError(f"the ranks must have equally many batches, they have {counts}")
        return sum(counts)

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._batches, self._seen, self._kept = [], {}, []

    def _quieten(self, module: nn.Module) -> None:
        """The first time that a module is seen: no training mode, no telemetry, for all that is in it."""
        if id(module) in self._seen:
            return
        for each in module.modules():
            if id(each) in self._seen:
                continue
            self._seen[id(each)] = each
            if each.training and not isinstance(each, nn.RNNBase):
                self._switch_off(each, "training")
            if isinstance(each, (KasminaLayer, TritonKasminaLayer)) and each.telemetry_enabled:
                self._switch_off(each, "telemetry_enabled")

    def _switch_off(self, module: nn.Module, switch: str) -> None:
        self._modes.append((module, switch))
        setattr(module, switch, False)

    def _restore_modes(self) -> None:
        for module, switch in self._modes:
            setattr(module, switch, True)

    # ---- what does not take part ---------------------------------------------------------------------------------

    def silence(self, chosen: Tensor) -> None:
        """From now on the seeds where ``chosen [T]`` are as if DORMANT: no alpha makes a weight harmless that is not finite."""
        for layer, silent in zip(self.layout.layers, self.layout.split(chosen), strict=True):
            state = layer._buffers["state"].clone()
            state[StateVar.LIFECYCLE_STATE].masked_fill_(silent, int(ExtendedLifecycle.DORMANT))
            layer._buffers["state"] = state

    def keep(self, wanted: Tensor) -> None:
        """From now on leave out the losses where not ``wanted [n]``, of those that :meth:`losses` last gave."""
        for number, pieces in enumerate(self._by_batch(wanted)):
            own, before = pieces[self._ranks.rank], self._kept[number]
            if not own.all():
                self._kept[number] = own if before is None else before.masked_scatter(before, own)
            self._some[number] = [bool(piece.any()) for piece in pieces]
            whole = zip(self._whole[number], pieces, strict=True)
            self._whole[number] = [was_whole and bool(piece.all()) for was_whole, piece in whole]
        self.num_batches = sum(sum(of_batch) for of_batch in self._some)

    def batches_with(self, chosen: Tensor) -> int:
        """How many batches have a loss where ``chosen [n]``, of those that :meth:`losses` last gave."""
        return sum(bool(piece.any()) for pieces in self._by_batch(chosen) for piece in pieces)

    def _by_batch(self, values: Tensor) -> list[tuple[Tensor, ...]]:
        """Of one value for each loss ``[n]``: batch by batch, those of each rank."""
        pieces = values.split([size for of_batch in self._sizes for size in of_batch])
        ranks = self._ranks.size
        return [pieces[first : first + ranks] for first in range(0, len(pieces), ranks)]

    # ---- passes --------------------------------------------------------------------------------------------------

    def losses(self, alpha: Tensor) -> Tensor:
        """float64 ``[n]``: the loss of every batch (or sample) with the seeds at ``alpha [T]``; one forward pass each. Batch
        by batch, of each in rank order.

        Values of two calls belong together pair by pair, as long as no more are left out.
        """
        with torch.no_grad():
            self._set_alphas(self._pieces(alpha))
            nothing = alpha.new_empty(0, dtype=torch.float64)
            numbers = range(len(self._batches))
            own = [self._loss(number)[1] if self._takes_part(number) else nothing for number in numbers]
            sizes = self._ranks.gather(torch.tensor([len(losses) for losses in own])).tolist()
            of_ranks = zip(self._ranks.gather_lengths(torch.cat(own)), sizes, strict=True)
            self._sizes = list(zip(*sizes, strict=True))
            by_batch = zip(*(losses.split(of_batches) for losses, of_batches in of_ranks), strict=True)
            return torch.cat([losses for of_batch in by_batch for losses in of_batch])

    def slopes(self, alphas: Sequence[Tensor]) -> Iterator[Slopes]:
        """For each batch (of each rank): its losses at the last of ``alphas``, and ``dL/dalpha`` of their mean at each of them.

        ValueError in the end where no batch's loss depends on any of the layers.
        """
        leaves = [[piece.requires_grad_() for piece in self._pieces(alpha)] for alpha in alphas]
        reached = False
        for number in range(len(self._batches)):
            if not self._takes_part(number):
                continue
            slopes = []
            for at in leaves:
                self._set_alphas(at)
                with torch.enable_grad():
                    mean, losses = self._loss(number)
                found = torch.autograd.grad(mean, at, allow_unused=True) if mean.requires_grad else [None] * len(at)
                reached = reached or any(slope is not None for slope in found)
                slopes.append(
                    self.layout.join([zeros_if_none(slope, leaf) for slope, leaf in zip(found, at, strict=True)])
                )
            of_ranks = zip(
                self._ranks.gather_lengths(losses),
                self._ranks.gather(torch.stack(slopes).double()),
                self._whole[number],
                strict=True,
            )
            for of_losses, of_slopes, whole in of_ranks:
                if len(of_losses):
                    yield Slopes(of_losses, list(of_slopes), whole)
        if not reached:
            raise ValueError("loss_fn's loss depends on none of the layers: it must run them, and not under no_grad")

    def _takes_part(self, number: int) -> bool:
        """Whether any rank needs the batch: a pass may be one of all ranks, as DDP and FSDP2 communicate in it."""
        return any(self._some[number])

    def _pieces(self, alpha: Tensor) -> list[Tensor]:
        """Copies, of the dtype that the layers need."""
        return [piece.detach().to(torch.float32, copy=True) for piece in self.layout.split(alpha)]

    def _set_alphas(self, alphas: Sequence[Tensor]) -> None:
        for layer, alpha in zip(self.layout.layers, alphas, strict=True):
            layer._buffers["alpha"] = alpha

    def _loss(self, number: int) -> tuple[Tensor, Tensor]:
        """The batch's mean loss with its graph, and its losses as float64 ``[n]`` without: of those not left out."""
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        for index, state in zip(self._cuda, cuda, strict=True):
            torch.cuda.set_rng_state(state, index)
        loss = self._loss_fn(copied(self._batches[number]))
        if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.numel() == 0:
            what = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return a floating tensor, a loss or one for each sample, got {what}")
        if self._kept[number] is not None:
            loss = loss.flatten()[self._kept[number].to(loss.device)]
        return loss.mean(), loss.detach().to(self.layout.device, torch.float64).flatten()


def zeros_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
