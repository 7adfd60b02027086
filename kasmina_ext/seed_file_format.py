"""What is in a seed file: the structure of the layers, and of their seeds and banks all that is not as in a new layer.

A seed file is one safetensors file. Its metadata are ``format``, ``version``, ``sha256``
(:mod:`kasmina_ext.checkpoint.single_file`), ``metadata``, the user's own as JSON, and ``layers``, a JSON table of the
structure: a row for each layer in the model's order, with its name, features H, seeds S, rows P of its bank, feature_dim,
chunking (which with H and S says where every chunk begins), strategy, dtype of its bank, and how many seeds, slices and
weights the file has of it. The tensors are of all layers together, one after the other:

===================  ==========  ==================================================================================
``common_state``     int32       ``[8, layers]``: the state that most seeds of a layer have, all dormant for so many epochs,
                                 say; see :class:`~kasmina_ext.state.StateVar`
``common_alpha``     float32     ``[layers]``: and their alpha
``seeds``            int64       ``[A]``: the seeds that are not such, by their numbers in the layer
``state``            int32       ``[8, A]``: their states
``alpha``            float32     ``[A]``
``slices``           int64       ``[L]``: ``row * S + seed`` for each slice of a bank that is not neutral throughout
``weights.<dtype>``  that dtype  ``[W]``: of the layers with a bank of this dtype, the weights in these slices, row by row
===================  ==========  ==================================================================================

So a file has 8 + its header + 36 layers + 44 A + 8 L + itemsize W bytes, and the bits of states, alphas and banks come back
as they were. (Of features that no seed owns, which have no part in anything, the bank's weights come back neutral.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from kasmina_ext import reference
from kasmina_ext.bank import neutral_rows
from kasmina_ext.checkpoint import single_file
from kasmina_ext.checkpoint.content import JSON, ContentError, Decoder, Encoder, from_text, to_text
from kasmina_ext.checkpoint.errors import CheckpointError, CheckpointMismatch
from kasmina_ext.checkpoint.state_dict import fresh_tensors
from kasmina_ext.checkpoint.tensor_file import DTYPES, TensorFileError
from kasmina_ext.checkpoint.values import problem_of
from kasmina_ext.chunking import CHUNKINGS
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.state_layout import StateVar

FORMAT, VERSION = "kasmina_ext.seeds", "1"
BANK = "blueprint_weights"
SAVED = ("state", "alpha", BANK)
"""Of a layer's own tensors, those that a file brings back; all others start afresh."""

Content = dict[str, Tensor]
"""Own tensors of a layer, by name, on the CPU."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}
_LISTED = 6  # names, and differences, in a message


class SeedFileDamaged(CheckpointError, RuntimeError):
    """Not what was saved, or no seed file at all: ``path`` and ``reason`` say which and why. Nothing was changed."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"seed file {path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


# ---- the structure -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A layer, in the table ``layers``; ``stored_...``: how much of the file's tensors is this layer's."""

    name: str
    features: int
    seeds: int
    rows: int
    feature_dim: int
    chunking: str
    strategy: str
    dtype: str
    stored_seeds: int
    stored_slices: int
    stored_weights: int


# What must agree, and how it is said.
_STRUCTURE = {
    "features": "features",
    "seeds": "seeds",
    "rows": "rows in its bank",
    "feature_dim": "feature_dim",
    "chunking": "chunking",
}


def _row_of(name: str, layer: KasminaLayer, stored: tuple[int, int, int]) -> Row:
    sizes = layer.hidden_dim, layer.num_seeds, layer.num_blueprints, layer.feature_dim
    return Row(name, *sizes, layer.chunking, layer.strategy.name.lower(), dtype_of(layer), *stored)


def dtype_of(layer: KasminaLayer) -> str:
    """Of its bank, as a file names it."""
    return str(layer.lasting_bank.dtype).removeprefix("torch.")


def _rows_from(table: JSON) -> dict[str, Row]:
    """By name; TensorFileError for anything but a table of layers."""
    if not isinstance(table, dict) or table.keys() != {"columns", "rows"} or table["columns"] != list(Row._fields):
        raise TensorFileError("has no table of layers that this package reads")
    if not isinstance(table["rows"], list):
        raise TensorFileError("has no table of layers that this package reads")
    rows = [_checked_row(row) for row in table["rows"]]
    named = {row.name: row for row in rows}
    if len(named) != len(rows):
        raise TensorFileError("has two layers of one name")
    return named


def _checked_row(values: Any) -> Row:
    kinds = list(get_type_hints(Row).values())
    if not isinstance(values, list) or [type(value) for value in values] != kinds:
        raise TensorFileError(f"has an impossible row in its table of layers: {str(values)[:80]}")
    row = Row(*values)
    counts = (row.features, row.seeds, row.rows, row.stored_seeds, row.stored_slices, row.stored_weights)
    strategies = [strategy.name.lower() for strategy in GraftingStrategy]
    known = row.chunking in CHUNKINGS and row.strategy in strategies and row.dtype in _DTYPES
    if not known or not all(0 <= count < 2**62 for count in counts):
        raise TensorFileError(f"has an impossible row in its table of layers: {str(values)[:80]}")
    return row


def _differences(theirs: Mapping[str, Row], ours: Mapping[str, Row], strict: bool) -> list[str]:
    """Why the file is of another structure than the model, each as a sentence."""
    missing, unexpected = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    differences = []
    if missing and (strict or len(missing) == len(ours)):
        differences.append(f"the file lacks {shortened(missing)}")
    if unexpected and (strict or len(unexpected) == len(theirs)):
        differences.append(f"the model lacks {shortened(unexpected)}")
    for name, row in theirs.items():
        if name in ours:
            own = ours[name]
            unlike = [field for field in _STRUCTURE if getattr(row, field) != getattr(own, field)]
            differences += [
                f"{name!r} has {getattr(row, field)} {_STRUCTURE[field]} in the file, {getattr(own, field)} in the model"
                for field in unlike
            ]
    return differences


def shortened(names: list[str], shown: int = _LISTED) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more


# ---- from tensors of layers to tensors of a file -------------------------------------------------


class _Stored(NamedTuple):
    """What a file has of a layer."""

    common_state: Tensor
    common_alpha: Tensor
    seeds: Tensor
    state: Tensor
    alpha: Tensor
    slices: Tensor
    weights: Tensor

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.seeds), len(self.slices), len(self.weights)


def _packed(layer: KasminaLayer, content: Mapping[str, Tensor]) -> _Stored:
    fresh = new_content(layer, layer.strategy)
    state, alpha, bank = (content[name] for name in SAVED)
    _, kind, count = _with_bits_of(state, alpha).unique(dim=1, return_inverse=True, return_counts=True)
    most = int(count.argmax())
    one = int((kind == most).nonzero()[0])
    seeds = (kind != most).nonzero().flatten()
    owner, owned = reference.feature_owner(fresh["seed_offsets"], layer.hidden_dim)
    differs = (_bytes(bank) != _bytes(fresh[BANK].to(bank.dtype))).any(-1) & owned
    used = torch.zeros(layer.num_blueprints, layer.num_seeds, dtype=torch.int64, device="cpu")
    used.index_add_(1, owner, differs.long())
    mask = (used[:, owner] > 0) & owned
    slices = used.flatten().nonzero().flatten()
    return _Stored(
        state[:, one : one + 1], alpha[one : one + 1], seeds, state[:, seeds], alpha[seeds], slices, bank[mask]
    )


def _unpacked(layer: KasminaLayer, row: Row, stored: _Stored) -> Content:
    """All of the layer's own tensors. TensorFileError for what cannot be those of such a layer."""
    content = new_content(layer, GraftingStrategy.parse(row.strategy))
    _check_numbers(stored.seeds, row.seeds, f"seeds of {row.name!r}")
    _check_numbers(stored.slices, row.rows * row.seeds, f"slices of {row.name!r}")
    content["state"][:] = stored.common_state
    content["state"][:, stored.seeds] = stored.state
    content["alpha"][:] = stored.common_alpha
    content["alpha"][stored.seeds] = stored.alpha
    owner, owned = reference.feature_owner(content["seed_offsets"], row.features)
    used = torch.zeros(row.rows * row.seeds, dtype=torch.bool, device="cpu")
    used[stored.slices] = True
    mask = used.view(row.rows, row.seeds)[:, owner] & owned
    if int(mask.sum()) != len(stored.weights):
        raise TensorFileError(f"has {len(stored.weights)} weights for slices of {int(mask.sum())} in {row.name!r}")
    content[BANK] = content[BANK].to(stored.weights.dtype)
    content[BANK][mask] = stored.weights
    for name, value in content.items():
        problem = problem_of(layer, name, value)
        if problem is not None:
            raise TensorFileError(f"cannot be loaded into {row.name!r}: {name} {problem}")
    return content


def _with_bits_of(state: Tensor, alpha: Tensor) -> Tensor:
    """int32 ``[9, S]``: all that a file has of a seed, but for its weights."""
    return torch.cat((state, alpha.contiguous().view(torch.int32)[None]))


def _check_numbers(numbers: Tensor, count: int, what: str) -> None:
    ascending = bool((numbers.diff() > 0).all())
    if not ascending or (len(numbers) and not 0 <= int(numbers[0]) <= int(numbers[-1]) < count):
        raise TensorFileError(f"its {what} are not different numbers below {count}, in order")


def new_content(layer: KasminaLayer, strategy: GraftingStrategy) -> Content:
    """All of the own tensors of a layer like this one with new seeds of this strategy, which change nothing."""
    content = fresh_tensors(layer, "cpu")
    content["state"][StateVar.GRAFTING_STRATEGY] = int(strategy)
    content[BANK] = neutral_rows(strategy, layer.num_blueprints)[:, None].repeat(1, layer.hidden_dim)
    return content


def _bytes(bank: Tensor) -> Tensor:
    """``[P, H, itemsize]``: equal only where the bits are."""
    return bank.contiguous().view(torch.uint8).unflatten(1, (bank.size(1), -1))


# ---- the file ------------------------------------------------------------------------------------


def write(
    path: Path, layers: Mapping[str, KasminaLayer], contents: Mapping[str, Content], metadata: Mapping[str, Any] | None
) -> None:
    """Save ``contents``, by the names of their layers. TypeError or ValueError for metadata that are no JSON, ValueError for
    values that could not be loaded again.
    """
    for name, layer in layers.items():
        offsets = {"seed_offsets": layer._buffers["seed_offsets"]}
        for tensor, value in (offsets | contents[name]).items():
            problem = problem_of(layer, tensor, value)
            if problem is not None:
                raise ValueError(f"what could not be loaded again is not saved: {tensor} of {name!r} {problem}")
    stored = {name: _packed(layer, contents[name]) for name, layer in layers.items()}
    rows = [_row_of(name, layer, stored[name].counts) for name, layer in layers.items()]
    table = {"columns": list(Row._fields), "rows": [list(row) for row in rows]}
    text = {"format": FORMAT, "version": VERSION, "layers": to_text(table).decode()}
    if metadata is not None:
        text["metadata"] = _metadata_text(metadata)
    names = [name for name in _Stored._fields if name != "weights"]
    tensors = {name: torch.cat([getattr(each, name) for each in stored.values()], -1) for name in names}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        tensors[f"weights.{dtype}"] = torch.cat([stored[row.name].weights for row in rows if row.dtype == dtype])
    single_file.write(path, text, tensors)


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dict, got {type(metadata).__name__}")
    encoder = Encoder()
    encoded = encoder.encode(metadata, "metadata")
    if encoder.tensors:
        raise TypeError(f"metadata cannot hold tensors: {next(iter(encoder.tensors))} is one")
    return to_text(encoded).decode()


class SeedFile(NamedTuple):
    """What was read for a model."""

    rows: dict[str, Row]
    """By the layers' names; also of layers that the model does not have."""
    contents: dict[str, Content]
    """All of the own tensors of each layer that file and model have, checked, in the model's order."""
    metadata: dict[str, Any] | None
    size: int
    """In bytes."""


def read(path: Path, layers: Mapping[str, KasminaLayer], *, strict: bool) -> SeedFile:
    """What the file has for these layers; changes nothing. :class:`SeedFileDamaged`,
    :class:`~kasmina_ext.checkpoint.CheckpointMismatch`, OSError for what the system refuses.
    """
    try:
        text, tensors, size = single_file.read(path)
        if text.get("format") != FORMAT:
            raise TensorFileError("is not of this package")
        if text.get("version") != VERSION:
            raise TensorFileError(f"has version {str(text.get('version'))[:40]}, this package reads {VERSION}")
        rows = _rows_from(_json(text.get("layers", "")))
        metadata = Decoder({}).decode(_json(text["metadata"])) if "metadata" in text else None
        if not isinstance(metadata, (dict, type(None))):
            raise TensorFileError("has metadata that are no dict")
        pieces = dict(zip(rows, _split(list(rows.values()), tensors), strict=True))
        ours = {name: _row_of(name, layer, (0, 0, 0)) for name, layer in layers.items()}
        differences = _differences(rows, ours, strict)
        if differences:
            more = f"; and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
            raise CheckpointMismatch(
                f"seed file {path} is of another structure: {'; '.join(differences[:_LISTED])}{more}"
            )
        contents = {name: _unpacked(layers[name], rows[name], pieces[name]) for name in layers if name in rows}
    except (TensorFileError, ContentError) as error:
        raise SeedFileDamaged(path, str(error)) from None
    return SeedFile(rows, contents, metadata, size)


def _json(text: str) -> JSON:
    return from_text(text.encode("utf-8", "surrogatepass"))


def _split(rows: list[Row], tensors: Mapping[str, Tensor]) -> Iterator[_Stored]:
    """Layer by layer what the file's tensors have of it. TensorFileError where they are not those of the rows."""
    grown, slices = sum(row.stored_seeds for row in rows), sum(row.stored_slices for row in rows)
    weights: dict[str, int] = {}
    for row in rows:
        weights[row.dtype] = weights.get(row.dtype, 0) + row.stored_weights
    expected = {
        "common_state": (torch.int32, (len(StateVar), len(rows))),
        "common_alpha": (torch.float32, (len(rows),)),
        "seeds": (torch.int64, (grown,)),
        "state": (torch.int32, (len(StateVar), grown)),
        "alpha": (torch.float32, (grown,)),
        "slices": (torch.int64, (slices,)),
    } | {f"weights.{dtype}": (_DTYPES[dtype], (count,)) for dtype, count in weights.items()}
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != expected:
        raise TensorFileError("its tensors are not those of its table of layers")
    common = [tensors[name].split(1, -1) for name in ("common_state", "common_alpha")]
    of_seeds = [tensors[name].split([row.stored_seeds for row in rows], -1) for name in ("seeds", "state", "alpha")]
    of_slices = tensors["slices"].split([row.stored_slices for row in rows])
    of_weights = {
        dtype: iter(tensors[f"weights.{dtype}"].split([row.stored_weights for row in rows if row.dtype == dtype]))
        for dtype in weights
    }
    for number, row in enumerate(rows):
        of_each = (pieces[number] for pieces in (*common, *of_seeds, of_slices))
        yield _Stored(*of_each, next(of_weights[row.dtype]))
