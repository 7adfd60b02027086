"""What growth.py found, in numbers: means, and paired differences with their intervals."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import t as students_t

Parts = dict[str, dict[str, list[dict[str, Any]]]]
"""By experiment and kind of damage: what was found for each random seed."""
CONFIDENCE = 0.95


def interval(values: list[float]) -> dict[str, float]:
    """Mean, and its two-sided 95 % interval by Student's t (no interval from one value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "n": len(values)}
    error = statistics.stdev(values) / len(values) ** 0.5
    reach = error * students_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": len(values)}


def summary(found: Parts) -> dict[str, Any]:
    return {
        "where to grow": where_to_grow(found["where to grow"]),
        "who helped": {kind: account(parts) for kind, parts in pooled(found["who helped"]).items()},
        "what to cull": compared(found["what to cull"], "controller"),
        "repair": compared(found["repair"], "controller"),
    }


def pooled(by_kind: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """With a kind "all": every pair of kind and seed."""
    return {**by_kind, "all": [part for parts in by_kind.values() for part in parts]}


def where_to_grow(by_kind: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By kind and number of seeds; differences in points of accuracy."""
    numbers = sorted({int(name.split()[0]) for parts in by_kind.values() for name in parts[0] if " by " in name})
    result: dict[str, Any] = {}
    for kind, parts in pooled(by_kind).items():
        result[kind] = {"damaged": accuracy(parts, "damaged")}
        for number in numbers:
            means = {
                name: accuracy(parts, f"{number} by {name}") for name in ("potential", "random", "activation shift")
            }
            result[kind][f"{number} seeds"] = means | differences(
                parts, f"{number} by potential", {name: f"{number} by {name}" for name in means if name != "potential"}
            )
    return result


def compared(by_kind: dict[str, list[dict[str, Any]]], which: str) -> dict[str, Any]:
    result = {}
    for kind, parts in pooled(by_kind).items():
        names = [name for name, value in parts[0].items() if isinstance(value, dict)]
        others = {name: name for name in names if name != which}
        result[kind] = {name: accuracy(parts, name) for name in names} | differences(parts, which, others)
    return result


def account(parts: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in parts[0] if name != "seconds"]
    return {name: interval([part[name] for part in parts]) | {"worst": worst(name, parts)} for name in names}


def worst(name: str, parts: list[dict[str, Any]]) -> float:
    best_is_high = "correlation" in name or name == "gain"
    return (min if best_is_high else max)(part[name] for part in parts)


def accuracy(parts: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(part[name]["accuracy"] for part in parts)


def differences(parts: list[dict[str, Any]], which: str, others: dict[str, str]) -> dict[str, dict[str, float]]:
    """Accuracy of ``which`` less that of each other, pair by pair."""
    return {
        f"less {label}": interval([part[which]["accuracy"] - part[other]["accuracy"] for part in parts])
        for label, other in others.items()
    }


# ---- as tables ------------------------------------------------------------------------------------------------------

Rows = list[tuple[str, list[str]]]
"""A label, and a cell for each kind of damage."""


def tables(results: dict[str, Any]) -> dict[str, Rows]:
    """By title."""
    kinds = list(results["repair"])
    found = {}
    for number in (name for name in results["where to grow"]["all"] if name != "damaged"):
        by_kind = {kind: results["where to grow"][kind][number] for kind in kinds}
        found[f"Where to grow: {number}, picked by potential"] = _compared(by_kind, "potential")
    found["What to cull: 24 of 48 seeds, by the controller"] = _compared(results["what to cull"], "controller")
    found["Grown by the controller alone"] = _compared(results["repair"], "controller")
    account = results["who helped"]
    credit = [(name, [_cell(account[kind][name]) for kind in kinds]) for name in account["all"]]
    found["Who helped: credit (means, and the worst)"] = credit
    return found


def _compared(by_kind: dict[str, dict[str, Any]], which: str) -> Rows:
    """Accuracy of ``which``, and by how much it is above each of the others."""
    found = [("accuracy, %", [f"{row[which]:.1f}" for row in by_kind.values()])]
    for name in next(iter(by_kind.values())):
        if name.startswith("less "):
            label = f"above {name.removeprefix('less ')}, points"
            found.append((label, [_cell(row[name]) for row in by_kind.values()]))
    return found


def _cell(value: dict[str, float]) -> str:
    """Mean, and the worst or the reach of the (symmetric) interval."""
    mean = value["mean"]
    if "worst" in value:
        shown = [f"{number:.3f}" if abs(number) < 10 else f"{number:.1f}" for number in (mean, value["worst"])]
        return f"{shown[0]} ({shown[1]})"
    return f"{mean:+.1f} ± {value['high'] - mean:.1f}" if "high" in value else f"{mean:+.1f}"


def show(results: dict[str, Any], console: Console) -> None:
    for title, rows in tables(results).items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("damage")
        for kind in results["repair"]:
            table.add_column(kind, justify="right", no_wrap=True)
        for label, cells in rows:
            table.add_row(label, *cells)
        console.print(table)


def markdown(results: dict[str, Any], config: dict[str, Any]) -> str:
    kinds = list(results["repair"])
    lines = [f"| damage | {' | '.join(kinds)} |", "| --- |" + " ---: |" * len(kinds)]
    for title, rows in tables(results).items():
        lines.append(f"| **{title}** |" + " |" * len(kinds))
        lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]
    note = (
        f"Means over {config['seeds']} random seeds for each kind of damage, with paired 95 % intervals by Student's t; "
        f'"all" pools them. Torch {config["torch"]}, commit {config["commit"]}.'
    )
    return "\n".join([*lines, "", note, ""])
