"""Pictures of seeds: the map of all seeds over time, for print and for the browser."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from kasmina_ext.plots.seed_map import SeedMap, seed_map
from kasmina_ext.seed_record import SeedHistory

__all__ = ["SeedMap", "plot", "seed_map"]

_PICTURES = (".png", ".svg", ".pdf")


def plot(history: SeedHistory, path: str | PathLike[str], *, title: str | None = None) -> Path:
    """The map of seeds over time in a file, of the kind that the path's suffix says; returns the path.

    ``.png``, ``.svg`` and ``.pdf`` are drawn by matplotlib (``pip install kasmina_ext[plots]``);
    ``.html`` is one page without anything from elsewhere, which shows a seed's history where the mouse
    or the keyboard points at it. One row a seed, by layer, as far as there is room: else a row is
    a block of neighbours in a layer, and the picture says so. ValueError for another suffix, or a
    history without snapshots.
    """
    if not isinstance(history, SeedHistory):
        kind = type(history).__name__
        raise TypeError(f"history must be a SeedHistory, as SeedRecord.history() makes it, got {kind}")
    if not isinstance(title, (str, type(None))):
        raise TypeError(f"title must be a str, got {type(title).__name__}")
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (*_PICTURES, ".html"):
        raise ValueError(f"the path must end in {', '.join(_PICTURES)} or .html, got {path.name!r}")
    if not history.steps:
        raise ValueError("the history has no snapshots")
    if kind == ".html":
        from kasmina_ext.plots.html import page

        content = page(history, title).encode()
    else:
        from kasmina_ext.plots.picture import picture

        content = picture(history, kind[1:], title)
    path.write_bytes(content)
    return path
