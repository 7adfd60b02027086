"""Finds nvcc (CUDA_HOME, PATH, /usr/local/cuda, NVIDIA's PyPI wheels) and decides what it compiles for."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Machine code of x.0 runs on every x.y, so five images serve all of Turing to Blackwell; the PTX of 10.0 is
# compiled by the driver for what has none of them (11.0, and whatever comes).
DEFAULT_ARCHS = "75 80 90 100+PTX 120"

USUAL_PLACE = "/usr/local/cuda/bin/nvcc"
NOT_FOUND = "no nvcc in CUDA_HOME, on PATH, in /usr/local/cuda or among NVIDIA's wheels"

PROBE = """#include <cuda_bf16.h>
#include <cuda_runtime.h>
__global__ void kasmina_probe(__nv_bfloat16 *p) { *p = __float2bfloat16(1.0f); }
"""


class CudaError(Exception):
    """Why there can be no CUDA in this build, in one line."""


class TargetError(CudaError):
    """KASMINA_CUDA_ARCHS asks for what cannot be: never passed over, even where CUDA is optional."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str  # "13.0"
    release: str  # "V13.0.88"
    cudart: str  # libcudart_static.a
    archs: tuple[str, ...]  # "90", "100+PTX"

    @property
    def gencode(self) -> list[str]:
        """nvcc's flags for ``archs``."""
        flags = []
        for arch in self.archs:
            number, ptx, _ = arch.partition("+PTX")
            code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
            flags += ["-gencode", f"arch=compute_{number},code={code}"]
        return flags


def find(mode: str, archs: str, probe: Callable[[str, Sequence[str]], str]) -> tuple[Toolkit | None, str]:
    """``(toolkit, "")`` or ``(None, why not)``; CudaError where the user asked for what cannot be.

    mode: KASMINA_CUDA. archs: KASMINA_CUDA_ARCHS, or "". probe(nvcc, flags): compiles PROBE, returns its errors or "".
    """
    if mode not in ("auto", "1", "0"):
        raise CudaError(f"KASMINA_CUDA must be auto, 1 or 0, not {mode!r}")
    if mode == "0":
        return None, "KASMINA_CUDA=0"
    reasons = []
    for nvcc in _candidates():
        try:
            toolkit = _inspect(nvcc, archs)
            errors = probe(nvcc, toolkit.gencode[:2])
            if errors:
                raise CudaError(f"{nvcc} cannot compile: {_first_error(errors)}")
            return toolkit, ""
        except CudaError as error:
            reasons.append(error)
    reason = str(reasons[0]) if reasons else NOT_FOUND
    if mode == "1" or any(isinstance(error, TargetError) for error in reasons):
        raise CudaError(f"{reason} (KASMINA_CUDA=0 builds without CUDA)")
    return None, reason


def _candidates() -> list[str]:
    """Paths of nvcc, best first, each once."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [f"{home}/bin/nvcc" for home in homes if home]
    found.append(shutil.which("nvcc") or "")
    found.append(USUAL_PLACE)
    # An isolated build hides site-packages from sys.path, not from sysconfig.
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    if venv := os.environ.get("VIRTUAL_ENV"):
        places += glob.glob(f"{glob.escape(venv)}/lib/python*/site-packages")
    for place in places:
        found += sorted(glob.glob(f"{glob.escape(place)}/nvidia/cu*/bin/nvcc"), reverse=True)
    usable = [os.path.abspath(path) for path in found if path and os.access(path, os.X_OK)]
    return list(dict.fromkeys(usable))


def _inspect(nvcc: str, archs: str) -> Toolkit:
    match = re.search(r"release ([\d.]+), (\S+)", _output(nvcc, "--version"))
    if not match:
        raise CudaError(f"{nvcc} --version does not name a CUDA release")
    supported = re.findall(r"sm_(\d+)", _output(nvcc, "--list-gpu-code"))
    targets = _targets(archs, supported, nvcc)
    return Toolkit(nvcc, match[1], match[2], _static_cudart(nvcc), targets)


def _targets(archs: str, supported: list[str], nvcc: str) -> tuple[str, ...]:
    """KASMINA_CUDA_ARCHS ("75 9.0+PTX", "native", separated by spaces, commas or semicolons), or the default."""
    if not archs.strip():
        known = [a for a in DEFAULT_ARCHS.split() if a.partition("+")[0] in supported]
        if not known:
            raise CudaError(f"{nvcc} knows none of the targets {DEFAULT_ARCHS}")
        # An older nvcc does not know the newest: its PTX must then come from the newest it does know.
        return tuple(known) if any("+" in a for a in known) else (*known[:-1], known[-1] + "+PTX")
    targets = []
    for word in re.split(r"[\s,;]+", archs.strip()):
        if word == "native":
            targets += _present()
            continue
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        if not match:
            raise TargetError(f"KASMINA_CUDA_ARCHS: {word!r} is no target (say 90, 9.0, 90+PTX or native)")
        if match[1] + match[2] not in supported:
            raise TargetError(f"KASMINA_CUDA_ARCHS: {nvcc} cannot compile for {word} (only {' '.join(supported)})")
        targets.append("".join(part or "" for part in match.groups()))
    return tuple(dict.fromkeys(targets))


def _present() -> list[str]:
    """The compute capabilities of this machine's GPUs."""
    text = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    present = re.findall(r"^(\d+)\.(\d+)$", text, re.MULTILINE)
    if not present:
        raise TargetError("KASMINA_CUDA_ARCHS=native: nvidia-smi shows no GPU")
    return ["".join(pair) for pair in present]


def _static_cudart(nvcc: str) -> str:
    """The static runtime beside nvcc. It may be a wrapper script, so nvcc itself is asked where it looks."""
    dryrun = _output(nvcc, "--dryrun", "-x", "cu", os.devnull)
    top = re.search(r"TOP=(.+)", dryrun)
    places = re.findall(r'"-L([^"]+)"', dryrun)
    if top:
        places += [f"{top[1]}/{name}" for name in ("lib64", "lib")]
    for place in places:
        library = Path(place, "libcudart_static.a")
        if library.is_file():
            return str(library.resolve())
    raise CudaError(f"no libcudart_static.a beside {nvcc}")


def _output(*command: str) -> str:
    """stdout and stderr together; "" where it cannot run."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return ""
    return run.stdout


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if re.search("error|fatal", line)), "no output")
