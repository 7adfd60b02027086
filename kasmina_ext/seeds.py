"""The handle on all seeds of a model: what they are, what they are worth, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext.credit import Credit, credit
from kasmina_ext.handle import SeedHandle
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.measure import Layers, Layout, LossFunction, roots_of, seed_layers
from kasmina_ext.names import matches, original_name
from kasmina_ext.plots import plot
from kasmina_ext.report import TableReport, counted
from kasmina_ext.seed_arguments import integers, is_single
from kasmina_ext.seed_record import SeedRecord
from kasmina_ext.seed_tables import GraftTable, graft_table, report
from kasmina_ext.selection import Selection
from kasmina_ext.telemetry import potential

SeedKey = int | slice | Iterable[int] | Tensor | str | Selection
"""Seeds: a number or several (negative ones from the end), a bool mask ``[T]``, a slice, or a pattern of layers' names."""


class Seeds(SeedHandle):
    """All seeds of a model, numbered 0 to T - 1 through its layers in their order.

    .. code-block:: python

        seeds = kasmina_ext.graft_(model, "*.mlp.*")
        seeds[10:20].graft()
        seeds["*.mlp.c_fc"].germinate("multiplicative")
        seeds[seeds.potential() > 0.1].germinate()
        seeds.report().show()

    ``len(seeds)`` is T, iteration goes over the layers, ``seeds[...]`` is a
    :class:`~kasmina_ext.selection.Selection`. A handle keeps nothing but the model: it goes by the
    layers that there are, so that when more modules are grafted they are its too (and numbers of
    seeds behind them change). Functions of the package take it where they take a model or layers.

    Arguments:
        layers: a model with KasminaLayers in it, a layer, several of either, or a handle.

    ValueError where there is no layer, TypeError for anything else.
    """

    skipped: dict[str, str]
    """Modules that :func:`kasmina_ext.graft_` found and did not graft, by name, and why."""

    def __init__(self, layers: Layers | SeedHandle) -> None:
        self.roots = roots_of(layers)
        self.skipped = {}
        self._recorder: SeedRecord | None = None
        seed_layers(self.roots)

    @classmethod
    def of(cls, layers: Layers | SeedHandle) -> Seeds:
        """The same as ``Seeds(layers)``."""
        return cls(layers)

    @property
    def layers(self) -> dict[str, KasminaLayer]:
        """All layers that there are now, by their names, in the model's order. ValueError where there is none."""
        return seed_layers(self.roots)

    def __iter__(self) -> Iterator[KasminaLayer]:
        return iter(self.layers.values())

    def __len__(self) -> int:
        return sum(layer.num_seeds for layer in self)

    def __repr__(self) -> str:
        try:
            layers = self.layers
        except ValueError:  # they were folded, or taken out: no reason for a debugger to stumble
            layers = {}
        total = sum(layer.num_seeds for layer in layers.values())
        return f"Seeds({counted(total, 'seed')} of {counted(len(layers), 'layer')})"

    # ---- what they are -----------------------------------------------------------------------------------------------

    def states(self) -> Tensor:
        """int32 ``[T]``: :class:`~kasmina_ext.lifecycle.ExtendedLifecycle`. Does not wait for the device."""
        return self._joined([layer.lifecycle_states for layer in self])

    def potential(self) -> Tensor:
        """float64 ``[T]``: :func:`kasmina_ext.potential` of each seed. Does not wait for the device."""
        return self._joined([potential(layer) for layer in self])

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        return Layout(list(self)).join(tensors)

    def table(self) -> GraftTable:
        """What was grafted: a line for each layer, with its seeds, their parameters and their share of the model's."""
        return graft_table(self.layers, self.roots, self.skipped)

    def report(self, per: str = "layer") -> TableReport:
        """What every layer's seeds are and have seen: a dict of rows, which at a prompt or printed is a table, and whose
        ``.show()`` prints that with rich on a terminal. Waits for the device.

        ``per="seed"``: a row for each seed, by its number, those at work before dormant ones where
        the table cannot show all; ``per="state"``: for each state. What was not measured is NaN, and
        a layer that has seen nothing while others have is noted: the model never calls it.
        """
        return report(self.layers, per)

    def credit(
        self,
        batches: Iterable[Any],
        loss_fn: LossFunction,
        points: int = 4,
        *,
        tolerance: float | None = None,
    ) -> Credit:
        """Who brought the gain: see :func:`kasmina_ext.credit`."""
        return credit(self, batches, loss_fn, points, tolerance=tolerance)

    # ---- over time ---------------------------------------------------------------------------------------------------

    @property
    def recorder(self) -> SeedRecord:
        """What this handle has recorded; give it to a controller, ``GrowthController(seeds, ..., record=seeds.recorder)``,
        which then records in each tick and evaluation. It begins anew when more modules are grafted.
        """
        if self._recorder is None or not self._recorder.is_of(list(self)):
            self._recorder = SeedRecord(self)
        return self._recorder

    def record(self, step: int, credit: Credit | None = None) -> None:
        """Record what all seeds are at this step, for :meth:`plot`: see :meth:`~kasmina_ext.seed_record.SeedRecord.take`.
        Does not wait for the device.
        """
        self.recorder.take(step, credit)

    def plot(self, path: str | PathLike[str], *, title: str | None = None) -> Path:
        """The map of the seeds over time as ``.png``, ``.svg``, ``.pdf`` or ``.html``: see :func:`kasmina_ext.plots.plot`.

        Of what was recorded, also where the layers have been folded since; where nothing was, of what the seeds are
        now. Waits for the device.
        """
        record = self._recorder
        if record is None or not record.steps:
            record = SeedRecord(self)
            record.take(0)
        return plot(record.history(), path, title=title)

    # ---- some of them ------------------------------------------------------------------------------------------------

    def __getitem__(self, seeds: SeedKey) -> Selection:
        """Seeds by number, in the order given, or those of all layers whose name matches a pattern.

        IndexError for a seed that does not exist and a mask of another length, KeyError for a pattern
        that no layer matches, TypeError for what is no number. Waits for the device only to read numbers that
        lie there.
        """
        layers = self.layers
        seeds = seeds.ids if isinstance(seeds, Selection) else seeds
        total = sum(layer.num_seeds for layer in layers.values())
        if isinstance(seeds, str):
            ids = _of_layers(seeds, layers)
        elif isinstance(seeds, slice):
            ids = torch.tensor(list(range(total)[seeds]), dtype=torch.int64, device="cpu")
        else:
            ids = _numbers(seeds, total)
        return Selection(list(layers.values()), ids)

    def reset_optimizer_state(self, optimizer: Optimizer, seed_ids: SeedKey | None = None) -> None:
        """Zero what ``optimizer`` remembers of the blueprints of these seeds (None: of all): see
        :meth:`KasminaLayer.reset_optimizer_state`.
        """
        for part in (self[:] if seed_ids is None else self[seed_ids]).parts:
            part.layer.reset_optimizer_state(optimizer, part.local)


def _of_layers(pattern: str, layers: dict[str, KasminaLayer]) -> Tensor:
    found, start = [], 0
    for name, layer in layers.items():
        if matches(name, pattern) or matches(original_name(name), pattern):
            found.append(torch.arange(start, start + layer.num_seeds, device="cpu"))
        start += layer.num_seeds
    if not found:
        raise KeyError(f"no layer matches {pattern!r}; there are {', '.join(map(repr, layers))}")
    return torch.cat(found)


def _numbers(seeds: Any, total: int) -> Tensor:
    """int64 ``[U]`` on the CPU, from 0."""
    if isinstance(seeds, bool) or (not is_single(seeds) and not isinstance(seeds, (Tensor, Iterable))):
        raise TypeError(f"seeds are chosen by numbers, a mask, a slice or a layer's name, got {type(seeds).__name__}")
    try:
        ids = integers(seeds, "seeds").detach().cpu().flatten()
    except ValueError:  # beyond int64
        raise IndexError(f"there are {total} seeds, there is no number {seeds!r:.60}") from None
    if ids.dtype == torch.bool:
        if ids.numel() != total:
            raise IndexError(f"a mask of seeds must have length {total}, got {ids.numel()}")
        return ids.nonzero().flatten()
    ids = ids.long()
    wrong = ids[(ids < -total) | (ids >= total)]
    if len(wrong):
        raise IndexError(f"there are {total} seeds, there is no number {wrong[0].item()}")
    return torch.where(ids < 0, ids + total, ids)
