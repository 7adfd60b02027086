"""What a list shows of a checkpoint: the fields of its header, and the rules for them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from kasmina_ext.lifecycle import ExtendedLifecycle

PRIORITIES = ("low", "normal", "high", "critical")
"""From what goes first to what is never removed."""

SEED, LAYER = "seed", "layer"
_LAYER_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TAG = re.compile(r"[a-zA-Z0-9_-]{1,32}")
_MAX_SEED_ID = 2**63 - 1
MAX_TIMESTAMP = 10**16 - 1  # milliseconds; with all parts of greatest length an identifier still fits


_AHEAD = 24 * 60 * 60 * 1000


def plausible(timestamp: int) -> bool:
    """Whether it is at most a day ahead of the clock. Others are a wrong clock's, or made up to stay the newest for ever:
    they count as older than all others.
    """
    return timestamp <= time.time_ns() // 1_000_000 + _AHEAD


def age_of(entry: Mapping[str, Any]) -> tuple[bool, int, str]:
    """To sort by, the oldest first."""
    return plausible(entry["timestamp"]), entry["timestamp"], entry["checkpoint_id"]


def checked_layer_id(layer_id: Any) -> str:
    if isinstance(layer_id, str) and _LAYER_ID.fullmatch(layer_id):
        return layer_id
    raise ValueError(f"Invalid layer_id: {_shown(layer_id)}; 1 to 64 letters, digits, _ and - are needed")


def checked_seed_id(seed_id: Any) -> int:
    try:
        number = None if isinstance(seed_id, bool) else seed_id.__index__()
    except (AttributeError, TypeError, ValueError):
        number = None
    if number is None or not 0 <= number <= _MAX_SEED_ID:
        raise ValueError(f"Invalid seed_id: {_shown(seed_id)}; an integer of at least 0 is needed")
    return number


def checked_priority(priority: Any) -> str:
    if isinstance(priority, str) and priority in PRIORITIES:
        return priority
    raise ValueError(f"Invalid priority: {_shown(priority)}; known are {', '.join(PRIORITIES)}")


def checked_tag(tag: Any) -> str:
    if isinstance(tag, str) and _TAG.fullmatch(tag):
        return tag
    raise ValueError(f"Invalid tag: {_shown(tag)}; 1 to 32 letters, digits, _ and - are needed")


def _shown(value: Any) -> str:
    return repr(value)[:80]


def seed_header(layer_id: str, seed_id: int, timestamp: int, priority: str, lifecycle_state: int | None) -> dict:
    return {
        "kind": SEED,
        "layer_id": layer_id,
        "seed_id": seed_id,
        "timestamp": timestamp,
        "priority": priority,
        "lifecycle_state": lifecycle_state,
    }


def layer_header(layer_id: str, tag: str, timestamp: int, priority: str, summary: Mapping[str, Any]) -> dict:
    return {
        "kind": LAYER,
        "layer_id": layer_id,
        "tag": tag,
        "timestamp": timestamp,
        "priority": priority,
        "summary": dict(summary),
    }


def lifecycle_of(state_data: Any) -> int | None:
    """The number of the state that ``state_data["lifecycle_state"]`` means (a member, a number, a name, a tensor of
    one); None for anything else.
    """
    state = state_data.get("lifecycle_state") if isinstance(state_data, Mapping) else None
    try:
        return int(ExtendedLifecycle.parse(state))
    except (TypeError, ValueError, RuntimeError):
        return None


def problem_with(header: Mapping[str, Any]) -> str:
    """Why this is no header of ours, or ""."""
    kind, timestamp = header.get("kind"), header.get("timestamp")
    if kind not in (SEED, LAYER):
        return f"is of the unknown kind {_shown(kind)}"
    if type(timestamp) is not int or not 0 <= timestamp <= MAX_TIMESTAMP:
        return f"has the impossible timestamp {_shown(timestamp)}"
    if not isinstance(header.get("layer_id"), str):
        return f"has the impossible layer_id {_shown(header.get('layer_id'))}"
    if header.get("priority") not in PRIORITIES:
        return f"has the unknown priority {_shown(header.get('priority'))}"
    if kind == LAYER:
        if not isinstance(header.get("tag"), str) or not isinstance(header.get("summary"), dict):
            return "has no tag or no summary"
        return ""
    seed, state = header.get("seed_id"), header.get("lifecycle_state")
    if type(seed) is not int or not 0 <= seed <= _MAX_SEED_ID:
        return f"has the impossible seed_id {_shown(seed)}"
    if state is not None and (type(state) is not int or not 0 <= state < len(ExtendedLifecycle)):
        return f"has the impossible lifecycle_state {_shown(state)}"
    return ""
