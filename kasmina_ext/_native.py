"""Loads the compiled module, and keeps the reason when it cannot."""

from __future__ import annotations

import importlib
import sys
import sysconfig

import torch


def _reason_not_built() -> str:
    """What the build said where it made no module."""
    try:
        from kasmina_ext._build import NO_MODULE_REASON
    except ImportError:
        return ""
    return NO_MODULE_REASON


def _load() -> tuple[object | None, str]:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None, "free-threaded Python runs the reference"
    try:
        # torch must come first: the module finds libtorch_cpu by its soname, already loaded.
        return importlib.import_module("kasmina_ext._C"), ""
    except ModuleNotFoundError as error:
        return None, _reason_not_built() or f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever is wrong with a binary must not break `import kasmina_ext`
        sys.modules.pop("kasmina_ext._C", None)
        return None, f"{type(error).__name__}: {error}"


_module, reason = _load()

available: bool = _module is not None
"""Whether the compiled module was loaded; if not, ``reason`` says why."""

build: dict[str, str] = {
    name: str(getattr(_module, name, ""))
    for name in ("version", "compiler", "cuda", "cuda_archs", "cuda_reason", "cuda_registration")
}
"""Facts about the build: versions as text, ``cuda_reason`` why it has no CUDA, ``cuda_registration`` why its CUDA
kernels were not registered; empty where there is nothing to say."""

_cuda_registered = bool(getattr(_module, "cuda_registered", 0))


def _runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether machine code or PTX among ``archs`` ("75 80 90+PTX") serves a device of this compute capability."""
    for arch in archs.replace(";", " ").split():
        number, ptx, _ = arch.partition("+PTX")
        built = divmod(int("".join(c for c in number if c.isdigit())), 10)
        if built[0] == capability[0] and built <= capability or ptx and built <= capability:
            return True
    return False


def has_kernel(device: torch.device | str) -> tuple[bool, str]:
    """``(True, "")`` where a compiled kernel serves ``device``, else ``(False, why not)``."""
    device = torch.device(device)
    if not available:
        return False, f"the compiled module could not be loaded ({reason})"
    if device.type == "cpu":
        return True, ""
    if device.type != "cuda":
        return False, f"there is no compiled kernel for {device.type}"
    if not build["cuda"]:
        return False, f"built without CUDA ({build['cuda_reason']})"
    if not _cuda_registered:
        return False, build["cuda_registration"]
    if torch.cuda.is_available() and not _runs_on(torch.cuda.get_device_capability(device), build["cuda_archs"]):
        major, minor = torch.cuda.get_device_capability(device)
        return False, f"no kernel image for compute capability {major}.{minor} (built for {build['cuda_archs']})"
    return True, ""
