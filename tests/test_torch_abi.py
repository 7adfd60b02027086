"""csrc/torch_abi.h against the installed torch: every prototype, every name, and nothing that is not called.

The compiler proves the prototypes: ours and torch's are both extern "C", so any difference is a conflicting declaration.
A name that torch does not have would pass that, so each is also taken from torch's headers alone, at target 2.10, and
from the installed library.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import elf
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc/torch_abi.h"
MODULE = ROOT / "kasmina_ext/_C.abi3.so"
TORCH = Path(torch.__file__).parent

TARGET_2_10 = "0x020a000000000000"
TARGET_2_9 = "0x0209000000000000"
TORCH_HEADERS = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
"""


def functions(header: str) -> list[str]:
    """The functions that a header declares."""
    code = re.sub(r"/\*.*?\*/", " ", header, flags=re.DOTALL)
    code = re.sub(r"typedef[^;]*;", " ", code)
    return re.findall(r"\b(\w*torch_\w+)\s*\(", code)


DECLARED = functions(HEADER.read_text())
CUDA = [name for name in DECLARED if "cuda" in name and "device_type" not in name]


def compile_only(source: str, folder: Path, header: str | None = None, target: str = TARGET_2_10) -> str:
    """The compiler's complaints about a C++ source; ``header`` is what it finds as torch_abi.h."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    assert shutil.which(compiler[0]), f"this test needs a C++ compiler: {compiler[0]} is not there"
    (folder / "torch_abi.h").write_text(HEADER.read_text() if header is None else header)
    (folder / "proof.cpp").write_text(source)
    flags = ["-std=c++17", "-fsyntax-only", "-fmax-errors=0", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={target}"]
    command = [*compiler, *flags, f"-I{folder}", f"-I{TORCH}/include", str(folder / "proof.cpp")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode == 0) == ("error" not in run.stderr), run.stderr
    return run.stderr if run.returncode else ""


def prototypes_proof() -> str:
    return f'{TORCH_HEADERS}#include "torch_abi.h"\n'


def names_proof(names: list[str]) -> str:
    """Each function, from torch's headers alone."""
    return TORCH_HEADERS + "".join(f"auto *const use_{name} = &{name};\n" for name in names)


def test_header_was_understood():
    assert len(DECLARED) == len(set(DECLARED)) >= 30
    assert {"aoti_torch_check", "torch_library_impl", "torch_parallel_for"} <= set(DECLARED)
    assert set(CUDA) == {
        "aoti_torch_create_cuda_guard",
        "aoti_torch_delete_cuda_guard",
        "aoti_torch_get_current_cuda_stream",
    }


def test_every_prototype_is_torchs(tmp_path):
    assert compile_only(prototypes_proof(), tmp_path) == ""


def test_every_function_is_in_torchs_headers_at_2_10(tmp_path):
    assert compile_only(names_proof(DECLARED), tmp_path) == ""


def test_an_invented_function_is_found(tmp_path):
    header = HEADER.read_text().replace("/* ---- Codes. */", "int32_t aoti_torch_get_mood(void);\n")
    invented = functions(header)
    assert "aoti_torch_get_mood" in invented
    assert "aoti_torch_get_mood" in compile_only(names_proof(invented), tmp_path)
    assert not hasattr(torch_library("libtorch_cpu.so"), "aoti_torch_get_mood")


def test_a_function_newer_than_the_target_is_found(tmp_path):
    complaints = compile_only(names_proof(DECLARED), tmp_path, target=TARGET_2_9)
    assert "torch_library_impl" in complaints and "torch_parallel_for" in complaints


def with_an_argument_more(result: str, name: str, parameters: str) -> str:
    return f"{result} {name}({'' if parameters == 'void' else parameters + ', '}int kasmina_extra);"


def with_another_result(_: str, name: str, parameters: str) -> str:
    return f"double {name}({parameters});"


@pytest.mark.parametrize("wrong", [with_an_argument_more, with_another_result])
def test_every_wrong_prototype_is_found(wrong, tmp_path):
    declaration = re.compile(r"^(\w+) (\w*torch_\w+)\(([^;]*)\);", re.MULTILINE)
    header, changed = declaration.subn(lambda match: wrong(*match.groups()), HEADER.read_text())
    assert changed == len(DECLARED)
    complaints = compile_only(prototypes_proof(), tmp_path, header)
    assert complaints.count("error:") >= len(DECLARED)
    assert set(DECLARED) <= set(re.findall(r"\w+", complaints))


def test_a_wrong_pointer_is_found(tmp_path):
    wrong = HEADER.read_text().replace("int64_t *ret_dim", "int32_t *ret_dim")
    assert "aoti_torch_get_dim" in compile_only(prototypes_proof(), tmp_path, wrong)


def torch_library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(TORCH / "lib" / name))


def test_installed_torch_exports_every_function():
    library = torch_library("libtorch_cpu.so")
    assert [name for name in DECLARED if name not in CUDA and not hasattr(library, name)] == []
    if (TORCH / "lib/libtorch_cuda.so").exists():  # else this torch has no CUDA
        library = torch_library("libtorch_cuda.so")
        assert [name for name in CUDA if not hasattr(library, name)] == []


def test_module_needs_what_the_header_declares_and_nothing_else_of_torch():
    used = {name for name in elf.read(MODULE).undefined if "torch" in name or name.startswith("_ZN")}
    assert used == set(DECLARED) - set(CUDA)


def test_cuda_functions_are_looked_up_by_the_names_declared():
    looked_up = re.findall(r'"(\w*torch_\w+)"', (ROOT / "csrc/device.c").read_text())
    assert sorted(looked_up) == sorted(CUDA)


def test_no_other_file_knows_libtorch():
    """Neither includes torch's headers nor declares a function of libtorch."""
    knowing = re.compile(
        r"#\s*include\s*<(?:torch|ATen|c10)/|^\s*extern\b.*torch_|^(?!\s*return)\w+ \w*torch_\w+\(", re.MULTILINE
    )
    files = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".c", ".h", ".cu", ".cuh"} and path != HEADER
    ]
    assert files
    assert [path.name for path in files if knowing.search(path.read_text())] == []
