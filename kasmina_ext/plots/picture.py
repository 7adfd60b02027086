"""The map for print: four panels beside each other, drawn by matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, TypeAlias

from kasmina_ext.extras import missing_extra
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.plots.colors import LIGHT
from kasmina_ext.plots.seed_map import SeedMap, heading, printable, seed_map
from kasmina_ext.seed_record import SeedHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_INK, _GREY = "#222222", "#767676"
_MAX_ROWS = 1200
_DPI = 150
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 7,
    "text.parse_math": False,  # a layer's name is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "kasmina_ext",
}


def picture(history: SeedHistory, kind: str, title: str | None = None) -> bytes:
    """A file of a kind that matplotlib writes; the same history gives the same bytes. ImportError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("a picture of seeds", "matplotlib", "plots") from error
    shown = seed_map(history, _MAX_ROWS)
    with matplotlib.rc_context(_STYLE):
        height = min(max(0.16 * len(shown.state), 1.6), 9.0)
        figure = Figure(figsize=(14.5, height + 2.35), dpi=_DPI, layout="constrained")
        _draw(figure, shown, title, height)
        buffer = io.BytesIO()
        # No date and no version inside.
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _draw(figure: Figure, shown: SeedMap, title: str | None, height: float) -> None:
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.06, wspace=0.015, hspace=0.02)
    figure.suptitle(heading(title), x=0.008, ha="left", fontsize=14, fontweight="bold")
    figure.text(0.992, 0.985, shown.title, ha="right", va="top", color=_GREY, fontsize=10)
    if shown.note:
        figure.supxlabel(shown.note, x=0.008, ha="left", fontsize=9, color=_GREY)
    panels, keys = figure.subplots(2, 4, width_ratios=(1.35, 1, 1, 1), height_ratios=(height, 0.95), squeeze=False)
    for below in keys:
        below.axis("off")
    _states(panels[0], keys[0], shown)
    scales = {
        "alpha": ("Alpha", "how much of it is blended in", _from_zero(bool(shown.alpha.isfinite().any()))),
        "credit": ("Credit", "what it takes off the loss; below 0: harm", _around_zero(shown.credit_limit)),
        "change": ("Size of change", "rms of y − x over rms of x", _logarithmic(*shown.change_range)),
    }
    for panel, key, (name, (title, unit, scale)) in zip(panels[1:], keys[1:], scales.items(), strict=True):
        _numbers(panel, key, shown, name, scale)
        panel.set_title(title)
        key.text(0.5, 0.42, unit, transform=key.transAxes, ha="center", va="top", fontsize=8.5, color=_GREY)
    _name_layers(panels[0], shown, height)


# ---- panels ----------------------------------------------------------------------------------------------------------


def _states(axes: Axes, key: Axes, shown: SeedMap) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    count = len(ExtendedLifecycle)
    colors = ListedColormap([*LIGHT.states, LIGHT.nothing])
    norm = BoundaryNorm([number - 0.5 for number in range(count + 2)], count + 1)
    _mesh(axes, shown, shown.state.clamp(max=count).numpy(), colors, norm)
    axes.set_title("State")
    handles = [
        Patch(facecolor=color, edgecolor="#BBBBBB", linewidth=0.4, label=_spoken(state))
        for state, color in zip(ExtendedLifecycle, LIGHT.states, strict=True)
    ]
    legend = key.legend(handles=handles, loc="upper left", ncols=3, frameon=False, fontsize=8.5, borderaxespad=0,
                        handlelength=1.1, handleheight=1.1, columnspacing=1.4, borderpad=0.2)  # fmt: skip
    legend.set_in_layout(False)  # it would push the panels apart


def _numbers(axes: Axes, key: Axes, shown: SeedMap, name: str, scale: Scale) -> None:
    """``name`` is that of values of the map and of their colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    norm, ticks = scale
    colors = LinearSegmentedColormap.from_list(name, getattr(LIGHT, name), bad=LIGHT.nothing)
    _mesh(axes, shown, getattr(shown, name).numpy().clip(norm.vmin, norm.vmax), colors, norm)
    axes.tick_params(axis="y", left=False, labelleft=False)
    if not ticks:
        axes.text(0.5, 0.5, "nothing known yet", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        return
    place = key.inset_axes((0.02, 0.74, 0.96, 0.2))
    bar = axes.figure.colorbar(ScalarMappable(norm, colors), cax=place, orientation="horizontal", ticks=ticks)
    bar.ax.set_xticklabels([f"{tick:.2g}" if tick else "0" for tick in ticks])
    bar.ax.tick_params(labelsize=8.5, length=2.5, which="major")
    bar.ax.minorticks_off()
    bar.outline.set_linewidth(0)


def _mesh(axes: Axes, shown: SeedMap, values: Any, colors: Any, norm: Any) -> None:
    edges, rows = _edges(shown.steps), range(len(shown.state) + 1)
    axes.pcolormesh(edges, rows, values, cmap=colors, norm=norm, rasterized=True, shading="flat")
    axes.invert_yaxis()
    axes.set_facecolor(LIGHT.nothing)
    axes.set_xlabel("step", labelpad=2)
    if len(shown.steps) == 1:
        axes.set_xticks(shown.steps)
    else:
        axes.locator_params(axis="x", integer=True, nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="both", length=2.5)
    axes.margins(0)
    firsts = [layer.first for layer in shown.layers[1:]]
    axes.hlines(firsts, edges[0], edges[-1], color="white", lw=1.6 if len(shown.layers) <= 40 else 0.5)


def _edges(steps: list[int]) -> list[float]:
    """A snapshot holds until the next one; the last one as long as they are apart on the whole."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    return [*steps, steps[-1] + (steps[-1] - steps[0]) / (len(steps) - 1)]


def _name_layers(axes: Axes, shown: SeedMap, height: float) -> None:
    """Beside their rows, as far as there is room: at most five names an inch."""
    places, names, last = [], [], -float("inf")
    for layer in shown.layers:
        middle = layer.first + layer.rows / 2
        if (middle - last) * height / len(shown.state) >= 0.2:
            places.append(middle)
            names.append(_readable(layer.name))
            last = middle
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, pad=5)


# ---- scales ----------------------------------------------------------------------------------------------------------

Scale: TypeAlias = "tuple[Normalize, list[float]]"
"""Of colours, and the ticks of its bar: none where nothing is known."""


def _from_zero(known: bool) -> Scale:
    from matplotlib.colors import Normalize

    return Normalize(0, 1), [0, 0.5, 1] if known else []


def _around_zero(limit: float) -> Scale:
    from matplotlib.colors import Normalize

    return Normalize(-(limit or 1), limit or 1), [-limit, 0, limit] if limit else []


def _logarithmic(low: float, high: float) -> Scale:
    from matplotlib.colors import LogNorm

    if not high:
        return LogNorm(0.1, 1), []
    if low >= high / 1.01:  # one value alone
        low = high / 10
    return LogNorm(low, high), [low, (low * high) ** 0.5, high]


def _readable(name: str) -> str:
    name = printable(name)
    if not name or name.isdecimal():
        return f"layer {name}".strip()
    return name if len(name) <= 34 else f"{name[:12]}…{name[-21:]}"


def _spoken(state: ExtendedLifecycle) -> str:
    return state.name.lower().replace("_", " ")
