"""The demo's picture: what the seeds win back, and how they lived."""

from __future__ import annotations

import io
import statistics

import matplotlib
import numpy as np
from demo_grow import CHUNK
from demo_report import DAMAGE_NAMES, Results
from demo_task import HIDDEN_LAYERS, WIDTH
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kasmina_ext.lifecycle import ExtendedLifecycle as State

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, INK, GREY = "#0072B2", "#E69F00", "#009E73", "#222222", "#767676"
STATE_COLORS = {
    State.DORMANT: "#ECECEC",
    State.GERMINATED: "#F0E442",
    State.TRAINING: "#F0E442",
    State.GRAFTING: "#E69F00",
    State.STABILIZATION: "#B5DDF5",
    State.EVALUATING: "#56B4E9",
    State.FINE_TUNING: "#0072B2",
    State.FOSSILIZED: "#14304A",
    State.CULLED: "#D55E00",
}


def draw(results: Results) -> bytes:
    """A PNG."""
    style = {
        "font.size": 10.5,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12.6, 5.4), dpi=160, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.12, 1))
        draw_accuracy(left, results)
        draw_lives(right, results)
        buffer = io.BytesIO()
        # No date and no version inside: the same results give the same file.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# ---- accuracy against parameters -----------------------------------------------------------------


def draw_accuracy(axes: Axes, results: Results) -> None:
    """Parameters on a log scale (linear up to the first point), accuracy by the log of what is missing to 100."""
    first = CHUNK * results.budgets("gradient")[0]
    axes.set_xscale("symlog", base=2, linthresh=first, linscale=1)
    axes.set_yscale("function", functions=(_missing, lambda y: 100 - 10.0**-y))
    damaged = results.values("base", "damaged")
    for by, color, marker, label in (
        ("random", ORANGE, "s", "seeds picked at random"),
        ("gradient", BLUE, "o", "seeds picked by gradient"),
    ):
        parts = [f"{by}/{budget}" for budget in results.budgets(by)]
        x = [0.0] + [statistics.mean(results.values(part, "parameters")) for part in parts]
        values = [damaged] + [results.values(part, "accuracy") for part in parts]
        means = [statistics.mean(each) for each in values]
        errors = [spread_of(each) for each in values]
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(x, low, high, color=color, alpha=0.16, lw=0)
        axes.plot(x, means, color=color, marker=marker, ms=6, lw=2, label=label)
        if by == "gradient":
            for i, budget in enumerate(results.budgets(by), 1):
                # By turns above and below: neighbours may lie close together.
                place = ((-2, 6), BLUE, "right", "bottom") if i % 2 else ((4, -5), BLUE, "left", "top")
                note(axes, f"{budget}", (x[i], means[i]), *place)
    for part, label in (
        ("subset", "random part\nof last layer"),
        ("last", "last layer"),
        ("full", "all weights"),
    ):
        at = statistics.mean(results.values(part, "parameters"))
        values = results.values(part, "accuracy")
        height, error = statistics.mean(values), spread_of(values)
        axes.errorbar(
            [at],
            [height],
            [error],
            color=GREEN,
            marker="D",
            ms=7,
            capsize=3,
            elinewidth=1,
            ls="none",
        )
        note(axes, label, (at, height - error), (0, -5), GREEN, "center", "top")
    healthy = statistics.mean(results.values("base", "accuracy"))
    axes.axhline(healthy, color=GREY, lw=1.2, ls="--", zorder=1)
    note(axes, f"before the damage: {healthy:.1f}", (0, healthy), (0, 4), GREY, "left", "bottom")
    name = DAMAGE_NAMES[results.config["damage"]]
    note(axes, name, (0, statistics.mean(damaged)), (9, -4), GREY, "left", "top")

    lowest = statistics.mean(damaged) - spread_of(damaged)
    axes.set_ylim(lowest - 6, 97.5)
    axes.set_yticks([y for y in (20, 30, 40, 50, 60, 70, 80, 85, 90, 92, 94, 96) if y > lowest - 6])
    rightmost = statistics.mean(results.values("full", "parameters"))
    axes.set_xlim(-first / 6, 1.7 * rightmost)
    ticks = [0, *(first * 2**i for i in range(12) if first * 2**i <= rightmost)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("parameters trained and kept (on the line: seeds alive at most)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("What a damaged network wins back")
    axes.grid(axis="y", color="#E4E4E4", lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False, reverse=True)


def _missing(accuracy: np.ndarray) -> np.ndarray:
    return -np.log10(np.maximum(100 - np.asarray(accuracy, dtype=float), 0.1))


def spread_of(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


Point = tuple[float, float]


def note(axes: Axes, text: str, at: Point, offset: Point, color: str, across: str, up: str) -> None:
    """``text`` at a point of the data, moved by a few points of print."""
    axes.annotate(text, at, offset, textcoords="offset points", ha=across, va=up, color=color, fontsize=9.5)


# ---- lives of the seeds --------------------------------------------------------------------------


def draw_lives(axes: Axes, results: Results) -> None:
    """One row per seed, by layer and within a layer by the time that it germinated; one column per tick."""
    shown = mapped_budget(results)
    lives = results.values(f"gradient/{shown}", "lifecycles")[0]
    seeds = len(lives[0])
    per_layer = seeds // HIDDEN_LAYERS
    by_seed = [[int(tick[one], 16) for tick in lives] for one in range(seeds)]
    rows: list[list[float]] = []
    centers = []
    for layer in range(HIDDEN_LAYERS):
        if layer:
            rows.append([float("nan")] * len(lives))
        members = by_seed[layer * per_layer : (layer + 1) * per_layer]
        members.sort(key=lambda states: (states.count(State.DORMANT), states.count(State.CULLED)))
        centers.append(len(rows) + (per_layer - 1) / 2)
        rows += members
    present = sorted({state for states in by_seed for state in states})
    colors = [STATE_COLORS.get(State(state), INK) for state in range(len(State))]
    axes.imshow(
        rows,
        cmap=ListedColormap(colors),
        norm=BoundaryNorm([s - 0.5 for s in range(len(State) + 1)], len(State)),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks(centers, [f"layer {layer + 1}" for layer in range(HIDDEN_LAYERS)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    steps = results.config["sizes"]["tick_steps"]
    axes.set_xlabel(f"tick ({steps} training step{'s' if steps > 1 else ''})")
    axes.set_title(f"Lives of {seeds} seeds of {WIDTH // per_layer} features (at most {shown} alive)")
    names: dict[str, str] = {}
    for state in present:
        color = colors[state]
        name = State(state).name.lower().replace("_", "-")
        names[color] = f"{names[color]}, {name}" if color in names else name
    axes.legend(
        handles=[Patch(color=color, label=name) for color, name in names.items()],
        loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False, fontsize=9.5,
        handlelength=1.2, handleheight=1.2, columnspacing=1.2,
    )  # fmt: skip


def mapped_budget(results: Results) -> int:
    """The largest that leaves some seeds dormant: the choice is then to be seen."""
    budgets = results.budgets("gradient")
    seeds = len(results.values(f"gradient/{budgets[0]}", "lifecycles")[0][0])
    return max((budget for budget in budgets if budget < seeds), default=max(budgets))
