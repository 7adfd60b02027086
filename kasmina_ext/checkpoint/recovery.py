"""Finds what is still whole among what is damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from kasmina_ext.checkpoint.catalog import PATIENCE, Entry
from kasmina_ext.checkpoint.errors import CheckpointError, CheckpointNotFound
from kasmina_ext.checkpoint.files import UNREADABLE
from kasmina_ext.checkpoint.manager import CheckpointManager

log = logging.getLogger(__name__)


class CheckpointRecovery:
    """Restores the newest that can be restored."""

    def __init__(self, checkpoint_manager: CheckpointManager) -> None:
        self.checkpoint_manager = checkpoint_manager

    def recover_seed_state(
        self, layer_id: str, seed_id: int, target_device: torch.device | str | int | None = None
    ) -> dict[str, Any] | None:
        """The newest checkpoint of a seed that is whole, as :meth:`CheckpointManager.restore_checkpoint` gives it; None
        where there is none. What is damaged is logged and left where it is.
        """
        manager = self.checkpoint_manager
        return self._newest_whole(
            lambda: manager.list_checkpoints(layer_id, seed_id, limit=None),
            lambda checkpoint_id: manager.restore_checkpoint(checkpoint_id, target_device),
            f"layer {layer_id}, seed {seed_id}",
        )

    def recover_layer(self, tag: str, layer_id: str | None = None) -> dict[str, Any] | None:
        """The same for a whole layer's tag, as :meth:`CheckpointManager.load_layer` gives it."""
        manager = self.checkpoint_manager
        return self._newest_whole(
            lambda: manager.list_layers(tag, layer_id),
            lambda checkpoint_id: manager.load_layer(checkpoint_id, layer_id),
            f"layer {layer_id or '(any)'}, tag {tag}",
        )

    def validate_checkpoint_integrity(self, checkpoint_id: str) -> tuple[bool, str | None]:
        """``(True, None)``, or ``(False, why not)``."""
        try:
            self.checkpoint_manager.verify(checkpoint_id)
        except (CheckpointError, OSError) as error:
            return False, str(error)
        return True, None

    def _newest_whole(
        self, find: Callable[[], list[Entry]], restore: Callable[[str], dict[str, Any]], what: str
    ) -> dict[str, Any] | None:
        damaged: set[str] = set()
        for _ in range(PATIENCE):
            vanished = False
            for entry in self.checkpoint_manager._catalog.settled(find):
                checkpoint_id = entry["checkpoint_id"]
                if checkpoint_id in damaged:
                    continue
                try:
                    return restore(checkpoint_id)
                except CheckpointNotFound:  # removed meanwhile: there may be newer ones than this list knows
                    vanished = True
                except (CheckpointError, OSError) as error:
                    if not isinstance(error, CheckpointError) and error.errno not in UNREADABLE:
                        raise
                    log.warning("%s", error)
                    damaged.add(checkpoint_id)
            if not vanished:
                break
        log.warning("no whole checkpoint of %s", what)
        return None
