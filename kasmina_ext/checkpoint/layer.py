"""A layer saves itself as a checkpoint, and goes on where it was saved."""

from __future__ import annotations

import os
import warnings
import weakref
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, overload

from torch.optim import Optimizer

from kasmina_ext.checkpoint.background import (
    PendingSave,
    Snapshot,
    report_failures,
    save_in_background,
    wait_for_saves,
)
from kasmina_ext.checkpoint.errors import CheckpointMismatch
from kasmina_ext.checkpoint.header import LAYER
from kasmina_ext.checkpoint.layer_content import (
    apply,
    behaviour_differs,
    pack,
    problems_with,
    refuse_unloadable,
    summary_of,
)
from kasmina_ext.checkpoint.manager import CheckpointManager
from kasmina_ext.checkpoint.progress import progress_of

if TYPE_CHECKING:
    from kasmina_ext.controller import GrowthController

Directory = str | PathLike[str]
_LAYER_ID = "layer"
# Who saved a line (directory, layer_id, tag) last in this process: two layers there overwrite each other.
_savers: dict[tuple[str, str, str], weakref.ref[LayerCheckpoints]] = {}


class LayerCheckpoints:
    """The part of :class:`~kasmina_ext.layer.KasminaLayer` that saves and loads it.

    Saving and loading belong to the thread that trains the layer: a tensor that another thread
    writes meanwhile may be saved as it was before, after, or in between.
    """

    checkpoint_dir: Directory | None
    """Where checkpoints go and come from where nothing else is said."""
    _manager: CheckpointManager | None
    _other_manager: CheckpointManager | None = None
    """Of the directory that was last passed: it knows what is there, which a save in the background has no time to read."""

    @property
    def checkpoint_manager(self) -> CheckpointManager | None:
        """What keeps the checkpoints in ``checkpoint_dir``; None where that is None."""
        if self.checkpoint_dir is None:
            return None
        if self._manager is None or _path(self._manager.checkpoint_dir) != _path(self.checkpoint_dir):
            self._manager = CheckpointManager(self.checkpoint_dir)
        return self._manager

    @overload
    def save_checkpoint(
        self,
        tag: str = ...,
        *,
        checkpoint_dir: Directory | None = ...,
        layer_id: str = ...,
        priority: str = ...,
        include_base: bool = ...,
        controller: GrowthController | None = ...,
        optimizer: Optimizer | None = ...,
        blocking: Literal[True] = ...,
    ) -> str: ...

    @overload
    def save_checkpoint(
        self,
        tag: str = ...,
        *,
        checkpoint_dir: Directory | None = ...,
        layer_id: str = ...,
        priority: str = ...,
        include_base: bool = ...,
        controller: GrowthController | None = ...,
        optimizer: Optimizer | None = ...,
        blocking: Literal[False],
    ) -> PendingSave: ...

    def save_checkpoint(
        self,
        tag: str = "latest",
        *,
        checkpoint_dir: Directory | None = None,
        layer_id: str = _LAYER_ID,
        priority: str = "normal",
        include_base: bool = False,
        controller: GrowthController | None = None,
        optimizer: Optimizer | None = None,
        blocking: bool = True,
    ) -> str | PendingSave:
        """Save the seeds, their history, alpha, telemetry and metrics, and the bank; returns the checkpoint's identifier.

        When it returns the checkpoint is on the disk, whole; a process killed before leaves none, and
        the ones before as they were. Of each tag the newest five are kept
        (``checkpoint_manager.max_checkpoints_per_seed``). To be called by the thread that trains.

        Arguments:
            tag: 1 to 32 letters, digits, ``_`` and ``-``; :meth:`load_checkpoint` finds the newest.
            checkpoint_dir: instead of the layer's ``checkpoint_dir``.
            layer_id: tells layers apart that share a directory: give each its own, here and in
                :meth:`load_checkpoint`. A warning says where two layers of this process save under one.
            priority: low, normal, high or critical; those of higher priority are kept longer,
                critical ones always.
            include_base: with the base layer's ``state_dict``, without which a checkpoint fits only the base
                layer of that time: train it, or absorb seeds into it, and it is another one.
            controller: with the state of this :class:`~kasmina_ext.GrowthController`; events still on
                their way are written first.
            optimizer: with the state of this optimizer, of all its parameters.
            blocking: False returns a :class:`~kasmina_ext.checkpoint.background.PendingSave` at once: all
                is copied on the device (and from there to the host, and to the disk, by another
                thread), so training may go on. Each such save holds its copy until it is written.

        ValueError for an argument that is none, and for seeds with values that could not be loaded again (written
        behind the layer's back); RuntimeError where there is no directory;
        :class:`~kasmina_ext.checkpoint.CheckpointSaveError` for what the system refuses, the disk
        being full for one.
        """
        report_failures()
        manager = self._manager_for(checkpoint_dir)
        if controller is not None:
            (controller._log.flush if blocking else controller._log.poll)()
        content = pack(self, include_base=include_base, controller=controller, optimizer=optimizer)
        self._warn_of_another(manager, layer_id, tag)

        def save(content: dict, **named: str) -> str:
            refuse_unloadable(self, content)
            with progress_of(f"{layer_id} {tag}") as progress:
                summary = summary_of(content)
                return manager.save_layer(
                    layer_id, tag, content, priority=priority, summary=summary, progress=progress, **named
                )

        if blocking:
            return save(content)
        checkpoint_id = manager.new_layer_id(layer_id, tag)
        snapshot = Snapshot(content)
        return save_in_background(checkpoint_id, lambda: save(snapshot.on_host(), checkpoint_id=checkpoint_id))

    def load_checkpoint(
        self,
        checkpoint_id: str = "latest",
        *,
        checkpoint_dir: Directory | None = None,
        layer_id: str | None = _LAYER_ID,
        controller: GrowthController | None = None,
        optimizer: Optimizer | None = None,
    ) -> str:
        """Go on where a checkpoint was saved: the newest with that tag, or the one of that identifier. Returns the
        identifier. Saves in the background are waited for; a warning tells those that failed.

        ``layer_id`` is the one that it was saved under, by default that of :meth:`save_checkpoint`; None takes the
        checkpoint of any.

        All is checked before anything is written: identifier, version, sizes, hashes, names, shapes,
        dtypes and values; tensors that do not fit by their shapes are not even read. Where the base layer
        or the optimizer refuses it after all, everything gets back what it had. Checkpoints go from any
        device and floating dtype to any other; tensors are written in place, so the optimizer's parameters
        are still these. The base layer is loaded if it was saved. ``controller`` and ``optimizer`` are loaded
        if given; with more than one layer, load all of them, and each of these two from one checkpoint.

        :class:`~kasmina_ext.checkpoint.CheckpointMismatch` (a ValueError) for a checkpoint of another
        number of seeds, features or blueprints, another chunking, controller or optimizer, and for an
        identifier of another ``layer_id``.
        Of the layer's other arguments (alpha schedule, ramp, strategy of new seeds) its own go on to hold;
        where the checkpoint's were different a warning says so.
        :class:`~kasmina_ext.checkpoint.CheckpointNotFound` (ValueError and FileNotFoundError),
        :class:`~kasmina_ext.checkpoint.CheckpointDamaged` (RuntimeError).
        """
        manager = self._manager_for(checkpoint_dir)
        wait_for_saves()
        report_failures()

        def check(header: dict[str, Any], content: Any, shapes_only: bool = True) -> None:
            """At first without values, so that nothing large is read for nothing."""
            name, theirs = header.get("checkpoint_id", checkpoint_id), header.get("layer_id")
            if header.get("kind") != LAYER or not isinstance(theirs, str):
                return  # the manager says so
            if layer_id not in (None, theirs):
                raise CheckpointMismatch(
                    f"checkpoint {name} was saved as layer_id={theirs!r}, not {layer_id!r}: pass layer_id="
                )
            problems = problems_with(content, self, controller, optimizer, shapes_only=shapes_only)
            if problems:
                raise CheckpointMismatch(f"checkpoint {name} {'; '.join(problems)}")

        found = manager.load_layer(checkpoint_id, layer_id, check=check)
        name, content = found["checkpoint_id"], found["content"]
        check(found, content, shapes_only=False)
        differs = behaviour_differs(content, self)
        if differs:
            text = f"checkpoint {name} was saved by a layer with {', '.join(differs)}: the arguments of this one hold"
            warnings.warn(text, UserWarning, stacklevel=2)
        apply(content, self, controller, optimizer)
        return name

    def _warn_of_another(self, manager: CheckpointManager, layer_id: str, tag: str) -> None:
        line = (_path(manager.checkpoint_dir), str(layer_id), str(tag))
        last = _savers.get(line, lambda: None)()
        _savers[line] = weakref.ref(self, lambda gone: _savers.pop(line) if _savers.get(line) is gone else None)
        if last is not None and last is not self:
            text = (
                f"another layer saves as layer_id={layer_id!r} with the tag {tag!r} in {manager.checkpoint_dir}: each "
                "loads what the other saved; give every layer a layer_id= of its own"
            )
            warnings.warn(text, UserWarning, stacklevel=3)

    def _manager_for(self, checkpoint_dir: Directory | None) -> CheckpointManager:
        if checkpoint_dir is not None:
            if self._other_manager is None or _path(self._other_manager.checkpoint_dir) != _path(checkpoint_dir):
                self._other_manager = CheckpointManager(checkpoint_dir)
            return self._other_manager
        manager = self.checkpoint_manager
        if manager is None:
            raise RuntimeError(
                "there is no directory for checkpoints: give the layer checkpoint_dir=, set layer.checkpoint_dir, "
                "or pass checkpoint_dir= here"
            )
        return manager


def _path(directory: Directory) -> str:
    return os.path.abspath(directory)
