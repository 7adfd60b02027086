"""The picture of the benchmarks' pages, drawn from their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]
COLOURS = {"kasmina_ext": "#0072b2", "Triton": "#e69f00", "torch.compile": "#009e73"}
GREY = "#999999"  # of what stands beside these
PACKAGE = "Triton package's scheme"


def picture(records: dict[str, Record], path: Path) -> bool:
    """One panel for each of what was measured: forward by size, by seeds, and at the report's sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (draw, records[name])
        for draw, name in (
            (by_size, "bench_chunked_forward_cuda"),
            (by_seeds, "bench_scaling_cuda"),
            (small, "bench_report_cuda"),
        )
        if name in records
    ]
    if not panels:
        return False
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2 + 4.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for one, (draw, record) in zip(axes[0], panels, strict=True):
        draw(one, record["microseconds"])
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Forward with telemetry, {panels[0][1]['device']}", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def fastest(times: dict[str, dict[str, float]], family: str) -> float | None:
    return min((t["p50"] for name, t in times.items() if name.split(",")[0] == family), default=None)


def bars(axes, rows: list[dict], heights, names: list[str], other: str) -> None:
    """``heights(row, family)`` of each row, for the families that have a colour and one more."""
    colours = COLOURS | {other: GREY}
    width = 0.8 / len(colours)
    for i, (family, colour) in enumerate(colours.items()):
        found = [(x, heights(row, family)) for x, row in enumerate(rows)]
        at = [x + (i - (len(colours) - 1) / 2) * width for x, height in found if height]
        label = "torch.compile, best" if family == "torch.compile" else family
        if at:
            axes.bar(at, [height for _, height in found if height], width, label=label, color=colour)
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    above(axes)


def above(axes) -> None:
    """The legend, where it hides nothing."""
    axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1)


def by_size(axes, rows: list[dict]) -> None:
    """Speed as a share of the device copy's, where there are peers."""
    rows = sorted((row for row in rows if "times best" in row), key=lambda row: row["bytes"])

    def share(row: dict, family: str) -> float | None:
        time = fastest(row["gpu"], family)
        return time and row["gpu"]["copy"]["p50"] / time

    names = [f"{row['bytes'] / 2 / (1 << 20):g}\n{row['case'].split(', ')[2]}" for row in rows]
    bars(axes, rows, share, names, "PyTorch")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("size of x, MiB, and its type", fontsize=8)
    axes.set_ylabel("speed as a share of a device copy's", fontsize=8)


def by_seeds(axes, rows: list[dict]) -> None:
    """Time against seeds at the same number of activations."""
    rows = [row for row in rows if "times 100 seeds" in row]
    points = sorted(((int(row["case"].split(", ")[1].split()[0]), row) for row in rows), key=lambda point: point[0])
    seeds = [number for number, _ in points]
    axes.scatter(
        seeds,
        [row["gpu"]["kasmina_ext"]["p50"] for _, row in points],
        s=18,
        color=COLOURS["kasmina_ext"],
        label="kasmina_ext",
    )
    copies = [row["gpu"]["copy"]["p50"] for _, row in points]
    axes.axhline(sorted(copies)[len(copies) // 2], color="black", linewidth=0.8, linestyle=":", label="device copy")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seeds, at 2^27 activations of bfloat16", fontsize=8)
    axes.set_ylabel("µs", fontsize=8)
    above(axes)


def small(axes, rows: list[dict]) -> None:
    """Times at the sizes of the Triton package's report; beside ours and peers the package's launch scheme."""

    def time(row: dict, family: str) -> float | None:
        return fastest(row["gpu"], family)

    bars(axes, rows, time, [row["case"].split(",")[0].replace(" x ", "\n") for row in rows], PACKAGE)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_xlabel("rows and features of the package's report", fontsize=8)
    axes.set_ylabel("µs of GPU time", fontsize=8)
