"""Checkpoints that are whole or absent, and that run no code."""

from kasmina_ext.checkpoint.background import PendingSave
from kasmina_ext.checkpoint.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointSaveError,
    CheckpointVersionError,
    InvalidCheckpointId,
)
from kasmina_ext.checkpoint.manager import CheckpointManager
from kasmina_ext.checkpoint.recovery import CheckpointRecovery

__all__ = [
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointRecovery",
    "CheckpointSaveError",
    "CheckpointVersionError",
    "InvalidCheckpointId",
    "PendingSave",
]
