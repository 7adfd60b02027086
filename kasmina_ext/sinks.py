"""Numbers about seeds while a network trains: a few for each layer, however many seeds it has, and where they go.

.. code-block:: python

    with JsonlSink("seeds.jsonl") as lines, TensorBoardSink("runs/1") as board:
        ...
        log_seeds(model, step, [lines, board])

The callbacks in :mod:`kasmina_ext.integrations` do so by themselves. Of every single seed, over time:
:mod:`kasmina_ext.seed_record`; of every transition: the ``log`` of a :class:`~kasmina_ext.GrowthController`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kasmina_ext import telemetry
from kasmina_ext.arguments import at_least
from kasmina_ext.credit import Credit, grafted
from kasmina_ext.events import append, state_name
from kasmina_ext.extras import missing_extra
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.measure import Layers, seed_layers
from kasmina_ext.seed_record import size_of_change
from kasmina_ext.state_layout import StateVar
from kasmina_ext.telemetry import ReducedColumn

BINS = 20
"""Of a histogram."""


class Sink(ABC):
    """Takes what is logged. Subclass it for another tool: three methods and an end.

    ``step`` counts optimizer steps; names have slashes, from the general to the particular.
    """

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A few numbers by name; they may be NaN."""

    @abstractmethod
    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """``counts[k]`` values lie between ``edges[k]`` and ``edges[k + 1]``; there is one edge more than counts."""

    @abstractmethod
    def event(self, step: int, event: Mapping[str, Any]) -> None:
        """Something that happened: JSON values."""

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way. May be called again; what is written later is written, too."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ---- lines of JSON ---------------------------------------------------------------------------------------------------


class JsonlSink(Sink):
    """Appends a line of JSON for each call to a file; read it with :func:`read_jsonl`.

    A line is written whole, by one system call, and is there for others when the call returns. What is
    not finite becomes null. OSError for a file that cannot be written; what a full disk cut off is
    taken back.

    The lines are ``{"step", "scalars": {name: value}}``, ``{"step", "histogram": name, "counts", "edges"}`` and
    ``{"step", "event": {...}}``.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        with self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # half a line, of a machine that lost its power: what comes is no part of it
                    file.write(b"\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write({"step": step, "scalars": values})

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        self._write({"step": step, "histogram": name, "counts": counts, "edges": edges})

    def event(self, step: int, event: Mapping[str, Any]) -> None:
        self._write({"step": step, "event": event})

    def close(self) -> None:
        """Every line is on its way already."""

    def _write(self, record: dict[str, Any]) -> None:
        append(self.path, json.dumps(_finite(record), allow_nan=False).encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: str | PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a file of lines, in order. Another process may be writing it, or have been killed while it did: an
    unfinished last line is left out, and so is what is no JSON object anywhere else, with one warning.
    """
    skipped = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and line.endswith(b"\n"):
                yield record
            elif line.endswith(b"\n") and line.strip():
                skipped += 1
    if skipped:
        warnings.warn(f"{path}: left out {skipped} lines that are no JSON objects", stacklevel=2)


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


class TensorBoardSink(Sink):
    """Writes for TensorBoard, below ``directory``: made with the first call, so that only the rank that logs has one.

    Events are shown as text. ImportError where TensorBoard is not installed.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("TensorBoardSink", "tensorboard", "tensorboard") from error
        self.directory = Path(os.path.abspath(directory))
        self._make = SummaryWriter
        self._writer: Any = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._open().add_scalar(name, value, step)

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        # TensorBoard wants sums, too: those of values in the middle of their bins.
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        self._open().add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=math.fsum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=math.fsum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def event(self, step: int, event: Mapping[str, Any]) -> None:
        text = json.dumps(_finite(event), allow_nan=False, indent=2)
        self._open().add_text("seeds/events", "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = self._make(str(self.directory))
        return self._writer


# ---- what is said of seeds -------------------------------------------------------------------------------------------


def log_seeds(
    layers: Layers, step: int, sinks: Iterable[Sink], top_k: int = 10, credit: Credit | None = None
) -> dict[str, int]:
    """What can be said of any number of seeds in a bounded number of numbers; returns how many are in each state.

    For each layer, with names that begin with ``seeds/<layer>/``:

    * scalars: ``state/<NAME>``, how many seeds are in each state; ``top_potential/1`` to ``top_k``, the highest
      potentials, and ``top_credit/1`` ... where ``credit`` is given.
    * histograms of 20 bins: ``alpha`` and ``change`` (:func:`~kasmina_ext.seed_record.size_of_change`) of the seeds that
      have a part in the output; ``potential``, ``mean`` and ``variance`` of those where they were measured. Bins of
      potentials, variances and changes above 0 grow by a constant factor.
    * an event that names the seeds at the top, with state and alpha.

    One copy from the device for each layer. ``credit`` is what :func:`kasmina_ext.credit` found of the same layers. Of a
    sharded bank every process must call; those without sinks write nothing, and get {}.
    """
    named, sinks = seed_layers(layers), list(sinks)
    top_k = at_least("top_k", top_k, 0)
    credits: Sequence[Tensor | None] = [None] * len(named)
    if credit is not None:
        credits = credit.mean
        if [len(mean) for mean in credits] != [layer.num_seeds for layer in named.values()]:
            raise ValueError("the credit is of other layers")
    totals: dict[str, int] = {}
    for (name, layer), of_layer in zip(named.items(), credits, strict=True):
        with torch.inference_mode(False), torch.no_grad():
            packed, tops = _packed(layer, top_k, of_layer)
        if not sinks:
            continue
        found = _unpacked(packed.tolist(), tops, min(top_k, layer.num_seeds))
        for state, count in found.states.items():
            totals[state] = totals.get(state, 0) + count
        for sink in sinks:
            _write(sink, step, name, found)
    return totals


class _Statistics(NamedTuple):
    """Of one layer."""

    states: dict[str, int]
    histograms: dict[str, tuple[list[int], list[float]]]
    """Counts and edges by name; those of no values are left out."""
    top: dict[str, list[dict[str, Any]]]
    """By what they are at the top of."""


def _write(sink: Sink, step: int, name: str, found: _Statistics) -> None:
    prefix = f"seeds/{name or 'layer'}"
    values: dict[str, float] = {f"{prefix}/state/{state}": count for state, count in found.states.items()}
    for by, seeds in found.top.items():
        values |= {f"{prefix}/top_{by}/{place}": seed[by] for place, seed in enumerate(seeds, 1)}
    sink.scalars(step, values)
    for of, (counts, edges) in found.histograms.items():
        sink.histogram(step, f"{prefix}/{of}", counts, edges)
    sink.event(step, {"layer": name, **{f"top_{by}": seeds for by, seeds in found.top.items()}})


_HISTOGRAMS = {"alpha": False, "change": True, "potential": True, "mean": False, "variance": True}
"""By name, whether the bins are of equal width in the logarithm."""
_TOP_COLUMNS = ("seed", "value", "state", "alpha")


def _packed(layer: KasminaLayer, top_k: int, credit: Tensor | None) -> tuple[Tensor, list[str]]:
    """float64: everything that :func:`_unpacked` wants to know, in one tensor; and the names of what seeds are at the top
    of. Waits for no device.
    """
    buffers = layer._buffers
    lifecycle, alpha = buffers["state"][StateVar.LIFECYCLE_STATE], buffers["alpha"].double()
    reduced, potential = telemetry.reduce(layer), telemetry.potential(layer)
    in_output = grafted(lifecycle)
    columns = {
        "alpha": torch.where(in_output, alpha, torch.nan),
        "change": torch.where(in_output, size_of_change(layer), torch.nan),
        "potential": potential,
        "mean": reduced[:, ReducedColumn.MEAN],
        "variance": reduced[:, ReducedColumn.VARIANCE],
    }
    states = torch.arange(len(ExtendedLifecycle), device=lifecycle.device)
    parts = [(lifecycle[:, None] == states).sum(0).double()]
    for name, logarithmic in _HISTOGRAMS.items():
        parts.append(_histogram(columns[name].log10() if logarithmic else columns[name]))
    tops = {"potential": potential}
    if credit is not None:
        tops["credit"] = credit.to(lifecycle.device, torch.float64, non_blocking=True)
    for values in tops.values():
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        value, seed = values.topk(min(top_k, layer.num_seeds))
        parts += [seed.double(), value, lifecycle[seed].double(), alpha[seed]]
    return torch.cat(parts), list(tops)


def _histogram(values: Tensor) -> Tensor:
    """float64 ``[2 BINS + 1]`` of the finite ones: edges of bins from the least to the greatest, and how many are in each."""
    finite = torch.isfinite(values)
    low = torch.where(finite, values, torch.inf).amin().nan_to_num(posinf=0.0)  # of none: 0
    high = torch.where(finite, values, -torch.inf).amax().nan_to_num(neginf=0.0)
    edges = low + (high - low) * torch.linspace(0, 1, BINS + 1, dtype=values.dtype, device=values.device)
    edges = torch.minimum(edges, high)  # whatever the rounding
    edges[-1] = high
    ordered = torch.where(finite, values, torch.inf).sort().values  # what is not finite comes last, and into no bin
    below = torch.searchsorted(ordered, edges)
    below[-1] = finite.sum()  # the last bin has its upper edge, too
    return torch.cat([edges, below.diff().double()])


def _unpacked(values: list[float], tops: list[str], top_k: int) -> _Statistics:
    rest = iter(values)

    def take(count: int) -> list[float]:
        return [next(rest) for _ in range(count)]

    states = {
        state.name: int(count) for state, count in zip(ExtendedLifecycle, take(len(ExtendedLifecycle)), strict=True)
    }
    histograms = {}
    for name, logarithmic in _HISTOGRAMS.items():
        edges, counts = take(BINS + 1), [int(count) for count in take(BINS)]
        if sum(counts):
            if edges[0] == edges[-1]:  # of one value: in the middle of the bins
                counts = [sum(counts) if k == BINS // 2 else 0 for k in range(BINS)]
                edges = [edges[0] + max(abs(edges[0]), 1.0) * (k - BINS // 2 - 0.5) / BINS for k in range(BINS + 1)]
            histograms[name] = counts, [10**edge for edge in edges] if logarithmic else edges
    top = {}
    for by in tops:
        rows = zip(*(take(top_k) for _ in _TOP_COLUMNS), strict=True)
        top[by] = [
            {"seed": int(seed), by: value, "state": state_name(state), "alpha": alpha}
            for seed, value, state, alpha in rows
            if math.isfinite(value)
        ]
    return _Statistics(states, histograms, top)
