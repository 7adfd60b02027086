"""Values with tensors anywhere in them, as JSON and a list of tensors, and back: exactly what was given, or an error.

JSON has no tuples, no NaN and only text as keys; these are objects with one key that starts with ``$``:

==============================  ====================================================
``{"$tensor": name}``           a tensor, by its name in the file of tensors
``{"$complex": name}``          a complex tensor: the real one of that name, of which the last dimension is (re, im)
``{"$tuple": [...]}``           a tuple
``{"$float": "nan"}``           nan, inf, -inf
``{"$dict": [[key, value]]}``   a dict with keys that are not text, or that start with ``$``
==============================  ====================================================
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kasmina_ext.checkpoint.forks import without_lost_threads

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"

MAX_DEPTH = 100
MAX_DIGITS = 4300
MAX_VALUES = 2_000_000
"""Of one text: a few bytes of JSON can take a hundred of memory."""
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # of surrogates: JSON reads one character for both
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")


class ContentError(ValueError):
    """Text or JSON that no content was written as."""


# ---- to JSON -------------------------------------------------------------------------------------


class Encoder:
    """Turns values into JSON; ``tensors`` collects the tensors met on the way, by names that are theirs alone."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, path: str) -> JSON:
        """``value`` as JSON; ``path`` names it in errors.

        Taken: None, bool, int, float, str, scalars of NumPy, tensors, and dicts, lists and tuples of
        these. TypeError for anything else, ValueError for what is nested too deeply (or in itself).
        """
        return self._encode(value, path, 0)

    def _encode(self, value: Any, path: str, depth: int) -> JSON:
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} is nested more than {MAX_DEPTH} deep, or contains itself")
        if isinstance(value, Tensor):
            if type(value) in (Tensor, nn.Parameter) and value.is_complex() and value.layout == torch.strided:
                # Few readers of the file's format know complex types.
                return {"$complex": self._add(torch.view_as_real(value.detach().resolve_conj()), path)}
            return {"$tensor": self._add(value, path)}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path, depth + 1)
        if isinstance(value, (list, tuple)):
            items = [self._encode(item, f"{path}.{k}", depth + 1) for k, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        return _encode_scalar(value, path)

    def _encode_mapping(self, mapping: Mapping[Any, Any], path: str, depth: int) -> JSON:
        if all(isinstance(key, str) and not key.startswith("$") for key in mapping):
            names = [exact_text(key, f"a key of {path}") for key in mapping]
            _refuse_equal(names, path)
            return {
                name: self._encode(value, f"{path}.{name}", depth)
                for name, value in zip(names, mapping.values(), strict=True)
            }
        pairs: list[JSON] = []
        for key, value in mapping.items():
            pairs.append([_encode_key(key, path, depth), self._encode(value, f"{path}.{key}", depth)])
        # Keys that differ here may be equal when they are read: tensors of one element, subclasses of str.
        _refuse_equal([Decoder({}).decode(key) for key, _ in pairs], path)
        return {"$dict": pairs}

    def _add(self, tensor: Tensor, path: str) -> str:
        name = path
        if not _PLAIN_NAME.fullmatch(path) or path in self.tensors:
            name = f"tensor.{len(self.tensors)}"
            while name in self.tensors:
                name += "_"
        self.tensors[name] = tensor
        return name


def _encode_scalar(value: Any, path: str) -> JSON:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a scalar of NumPy
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >> 8192:
            raise ValueError(f"{path} is an integer of {value.bit_length()} bits, too large to be saved")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, str):
        return exact_text(value, path)
    raise TypeError(
        f"{path} is of type {type(value).__name__}; a checkpoint holds None, bool, int, float, str, "
        "tensors, and dicts, lists and tuples of these"
    )


def exact_text(value: str, path: str) -> str:
    """A plain str; ValueError for two surrogates that JSON would read as one character."""
    text = str.__str__(value)
    if _PAIR.search(text):
        raise ValueError(f"{path} has a pair of surrogates, which would come back as one character")
    return text


def _refuse_equal(keys: list[Any], path: str) -> None:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{path} has the key {key!r} twice")
        seen.add(key)


def _encode_key(key: Any, path: str, depth: int) -> JSON:
    if depth > MAX_DEPTH:
        raise ValueError(f"a key of {path} is nested more than {MAX_DEPTH} deep")
    if isinstance(key, tuple):
        return {"$tuple": [_encode_key(part, path, depth + 1) for part in key]}
    if key != key:
        raise ValueError(f"a key of {path} is NaN, which equals nothing")
    return _encode_scalar(key, f"a key of {path}")


# ---- from JSON -----------------------------------------------------------------------------------


class Decoder:
    """The way back; each tensor must be named exactly once, which :meth:`finish` checks."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def decode(self, value: JSON) -> Any:
        """:class:`ContentError` for JSON that :class:`Encoder` does not make."""
        return self._decode(value, 0)

    def finish(self) -> None:
        if self._tensors:
            raise ContentError(f"tensor {next(iter(self._tensors))!r} belongs to nothing")

    def _decode(self, value: JSON, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ContentError(f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, list):
            return [self._decode(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        if not any(key.startswith("$") for key in value):
            return {key: self._decode(item, depth + 1) for key, item in value.items()}
        if len(value) != 1:
            raise ContentError(f"an object has the keys {', '.join(map(repr, list(value)[:3]))}")
        [(marker, inner)] = value.items()
        if marker in ("$tensor", "$complex") and isinstance(inner, str):
            tensor = self._tensors.pop(inner, None)
            if tensor is None:
                raise ContentError(f"tensor {inner!r} is not there, or belongs to two things")
            return _as_complex(tensor, inner) if marker == "$complex" else tensor
        if marker == "$tuple" and isinstance(inner, list):
            return tuple(self._decode(item, depth + 1) for item in inner)
        if marker == "$float" and isinstance(inner, str) and inner in _NOT_FINITE:
            return _NOT_FINITE[inner]
        if marker == "$dict" and isinstance(inner, list):
            return self._decode_pairs(inner, depth)
        raise ContentError(f"an object has the key {marker!r}")

    def _decode_pairs(self, pairs: list[JSON], depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2:
                raise ContentError('"$dict" is not a list of pairs')
            key = self._decode(pair[0], depth + 1)
            if not _is_key(key) or key in result:
                raise ContentError('"$dict" has a key twice, or one that is none')
            result[key] = self._decode(pair[1], depth + 1)
        return result


def _as_complex(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in (torch.float16, torch.float32, torch.float64) or tensor.shape[-1:] != (2,):
        raise ContentError(f"tensor {name!r} is not made of complex numbers")
    return torch.view_as_complex(tensor)


def _is_key(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return not isinstance(key, (list, dict, Tensor)) and key == key


# ---- text ----------------------------------------------------------------------------------------


def to_text(value: JSON) -> bytes:
    """JSON as ASCII."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, indent=None, separators=(",", ":")).encode("ascii")


def values_in(text: bytes) -> int:
    """At most so many values are in it; a little more where strings have commas and brackets."""
    return sum(map(text.count, (b",", b":", b"[", b"{")))


def from_text(text: bytes, *, allow_nan: bool = False) -> JSON:
    """The way back; :class:`ContentError` for anything that has two readings: double keys, numbers out of range, other
    encodings, and NaN and Infinity, which are no JSON (``allow_nan`` takes them). At most MAX_VALUES.
    """
    if values_in(text) > MAX_VALUES:
        raise ContentError(f"has more than {MAX_VALUES} values")
    try:
        return json.loads(
            text.decode("ascii"),
            object_pairs_hook=_unique,
            parse_constant=float if allow_nan else _no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except ContentError:
        raise
    except UnicodeDecodeError as error:
        raise ContentError(f"byte {error.start} is not ASCII") from None
    except RecursionError:
        raise ContentError("nested too deeply") from None
    except ValueError as error:
        raise ContentError(f"is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ContentError(f"the key {double!r} is there twice")
    return result


def _no_constant(text: str) -> None:
    raise ContentError(f"{text} is not JSON")


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:  # reading it takes quadratic time
        raise ContentError(f"an integer has {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ContentError(f"the number {text[:40]} is out of range")
    return value


# ---- what holds tensors --------------------------------------------------------------------------


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``change(tensor)`` in place of every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [mapped(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


@without_lost_threads()
def to_device(value: Any, device: torch.device | str | int) -> Any:
    """The same value with all tensors on ``device``."""
    return mapped(value, lambda tensor: tensor.to(device))
