"""Seed files: what the seeds of a model have become, in a small file of its own, beside a model that stays as it was.

:mod:`kasmina_ext.seed_file_format` says what is in one, :mod:`kasmina_ext.seed_sets` holds several ready for one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from kasmina_ext import seed_file_format
from kasmina_ext.checkpoint.forks import without_lost_threads
from kasmina_ext.checkpoint.layer_content import undo_of_layer, unwritable, write_layer
from kasmina_ext.checkpoint.state_dict import plain_name
from kasmina_ext.credit import grafted
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.measure import Layers, roots_of
from kasmina_ext.optim import forget
from kasmina_ext.report import TableReport, cell, counted
from kasmina_ext.seed_file_format import BANK, Content, SeedFile, SeedFileDamaged, dtype_of, shortened
from kasmina_ext.state_layout import StateVar

__all__ = ["LoadReport", "SeedFileDamaged", "load_seeds", "save_seeds"]

File = str | PathLike[str]


class LoadReport(TableReport):
    """``{layer name: row}`` in the model's order; printed, it is a table.

    A row has ``seeds``, of the layer; ``awake``, those that are not dormant; ``grafted``, those with a part in the output;
    ``weights``, how many weights of the bank the file has, the others being neutral; and ``note``: the bank is of another
    dtype than in the file, the layer of another strategy, or it was not in the file and stays as it was.

    ``path``, ``size`` (bytes), ``metadata`` (what was given to :func:`save_seeds`, else None), and ``unexpected``: layers
    of the file that the model does not have.
    """

    text_columns = ("layer", "note")

    def __init__(
        self, rows: Mapping[str, dict[str, Any]], path: Path, size: int, metadata: Any, unexpected: Iterable[str]
    ) -> None:
        super().__init__(rows)
        self.path, self.size, self.metadata, self.unexpected = path, size, metadata, list(unexpected)

    @property
    def title(self) -> str:
        """What was loaded, in a line."""
        awake = sum(row["awake"] for row in self.values())
        title = f"{self.path.name}: {counted(awake, 'seed')} awake in {counted(len(self), 'layer')}, {self.size / 1024:.1f} KiB"
        return title + (f"; not in the model: {shortened(self.unexpected)}" if self.unexpected else "")

    def __reduce__(self) -> tuple:
        return LoadReport, (dict(self), self.path, self.size, self.metadata, self.unexpected)

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        names = [name for name in _COLUMNS if name != "note" or any(row["note"] for row in self.values())]
        rows = [[layer or "(model)", *(cell(row[name]) for name in names)] for layer, row in self.items()]
        return ["layer", *names], rows, ""


_COLUMNS = ("seeds", "awake", "grafted", "weights", "note")


# ---- saving and loading --------------------------------------------------------------------------


@without_lost_threads()
def save_seeds(model: Layers, path: File, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Save the seeds of all KasminaLayers in ``model``, and nothing else of it, as one file: kilobytes. Returns the path.

    Saved are states, alphas and banks: what the outputs depend on, and what growing goes on from.
    Not saved is what has only been watched: telemetry, performance metrics, the history of
    transitions; nor the layers' arguments, the optimizer or a controller (for all of these there are
    ``state_dict`` and :meth:`KasminaLayer.save_checkpoint`); nor any weight of the model: what
    :func:`~kasmina_ext.absorb` has folded is not in the file.

    The file is on the disk when this returns; one that was there is replaced at once, and stays if
    the saving fails. Names in it are those without wrappers (DistributedDataParallel, torch.compile,
    FSDP, ...). With FSDP2 banks are gathered, so every process must call this; every process that
    calls it writes the same file. Waits for the device.

    Arguments:
        model: a model, a handle of its seeds, or layers, as :func:`kasmina_ext.credit` takes them.
        path: of the file; its directory must exist.
        metadata: a dict of None, bool, int, float, str, and lists, tuples and dicts of these, which
            :func:`load_seeds` gives back.

    ValueError where there is no layer, one cannot be saved (parametrized, flattened by FSDP1, on the
    meta device) or holds values that could not be loaded again;
    :class:`~kasmina_ext.checkpoint.CheckpointSaveError` (an OSError) for what the system refuses.
    """
    with torch.inference_mode(False), torch.no_grad():
        layers = seeded_layers(model)
        path = Path(path)
        seed_file_format.write(path, layers, {name: content_of(layer) for name, layer in layers.items()}, metadata)
    return path


@without_lost_threads()
def load_seeds(model: Layers, path: File, *, strict: bool = True) -> LoadReport:
    """Make the seeds of ``model`` those that :func:`save_seeds` saved: all of them, or none.

    States, alphas and banks get the bits that they had, and the outputs are those of the model that
    was saved, if this one has its weights. Telemetry, metrics and history start afresh; what optimizers that trained these banks
    remember of them is zeroed, as is ``.grad``. Tensors are written in place: compiled models,
    captured CUDA graphs and optimizers go on with the same ones. Files go to any device, to any
    floating dtype of the bank (the report says where that rounds), and through any wrappers of the
    model. With FSDP2 every process must call this.

    Everything is checked before anything is written: hash, names, sizes, values; no code runs,
    whoever wrote the file. :class:`~kasmina_ext.checkpoint.CheckpointMismatch` (a ValueError) says
    how the model differs: in the layers that it has, or in their features, seeds, rows of the bank,
    feature_dim or chunking. ``strict=False`` takes the layers that both have, leaves the model's
    others as they are, and says in the report which the file has beyond them.
    :class:`SeedFileDamaged` (a RuntimeError) for what is no seed file any more, FileNotFoundError
    where there is none, ValueError where the model has no layer: call ``graft_`` first.
    """
    with torch.inference_mode(False), torch.no_grad():
        layers = seeded_layers(model)
        path = Path(path)
        found = seed_file_format.read(path, layers, strict=strict)
        _write({layers[name]: content for name, content in found.contents.items()})
    return report_on(layers, found, path)


def _write(contents: Mapping[KasminaLayer, Content]) -> None:
    undo = [undo_of_layer(layer, False) for layer in contents]
    try:
        for layer, content in contents.items():
            write_layer(layer, content)
    except BaseException:
        for put_back in undo:
            put_back()
        raise
    for layer in contents:
        layer.telemetry_resets += 1
        forget(layer)


# ---- layers --------------------------------------------------------------------------------------


def seeded_layers(model: Layers) -> dict[str, KasminaLayer]:
    """The KasminaLayers in ``model``, each once, by the names that they have without wrappers. ValueError where there is
    none, or one whose own tensors cannot be written.
    """
    found: dict[str, KasminaLayer] = {}
    for prefix, root in roots_of(model).items():
        for name, module in root.named_modules():
            if isinstance(module, KasminaLayer) and not any(module is layer for layer in found.values()):
                found[".".join(filter(None, (prefix, plain_name(root, name))))] = module
    if not found:
        raise ValueError(
            "the model has no seeds: call graft_ first, as it was called for the model whose seeds are saved"
        )
    for name, layer in found.items():
        problem = unwritable(layer, sharded=True)
        if problem is not None:
            raise ValueError(f"layer {name!r} can neither save nor load seeds: its {problem}")
    return found


def content_of(layer: KasminaLayer) -> Content:
    """State, alpha and bank, on the CPU."""
    return {name: layer._buffers[name].detach().cpu() for name in ("state", "alpha")} | {BANK: layer.whole_bank().cpu()}


def report_on(
    layers: Mapping[str, KasminaLayer], found: SeedFile, path: Path, *, absent: str = "not in the file: as it was"
) -> LoadReport:
    """What a file brings to these layers; ``absent`` says what becomes of those that it lacks."""
    rows = {name: _row(layer, found, name, absent) for name, layer in layers.items()}
    return LoadReport(rows, path, found.size, found.metadata, [name for name in found.rows if name not in layers])


def _row(layer: KasminaLayer, found: SeedFile, name: str, absent: str) -> dict[str, Any]:
    if name not in found.contents:
        nothing = dict.fromkeys(("awake", "grafted", "weights"), 0)
        return {"seeds": layer.num_seeds, **nothing, "note": absent}
    theirs, lifecycle = found.rows[name], found.contents[name]["state"][StateVar.LIFECYCLE_STATE]
    notes = []
    if dtype_of(layer) != theirs.dtype:
        notes.append(f"{theirs.dtype} in the file, {dtype_of(layer)} here")
    if layer.strategy.name.lower() != theirs.strategy:
        notes.append(f"{theirs.strategy} in the file, {layer.strategy.name.lower()} here")
    return {
        "seeds": theirs.seeds,
        "awake": int((lifecycle != ExtendedLifecycle.DORMANT).sum()),
        "grafted": int(grafted(lifecycle).sum()),
        "weights": theirs.stored_weights,
        "note": "; ".join(notes),
    }
