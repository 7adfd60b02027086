"""Which path computes: the switch for the compiled kernels, and the decision for a device and dtype.

``kasmina_ext.flags.triton_kernels`` is a bool that may be set at any time (the name is the Triton
package's: it turns the compiled kernels on). Its first value comes from the environment variable
``MORPHOGENETIC_FEATURE_TRITON_KERNELS``, read when the package is imported: true, 1, yes, on or
false, 0, no, off in any case; not set or empty means true.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch

from kasmina_ext import _native

ENVIRONMENT = "MORPHOGENETIC_FEATURE_TRITON_KERNELS"
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_WORDS = {
    **dict.fromkeys(("true", "1", "yes", "on", ""), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


def read_environment(environ: Mapping[str, str] = os.environ) -> bool:
    """What the environment says; ValueError for a value that is neither yes nor no."""
    value = environ.get(ENVIRONMENT, "")
    try:
        return _WORDS[value.strip().lower()]
    except KeyError:
        raise ValueError(f"environment variable {ENVIRONMENT} must be true or false, got {value!r}") from None


triton_kernels: bool = read_environment()


@contextmanager
def override(*, triton_kernels: bool) -> Iterator[None]:
    """The flag as given within a ``with`` block, then as it was. It is one flag for all threads."""
    module = sys.modules[__name__]
    before = module.triton_kernels
    module.triton_kernels = triton_kernels
    try:
        yield
    finally:
        module.triton_kernels = before


# ---- the decision --------------------------------------------------------------------------------


def compiled_path(device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[bool, str]:
    """``(True, "")`` where the compiled kernels compute for this device and dtype, else ``(False, why not)``."""
    if not triton_kernels:
        return False, f"switched off ({ENVIRONMENT} or kasmina_ext.flags.triton_kernels)"
    if dtype not in KERNEL_DTYPES:
        return False, f"there is no compiled kernel for {str(dtype).removeprefix('torch.')}"
    return _native.has_kernel(torch.device(device))


_cached: dict[tuple[torch.device, torch.dtype], bool] = {}


@torch.compiler.assume_constant_result
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel serves device and dtype, whatever the flag says; asked once, then
    remembered, as it is on the way of every forward. A constant while a graph is traced.
    """
    key = (device, dtype)
    known = _cached.get(key)
    if known is None:
        known = _cached[key] = dtype in KERNEL_DTYPES and _native.has_kernel(device)[0]
    return known


class _Flags(ModuleType):
    """The module itself, so that a flag can be a plain attribute (a forward reads it) and a bad
    value still an error.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "triton_kernels" and not isinstance(value, bool):
            raise TypeError(f"kasmina_ext.flags.{name} must be True or False, got {value!r}")
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Flags
