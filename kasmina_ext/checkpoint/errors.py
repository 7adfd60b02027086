"""What can go wrong with a checkpoint. Each error is also of the built-in kind that a caller would look for."""

from __future__ import annotations


class CheckpointError(Exception):
    """The base of all others."""


class InvalidCheckpointId(CheckpointError, ValueError):
    """What was given is no identifier."""


class CheckpointNotFound(CheckpointError, ValueError, FileNotFoundError):
    """There is no checkpoint of that name, or it was removed while it was read."""

    def __init__(self, what: str) -> None:
        super().__init__(f"Checkpoint not found: {what}")
        self.what = what

    def __reduce__(self) -> tuple:
        return type(self), (self.what,)


class CheckpointDamaged(CheckpointError, RuntimeError):
    """Not what was saved, or not ours: ``file`` and ``reason`` say where and why."""

    def __init__(self, checkpoint_id: str, file: str, reason: str) -> None:
        super().__init__(f"Integrity check failed for checkpoint {checkpoint_id}: {file}: {reason}")
        self.checkpoint_id, self.file, self.reason = checkpoint_id, file, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.checkpoint_id, self.file, self.reason)


class CheckpointVersionError(CheckpointDamaged):
    """Of a version that this package does not read."""


class CheckpointSaveError(CheckpointError, OSError, RuntimeError):
    """A save failed (disk full, permission denied, ...): what was there before is as it was, and nothing is left over.

    ``errno`` and ``filename`` are those of the system's error.
    """

    @classmethod
    def because(cls, checkpoint_id: str, error: OSError) -> CheckpointSaveError:
        reason = error.strerror or str(error)
        return cls(error.errno, f"saving checkpoint {checkpoint_id} failed: {reason}", error.filename)


class CheckpointMismatch(CheckpointError, ValueError):
    """Whole, but of another layer, controller or optimizer than those it is loaded into: they are as they were."""
