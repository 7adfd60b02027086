"""How the state of seeds lies in memory: the rows and columns of its tensors, and what a fresh one holds."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import Tensor


class StateVar(IntEnum):
    """Rows of ``state``, int32 ``[8, S]``."""

    LIFECYCLE_STATE = 0
    BLUEPRINT_ID = 1
    EPOCHS_IN_STATE = 2
    GRAFTING_STRATEGY = 3
    PARENT_STATE = 4
    CHECKPOINT_ID = 5
    EVALUATION_SCORE = 6
    ERROR_COUNT = 7


class PerformanceColumn(IntEnum):
    """Columns of ``performance_metrics``, float32 ``[S, 4]``."""

    LOSS = 0
    ACCURACY = 1
    STABILITY = 2
    EFFICIENCY = 3


HISTORY_LENGTH = 10
NO_ID = -1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def new_state(num_seeds: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The tensors of ``num_seeds`` seeds, not filled: see :func:`fill_fresh`."""
    return {
        "state": torch.empty((len(StateVar), num_seeds), dtype=torch.int32, device=device),
        "history": torch.empty((num_seeds, HISTORY_LENGTH, 2), dtype=torch.int32, device=device),
        "history_count": torch.empty(num_seeds, dtype=torch.int32, device=device),
        "performance_metrics": torch.empty((num_seeds, len(PerformanceColumn)), dtype=torch.float32, device=device),
    }


def fill_fresh(tensors: Mapping[str, Tensor]) -> None:
    """Every seed dormant, without blueprint, checkpoint or history."""
    for name in ("state", "history", "history_count", "performance_metrics"):
        tensors[name].zero_()
    tensors["state"][StateVar.BLUEPRINT_ID] = NO_ID
    tensors["state"][StateVar.CHECKPOINT_ID] = NO_ID


def row_view(variable: StateVar, doc: str) -> property:
    """A property: the row of ``_buffers["state"]`` as a view; assigning to it writes the row."""

    def get(self) -> Tensor:
        return self._buffers["state"][variable]

    def put(self, values: Tensor | int) -> None:
        with torch.no_grad():
            self._buffers["state"][variable].copy_(torch.as_tensor(values))

    return property(get, put, doc=doc)
