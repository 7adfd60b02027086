"""The event log: one JSON line for each transition, written without ever waiting for a device in the middle of training."""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Mapping
from io import FileIO
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.lifecycle import ExtendedLifecycle

Sink = str | PathLike[str] | Callable[[dict[str, Any]], object] | None
"""A file that lines are appended to, a function that takes each event as a dict, or None."""


class EventLog:
    """Turns rows of tensors into events, in the order of :meth:`record`.

    On a GPU the rows come over with asynchronous copies; an event is written by the first
    :meth:`poll` after its rows have arrived, at the latest by :meth:`flush`. It leaves the queue
    only when it has been written: if the sink raises, the error is passed on once, and events wait
    until the sink works again.
    """

    def __init__(
        self, sink: Sink, layers: Mapping[str, int], numbers: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """``layers``: their names and numbers of seeds, in order. ``numbers``: what to write of a transition, by the
        name of the state entered; None is everything. OSError for a file that cannot be opened.
        """
        self._numbers = numbers
        self._names = list(layers)
        self._starts = [0, *accumulate(layers.values())]
        self._path = None if sink is None or callable(sink) else Path(sink)
        self._call = sink if callable(sink) else None
        self._pending: deque[_Rows] = deque()
        self._events: deque[dict[str, Any]] = deque()
        self._failing = False
        if self._path is not None:
            self._path.open("ab").close()

    @property
    def wanted(self) -> bool:
        """Whether anybody listens: recording costs something."""
        return self._path is not None or self._call is not None

    def record(self, head: Mapping[str, Any], rows: Tensor, columns: Mapping[str, Tensor]) -> None:
        """An event for each seed where ``rows [T]``: its values in ``columns`` (``[T]``, or one for all) and in ``head``.

        ``head`` has the step and the tick, ``columns`` the states ``from`` and ``to``; columns must
        not be written afterwards. Values that are NaN or infinite are left out.
        """
        if self.wanted:
            self._pending.append(_Rows(dict(head), rows, dict(columns)))

    def poll(self, wait: bool = False) -> None:
        """Write what has arrived (with ``wait``, everything). A sink that goes on failing is tried again, but raises no more."""
        self._take(wait)
        try:
            self._write()
        except Exception:
            if not self._failing:
                self._failing = True
                raise

    def flush(self) -> None:
        """Write everything. Waits for the device; a failing sink raises each time."""
        self._take(wait=True)
        self._write()

    def _take(self, wait: bool) -> None:
        while self._pending and self._pending[0].arrived(wait):
            rows = self._pending.popleft()
            self._events += [self._event(rows.head, values) for values in rows.values()]

    def _write(self) -> None:
        if self._call is not None:
            while self._events:
                self._call(self._events[0])
                self._events.popleft()
        elif self._events:
            text = "".join(json.dumps(event, allow_nan=False) + "\n" for event in self._events)
            append(self._path, text.encode())
            self._events.clear()
        self._failing = False

    def _event(self, head: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
        number = bisect_right(self._starts, values["seed"]) - 1
        seed = int(values.pop("seed")) - self._starts[number]
        states = {end: state_name(values.pop(end)) for end in ("from", "to")}
        place = {"step": head["step"], "tick": head["tick"], "layer": self._names[number], "seed": seed}
        numbers = {name: value for name, value in (values | head).items() if name not in place}
        if self._numbers is not None:
            numbers = {name: value for name, value in numbers.items() if name in self._numbers[states["to"]]}
        return {**place, **states, **{name: _plain(value) for name, value in numbers.items() if math.isfinite(value)}}


class _Rows:
    """Chosen rows on their way to the host: first how many there are, then, once that is known, the rows."""

    def __init__(self, head: dict[str, Any], rows: Tensor, columns: dict[str, Tensor]) -> None:
        self.head, self._rows, self._columns = head, rows, columns
        self._count: HostCopy | None = HostCopy(rows.sum())
        self._table: HostCopy | None = None

    def arrived(self, wait: bool) -> bool:
        if self._table is None:
            if not self._count.arrived(wait):
                return False
            count = int(self._count.values)
            # Not nonzero: the device would have to be asked for its size.
            chosen = self._rows.logical_not().to(torch.uint8).argsort(stable=True)[:count]
            columns = [column.expand(self._rows.shape)[chosen].double() for column in self._columns.values()]
            self._table = HostCopy(torch.stack((chosen.double(), *columns), 1))
        return self._table.arrived(wait)

    def values(self) -> list[dict[str, float]]:
        """Of each row; ``seed`` is its number among all ``T``."""
        names = ("seed", *self._columns)
        return [dict(zip(names, row, strict=True)) for row in self._table.values.tolist()]


class HostCopy:
    """A tensor's copy on the host, asynchronous from a GPU (of CUDA: from another, it waits)."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.is_cuda:
            self.values = values.to("cpu", non_blocking=True)  # into pinned memory
            with torch.cuda.device(values.device):
                self._event = torch.cuda.Event()
                self._event.record()
        else:
            self.values = values.cpu()

    def arrived(self, wait: bool) -> bool:
        if self._event is None or self._event.query():
            return True
        if wait:
            self._event.synchronize()
        return wait


def _write_all(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def append(path: Path, data: bytes) -> None:
    """All of ``data`` at a file's end or, where that fails, none: no half line, nor one that comes again."""
    with path.open("ab", buffering=0) as file:
        end = file.tell() if file.seekable() else None
        try:
            _write_all(file, data)
        except BaseException:
            if end is not None:
                with contextlib.suppress(OSError):
                    file.truncate(end)
            raise


def state_name(state: float) -> str:
    """A state's name, or the number where somebody wrote what is no state."""
    number = int(state)
    return ExtendedLifecycle(number).name if 0 <= number < len(ExtendedLifecycle) else str(number)


def _plain(value: float) -> int | float:
    return int(value) if value.is_integer() else value
