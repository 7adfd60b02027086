"""A module that stands in for another: it answers as its base layer does, and its buffers keep their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def _nothing(module: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook that does nothing."""


class CallsOnly(nn.Module):
    """Never called: it is found in a tree of modules, and says there that modules have to be called.

    nn.TransformerEncoderLayer hands the weights of its parts to one fused kernel, in evaluation without gradients,
    instead of calling them; not so where a module below it has a forward hook. A hook on the wrapper itself would do,
    and cost a microsecond in every call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(_nothing)


class TransparentWrapper(nn.Module):
    """Attributes that this module lacks come from ``base_layer``; its own buffers follow devices only.

    A subclass names its buffers and their dtypes in ``BUFFER_DTYPES`` and its other tensors and
    modules in ``OWN_NAMES``.
    """

    BUFFER_DTYPES: ClassVar[dict[str, torch.dtype]] = {}
    OWN_NAMES: ClassVar[frozenset[str]] = frozenset()
    PRIVATE_NAMES: ClassVar[frozenset[str]] = frozenset({"_qkv_same_embed_dim"})
    """Of the base layer too, though private: nn.TransformerEncoderLayer asks its attention for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls_only = CallsOnly()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as missing:
            # Private names describe the module itself; copy and pickle ask before there is a base.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or (name.startswith("_") and name not in self.PRIVATE_NAMES):
                raise
            try:
                return getattr(base, name)
            except AttributeError:
                raise missing from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Tensors that are the base layer's go there: weights are tied by assignment."""
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and not self._has_own(name) and isinstance(getattr(base, name, None), Tensor):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def _has_own(self, name: str) -> bool:
        if name in self.OWN_NAMES or name in self.BUFFER_DTYPES or hasattr(type(self), name):
            return True
        return any(name in store for store in (self.__dict__, self._parameters, self._buffers, self._modules))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransparentWrapper:
        """The buffers' own values move to the device: they are not cast, nor cast back."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in self.BUFFER_DTYPES:
            original, applied = before[name], self._buffers[name]
            if applied.dtype != original.dtype:
                self._buffers[name] = original.to(applied.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, dtype in self.BUFFER_DTYPES.items():
            if self._buffers[name].dtype != dtype:  # assigned from a state_dict that somebody cast
                self._buffers[name] = self._buffers[name].to(dtype)
