"""Several sets of seeds for one model, ready on its device, and one call to go from one to another."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kasmina_ext import seed_file_format
from kasmina_ext.checkpoint.forks import without_lost_threads
from kasmina_ext.checkpoint.layer_content import unwritable
from kasmina_ext.folding.plan import Folded
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.measure import Layers
from kasmina_ext.optim import forget
from kasmina_ext.placement import is_sharded
from kasmina_ext.seed_file_format import BANK, SAVED, Content, new_content
from kasmina_ext.seed_files import File, LoadReport, content_of, report_on, seeded_layers

# All that a layer knows of its seeds; where its chunks begin is the structure, and stays.
_SWITCHED = (*(name for name in KasminaLayer.BUFFER_DTYPES if name != "seed_offsets"), BANK)
_COUNT = _SWITCHED.index("history_count")


class SeedSets:
    """Seeds of several files for one model (or of one model at several times), of which one set is active.

    .. code-block:: python

        sets = kasmina_ext.load_seed_sets(model, {"anna": "anna.safetensors", "bert": "bert.safetensors"})
        sets.switch("anna")
        with sets.use("bert"):
            model(x)
        sets.off()

    Every set has its own copy of all that layers know of their seeds (states, alphas, banks, history,
    telemetry), on their devices. Switching copies it into the layers' own tensors, in place: no
    memory is allocated, no device is waited for, it takes as long as copying the bytes of the seeds
    (:attr:`nbytes`), and what has been compiled or captured in a CUDA graph goes on with the same
    tensors. As after any write to them, a backward whose forward was before raises autograd's own
    error about in-place changes.

    **What becomes of the active set** meanwhile, by training, ticks, requests or what it has seen, is
    copied back into it when it is left; with ``keep=False`` it is forgotten, and the set is as it was
    when it became active. Nothing is written into files but by :meth:`save`.

    **Training.** What optimizers that have trained the banks remember of them, and ``.grad``, are of
    the set that is left: both are zeroed. To train a set, switch to it, make an optimizer and a
    :class:`~kasmina_ext.GrowthController` for it, and stay; a controller takes all that it sees for
    one growth. Steps that Adam has counted stay, so a new optimizer for every set is better.

    **Threads.** Calls wait for each other, and :meth:`use` makes those of other threads wait until its
    block ends: threads that run the model only inside of ``use`` each have their own set. A forward
    outside of it, in another thread or on another CUDA stream than the switch, may meet layers of
    both sets, as it may meet any write to the model. In coroutines, do not await inside of ``use``.

    **Several processes.** Each switches on its own, so all must switch alike. A bank in parts (FSDP2)
    is refused: there is :func:`kasmina_ext.load_seeds`.

    If the model is moved, or its banks are cast, the sets follow at the next switch. Layers that it
    gains are not of the sets; of layers that :func:`~kasmina_ext.ungraft_` takes out nothing is seen
    any more. RuntimeError for a layer that has been folded, or whose bank cannot be
    written any more: nothing is copied then.
    """

    def __init__(self, model: Layers, files: Mapping[str, File] | None = None, *, strict: bool = True) -> None:
        if not isinstance(files, (Mapping, type(None))):
            raise TypeError(f"files must be a dict of the sets' names and their files, got {type(files).__name__}")
        self._layers = seeded_layers(model)
        self._lock = threading.RLock()
        self._sets: dict[str, _Set] = {}
        with torch.inference_mode(False), torch.no_grad():
            live = self._live()
            self._own = _Set(None, [tensor.clone() for tensor in live])
            fresh = [new_content(layer, layer.strategy) for layer in self._layers.values()]
            self._off = _Set(None, _on_places_of(live, fresh))
        self._active = self._own
        for name, path in (files or {}).items():
            self.add(name, path, strict=strict)

    # ---- which there are -------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sets, in the order in which they were added."""
        return tuple(self._sets)

    @property
    def active(self) -> str | None:
        """The set whose seeds the model has now; None: its own ones, or none (:meth:`off`)."""
        return self._active.name

    @property
    def nbytes(self) -> int:
        """Of one set, in the memory of the model's device; there is one for each name, and two more."""
        return sum(tensor.nbytes for tensor in self._own.tensors)

    def __repr__(self) -> str:
        seeds = sum(layer.num_seeds for layer in self._layers.values())
        names = ", ".join(f"{name!r} (active)" if name == self.active else repr(name) for name in self._sets)
        return f"SeedSets({names or 'none'}; {seeds} seeds of {len(self._layers)} layers, {self.nbytes / 1024:.1f} KiB each)"

    # ---- switching -------------------------------------------------------------------------------

    def switch(self, name: str | None, *, keep: bool = True) -> None:
        """Make ``name`` the active set; None: the seeds that the model had when the sets were made.

        ``keep=False`` forgets what the set that is left has become since it was activated. Of the
        active set itself this makes it again what it was; with ``keep=True`` that changes nothing.
        KeyError, naming the known ones, for a set that there is not.
        """
        with self._lock:
            self._go(self._own if name is None else self._named(name), keep)

    def off(self, *, keep: bool = True) -> None:
        """Make all seeds dormant and new: the model computes what it would without any. ``keep`` as in :meth:`switch`; what
        seeds become while the sets are off is always forgotten.
        """
        with self._lock:
            self._go(self._off, keep)

    @contextmanager
    def use(self, name: str | None, *, keep: bool = True) -> Iterator[SeedSets]:
        """Inside, ``name`` is active; afterwards what was before, as it was, whatever happens inside.

        Other threads' calls wait until the block ends. ``keep=False`` forgets what the set becomes
        inside.
        """
        with self._lock:
            before = self._active
            self.switch(name)
            try:
                yield self
            finally:
                removed = before.name is not None and self._sets.get(before.name) is not before
                self._go(self._off if removed else before, keep)

    def _go(self, there: _Set, keep: bool) -> None:
        if there is self._active and keep:
            return
        with torch.no_grad():
            live = self._live()
            self._follow(live)
            if keep and self._active is not self._off:
                _copy(live, self._active.tensors)
            try:
                _copy(there.tensors, live)
            except BaseException:  # Ctrl-C, between two launches
                _copy(self._active.tensors, live)
                raise
        for number, layer in enumerate(self._layers.values()):
            layer.telemetry_resets += 1
            # The set's own count: optimizers need not look for what its seeds went through before.
            layer._loaded_history_count = there.tensors[number * len(_SWITCHED) + _COUNT]
            forget(layer)
        self._active = there

    # ---- adding, saving, removing ----------------------------------------------------------------

    @without_lost_threads()
    def add(self, name: str, path: File | None = None, *, strict: bool = True) -> LoadReport | None:
        """A set of the seeds in a file, all of them or an error as :func:`kasmina_ext.load_seeds` raises it; returns what
        the file brings. Without a path, a copy of what the model's seeds are now, with all that they have seen.

        With ``strict=False``, layers that the file lacks have new seeds. The active set stays active.
        ValueError for a name that there is already.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a set must be a str, got {type(name).__name__}")
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if name in self._sets:
                raise ValueError(f"there is a set {name!r} already: remove it first, or take another name")
            live, report = self._live(), None
            self._follow(live)
            if path is None:
                tensors = [tensor.clone() for tensor in live]
            else:
                found = seed_file_format.read(Path(path), self._layers, strict=strict)
                report = report_on(self._layers, found, Path(path), absent="not in the file: new seeds")
                contents = [
                    found.contents.get(key) or new_content(layer, layer.strategy) for key, layer in self._layers.items()
                ]
                tensors = _on_places_of(live, contents)
            self._sets[name] = _Set(name, tensors)
            return report

    @without_lost_threads()
    def save(self, name: str, path: File, *, metadata: Mapping[str, Any] | None = None) -> Path:
        """Save a set as :func:`kasmina_ext.save_seeds` does; the active one as it is now. Waits for the device."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            found, path = self._named(name), Path(path)
            if found is self._active:
                self._live()
                contents = {key: content_of(layer) for key, layer in self._layers.items()}
            else:
                pieces = zip(self._layers, _by_layer(found.tensors), strict=True)
                contents = {key: {name: tensors[name].cpu() for name in SAVED} for key, tensors in pieces}
            seed_file_format.write(path, self._layers, contents, metadata)
            return path

    def remove(self, name: str) -> None:
        """Forget a set, and free its memory. KeyError where there is none, ValueError for the active one."""
        with self._lock:
            if self._named(name) is self._active:
                raise ValueError(f"the set {name!r} is active: switch to another one first, or off()")
            del self._sets[name]

    def _named(self, name: str) -> _Set:
        if name not in self._sets:
            raise KeyError(f"there is no set {name!r}; known are {', '.join(map(repr, self._sets)) or 'none'}")
        return self._sets[name]

    # ---- tensors ---------------------------------------------------------------------------------

    def _live(self) -> list[Tensor]:
        """The layers' own tensors, layer by layer in the order of :data:`_SWITCHED`. RuntimeError where one cannot be
        written.
        """
        live = []
        for name, layer in self._layers.items():
            problem = unwritable(layer, sharded=True)
            if is_sharded(layer.lasting_bank):
                problem = "blueprint_weights are sharded: load_seeds can write them"
            if isinstance(layer._modules["base_layer"], Folded):
                problem = "base layer has taken its place (fold_): unfold_ puts it back"
            if problem is not None:
                raise RuntimeError(f"sets of seeds cannot be switched in layer {name!r}: its {problem}")
            live += [layer._buffers.get(own, layer._parameters.get(own)).detach() for own in _SWITCHED]
        return live

    def _follow(self, live: list[Tensor]) -> None:
        """Bring all sets to where the layers are, if these have been moved or cast."""
        if all(
            own.device == now.device and own.dtype == now.dtype
            for own, now in zip(self._own.tensors, live, strict=True)
        ):
            return
        with torch.inference_mode(False):
            for each in (self._own, self._off, *self._sets.values()):
                each.tensors = [tensor.to(now) for tensor, now in zip(each.tensors, live, strict=True)]


class _Set:
    """All tensors of all layers, where these are."""

    def __init__(self, name: str | None, tensors: list[Tensor]) -> None:
        self.name, self.tensors = name, tensors


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """In place, in few launches: a launch takes tensors of one device and dtype only."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        into, out_of = groups.setdefault((target.device, target.dtype), ([], []))
        into.append(target)
        out_of.append(source)
    for into, out_of in groups.values():
        torch._foreach_copy_(into, out_of)


def _by_layer(tensors: list[Tensor]) -> Iterator[Content]:
    for first in range(0, len(tensors), len(_SWITCHED)):
        yield dict(zip(_SWITCHED, tensors[first : first + len(_SWITCHED)], strict=True))


def _on_places_of(live: list[Tensor], contents: list[Content]) -> list[Tensor]:
    """The contents of layers as tensors like those of the layers."""
    new = [content[name] for content in contents for name in _SWITCHED]
    return [torch.empty_like(own).copy_(values) for own, values in zip(live, new, strict=True)]


@without_lost_threads()
def load_seed_sets(model: Layers, files: Mapping[str, File], *, strict: bool = True) -> SeedSets:
    """:class:`SeedSets` of these files, by names of your own; the model's seeds stay as they are until you switch.

    All files are read and checked as :func:`kasmina_ext.load_seeds` does, with its errors.
    """
    return SeedSets(model, files, strict=strict)
