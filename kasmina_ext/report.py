"""What every seed of a layer is and has seen: a table for people, a dict for programs."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from torch import Tensor

from kasmina_ext import telemetry
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.state_layout import StateVar
from kasmina_ext.telemetry import ReducedColumn, TelemetryColumn

if TYPE_CHECKING:
    from rich.table import Table

    from kasmina_ext.layer import KasminaLayer

MAX_TABLE_ROWS = 60
"""Seeds in a table; the dict has them all."""


class TableReport(dict):
    """Rows by name, each a dict; printed, it is a table: with rich on a terminal (:meth:`show`), else plain text."""

    title: str
    text_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of words, which start at the left; numbers end at the right."""
    short_names: ClassVar[Mapping[str, str]] = {}
    """Of columns, so that the table fits a terminal of 80 columns."""
    unbroken_columns: ClassVar[tuple[str, ...]] = ()
    """Columns whose cells stay on one line."""

    def show(self, file: TextIO | None = None) -> None:
        """Print the table, with rich where it is installed and ``file`` (by default stdout) is a terminal."""
        file = sys.stdout if file is None else file
        try:
            from rich.console import Console
        except ImportError:
            print(self, file=file)
            return
        console = Console(file=file)
        if console.is_terminal:
            console.print(self)
        else:
            print(self, file=file)

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        header, rows, more = self._cells()
        table = Table(title=self.title, caption=more or None, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
        for name in header:
            side = "left" if name in self.text_columns else "right"
            unbroken = name in self.unbroken_columns
            table.add_column(self.short_names.get(name, name), justify=side, overflow="fold", no_wrap=unbroken)
        for row in rows:
            table.add_row(*map(Text, row))  # a name in brackets is no markup
        return table

    def __str__(self) -> str:
        header, rows, more = self._cells()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        sides = [str.ljust if name in self.text_columns else str.rjust for name in header]

        def line(cells: list[str]) -> str:
            return "  ".join(side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, line(header), rule, *map(line, rows), *([more] if more else [])])

    __repr__ = __str__

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        """Names of the columns, the rows, and a line below them."""
        raise NotImplementedError


class SeedReport(TableReport):
    """``{seed: row}`` or ``{state name: row}``, each row a dict; printed, it is a table.

    Rows of seeds: state, blueprint (-1: none), strategy, alpha, epochs, features, count, mean, std,
    nonfinite, potential. Rows of states: seeds, the number of seeds for each
    blueprint and strategy, means of alpha, epochs and potential over the seeds, and the telemetry
    of all of them together. What was not measured is NaN.
    """

    text_columns = ("state", "strategy", "blueprint")
    short_names = MappingProxyType({"blueprint": "bp", "features": "size"})
    unbroken_columns = ("state",)

    def __init__(self, rows: dict[Any, dict[str, Any]], per: str, title: str) -> None:
        super().__init__(rows)
        self.per, self.title = per, title

    def __reduce__(self) -> tuple:
        return type(self), (dict(self), self.per, self.title)

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        """Header, rows, and what the table leaves out; seeds at work come before sleeping ones where not all fit."""
        keys = [key for key, row in self.items() if row.get("seeds", 1)]
        hidden = 0
        if len(keys) > MAX_TABLE_ROWS:
            keys.sort(key=lambda key: self[key].get("state") == ExtendedLifecycle.DORMANT.name)
            hidden = len(keys) - MAX_TABLE_ROWS
            keys = sorted(keys[:MAX_TABLE_ROWS])
        names = [name for name in next(iter(self.values())) if name not in _RARELY or any(self[k][name] for k in keys)]
        rows = [[str(key), *(cell(self[key][name]) for name in names)] for key in keys]
        return [self.per, *names], rows, f"... and {hidden} more" if hidden else ""


_RARELY = ("nonfinite",)  # in a table only where there are any


def cell(value: Any) -> str:
    """A value as a table shows it; NaN is a dash."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items()) or "-"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}"
    return str(value)


def counted(number: int, what: str) -> str:
    """As in 1 seed, 2 seeds."""
    return f"{number} {what}{'s' if number != 1 else ''}"


# ---- gathering -----------------------------------------------------------------------------------


def seed_report(layer: KasminaLayer, per: str = "seed") -> SeedReport:
    """See :meth:`KasminaLayer.seed_report`."""
    if per not in ("seed", "state"):
        raise ValueError(f"per must be 'seed' or 'state', got {per!r}")
    rows = list(seed_rows(layer))
    title = f"{layer.num_seeds} seeds of {type(layer._modules['base_layer']).__name__}, {layer.hidden_dim} features"
    if per == "seed":
        return SeedReport(dict(enumerate(rows)), per, title)
    return SeedReport(rows_by_state(rows), per, title)


def rows_by_state(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of seeds, put together by the name of the state that they are in."""
    names = [state.name for state in ExtendedLifecycle]
    names += sorted({row["state"] for row in rows} - set(names))
    return {name: together([row for row in rows if row["state"] == name]) for name in names}


def seed_rows(layer: KasminaLayer) -> Iterator[dict[str, Any]]:
    """A row for each seed, as :class:`SeedReport` has them. Waits for the device."""
    buffers = layer._buffers
    state = buffers["state"].tolist()
    seen = _columns(buffers["telemetry"])
    reduced = _columns(telemetry.reduce(layer))
    features = buffers["seed_offsets"].diff().tolist()
    alpha, potential = buffers["alpha"].tolist(), telemetry.potential(layer).tolist()
    for seed in range(layer.num_seeds):
        yield {
            "state": _name(ExtendedLifecycle, state[StateVar.LIFECYCLE_STATE][seed]),
            "blueprint": state[StateVar.BLUEPRINT_ID][seed],
            "strategy": _name(GraftingStrategy, state[StateVar.GRAFTING_STRATEGY][seed]),
            "alpha": alpha[seed],
            "epochs": state[StateVar.EPOCHS_IN_STATE][seed],
            "features": features[seed],
            "count": int(seen[TelemetryColumn.COUNT][seed]),
            "mean": reduced[ReducedColumn.MEAN][seed],
            "std": reduced[ReducedColumn.STD][seed],
            "nonfinite": int(seen[TelemetryColumn.NONFINITE][seed]),
            "potential": potential[seed],
        }


def _columns(table: Tensor) -> list[list[float]]:
    return table.t().tolist()


def _name(kind: type[ExtendedLifecycle] | type[GraftingStrategy], number: int) -> str:
    """The member's name, or the bare number where somebody wrote what is none."""
    return kind(number).name if 0 <= number < len(kind) else str(number)


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several seeds as one."""
    measured = [row for row in rows if row["count"]]
    count = sum(row["count"] for row in measured)
    mean = math.fsum(row["count"] * row["mean"] for row in measured) / count if count else math.nan
    spread = math.fsum(row["count"] * (row["std"] ** 2 + (row["mean"] - mean) ** 2) for row in measured)
    return {
        "seeds": len(rows),
        "blueprint": dict(sorted(Counter(row["blueprint"] for row in rows).items())),
        "strategy": dict(sorted(Counter(row["strategy"] for row in rows).items())),
        "alpha": _mean(row["alpha"] for row in rows),
        "epochs": _mean(row["epochs"] for row in rows),
        "features": sum(row["features"] for row in rows),
        "count": count,
        "mean": mean,
        "std": math.sqrt(spread / count) if count else math.nan,
        "nonfinite": sum(row["nonfinite"] for row in rows),
        "potential": _mean(row["potential"] for row in rows),
    }


def _mean(values: Iterable[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
