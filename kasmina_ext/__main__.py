"""``python -m kasmina_ext``: what a bug report needs, and which path each device takes and why."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kasmina_ext
from kasmina_ext import _native, flags
from kasmina_ext.checkpoint import cli

PACKAGES = ("numpy", "triton", "safetensors", "transformers", "accelerate", "peft", "lightning")
SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_LOGS",
    "TORCH_COMPILE_DISABLE",
    "OMP_NUM_THREADS",
)
"""Environment variables that change what is run, or how."""


def collect() -> dict[str, Any]:
    """All facts as text, numbers and lists; what cannot be found out is said, never raised."""
    return {
        "versions": {
            "kasmina_ext": kasmina_ext.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda or "none",
            "driver_cuda": _attempt(_driver_version),
            "platform": platform.platform(),
        },
        "packages": {name: _attempt(lambda name=name: _package_version(name)) for name in PACKAGES},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "module": {
            "loaded": _native.available,
            "reason": _native.reason,
            "folder": str(Path(kasmina_ext.__file__).parent),
        },
        "build": dict(_native.build),
        "flag": {
            "triton_kernels": flags.triton_kernels,
            "environment": {flags.ENVIRONMENT: os.environ.get(flags.ENVIRONMENT)},
        },
        "devices": [_device_facts(device, detail) for device, detail in _devices()],
    }


def _attempt(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a broken driver is a finding, not a failure of the report
        return f"unknown ({type(error).__name__}: {error})"


def _driver_version() -> str:
    if torch.version.cuda is None:
        return "none (this torch has no CUDA)"
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # which is the driver's; torch does not tell its version any more
    except OSError:
        return "none (no driver)"
    version = ctypes.c_int()
    code = driver.cuDriverGetVersion(ctypes.byref(version))
    if code:
        raise RuntimeError(f"cuDriverGetVersion returned {code}")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    """(device, description), the CPU first."""
    found = [("cpu", _attempt(_cpu_name))]
    count = _attempt(torch.cuda.device_count)
    if not isinstance(count, int):
        return [*found, ("cuda", count)]
    for index in range(count):
        found.append((f"cuda:{index}", _attempt(lambda index=index: _cuda_name(index))))
    other = _attempt(lambda: torch.accelerator.current_accelerator(check_available=True))
    if isinstance(other, torch.device) and other.type != "cuda":
        found.append((other.type, ""))
    return found


def _cpu_name() -> str:
    name = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}, {torch.get_num_threads()} threads"


def _cuda_name(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    memory = facts.total_memory / 2**30
    return f"{facts.name}, capability {facts.major}.{facts.minor}, {memory:.0f} GiB"


def _device_facts(device: str, description: str) -> dict[str, str]:
    answer = _attempt(lambda: flags.compiled_path(device))
    if not isinstance(answer, tuple):
        return {"device": device, "description": description, "path": "unknown", "why": answer}
    compiled, why = answer
    return {
        "device": device,
        "description": description,
        "path": "compiled" if compiled else "reference",
        "why": why or "a kernel for this device is loaded",
    }


# ---- showing it ----------------------------------------------------------------------------------


def _sections(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    module, flag = facts["module"], facts["flag"]
    [(variable, value)] = flag["environment"].items()
    return [
        ("versions", list(facts["versions"].items())),
        ("packages", list(facts["packages"].items())),
        *([("environment", list(facts["settings"].items()))] if facts["settings"] else []),
        (
            "compiled module",
            [
                ("loaded", "yes" if module["loaded"] else f"no: {module['reason']}"),
                ("folder", module["folder"]),
                *((name, value) for name, value in facts["build"].items() if value),
            ],
        ),
        (
            "flag",
            [
                ("triton_kernels", "on" if flag["triton_kernels"] else "off"),
                (variable, "not set" if value is None else value),
            ],
        ),
    ]


def show_plain(facts: dict[str, Any]) -> None:
    """Lines of text, for pipes and where rich is not installed."""
    for title, rows in _sections(facts):
        print(title)
        for name, value in rows:
            print(f"  {name}: {value}")
    print("devices")
    for row in facts["devices"]:
        print(f"  {row['device']} ({row['description']}): {row['path']}: {row['why']}")


def show_rich(facts: dict[str, Any]) -> None:
    """Tables, for a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for title, rows in _sections(facts):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(escape(name), escape(str(value)))
        console.print(table)
    table = Table("device", "", "path", "why", title="devices", title_justify="left")
    for row in facts["devices"]:
        colour = "green" if row["path"] == "compiled" else "yellow"
        table.add_row(
            escape(row["device"]),
            escape(row["description"]),
            f"[{colour}]{row['path']}[/]",
            escape(row["why"]),
        )
    console.print(table)


def show(facts: dict[str, Any]) -> None:
    """Tables on a terminal that rich can draw on, else lines."""
    if sys.stdout.isatty():
        try:
            return show_rich(facts)
        except ImportError:
            pass
    show_plain(facts)


def environment_command(arguments: argparse.Namespace) -> int:
    """Print the report."""
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Without a tool: the environment report."""
    parser = argparse.ArgumentParser(prog="python -m kasmina_ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(run=environment_command)
    cli.add_to(parser.add_subparsers(title="tools", metavar="tool"))
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
