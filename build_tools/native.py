"""Compiles csrc/ into the extension module: a C compiler, nvcc where there is one, and no torch.

Objects live in build/native, whoever builds (pip hands out a fresh temporary folder each time), and each keeps a
key over its command, its compiler and every file of ours that went into it: only what changed is compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import cuda
from .schema import write_if_changed

BUILD = Path("build/native")

# y has the same bits on every device: what would change rounding comes after the user's own CFLAGS.
C_FLAGS = ["-std=c11", "-fexceptions", "-fvisibility=hidden", "-fPIC", "-pthread"]
C_FLAGS += ["-ffp-contract=off", "-fno-fast-math"]
if platform.machine() == "x86_64":
    # Compilers stop at half an AVX-512 register by themselves, for processors that slow down; the kernels' loops are short
    # of instructions, not of clock.
    C_FLAGS += ["-mprefer-vector-width=512"]
CUDA_FLAGS = ["-O3", "--fmad=false", "-std=c++17", "-Wno-deprecated-gpu-targets"]
CUDA_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti"]
C_WARNINGS = ["-Wall", "-Wextra", "-Werror"]
CUDA_WARNINGS = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]


class BuildError(Exception):
    """What stops the build; the last line says it alone."""


@dataclass(frozen=True)
class Job:
    """One compilation. ``key_parts`` are what the object depends on beside the files in its depfile."""

    source: Path
    object: Path
    command: tuple[str, ...]
    key_parts: tuple[str, ...]

    @property
    def depfile(self) -> Path:
        return self.object.with_suffix(".d")

    @property
    def keyfile(self) -> Path:
        return self.object.with_suffix(".key")

    def key(self) -> str | None:
        """None where there is no depfile yet, or a file in it has gone."""
        digest = hashlib.sha256("\0".join(self.key_parts).encode())
        try:
            for path in (self.source, *self.own_dependencies()):
                digest.update(path.read_bytes())
        except OSError:
            return None
        return digest.hexdigest()

    def own_dependencies(self) -> list[Path]:
        """What the depfile names inside csrc; compilers and their headers are known by their version."""
        text = self.depfile.read_text().partition(":")[2].replace("\\\n", " ")
        return sorted(Path(word) for word in text.split() if word.startswith("csrc/"))

    def is_fresh(self) -> bool:
        try:
            return self.object.exists() and self.keyfile.read_text() == self.key()
        except OSError:
            return False

    def run(self) -> str:
        """Compile; the compiler's own output, BuildError if it fails."""
        self.object.parent.mkdir(parents=True, exist_ok=True)
        self.keyfile.unlink(missing_ok=True)
        started = time.time()
        output = execute(self.command, f"compiling {self.source}")
        files = [self.source, *self.own_dependencies()]
        if max(path.stat().st_mtime for path in files) < started:  # not edited meanwhile
            self.keyfile.write_text(self.key() or "")
        return output


def c_compiler() -> tuple[list[str], str]:
    """``(command, "")``, or ``([], what is missing)``: a C compiler that can compile against Python."""
    if sys.platform != "linux":
        return [], f"compiled kernels are built on Linux only, not on {sys.platform}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return [], "free-threaded Python runs the reference"
    chosen = os.environ.get("CC")
    names = [chosen] if chosen else [sysconfig.get_config_var("CC") or "cc", "cc", "gcc", "clang"]
    command = next((words for words in map(shlex.split, names) if words and shutil.which(words[0])), None)
    if command is None:
        return [], f"no C compiler ({chosen!r}, from CC, is not there)" if chosen else "no C compiler"
    probe = [*command, "-std=c11", f"-I{python_include()}", "-fsyntax-only", "-xc", "-"]
    run = subprocess.run(probe, input="#include <Python.h>\n", capture_output=True, text=True)
    if run.returncode != 0:
        missing = "Python.h (the Python development files)" if "Python.h" in run.stderr else "a working C compiler"
        return [], f"no {missing.removeprefix('a ')} for {command[0]}"
    return command, ""


def python_include() -> str:
    return sysconfig.get_path("include")


def build(module: str, version: str, log: Callable[[str], None] = print) -> Path:
    """Compile and link; the path of the shared library. The working directory is the root of the source tree."""
    cc, missing = c_compiler()
    if missing:
        raise BuildError(missing)
    with _locked():
        toolkit, reason = _find_cuda(cc)
        if toolkit:
            log(f"CUDA {toolkit.version} for {' '.join(toolkit.archs)} ({toolkit.nvcc})")
        else:
            log(f"without CUDA: {reason}")
        jobs = _cuda_jobs(toolkit) + _c_jobs(cc, version, toolkit, reason)
        stale = [job for job in jobs if not job.is_fresh()]
        _run_all(stale, len(jobs), log)
        return _link(cc, module, [job.object for job in jobs], toolkit)


@contextmanager
def _locked() -> Iterator[None]:
    """Two builds in one tree take turns."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _find_cuda(cc: Sequence[str]) -> tuple[cuda.Toolkit | None, str]:
    source = BUILD / "probe.cu"
    write_if_changed(source, cuda.PROBE)

    def probe(nvcc: str, flags: Sequence[str]) -> str:
        command = (nvcc, *_host_compiler(), "-std=c++17", *flags, "-c", str(source), "-o", str(BUILD / "probe.o"))
        passed = BUILD / "probe.key"
        key = "\0".join((*command, cuda.PROBE, str(os.stat(nvcc).st_mtime_ns)))
        if passed.exists() and passed.read_text() == key:
            return ""
        try:
            execute(command, "probing nvcc")
        except BuildError as error:
            return str(error).partition("\n")[2]  # without the command
        passed.write_text(key)
        return ""

    mode = os.environ.get("KASMINA_CUDA") or "auto"
    try:
        return cuda.find(mode, os.environ.get("KASMINA_CUDA_ARCHS", ""), probe)
    except cuda.CudaError as error:
        raise BuildError(str(error)) from None


def _host_compiler() -> list[str]:
    """nvcc's C++ compiler: NVCC_CCBIN is nvcc's own variable, CXX everyone's."""
    cxx = shlex.split(os.environ.get("CXX", ""))
    return [] if os.environ.get("NVCC_CCBIN") or not cxx else ["-ccbin", cxx[-1]]


def _c_jobs(cc: list[str], version: str, toolkit: cuda.Toolkit | None, reason: str) -> list[Job]:
    facts = {
        "VERSION": version,
        "BUILD_COMPILER": _first_line([*cc, "--version"]),
        "BUILD_CUDA": toolkit.version if toolkit else "",
        "BUILD_CUDA_ARCHS": " ".join(toolkit.archs) if toolkit else "",
        "BUILD_CUDA_REASON": reason,
    }
    defines = ["-DPy_LIMITED_API=0x030A0000", *(["-DKASMINA_WITH_CUDA"] if toolkit else [])]
    defines += [f"-DKASMINA_{name}={_c_string(value)}" for name, value in facts.items()]
    user = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CFLAGS", ""))
    flags = ["-O3", *user, *C_FLAGS, *(C_WARNINGS if _werror() else [])]
    includes = ["-Icsrc", "-isystem", python_include()]
    jobs = []
    for source in _sources("csrc/*.c", "csrc/ops/*.c", "csrc/cpu/*.c"):
        target = _object(source)
        # Only the top level (module.c) states the build's facts: the rest need not be compiled again when they change.
        own = defines if source.parent == Path("csrc") else defines[: len(defines) - len(facts)]
        command = (*cc, *flags, *own, *includes, "-MMD", "-MF", str(target.with_suffix(".d")))
        command += ("-c", str(source), "-o", str(target))
        jobs.append(Job(source, target, command, (*command, facts["BUILD_COMPILER"])))
    return jobs


def _cuda_jobs(toolkit: cuda.Toolkit | None) -> list[Job]:
    if toolkit is None:
        return []
    sources = _sources("csrc/cuda/*.cu")
    flags = [*_host_compiler(), *CUDA_FLAGS, *(CUDA_WARNINGS if _werror() else [])]
    # Size costs nothing at run time (the driver unpacks an image once); nvcc before 12.8 cannot.
    if tuple(map(int, toolkit.version.split("."))) >= (12, 8):
        flags.append("--compress-mode=size")
    spare = ["--threads", str(max(1, parallelism() // max(1, len(sources))))]
    jobs = []
    for source in sources:
        target = _object(source)
        what = (*toolkit.gencode, "-Icsrc", "-MMD", "-MF", str(target.with_suffix(".d")))
        what += ("-c", str(source), "-o", str(target))
        command = (toolkit.nvcc, *flags, *what)
        jobs.append(Job(source, target, (*command, *spare), (*command, toolkit.release)))
    # The largest file first, so that no core waits for it at the end.
    return sorted(jobs, key=lambda job: -job.source.stat().st_size)


def _run_all(jobs: list[Job], total: int, log: Callable[[str], None]) -> None:
    if total == 0:
        raise BuildError("no sources under csrc")
    if not jobs:
        log(f"all {total} objects are up to date")
        return
    with ThreadPoolExecutor(parallelism()) as pool:
        started = time.time()
        running = {pool.submit(job.run): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(running), 1):
                output = future.result()
                log(f"[{number}/{len(jobs)}] {running[future].source} ({time.time() - started:.0f} s)")
                if output:
                    log(output)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _link(cc: list[str], module: str, objects: list[Path], toolkit: cuda.Toolkit | None) -> Path:
    """Our own command: Python's LDSHARED may carry an RPATH, and torch is there by its soname alone."""
    stub = BUILD / "stub" / "libtorch_cpu.so"
    library = BUILD / (module.rpartition(".")[2] + ".abi3.so")
    exports = BUILD / "exports.map"
    stub.parent.mkdir(exist_ok=True)
    write_if_changed(exports, "{ global: PyInit_" + module.rpartition(".")[2] + "; local: *; };\n")
    empty = [*cc, "-shared", "-nostdlib", "-Wl,-soname,libtorch_cpu.so", "-xc", os.devnull]
    execute([*empty, "-o", str(stub)], "making the stub of libtorch_cpu.so")
    # Bound at load time: a symbol that some torch lacks is then an ImportError and not a crash in a training run.
    flags = ["-shared", "-pthread", "-s", "-Wl,-z,now", "-Wl,-z,relro", "-Wl,-z,noexecstack"]
    flags += [f"-Wl,--version-script={exports}", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]
    libraries = ["-Wl,--no-as-needed", str(stub), "-Wl,--as-needed"]
    if toolkit:
        libraries += [toolkit.cudart, "-lrt", "-ldl"]
    libraries += ["-lm", "-ldl"]
    user = shlex.split(os.environ.get("LDFLAGS", ""))
    temporary = library.with_suffix(".tmp")
    command = [*cc, *user, *flags, *map(str, objects), *libraries, "-o", str(temporary)]
    execute(command, f"linking {library.name}")
    os.replace(temporary, library)
    return library


def execute(command: Sequence[str], what: str) -> str:
    """stdout and stderr of a command that must succeed."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{what} failed: {error}") from None
    if run.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{run.stdout.strip()}\n{what} failed")
    return run.stdout.strip()


def parallelism() -> int:
    """MAX_JOBS, as in other torch extensions, else every core this process may use."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path().glob(pattern))


def _object(source: Path) -> Path:
    return BUILD / source.with_name(source.name + ".o")


def _werror() -> bool:
    return os.environ.get("KASMINA_WERROR") == "1"


def _first_line(command: Sequence[str]) -> str:
    return execute(command, f"asking {command[0]} for its version").splitlines()[0]


def _c_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
