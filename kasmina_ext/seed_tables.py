"""What the seeds of a whole model are: a line for each layer, seed or state; for people tables, for programs dicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from kasmina_ext.blueprints import Blueprints
from kasmina_ext.graftable import plain_of
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.report import SeedReport, TableReport, cell, counted, rows_by_state, seed_rows, together


class GraftTable(TableReport):
    """``{layer name: row}``: ``kind`` of the module, ``features``, ``seeds``, ``parameters`` of their blueprints and their
    ``share`` of the model's own. ``skipped``: names of modules that were found and not grafted, and why.
    """

    text_columns = ("module", "kind")

    def __init__(self, rows: Mapping[str, dict[str, Any]], own: int, trained: int, skipped: Mapping[str, str]) -> None:
        super().__init__(rows)
        self.own_parameters = own
        """Of the model, without seeds."""
        self.trained_parameters = trained
        """Of the model and the seeds: those that require a gradient."""
        self.skipped = dict(skipped)

    @property
    def title(self) -> str:
        """All of it in a line."""
        seeds, parameters = (sum(row[column] for row in self.values()) for column in ("seeds", "parameters"))
        return (
            f"{counted(seeds, 'seed')} in {counted(len(self), 'layer')}: {parameters} parameters beside {self.own_parameters} "
            f"({_percent(parameters, self.own_parameters)}); {self.trained_parameters} can be trained"
        )

    def __reduce__(self) -> tuple:
        return GraftTable, (dict(self), self.own_parameters, self.trained_parameters, self.skipped)

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        columns = ("kind", "features", "seeds", "parameters")
        rows = [
            [
                name or "(model)",
                *(cell(row[column]) for column in columns),
                _percent(row["parameters"], self.own_parameters),
            ]
            for name, row in self.items()
        ]
        left_out = [f"not grafted: {name or '(model)'}, {reason}" for name, reason in self.skipped.items()]
        return ["module", *columns, "share"], rows, "\n".join(left_out)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if whole else "-"


def graft_table(
    layers: Mapping[str, KasminaLayer], roots: Mapping[str, nn.Module], skipped: Mapping[str, str]
) -> GraftTable:
    banks = {id(layer.lasting_bank) for layer in layers.values()}
    found = {id(p): p for root in roots.values() for p in root.parameters()}.values()
    parameters = [p for p in found if not isinstance(p, UninitializedTensorMixin)]
    own = sum(p.numel() for p in parameters if id(p) not in banks)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    rows = {}
    for name, layer in layers.items():
        count = Blueprints(layer).total_parameters
        rows[name] = {
            "kind": type(plain_of(layer)).__name__,
            "features": layer.hidden_dim,
            "seeds": layer.num_seeds,
            "parameters": count,
            "share": count / own if own else float("nan"),
        }
    return GraftTable(rows, own, trained, skipped)


class ModelReport(SeedReport):
    """:class:`~kasmina_ext.report.SeedReport` of all layers; its rows of seeds say which ``layer`` they are in."""

    text_columns = (*SeedReport.text_columns, "layer")


class LayerReport(TableReport):
    """``{layer name: row}``: ``kind``, ``seeds``, ``states`` and ``strategy`` (how many seeds in each), the mean ``alpha``,
    telemetry of all seeds together (``count``, ``mean``, ``std``, ``nonfinite``), the mean ``potential``, and a ``note``.
    """

    text_columns = ("layer", "kind", "states", "strategy", "note")

    def __init__(self, rows: Mapping[str, dict[str, Any]], title: str) -> None:
        super().__init__(rows)
        self.title = title

    def __reduce__(self) -> tuple:
        return LayerReport, (dict(self), self.title)

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        first = next(iter(self.values()))
        names = [name for name in first if name not in _RARELY or any(row[name] for row in self.values())]
        rows = [[name or "(model)", *(cell(row[column]) for column in names)] for name, row in self.items()]
        return ["layer", *names], rows, ""


_RARELY = ("nonfinite", "note")  # in a table only where there are any
_OF_LAYERS = ("strategy", "alpha", "count", "mean", "std", "nonfinite", "potential")


def report(layers: Mapping[str, KasminaLayer], per: str) -> TableReport:
    """Waits for the device. ValueError for a ``per`` that is not "layer", "seed" or "state"."""
    if per not in ("layer", "seed", "state"):
        raise ValueError(f"per must be 'layer', 'seed' or 'state', got {per!r}")
    rows = {name: list(seed_rows(layer)) for name, layer in layers.items()}
    total = sum(map(len, rows.values()))
    title = f"{counted(total, 'seed')} of {counted(len(layers), 'layer')}"
    if per == "layer":
        return LayerReport(_by_layer(layers, rows), title)
    flat = [{"layer": name or "(model)", **row} for name, of_layer in rows.items() for row in of_layer]
    if per == "seed":
        return ModelReport(dict(enumerate(flat)), per, title)
    return ModelReport(rows_by_state(flat), per, title)


def _by_layer(
    layers: Mapping[str, KasminaLayer], rows: Mapping[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    found = {}
    some_ran = any(row["count"] for of_layer in rows.values() for row in of_layer)
    for name, layer in layers.items():
        all_seeds = together(rows[name])
        never_ran = some_ran and layer.telemetry_enabled and not all_seeds["count"]
        found[name] = {
            "kind": type(plain_of(layer)).__name__,
            "seeds": len(rows[name]),
            "states": dict(Counter(row["state"] for row in rows[name])),
            **{column: all_seeds[column] for column in _OF_LAYERS},
            "note": "was never called" if never_ran else "",
        }
    return found
