"""What folding did: a table for people, a dict for programs."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from kasmina_ext.report import TableReport, cell


class FoldReport(TableReport):
    """``{layer name: row}`` in the model's order; printed, it is a table.

    ============  =====================================================================================
    row           meaning
    ============  =====================================================================================
    ``into``      name of the module that took a and b; "" where there was nothing to take
    ``kind``      its type, or the type of the base layer
    ``features``  of the layer
    ``changed``   features with a != 1 or b != 0
    ``scale``     largest ``|a - 1|``
    ``shift``     largest ``|b|``
    ``bound``     how far the rounding of the weights can move an output, for inputs of at most 1 in size (of
                  a norm: once normalized): larger inputs move it by as much more. Arithmetic not counted
    ``added``     tensors that the module has gained, as "bias"; else ""
    ``note``      why it was skipped, or what to know about it
    ``folded``    False where it was skipped
    ============  =====================================================================================

    ``kept_bytes``: what the undo holds in memory, beside the model.
    """

    text_columns = ("layer", "into", "kind", "added", "note")
    short_names = MappingProxyType({"features": "size"})

    def __init__(self, rows: dict[str, dict[str, Any]], title: str, kept_bytes: int = 0) -> None:
        super().__init__(rows)
        self.title, self.kept_bytes = title, kept_bytes

    @property
    def skipped(self) -> dict[str, str]:
        """Names and reasons."""
        return {name: row["note"] for name, row in self.items() if not row["folded"]}

    def __reduce__(self) -> tuple:
        return FoldReport, (dict(self), self.title, self.kept_bytes)

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        seldom = [name for name in ("added", "note") if not any(row[name] for row in self.values())]
        names = [name for name in _COLUMNS if name not in seldom]
        rows = [[name or "(model)", *(cell(row[column]) for column in names)] for name, row in self.items()]
        kept = f"the undo keeps {_size(self.kept_bytes)}" if self.kept_bytes else ""
        return ["layer", *names], rows, kept


_COLUMNS = ("into", "kind", "features", "changed", "scale", "shift", "bound", "added", "note")


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
