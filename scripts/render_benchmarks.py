"""Writes what the benchmarks measured into README.md, benchmarks/README.md and docs/benchmarks.png.

Reads benchmarks/results/bench_*.json; a benchmark that was not run is said to be missing. Nothing is typed by hand: the
targets are here, the figures are in the records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_report import into_readme

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"

Record = dict[str, Any]
Row = dict[str, Any]
MIB = 1 << 20


# ---- Targets: what, how much, and which figure of which rows ----


@dataclass(frozen=True)
class Target:
    what: str
    record: str
    limit: float
    figure: Callable[[Row], float | None]
    """Of a row; None where the target does not speak of it. The worst row counts."""
    unit: str = "× copy"
    at_least: bool = False

    def worst(self, records: dict[str, Record]) -> tuple[float, str] | None:
        """The figure and the case; None where it was not measured."""
        rows = records.get(self.record, {}).get("microseconds", [])
        found = [(value, row["case"]) for row in rows if (value := self.figure(row)) is not None]
        return (min(found) if self.at_least else max(found)) if found else None

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def copies(least: float, most: float) -> Callable[[Row], float | None]:
    """Times a copy, of tensors between these sizes in MiB (of one tensor; a row's bytes count two)."""
    return lambda row: row.get("times copy") if least <= row["bytes"] / 2 / MIB < most else None


def p50(row: Row, contestant: str = "kasmina_ext") -> float | None:
    return row["gpu"][contestant]["p50"]


def million(row: Row) -> float | None:
    return p50(row) if row["case"].startswith("1,000,000") else None


def against_best_compiled(row: Row) -> float:
    above = row["above the plain layer"]
    ours = min(above["kasmina_ext"], above["kasmina_ext, compiled"])
    return round((1 + ours) / (1 + above["torch.compile of it by hand"]), 4)


def memcpy(row: Row) -> float | None:
    threads = row["case"].split(", ")[-2]
    return row["of memcpy's speed"] if threads in ("2 threads", "16 threads") and row["bytes"] > 100 * MIB else None


FORWARD, REPORT, LAYER = "bench_chunked_forward_cuda", "bench_report_cuda", "bench_layer_cuda"
TARGETS = (
    Target("forward + telemetry, 256 MiB and more", FORWARD, 1.05, copies(256, 1 << 20)),
    Target("forward + telemetry, 64 MiB", FORWARD, 1.12, copies(64, 256)),
    Target("forward + telemetry, 1 to 64 MiB", FORWARD, 1.25, copies(1, 64)),
    Target("... against the fastest peer", FORWARD, 1.0, lambda row: row["times best"], "× peer"),
    Target("backward", "bench_chunked_backward_cuda", 1.10, lambda row: row["times copy of its bytes"], "× its bytes"),
    Target("the report's sizes, forward + telemetry", REPORT, 2.5, p50, "µs"),
    Target("... against the package's launch scheme", REPORT, 1.0, lambda row: row.get("times package"), "× package"),
    Target(
        "eager layer, forward", LAYER, 1.5, lambda row: row["added, in units of x * 2"]["forward"], "× an x * 2 module"
    ),
    Target(
        "eager layer, training step", LAYER, 2.0, lambda row: row["added, in units of x * 2"]["training step"],
        "× an x * 2 module",
    ),
    Target(
        "awkward layouts and chunks", "bench_layouts_cuda", 1.15, lambda row: row["times aligned"], "× the aligned case"
    ),
    Target("100 to 1,000,000 seeds, 256 MiB", "bench_scaling_cuda", 1.2, lambda row: row.get("times 100 seeds"), "× 100 seeds"),
    Target("1,000,000 validated state changes", "bench_state_update_cuda", 50, million, "µs"),
    Target(
        "training step of a linear layer", "bench_training_cuda", 1.0, against_best_compiled, "× torch.compile by hand"
    ),
    Target("CPU, 2 and 16 threads, 128 MiB", "bench_cpu_cpu", 0.9, memcpy, "of memcpy's speed", at_least=True),
    Target("... against torch.compile", "bench_cpu_cpu", 1.0, lambda row: row.get("times best"), "× torch.compile"),
)  # fmt: skip


def targets(records: dict[str, Record]) -> str:
    lines = ["| what | target | measured, worst case | where | |", "| --- | ---: | ---: | --- | :-: |"]
    for target in TARGETS:
        sign = "≥" if target.at_least else "≤"
        aim = f"{sign} {target.limit:g} {target.unit}"
        worst = target.worst(records)
        if worst is None:
            lines.append(f"| {target.what} | {aim} | not measured | | |")
            continue
        value, case = worst
        lines.append(f"| {target.what} | {aim} | {value:.3g} | {case} | {'✓' if target.met(value) else '✗'} |")
    return "\n".join(lines) + "\n\n" + sources(records.values())


def sources(records: Iterable[Record]) -> str:
    """Where figures come from, each combination of device, torch and commit once."""
    found = dict.fromkeys(
        f"{record['device']}, torch {record['torch']}"
        + (f", driver {record['driver']}" if record.get("driver") else "")
        + (f", commit {record['commit']}" if record.get("commit") else "")
        for record in records
    )
    return "Measured on: " + "; ".join(found) + ".\n"


# ---- Tables ----


def table(record: Record) -> str:
    """A record's rows, contestants as lines: microseconds p20 / p50 / p80, and other figures below."""
    lines = []
    for row in record["microseconds"]:
        kinds = [kind for kind in ("gpu", "cpu", "eager") if kind in row]
        lines += ["", f"**{row['case']}**", "", "| contestant | " + " | ".join(f"{k}, µs" for k in kinds) + " |"]
        lines += ["| --- |" + " ---: |" * len(kinds)]
        for name in dict.fromkeys(name for kind in kinds for name in row[kind]):
            cells = [" / ".join(f"{t:.4g}" for t in row[kind].get(name, {}).values()) for kind in kinds]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        figures = [f"{key}: {spelled(value)}" for key, value in row.items() if key not in (*kinds, "case")]
        lines += ["", "; ".join(figures)]
    return "\n".join([sources([record]), *lines]) + "\n"


def spelled(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {spelled(number)}" for name, number in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


# ---- The picture ----


def picture(records: dict[str, Record], path: Path) -> bool:
    """Speed as a share of the device copy's, by case; False where there is nothing to draw."""
    if FORWARD not in records:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(records[FORWARD]["microseconds"], key=lambda row: row["bytes"])
    colours = {"kasmina_ext": "#0072b2", "Triton": "#e69f00", "torch.compile": "#009e73", "PyTorch": "#999999"}
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(colours)
    for i, (name, colour) in enumerate(colours.items()):
        heights = [
            max((s for peer, s in row["share of copy speed"].items() if peer.startswith(name)), default=0)
            for row in rows
        ]
        at = [x + (i - (len(colours) - 1) / 2) * width for x in range(len(rows))]
        axes.bar(at, heights, width, label=name if name != "torch.compile" else "torch.compile, best", color=colour)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.text(len(rows) - 0.5, 1.01, "device copy", ha="right", va="bottom", fontsize=8)
    names = [row["case"].replace(", ", "\n", 1).replace(", ", "\n") for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_ylabel("bytes per second,\nas a share of a copy's")
    axes.set_title(f"Forward with telemetry, {records[FORWARD]['device']}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default benchmarks/results")
    parser.add_argument("--into", type=Path, default=ROOT, help="the tree whose pages are written (default: this one)")
    options = parser.parse_args()
    records = {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("bench_*_c*.json"))}
    summary = targets(records)
    into_readme(options.into / "README.md", summary, *markers("benchmarks"))
    page = options.into / "benchmarks/README.md"
    into_readme(page, summary, *markers("benchmarks"))
    everything = "\n".join(f"### {name}\n\n{table(record)}" for name, record in records.items())
    into_readme(page, everything, *markers("figures"))
    picture(records, options.into / "docs/benchmarks.png")


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


if __name__ == "__main__":
    main()
