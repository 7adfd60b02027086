"""How a blueprint is blended in: the four strategies, and the ramps that alpha follows."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TypeVar

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


class GraftingStrategy(IntEnum):
    """What a grafted seed makes of a feature x, with blueprint weight w, blended in by alpha."""

    MULTIPLICATIVE = 0
    """w x"""
    ADDITIVE = 1
    """x + w"""
    MIXED = 2
    """(x + w) / 2"""
    AFFINE = 3
    """w x + v, with v from the next row of the bank"""

    @classmethod
    def parse(cls, value: GraftingStrategy | int | str) -> GraftingStrategy:
        """From a member, an id or a name; ValueError naming the known ones."""
        return parse_choice(cls, value, "grafting strategy")

    @property
    def rows(self) -> int:
        """Adjacent rows of the bank that one blueprint takes."""
        return 2 if self is GraftingStrategy.AFFINE else 1

    @property
    def neutral(self) -> tuple[float, ...]:
        """The weights, one for each of its rows, that change nothing; MIXED has none and starts at 0."""
        return {
            GraftingStrategy.MULTIPLICATIVE: (1.0,),
            GraftingStrategy.ADDITIVE: (0.0,),
            GraftingStrategy.MIXED: (0.0,),
            GraftingStrategy.AFFINE: (1.0, 0.0),
        }[self]


class AlphaSchedule(IntEnum):
    """The curve of alpha while a seed is in GRAFTING."""

    NONE = 0
    LINEAR = 1
    COSINE = 2
    SIGMOID = 3

    @classmethod
    def parse(cls, value: AlphaSchedule | int | str | None) -> AlphaSchedule:
        """From a member, an id, a name or None; ValueError naming the known ones."""
        return cls.NONE if value is None else parse_choice(cls, value, "alpha schedule")


def ramp(schedule: AlphaSchedule | int | str, t: float) -> float:
    """Alpha after the fraction ``t`` (clipped to [0, 1]) of a ramp: exactly 0 at its start, exactly 1 at its end.

    linear: t; cosine: (1 - cos(pi t)) / 2; sigmoid: the logistic function of slope 12 about 1/2,
    scaled to reach 0 and 1. ValueError for no schedule: alpha is then the caller's.
    """
    schedule = AlphaSchedule.parse(schedule)
    t = min(1.0, max(0.0, float(t)))
    if schedule is AlphaSchedule.LINEAR:
        return t
    if schedule is AlphaSchedule.COSINE:
        return (1.0 - math.cos(math.pi * t)) / 2.0
    if schedule is AlphaSchedule.SIGMOID:
        low, high = _logistic(-6.0), _logistic(6.0)
        return (_logistic(12.0 * (t - 0.5)) - low) / (high - low)
    raise ValueError("no alpha schedule: there is no ramp to evaluate")


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
