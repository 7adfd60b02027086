"""What users write as arguments, as what it means: members of enumerations, numbers."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar

Choice = TypeVar("Choice", bound=IntEnum)


def parse_choice(kind: type[Choice], value: Choice | int | str, what: str) -> Choice:
    """``value`` as a member of ``kind``, from a member, its number or its name in any case.

    ValueError for a number or name that is not one of them, TypeError for anything else (a float
    would be truncated).
    """
    if isinstance(value, str):
        member = kind.__members__.get(value.upper())
        if member is not None:
            return member
    elif isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be a name or a number, got {type(value).__name__}")
    else:
        try:
            return kind(value.__index__())
        except ValueError:
            pass
    known = ", ".join(f"{name.lower()} ({member.value})" for name, member in kind.__members__.items())
    raise ValueError(f"unknown {what} {value!r}; known are {known}")


def integer(name: str, value: Any) -> int:
    """``value`` as an int; TypeError for what is none (a float would be truncated)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return value.__index__()


def at_least(name: str, value: Any, lowest: int) -> int:
    """``value`` as an int; ValueError for what is none, or below ``lowest``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < lowest:
        raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
    return value.__index__()


def positive(name: str, value: Any) -> int:
    """:func:`integer`; ValueError below 1."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
