"""C++ to a shared library with the host's compiler, through ninja.

Kernels use the threads of torch: importing torch puts the OpenMP runtime that it brings into the process's
global scope, where a kernel's calls of GOMP_* find it before the system's, whatever the name of its file. So
torch is imported here, and kernels take the number of threads as an argument, cpu_threads().
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import mace_fast
from mace_fast.errors import BuildError, MissingToolError
from mace_fast.kernels.build.cache import get_or_build
from mace_fast.kernels.build.source_files import keep_failed_source, write_source
from mace_fast.kernels.build.sources import CpuSource

_LOG = logging.getLogger(__name__)
_COMPILER_HINT = (
    "install one (Debian and Ubuntu: apt install g++; conda: conda install -c conda-forge gxx), "
    "or name one in the environment variable CXX"
)
_COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-semantic-interposition",
    "-fvisibility-inlines-hidden",
    "-Wno-psabi",  # gcc's remarks on passing vectors between compilers' versions; nothing here is passed on
    "-pipe",
)
_LINK_FLAGS = ("-shared", "-fopenmp", "-Wl,--version-script=exports.map", "-Wl,-z,defs")
# extern "C" functions are exported; C++ names (mangled, they begin with _Z) stay inside the library. This is
# -fvisibility=hidden without an attribute on every exported function.
_EXPORTS = "{ global: *; local: _Z*; };\n"
_LIBRARY = "kernel.so"
_LOG_FILE = "log.txt"


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler. command: how it is called. identity: its version and what -march=native means to it."""

    command: tuple[str, ...]
    identity: str


@dataclass(frozen=True)
class CompiledCpu:
    """A shared library. path: the file in the cache. from_cache: whether it was there before."""

    path: Path
    log: str
    from_cache: bool


def host_compiler() -> HostCompiler:
    """The compiler that $CXX names, else the first of c++, g++, clang++.

    Raises MissingToolError if there is none that runs.
    """
    return _host_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.cache
def _host_compiler(cxx: str, path: str) -> HostCompiler:
    command = shlex.split(cxx)
    names = command[:1] or ["c++", "g++", "clang++"]
    found = next((name for name in (shutil.which(name, path=path) for name in names) if name), None)
    if found is None:
        missing = f"the one that CXX names, {cxx!r}, is not there" if command else "there is none"
        raise MissingToolError(f"compiling CPU kernels needs a C++ compiler, and {missing}; {_COMPILER_HINT}")
    command[:1] = [os.path.abspath(found)]  # it will be called from other directories
    version = _ask(command, "--version")
    # The flags that -march=native stands for here: a library built for this CPU may not run on another one
    # that shares the cache.
    native = _ask(command, "-march=native", "-###", "-E", "-x", "c++", os.devnull)
    return HostCompiler(tuple(command), f"{version}\n{native}")


def _environment() -> dict[str, str]:
    """The environment, in English: messages are part of the compiler's identity and of errors."""
    return {**os.environ, "LC_ALL": "C"}


def _ask(command: list[str], *arguments: str) -> str:
    """What the compiler answers to `arguments`."""
    call = [*command, *arguments]
    try:
        # In the root directory, which some compilers write into what they answer.
        done = subprocess.run(
            call, cwd="/", env=_environment(), capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingToolError(f"the C++ compiler does not run ({error}); {_COMPILER_HINT}") from error
    if done.returncode != 0:
        raise MissingToolError(
            f"the C++ compiler does not work: {shlex.join(call)} ended with status {done.returncode}:\n"
            f"{done.stderr}\n{_COMPILER_HINT}"
        )
    return done.stdout + done.stderr


def ninja_command() -> str:
    """The ninja program: the Python package's, else the one on PATH. Raises MissingToolError without one."""
    found = None
    try:
        import ninja
    except ImportError:
        _LOG.debug("no Python package ninja; looking on PATH")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR)
    found = found or shutil.which("ninja")
    if found is None:
        raise MissingToolError("compiling CPU kernels needs ninja; install it with: pip install ninja")
    return found


def cpu_available() -> bool:
    """Whether CPU kernels can be compiled here: there are a C++ compiler and ninja."""
    try:
        host_compiler()
        ninja_command()
    except MissingToolError as missing:
        _LOG.info("CPU kernels cannot be compiled here: %s", missing)
        return False
    return True


def cpu_threads() -> int:
    """The number of threads that a CPU kernel is to use: torch's. Kernels take it as an argument."""
    return torch.get_num_threads()


def compile_cpu(source: CpuSource) -> CompiledCpu:
    """Compile to a shared library, or find the result of an earlier compilation in the cache.

    Raises BuildError with the compiler's log, MissingToolError without compiler or ninja, CacheError without
    a usable cache.
    """
    compiler = host_compiler()
    inputs = {
        "kind": "cpu",
        "mace_fast": mace_fast.__version__,
        "compiler": compiler.identity,
        "flags": (*_COMPILE_FLAGS, *_LINK_FLAGS, _EXPORTS),
        "abi": (sys.platform, platform.machine(), *platform.libc_ver()),
        "source": asdict(source),
    }

    def build(directory: Path) -> None:
        work = directory / "work"
        work.mkdir()
        log = _run_ninja(source, compiler, work)
        (work / _LIBRARY).rename(directory / _LIBRARY)
        (directory / _LOG_FILE).write_text(log)
        shutil.rmtree(work)

    entry = get_or_build(f"cpu-{source.name}", inputs, build)
    return CompiledCpu(entry.path / _LIBRARY, entry.files[_LOG_FILE].decode(), entry.from_cache)


@functools.cache
def load_cpu(source: CpuSource) -> ctypes.CDLL:
    """Compile (or find in the cache) and load, once per process and source. The caller sets argtypes.

    Symbols are private to the library. Raises what compile_cpu raises, and BuildError if loading fails.
    """
    library = compile_cpu(source)
    try:
        return ctypes.CDLL(str(library.path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    except OSError as error:
        raise BuildError(f"the compiled kernel {library.path} cannot be loaded: {error}") from error


def _run_ninja(source: CpuSource, compiler: HostCompiler, directory: Path) -> str:
    """Build the library in `directory`; the log of the compiler."""
    file_name = f"{source.name}.cpp"
    write_source(directory, file_name, source.text, source.headers)
    (directory / "exports.map").write_text(_EXPORTS)
    # Names are relative to the directory: its own path may hold characters that ninja or the shell reads.
    compile_command = _escaped(*compiler.command, *_COMPILE_FLAGS, *source.options, "-I.")
    link_command = _escaped(*compiler.command, *_LINK_FLAGS)
    (directory / "build.ninja").write_text(
        f"rule compile\n  command = {compile_command} -c $in -o $out\n"
        f"rule link\n  command = {link_command} $in -o $out\n"
        f"build kernel.o: compile {file_name}\n"
        f"build {_LIBRARY}: link kernel.o | exports.map\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [ninja_command(), "--verbose", _LIBRARY],
        cwd=directory,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        if os.strerror(errno.ENOSPC) in done.stdout:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, says the compiler")
        raise BuildError(
            f"the C++ compiler cannot build the kernel source {source.name!r}. "
            f"{keep_failed_source(file_name, source.text, source.headers, done.stdout)} "
            f"The compiler's log:\n{done.stdout}"
        )
    _LOG.info("compiled CPU source %s in %.2f s", source.name, time.perf_counter() - started)
    return done.stdout


def _escaped(*words: str) -> str:
    """Words as the shell that ninja starts should read them."""
    return shlex.join(words).replace("$", "$$")
