"""Writes what the benchmarks measured into README.md, benchmarks/README.md and docs/benchmarks.png.

Reads benchmarks/results/bench_*.json and profile_cuda.json; a benchmark that was not run is said to be missing. Nothing is
typed by hand: the targets are here, the figures are in the records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_report import into_readme

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PROFILE = "profile_cuda"

Record = dict[str, Any]
Row = dict[str, Any]
MIB = 1 << 20
KINDS = ("gpu", "cpu", "eager")


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


def of_its_bytes(least: float, most: float) -> Callable[[Row], float | None]:
    """As above, for work that moves three tensors."""
    return lambda row: row.get("times copy of its bytes") if least <= row["bytes"] / 3 / MIB < most else None


def figure(*keys: str) -> Callable[[Row], float | None]:
    def of(row: Row) -> float | None:
        for key in keys:
            row = row.get(key, {})
        return row if isinstance(row, (int, float)) else None

    return of


def million(row: Row) -> float | None:
    return row["gpu"]["kasmina_ext"]["p50"] if row["case"].startswith("1,000,000") else None


BY_HAND = "by hand, torch.compile"


def above_plain(row: Row) -> float:
    above = row["above the plain layer"]
    return min(above["kasmina_ext"], above["kasmina_ext, compiled"])


def against_best_compiled(row: Row) -> float:
    peers = [value for name, value in row["above the plain layer"].items() if name.startswith(BY_HAND)]
    return round((1 + above_plain(row)) / (1 + min(peers)), 4)


FORWARD, BACKWARD, REPORT = "bench_chunked_forward_cuda", "bench_chunked_backward_cuda", "bench_report_cuda"
LAYER, LAYOUTS, SCALING = "bench_layer_cuda", "bench_layouts_cuda", "bench_scaling_cuda"
TRAINING, CPU = "bench_training_cuda", "bench_cpu_cpu"
ADDED, DOUBLED, ALIGNED = "added, in units of x * 2", "× an x * 2 module", "× the aligned case"
TARGETS = (
    Target("forward + telemetry, 256 MiB and more", FORWARD, 1.05, copies(256, 1 << 20)),
    Target("forward + telemetry, 64 MiB", FORWARD, 1.12, copies(64, 256)),
    Target("forward + telemetry, 1 to 64 MiB", FORWARD, 1.25, copies(1, 64)),
    Target("... against the fastest peer, all sizes", FORWARD, 1.0, figure("times best"), "× peer"),
    Target("backward, 256 MiB and more", BACKWARD, 1.10, of_its_bytes(256, 1 << 20), "× its bytes"),
    Target("backward, 1 to 64 MiB", BACKWARD, 1.10, of_its_bytes(1, 256), "× its bytes"),
    Target("the report's sizes, forward + telemetry", REPORT, 2.5, figure("gpu", "kasmina_ext", "p50"), "µs"),
    Target("... against the package's launch scheme", REPORT, 1.0, figure("times package"), "× package"),
    Target("eager layer, forward", LAYER, 1.5, figure(ADDED, "forward"), DOUBLED),
    Target("eager layer, training step", LAYER, 2.0, figure(ADDED, "training step"), DOUBLED),
    Target("awkward layouts and chunks, forward", LAYOUTS, 1.15, figure("times aligned"), ALIGNED),
    Target("awkward layouts and chunks, backward", LAYOUTS, 1.15, figure("times aligned, backward"), ALIGNED),
    Target("100 to 1,000,000 seeds, 256 MiB", SCALING, 1.2, figure("times 100 seeds"), "× 100 seeds"),
    Target("1,000,000 validated state changes", "bench_state_update_cuda", 50, million, "µs"),
    Target("training step, best of ours", TRAINING, 1.0, against_best_compiled, "× best torch.compile"),
    Target("... above the plain layer", TRAINING, 0.02, above_plain, "of its time"),
    Target("CPU, 2 and 16 threads", CPU, 0.9, figure("of memcpy's speed"), "of memcpy's speed", at_least=True),
    Target("... against torch.compile", CPU, 1.0, figure("times best"), "× torch.compile"),
)


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


def sources(records: Iterable[Record], clocks: bool = False) -> str:
    """Where figures come from, each combination of device, torch and commit once."""
    found = dict.fromkeys(
        f"{record['device']}, torch {record['torch']}"
        + "".join(f", {what} {record[what]}" for what in ("driver", "commit") if record.get(what))
        + (f", clocks {record['clocks']}" if clocks and record.get("clocks") else "")
        + ("" if record.get("complete", True) else " (cut short: cases are missing)")
        for record in records
    )
    return "Measured on: " + ("; ".join(found) or "nothing yet") + ".\n"


# ---- Who is faster ----

REFERENCES = ("copy", "clone", "aligned", "plain layer", "base", "layer")
"""What ours stands beside, but what does not do its work."""


def wins(records: dict[str, Record]) -> str:
    """A line for each benchmark and peer that is faster than ours somewhere."""
    lines = []
    for name, record in records.items():
        ratios: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for row in record.get("microseconds", []):
            for kind in KINDS:
                for peer, ratio in faster(row.get(kind, {})):
                    ratios.setdefault((kind, peer), []).append((ratio, row["case"]))
        for (kind, peer), found in ratios.items():
            ratio, case = max(found)
            cases = f"{len(found)} of {sum(peer in row.get(kind, {}) for row in record['microseconds'])} cases"
            lines.append(f"* {name}, {kind}: **{peer}** in {cases}; most, we take {ratio:.3g} × its time, at {case}")
    return "\n".join(lines) + "\n" if lines else "* Nowhere in what was measured.\n"


def faster(times: dict[str, dict[str, float]]) -> Iterator[tuple[str, float]]:
    """Peers of a case that beat ours: (name, our time over its time). "PyTorch, merge" stands against our merge."""
    ours = {name: t["p50"] for name, t in times.items() if name.startswith("kasmina_ext")}
    for name, t in times.items():
        if not ours or name in ours or name.startswith(REFERENCES):
            continue
        same = [ours[mine] for mine in ours if mine.partition(", ")[2] == name.partition(", ")[2]]
        ratio = min(same or ours.values()) / t["p50"]
        if ratio > 1:
            yield name, ratio


# ---- Tables ----

GROUPED = ("torch.compile", BY_HAND)
"""Contestants that come in several formulations: the fastest one's time is shown."""
MOST_COLUMNS = 7


def table(record: Record) -> str:
    """A record's rows: p50 in microseconds of each contestant, ours as p20 / p50 / p80, and the ratios."""
    rows = record["microseconds"]
    ratios = {row["case"]: dict(ratios_of(row)) for row in rows}
    parts = []
    for kind, title in (("gpu", "GPU time, µs"), ("cpu", "time, µs"), ("eager", "with the host's side, µs")):
        timed = {row["case"]: grouped(row[kind]) for row in rows if row.get(kind)}
        if timed and not parts:
            timed = {case: cells | ratios[case] for case, cells in timed.items()}
        if timed:
            parts.append(cross(title, timed))
    return "\n".join(parts)


def ratios_of(row: Row) -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        if isinstance(value, (int, float)) and key != "bytes":
            yield key, f"{value:.3g}"
        elif key.startswith(("above", "added")):
            yield from ((f"{key}: {name}", f"{number:.3g}") for name, number in value.items())


def grouped(times: dict[str, dict[str, float]]) -> dict[str, str]:
    cells: dict[str, str] = {}
    for name, t in sorted(times.items(), key=lambda item: item[1]["p50"]):
        family = next((family for family in GROUPED if name.startswith(family)), name)
        if name.startswith("kasmina_ext"):
            cells[name] = " / ".join(map(microseconds, t.values()))
        elif family not in cells:
            variant = name.removeprefix(family).removeprefix(", ")
            cells[family] = microseconds(t["p50"]) + (f" ({variant})" if variant else "")
    order = dict.fromkeys(next((f for f in GROUPED if name.startswith(f)), name) for name in times)
    return {name: cells[name] for name in order}


def microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def cross(title: str, cells: dict[str, dict[str, str]]) -> str:
    """Cases as lines; as columns where that is narrower."""
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    if len(names) > MOST_COLUMNS and len(cells) <= MOST_COLUMNS:
        cells = {name: {case: row.get(name, "") for case, row in cells.items()} for name in names}
        names = list(dict.fromkeys(name for row in cells.values() for name in row))
    lines = [f"| {title} | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {line} | " + " | ".join(row.get(name, "") for name in names) + " |" for line, row in cells.items()]
    return "\n".join(lines) + "\n"


def limits(record: Record | None) -> str:
    """The profiler's counters, a line for each kernel."""
    if not record:
        return "Not measured: `python benchmarks/profile_kernels.py` needs a GPU and ncu.\n"
    columns = (
        "case", "kernel", "µs", "MB moved (of MB needed)", "memory's speed", "warps active", "issue slots",
        "instructions / element", "registers", "shared KiB", "what warps wait for (of 1 instruction)",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * 8 + " --- |"]
    before = ""
    for k in record["kernels"]:
        moved = (k["bytes read"] + k["bytes written"]) / 1e6
        waits = ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in k["waits"].items())
        case = k["case"] if k["case"] != before else ""
        needed = f" ({k['bytes needed'] / 1e6:.4g})" if case else ""
        before = k["case"]
        cells = (
            case, f"`{k['kernel']}`", f"{k['ns'] / 1e3:.4g}", f"{moved:.4g}{needed}",
            f"{k[PERCENT_OF_MEMORY]:.0f} %", f"{k['% of warps active']:.0f} %", f"{k['% of issue slots used']:.0f} %",
            f"{k['instructions per element']:.3g}", f"{k['registers']:.0f}", f"{k['shared bytes'] / 1024:.3g}", waits,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + sources([record])


PERCENT_OF_MEMORY = "% of the memory's speed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default benchmarks/results")
    parser.add_argument("--into", type=Path, default=ROOT, help="the tree whose pages are written (default: this one)")
    options = parser.parse_args()
    records = {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("bench_*_c*.json"))}
    profile = options.results / f"{PROFILE}.json"
    picture_there = False
    if FORWARD in records:
        from benchmark_pictures import picture

        picture_there = picture(records, options.into / "docs/benchmarks.png")
    summary = targets(records)
    shown = "\n![Forward with telemetry beside a copy and its peers](docs/benchmarks.png)\n" if picture_there else ""
    into_readme(options.into / "README.md", (summary + shown) if records else UNMEASURED, *markers("benchmarks"))
    page = options.into / "benchmarks/README.md"
    shown = shown.replace("docs/", "../docs/")
    first = next(iter(records.values()), {})
    everything = sources([first], clocks=True) if first else ""
    for name, record in records.items():
        elsewhere = any(record.get(key) != first.get(key) for key in ("device", "torch", "driver", "commit"))
        everything += f"\n### {name}\n\n" + (sources([record]) + "\n" if elsewhere else "") + table(record)
    for marker, text in (
        ("benchmarks", summary + shown),
        ("wins", wins(records) if records else UNMEASURED),
        ("limits", limits(json.loads(profile.read_text()) if profile.exists() else None)),
        ("figures", everything),
    ):
        into_readme(page, text, *markers(marker))


UNMEASURED = "No record of the present kernels is kept yet.\n"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


if __name__ == "__main__":
    main()
