"""Which checkpoints stay: pure functions on what a list shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from kasmina_ext.checkpoint.header import LAYER, PRIORITIES, age_of


def group_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is counted together: a layer and a seed, or a layer and a tag."""
    return entry["layer_id"], entry["tag"] if entry["kind"] == LAYER else entry["seed_id"]


def in_excess(entries: Iterable[dict[str, Any]], keep: int) -> list[dict[str, Any]]:
    """What has to go so that of each group the ``keep`` best stay, the worst first.

    Higher priorities are better, of one priority newer ones. Critical ones never go, and count.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        groups[group_of(entry)].append(entry)
    excess = []
    for group in groups.values():
        group.sort(key=_worth)
        excess += [entry for entry in group[: max(0, len(group) - keep)] if entry["priority"] != PRIORITIES[-1]]
    return excess


def _worth(entry: Mapping[str, Any]) -> tuple[int, bool, int, str]:
    return PRIORITIES.index(entry["priority"]), *age_of(entry)
