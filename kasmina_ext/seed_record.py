"""What all seeds were over time, in bounded memory: state, alpha, credit, and how far each is from changing nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kasmina_ext import reference
from kasmina_ext.arguments import at_least, integer
from kasmina_ext.credit import Credit, grafted
from kasmina_ext.events import HostCopy
from kasmina_ext.extras import missing_extra
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.measure import Layers, Layout, seed_layers
from kasmina_ext.state_layout import StateVar
from kasmina_ext.telemetry import TelemetryColumn

NO_STATE = 255
"""In place of a state's number, where somebody wrote what is no state."""
_FORMAT = "kasmina_ext seed history 1"
# bfloat16: credits may be as small as losses are, which float16 cannot hold; two to three digits are enough to look at.
_COLUMNS = {"state": torch.uint8, "alpha": torch.float16, "credit": torch.bfloat16, "change": torch.bfloat16}
_BYTES = sum(dtype.itemsize for dtype in _COLUMNS.values())  # of a seed, in a snapshot


def size_of_change(layer: KasminaLayer) -> Tensor:
    """float64 ``[S]``: how far each seed's map y = a x + b is from the identity, by the size of what it sees.

    The root mean square of y - x over the features f of the seed, over that of x:

        sqrt(mean_f((a_f - 1)^2 E[x^2] + 2 (a_f - 1) b_f E[x] + b_f^2)) / sqrt(E[x^2])

    with the layer's telemetry for E[x] and E[x^2], which it has for a seed and not for each of its
    features: exact where these are alike. Where nothing was seen but zeros or nothing at all, E[x]
    is 0 and E[x^2] is 1. 0 for a seed that is not grafted, whatever its blueprint. Waits for no
    device; of a sharded bank every process must ask.
    """
    with torch.no_grad():
        buffers = layer._buffers
        offsets, seen = buffers["seed_offsets"], buffers["telemetry"]
        a, b = reference.coefficients(offsets, buffers["state"], buffers["alpha"], layer.whole_bank(), torch.float64)
        owner, owned = reference.feature_owner(offsets, layer.hidden_dim)
        slope, shift = torch.where(owned, a - 1, 0.0), torch.where(owned, b, 0.0)
        table = torch.stack([slope * slope, slope * shift, shift * shift, owned.double()], 1)
        sums = table.new_zeros(layer.num_seeds, 4).index_put((owner,), table, accumulate=True)
        slope2, mixed, shift2, size = sums.unbind(1)
        count, mean, m2 = (seen[:, c] for c in (TelemetryColumn.COUNT, TelemetryColumn.MEAN, TelemetryColumn.M2))
        square = m2 / count + mean * mean
        measured = (count > 0) & (square > 0)
        mean, square = torch.where(measured, mean, 0.0), torch.where(measured, square, 1.0)
        moved = (slope2 * square + 2 * mixed * mean + shift2).clamp(min=0)
        return (moved / (size.clamp(min=1) * square)).sqrt()


# ---- what was recorded -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedHistory:
    """All that a :class:`SeedRecord` holds: ``K`` snapshots of the ``T`` seeds of all layers. On the CPU."""

    layers: dict[str, int]
    """Names and numbers of seeds, in the order of the seeds."""
    steps: list[int]
    """``K``, ascending."""
    state: Tensor
    """uint8 ``[K, T]``: :class:`~kasmina_ext.lifecycle.ExtendedLifecycle`; 255 for what is none."""
    alpha: Tensor
    """float16 ``[K, T]``."""
    credit: Tensor
    """bfloat16 ``[K, T]``: as last measured, for seeds that have been grafted ever since; NaN where not known."""
    change: Tensor
    """bfloat16 ``[K, T]``: :func:`size_of_change`."""

    def save(self, path: str | PathLike[str]) -> None:
        """As a safetensors file. ImportError where safetensors is not installed."""
        tensors = {name: getattr(self, name).contiguous() for name in _COLUMNS}
        tensors["steps"] = torch.tensor(self.steps, dtype=torch.int64)
        metadata = {"format": _FORMAT, "layers": json.dumps(self.layers)}
        _safetensors().torch.save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SeedHistory:
        """From :meth:`save`, to be plotted where the model is not; ValueError for any other file."""
        try:
            with _safetensors().safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            layers = json.loads(metadata.get("layers", "null"))
        except (_safetensors().SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no seed history: {error}") from None
        problem = _problem_of_history(metadata.get("format"), layers, tensors)
        if problem:
            raise ValueError(f"{path} is no seed history: {problem}")
        return cls(layers, tensors.pop("steps").tolist(), **tensors)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing_extra("a history in a file", "safetensors", "plots") from error
    return safetensors


def _problem_of_history(kind: Any, layers: Any, tensors: Mapping[str, Tensor]) -> str | None:
    if kind != _FORMAT:
        return f"its format is {kind!r}"
    if not _are_sizes(layers):
        return "it does not name its layers"
    steps = tensors.get("steps")
    if tensors.keys() != {*_COLUMNS, "steps"} or steps.dtype != torch.int64 or steps.dim() != 1:
        return f"it has {', '.join(sorted(tensors)) or 'nothing'}"
    if not (steps.diff() > 0).all():
        return "its steps do not ascend"
    shape = (len(steps), sum(layers.values()))
    wrong = [n for n, dtype in _COLUMNS.items() if (tuple(tensors[n].shape), tensors[n].dtype) != (shape, dtype)]
    return f"{wrong[0]} must be {_COLUMNS[wrong[0]]} {list(shape)}" if wrong else None


def _are_sizes(layers: Any) -> bool:
    return (
        isinstance(layers, dict)
        and len(layers) > 0
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in layers.values())
    )


# ---- recording -------------------------------------------------------------------------------------------------------


class SeedRecord:
    """Takes snapshots of all seeds of all layers, for :mod:`kasmina_ext.plots`.

    .. code-block:: python

        record = SeedRecord(model)
        grow = GrowthController(model, optimizer, record=record)  # at each tick and evaluation; or
        record.take(step)                                         # by hand
        plot(record.history(), "seeds.html")                      # kasmina_ext.plots

    A snapshot is 7 bytes a seed on the host, and one asynchronous copy from a GPU. When there are too
    many, every other one goes, and from then on half as many stay: they reach back to the start
    at equal distances. The newest is always among them.

    Arguments:
        layers: KasminaLayers, a model that contains them, or a list of either.
        snapshots: how many are kept at most.
        memory: bytes that they may take (but two always stay): 64 MiB are 91 snapshots of 100,000 seeds.
    """

    def __init__(self, layers: Layers, *, snapshots: int = 256, memory: int = 64 << 20) -> None:
        named = seed_layers(layers)
        self.layers = {name: layer.num_seeds for name, layer in named.items()}
        """Their names and numbers of seeds."""
        self._layout = Layout(list(named.values()))
        snapshots, memory = at_least("snapshots", snapshots, 2), at_least("memory", memory, 0)
        self._capacity = max(2, min(snapshots, memory // (_BYTES * self._layout.total)))
        self._kept: list[_Snapshot] = []
        self._stride = 1
        self._credit: Tensor | None = None

    def is_of(self, layers: Sequence[KasminaLayer]) -> bool:
        """Whether these are the layers recorded, in this order, whatever their names."""
        return list(map(id, layers)) == list(map(id, self._layout.layers))

    @property
    def steps(self) -> list[int]:
        """Of the snapshots there are."""
        return [snapshot.step for snapshot in self._kept]

    def take(self, step: int, credit: Credit | Sequence[Tensor] | None = None) -> None:
        """A snapshot of what the seeds are now. Waits for no device.

        Snapshots of this step or a later one go: a training that went back is recorded as it went on.
        ``credit`` is what :func:`kasmina_ext.credit` found, or its ``mean``: one ``[S]`` for each
        layer. It is shown until it is measured again, or the seed is no longer grafted.
        Of a sharded bank every process must take part.
        """
        step = integer("step", step)
        layout = self._layout
        with torch.inference_mode(False), torch.no_grad():
            lifecycle = layout.buffer("state")[StateVar.LIFECYCLE_STATE]
            if credit is not None:
                self._credit = layout.join(self._checked_credit(credit)).to(torch.bfloat16)
            elif self._credit is None:
                self._credit = torch.full_like(lifecycle, torch.nan, dtype=torch.bfloat16)
            # Kept with what is forgotten, so that a seed's next life starts without.
            self._credit = torch.where(grafted(lifecycle), self._credit.to(lifecycle.device), torch.nan)
            values = {
                "state": torch.where((lifecycle >= 0) & (lifecycle < NO_STATE), lifecycle, NO_STATE),
                "alpha": layout.buffer("alpha"),
                "credit": self._credit,
                "change": layout.join([size_of_change(layer) for layer in layout.layers]),
            }
            row = torch.cat([values[name].to(dtype).contiguous().view(torch.uint8) for name, dtype in _COLUMNS.items()])
        forgotten = [snapshot for snapshot in self._kept if snapshot.step >= step]
        number = forgotten[0].number if forgotten else self._kept[-1].number + 1 if self._kept else 0
        self._kept = self._kept[: len(self._kept) - len(forgotten)]
        if self._kept and self._kept[-1].number % self._stride:
            self._kept.pop()  # it was only there as the newest
        self._kept.append(_Snapshot(step, number, row, HostCopy(row)))
        while len(self._kept) > self._capacity:
            self._stride *= 2
            self._kept = [one for one in self._kept if one.number % self._stride == 0 or one is self._kept[-1]]
        self._settle(wait=False)

    def _checked_credit(self, credit: Credit | Sequence[Tensor]) -> Sequence[Tensor]:
        given = credit.mean if isinstance(credit, Credit) else credit
        each = given if isinstance(given, Sequence) else [None]
        shapes = [tuple(one.shape) if isinstance(one, Tensor) else None for one in each]
        if shapes != [(size,) for size in self._layout.sizes]:
            raise ValueError("credit must be one tensor [S] for each layer")
        return given

    def _settle(self, wait: bool) -> None:
        """What has arrived goes to the host's own memory; pinned memory is short."""
        self._kept = [
            _Snapshot(one.step, one.number, one.copy.values.clone(), None)
            if one.copy is not None and one.copy.arrived(wait)
            else one
            for one in self._kept
        ]

    def history(self) -> SeedHistory:
        """All snapshots. Waits for the device."""
        self._settle(wait=True)
        total = self._layout.total
        rows = torch.stack([one.row for one in self._kept]) if self._kept else torch.empty(0, _BYTES * total).byte()
        parts = rows.split([dtype.itemsize * total for dtype in _COLUMNS.values()], 1)
        columns = {  # clones: a view must begin where numbers of its size may
            name: part.clone(memory_format=torch.contiguous_format).view(dtype)
            for (name, dtype), part in zip(_COLUMNS.items(), parts, strict=True)
        }
        return SeedHistory(dict(self.layers), self.steps, **columns)

    # ---- going on later ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, for :meth:`load_state_dict`: copies on the CPU. Waits for the device."""
        return self._state(lambda tensor: tensor.detach().to("cpu", copy=True))

    def _state(self, kept: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """:meth:`state_dict` of tensors as ``kept`` makes them; does not wait for the device itself."""
        self._settle(wait=False)
        return {
            "layers": dict(self.layers),
            "steps": self.steps,
            "numbers": [one.number for one in self._kept],
            "stride": self._stride,
            "rows": [kept(one.row) for one in self._kept],
            "credit": None if self._credit is None else kept(self._credit),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. ValueError, and nothing changed, for a state of other layers, or one
        that is damaged.
        """
        self.check_state_dict(state)
        numbers, rows = state["numbers"], state["rows"]
        snapshots = zip(state["steps"], numbers, rows, strict=True)
        self._kept = [_Snapshot(step, number, row.to("cpu", copy=True), None) for step, number, row in snapshots]
        self._stride = state["stride"]
        self._credit = None if state["credit"] is None else state["credit"].to(self._layout.device, copy=True)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError for what :meth:`load_state_dict` would refuse. Changes nothing."""
        names = ("layers", "steps", "numbers", "stride", "rows", "credit")
        if not isinstance(state, Mapping) or any(name not in state for name in names):
            raise ValueError(f"a record's state has {', '.join(names)}")
        if state["layers"] != self.layers:
            raise ValueError(f"the record is of layers {state['layers']}, these are {self.layers}")
        total = self._layout.total
        steps, numbers, rows, credit = (state[name] for name in ("steps", "numbers", "rows", "credit"))
        good = (
            all(isinstance(each, (list, tuple)) and len(each) == len(steps) for each in (steps, numbers, rows))
            and all(type(number) is int for number in (*steps, *numbers, state["stride"]))
            and all(a < b for each in (steps, numbers) for a, b in zip(each, each[1:], strict=False))
            and state["stride"] >= 1
            and all(_is(row, torch.uint8, _BYTES * total) for row in rows)
            and (credit is None or _is(credit, torch.bfloat16, total))
        )
        if not good:
            raise ValueError("the record's state is damaged")


class _Snapshot(NamedTuple):
    step: int
    number: int
    """Counted from the first one ever taken; those that are multiples of the stride stay."""
    row: Tensor
    """uint8 ``[7 T]``; on the device until its copy has arrived."""
    copy: HostCopy | None


def _is(tensor: Any, dtype: torch.dtype, size: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype == dtype and tuple(tensor.shape) == (size,)
