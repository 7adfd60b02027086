"""What the build makes: the module's binary, the wheel, what is compiled again, and what is said where a tool is missing."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import elf
import pytest
import torch

import kasmina_ext
from kasmina_ext import _native, _schema

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "kasmina_ext/_C.abi3.so"
sys.path.append(str(ROOT))

from build_tools import cuda, schema  # noqa: E402

SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}


# ---- the module ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module() -> elf.SharedLibrary:
    return elf.read(MODULE)


def test_module_is_loaded_and_knows_its_build():
    assert _native.available, _native.reason
    assert _native.build["version"] == kasmina_ext.__version__
    assert _native.build["compiler"]
    assert bool(_native.build["cuda"]) != bool(_native.build["cuda_reason"])
    assert bool(_native.build["cuda"]) == bool(_native.build["cuda_archs"])


def test_module_needs_libtorch_cpu_and_the_system(module):
    assert set(module.needed) - SYSTEM_LIBRARIES == {"libtorch_cpu.so"}


def test_module_has_no_search_path(module):
    assert module.search_paths == []


def test_module_exports_its_init_function_alone(module):
    assert module.exported == {"PyInit__C"}


def test_module_misses_nothing_but_torch_python_and_c(module):
    """Among other things: no libstdc++, whose names are mangled or begin with __cxa."""
    libraries = [ctypes.CDLL(name) for name in ("libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2")]
    unexplained = [
        name
        for name in module.undefined
        if not re.match(r"_?Py|(aoti_)?torch_", name) and not any(hasattr(library, name) for library in libraries)
    ]
    assert unexplained == []


def test_module_binds_at_load_time(module):
    """A function that some torch lacks is then an ImportError, not the end of the process at the first call."""
    assert module.binds_at_load


def test_module_is_small_and_stripped(module):
    assert module.stripped
    assert MODULE.stat().st_size <= 5 << 20


def test_module_without_torch_says_what_is_missing():
    code = (
        "import importlib.machinery as m, importlib.util as u;"
        f"s = u.spec_from_loader('_C', m.ExtensionFileLoader('_C', {str(MODULE)!r})); u.module_from_spec(s)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "ImportError: libtorch_cpu.so" in run.stderr


# ---- a build of its own ----------------------------------------------------------------------------------------------

NO_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; "


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what an sdist holds."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    unbuilt = shutil.ignore_patterns("*.so", "_schema.py", "_build.py", "__pycache__")
    for name in ("csrc", "build_tools", "kasmina_ext"):
        shutil.copytree(ROOT / name, tree / name, ignore=unbuilt)
    return tree


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py where torch cannot be imported, without CUDA unless told otherwise."""
    command = [sys.executable, "-c", NO_TORCH + "runpy.run_path('setup.py', run_name='__main__')", *arguments]
    settings = {"KASMINA_CUDA": "0", "KASMINA_WERROR": "", "KASMINA_CUDA_ARCHS": ""} | environment
    return subprocess.run(command, cwd=tree, env=os.environ | settings, capture_output=True, text=True)


def compiled_files(output: str) -> set[str]:
    return set(re.findall(r"\[\d+/\d+\] (\S+)", output))


@pytest.fixture(scope="module")
def built(tree) -> set[str]:
    """Builds the tree; the files that were compiled."""
    run = run_setup(tree, "-q", "build_ext", "--inplace")
    assert run.returncode == 0, run.stderr
    return compiled_files(run.stdout)


def test_builds_without_torch(tree, built):
    assert {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*.c")} == built
    assert elf.read(tree / "kasmina_ext/_C.abi3.so").exported == {"PyInit__C"}


def test_second_build_compiles_nothing(tree, built):
    assert built
    run = run_setup(tree, "-q", "build_ext", "--inplace")
    assert "up to date" in run.stdout and not compiled_files(run.stdout)


def test_changed_header_recompiles_what_includes_it(tree, built):
    header = tree / "csrc/status.h"
    header.write_text(header.read_text() + "/* changed */\n")
    again = compiled_files(run_setup(tree, "-q", "build_ext", "--inplace").stdout)
    assert "csrc/status.c" in again and "csrc/module.c" in built
    assert not any(name.startswith("csrc/cpu/") for name in again)


def test_changed_flags_recompile(tree, built):
    assert compiled_files(run_setup(tree, "-q", "build_ext", "--inplace", CFLAGS="-g0").stdout) == built


def test_broken_source_stops_the_build_and_says_where(tree, built):
    source = tree / "csrc/status.c"
    right = source.read_text()
    try:
        source.write_text(right + "int broken(\n")
        run = run_setup(tree, "-q", "build_ext", "--inplace")
    finally:
        source.write_text(right)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == "compiling csrc/status.c failed"


def wheel_names(tree: Path, folder: Path, **environment: str) -> tuple[str, set[str], str]:
    run = run_setup(tree, "-q", "bdist_wheel", "-d", str(folder), **environment)
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel.name, set(zipfile.ZipFile(wheel).namelist()), run.stdout


def package_files(tree: Path) -> set[str]:
    """Python, and what the page of seeds is made of."""
    package = tree / "kasmina_ext"
    return {path.relative_to(tree).as_posix() for path in (*package.rglob("*.py"), *package.glob("plots/page.*"))}


def test_wheel(tree, built, tmp_path):
    name, content, _ = wheel_names(tree, tmp_path)
    assert name == f"kasmina_ext-{kasmina_ext.__version__}-cp310-abi3-linux_x86_64.whl"
    package = {entry for entry in content if ".dist-info/" not in entry}
    assert package == package_files(tree) | {"kasmina_ext/_C.abi3.so"}
    assert {"kasmina_ext/_schema.py", "kasmina_ext/_build.py"} <= package


def test_without_a_compiler_there_is_a_pure_wheel(tree, built, tmp_path):
    name, content, output = wheel_names(tree, tmp_path, CC="/nowhere/cc")
    assert name == f"kasmina_ext-{kasmina_ext.__version__}-py3-none-any.whl"
    assert {entry for entry in content if ".dist-info/" not in entry} == package_files(tree)
    assert "no C compiler ('/nowhere/cc', from CC, is not there)" in output
    assert "no C compiler" in (tree / "kasmina_ext/_build.py").read_text()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KASMINA_CUDA": "yes"}, "error: KASMINA_CUDA must be auto, 1 or 0, not 'yes'"),
        ({"KASMINA_CUDA": "1", "CC": "/nowhere/cc"}, "error: KASMINA_CUDA=1 cannot be: no C compiler"),
    ],
)
def test_what_cannot_be_stops_with_one_line(tree, built, environment, message):
    run = run_setup(tree, "-q", "build_ext", "--inplace", **environment)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(message) and "Traceback" not in run.stderr


# ---- nvcc ------------------------------------------------------------------------------------------------------------

FAKE_NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n' ;;
--dryrun) echo "#$ TOP={top}"; echo '#$ LIBRARIES= "-L{top}/nowhere"' ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """A toolkit that only answers questions, and no other in sight; with `lib/` as in NVIDIA's wheels."""
    home = tmp_path / "site-packages/nvidia/cu12"
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    (home / "lib/libcudart_static.a").touch()
    (home / "bin/nvcc").write_text(FAKE_NVCC.format(top=home))
    (home / "bin/nvcc").chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "USUAL_PLACE", str(tmp_path / "nowhere"))
    monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda.sys, "path", [])
    monkeypatch.setattr(cuda.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    return home


def probe(nvcc, flags):
    return ""


@pytest.mark.parametrize("place", ["CUDA_HOME", "PATH", "usual", "wheels", "venv"])
def test_nvcc_is_found(place, toolkit, monkeypatch):
    nvcc = str(toolkit / "bin/nvcc")
    if place == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
    elif place == "PATH":
        monkeypatch.setattr(cuda.shutil, "which", lambda name: nvcc)
    elif place == "usual":
        monkeypatch.setattr(cuda, "USUAL_PLACE", nvcc)
    elif place == "wheels":
        monkeypatch.setattr(cuda.sysconfig, "get_path", lambda name: str(toolkit.parent.parent))
    else:
        venv = toolkit.parents[2] / "venv"
        (venv / "lib/python3.12").mkdir(parents=True)
        (venv / "lib/python3.12/site-packages").symlink_to(toolkit.parents[1])
        monkeypatch.setenv("VIRTUAL_ENV", str(venv))
    found, reason = cuda.find("auto", "", probe)
    assert reason == "" and found.version == "12.4"
    assert Path(found.nvcc).samefile(nvcc)
    assert found.cudart == str(toolkit / "lib/libcudart_static.a")


def test_targets(toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert cuda.find("1", "", probe)[0].archs == ("75", "80", "90+PTX")  # this nvcc knows no 100
    assert cuda.find("1", "9.0+PTX; sm_80,80", probe)[0].archs == ("90+PTX", "80")
    flags = cuda.find("1", "80 90+PTX", probe)[0].gencode
    assert flags[1::2] == ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]
    with pytest.raises(cuda.CudaError, match=r"KASMINA_CUDA_ARCHS: 'ninety' is no target"):
        cuda.find("auto", "ninety", probe)
    with pytest.raises(cuda.CudaError, match=r"KASMINA_CUDA_ARCHS: .* cannot compile for 100"):
        cuda.find("auto", "100", probe)


def test_default_targets_serve_every_gpu_from_turing_on(monkeypatch):
    archs = cuda.DEFAULT_ARCHS
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)):
        assert _native._runs_on(capability, archs), capability


def test_no_nvcc(toolkit):
    assert cuda.find("auto", "", probe) == (None, cuda.NOT_FOUND)
    with pytest.raises(cuda.CudaError, match="no nvcc in CUDA_HOME"):
        cuda.find("1", "", probe)


def test_nvcc_that_cannot_compile(toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    complaint = "some talk\nfatal error: nv/target: No such file or directory\n"
    found, reason = cuda.find("auto", "", lambda nvcc, flags: complaint)
    assert found is None and reason.endswith("cannot compile: fatal error: nv/target: No such file or directory")
    (toolkit / "lib/libcudart_static.a").unlink()
    found, reason = cuda.find("auto", "", probe)
    assert found is None and reason == f"no libcudart_static.a beside {toolkit}/bin/nvcc"


# ---- schemas ---------------------------------------------------------------------------------------------------------


def test_schemas_are_those_of_the_header_and_of_torch():
    assert schema.parse((ROOT / "csrc/schema.h").read_text()) == _schema.SCHEMAS
    for name, text in _schema.SCHEMAS.items():
        registered = getattr(torch.ops.kasmina, name).default._schema
        assert str(registered) == "kasmina::" + text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#define KASMINA_SCHEMA_F OTHER\n", "not a sequence of string literals"),
        ('#define KASMINA_SCHEMA_F "g(Tensor x) -> ()"\n', "declares 'g', expected 'f'"),
        ("", "no KASMINA_SCHEMA_ macro"),
    ],
)
def test_bad_schemas_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        schema.parse(text)


def test_schemas_in_pieces_and_comments():
    text = '/* "no" */\n#define KASMINA_SCHEMA_F \\\n    "f(Tensor x, " /* why */ \\\n    "int n) -> ()"\n'
    assert schema.parse(text) == {"f": "f(Tensor x, int n) -> ()"}
