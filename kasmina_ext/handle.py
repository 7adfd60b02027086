"""What may stand for a model with seeds, or for its layers, in every call of the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from kasmina_ext.layer import KasminaLayer


class SeedHandle:
    """A handle on the seeds of a model or of several modules: :class:`kasmina_ext.Seeds` is the one that there is."""

    roots: dict[str, nn.Module]
    """The modules that the handle was made of, by name: "" for a single one."""

    @property
    def model(self) -> nn.Module | None:
        """The model that the seeds are in; None where the handle was made of several modules."""
        return self.roots.get("") if len(self.roots) == 1 else None

    @property
    def layers(self) -> dict[str, KasminaLayer]:
        """All layers that there are now, by their names, in the model's order. ValueError where there is none."""
        raise NotImplementedError

    def potential(self) -> Tensor:
        """See :func:`kasmina_ext.potential`; float64 ``[T]``, of all seeds."""
        raise NotImplementedError

    def reset_optimizer_state(self, optimizer: Optimizer, seed_ids: Any = None) -> None:
        """Zero what ``optimizer`` remembers of the blueprints of these seeds (None: of all)."""
        raise NotImplementedError


def model_of(model: nn.Module | SeedHandle) -> nn.Module:
    """The model itself, or a handle's. ValueError for a handle that was made of several modules."""
    if not isinstance(model, SeedHandle):
        return model
    if model.model is None:
        raise ValueError("these seeds are of several modules, not of one model: give the model itself")
    return model.model
