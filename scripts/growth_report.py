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
    values = [part[name] for part in parts]
    return min(values) if "correlation" in name or name == "gain" else max(values)


def accuracy(parts: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(part[name]["accuracy"] for part in parts)


def differences(parts: list[dict[str, Any]], which: str, others: dict[str, str]) -> dict[str, dict[str, float]]:
    """Accuracy of ``which`` less that of each other, pair by pair."""
    return {
        f"less {label}": interval([part[which]["accuracy"] - part[other]["accuracy"] for part in parts])
        for label, other in others.items()
    }


# ---- on the terminal -------------------------------------------------------------------------------------------------


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Who helped: credit", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    rows = results["who helped"]
    for name in ("damage", *next(iter(rows.values()))):
        table.add_column(name, justify="left" if name == "damage" else "right", max_width=14)
    for kind, row in rows.items():
        table.add_row(kind, *(cell(value) for value in row.values()))
    for kind, row in results["where to grow"].items():
        for number in (name for name in row if name != "damaged"):
            show_differences(f"{number}, picked by potential; {kind}", row[number], "potential", console)
    console.print(table)
    for kind, row in results["what to cull"].items():
        show_differences(f"24 of 48 seeds left by the controller; {kind}", row, "controller", console)
    for kind, row in results["repair"].items():
        show_differences(f"Repaired by the controller; {kind}", row, "controller", console)


def show_differences(title: str, row: dict[str, Any], which: str, console: Console) -> None:
    """Accuracy of ``which``, and by how much it is above each of the others."""
    others = {name: value for name, value in row.items() if isinstance(value, float) and name != which}
    parts = [f"{name} {value:.1f} (difference {cell(row['less ' + name])})" for name, value in others.items()]
    console.print(f"[bold]{title}[/bold]: {row[which]:.1f} %; {'; '.join(parts)}", soft_wrap=True)


def cell(value: dict[str, float]) -> str:
    """Mean, interval and worst."""
    digits = 1 if max(abs(value["mean"]), abs(value.get("low", 0.0))) >= 1 else 3
    text = f"{value['mean']:.{digits}f}"
    if "worst" in value:
        return f"{text} (worst {value['worst']:.{digits}f})"
    return f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]" if "low" in value else text
