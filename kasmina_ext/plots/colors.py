"""The colours of the map. Those of states can be told apart by the colour-blind, too (the tests measure it)."""

from __future__ import annotations

from dataclasses import dataclass

from kasmina_ext.lifecycle import ExtendedLifecycle as State


@dataclass(frozen=True)
class Palette:
    """For one background."""

    states: tuple[str, ...]
    """By the states' numbers: warm while a blueprint comes in, blue from pale to deep while it proves itself."""
    nothing: str
    """Where there is nothing to show."""
    alpha: tuple[str, ...]
    """Stops at equal distances, from 0 to 1."""
    credit: tuple[str, ...]
    """From harm over nothing to help."""
    change: tuple[str, ...]
    """From small to large."""


_WARM = {State.GERMINATED: "#F0E442", State.TRAINING: "#CDA500", State.GRAFTING: "#E36A0A"}
_BLUE = {State.STABILIZATION: "#B5DDF5", State.EVALUATING: "#56B4E9", State.FINE_TUNING: "#0072B2"}
_ENDED = {State.CULLED: "#96281B", State.CANCELLED: "#ABB8A0", State.ROLLED_BACK: "#C678B4"}


def _by_number(dormant: str, fossilized: str) -> tuple[str, ...]:
    colors = {State.DORMANT: dormant, State.FOSSILIZED: fossilized, **_WARM, **_BLUE, **_ENDED}
    return tuple(colors[state] for state in State)


LIGHT = Palette(
    states=_by_number("#EDEDED", "#14304A"),
    nothing="#F3F3F3",
    alpha=("#D6E9F8", "#7DB8E0", "#2A7AB9", "#0B2F57"),
    credit=("#7A2E00", "#D97B32", "#F1EDE6", "#4BA59A", "#004B44"),
    change=("#FFF0BF", "#FDB863", "#D9482B", "#5E0B33"),
)
DARK = Palette(
    states=_by_number("#2A2F36", "#FFFFFF"),
    nothing="#23282E",
    alpha=("#173A5A", "#2F78B0", "#7DB8E0", "#E3F2FD"),
    credit=("#FFB27A", "#C4621B", "#3A3F45", "#238C80", "#8FE8DB"),
    change=("#45260F", "#B5501F", "#F2A24B", "#FFF3CF"),
)
