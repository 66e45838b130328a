"""CUDA C++ to machine code with NVRTC. Needs neither a GPU nor a driver nor a CUDA toolkit.

NVRTC is called through cuda.bindings and not through cuda.core's Program: only there are headers handed over
as text, under their own names in messages, and options passed on as they are.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mace_fast
from mace_fast.errors import BuildError, MissingToolError
from mace_fast.kernels.build.cache import get_or_build
from mace_fast.kernels.build.resources import KernelResources, parse_resources
from mace_fast.kernels.build.source_files import keep_failed_source
from mace_fast.kernels.build.sources import CudaSource

INSTALL = 'install it with: pip install "mace-fast[cuda]"'

_LOG = logging.getLogger(__name__)
_BASE_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
# Since then NVRTC may take its result from the driver's cache, and has no log to read resources from.
_DRIVER_CACHE_SINCE = (12, 9)
_ARCH = re.compile(r"sm_(\d+)[af]?")
_CUBIN = "kernel.cubin"
_LOADING = threading.Lock()
_FACTS = "kernel.json"


@dataclass(frozen=True)
class CompiledCuda:
    """Machine code for one architecture.

    cubin: the binary. resources: what each entry point uses. log: the compiler's messages.
    from_cache: whether it was read from disk instead of compiled.
    """

    cubin: bytes
    resources: dict[str, KernelResources]
    log: str
    from_cache: bool


@dataclass(frozen=True)
class Nvrtc:
    """The NVRTC library of this process.

    api: cuda.bindings.nvrtc. architectures: the numbers XY of the sm_XY that it compiles for.
    identity: a text that tells its builds apart.
    """

    api: ModuleType
    version: tuple[int, int]
    architectures: tuple[int, ...]
    identity: str


def load_nvrtc() -> Nvrtc:
    """Load NVRTC, once per process. Raises MissingToolError, naming the command that installs it."""
    # One thread at a time: version 13.0 finds its second library only after the first is loaded completely, and two
    # threads that begin with it together fail ("failed to open libnvrtc-builtins").
    with _LOADING:
        return _load_nvrtc()


@functools.cache
def _load_nvrtc() -> Nvrtc:
    try:
        from cuda.bindings import nvrtc as api
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError as error:
        raise MissingToolError(
            f"compiling CUDA kernels needs the package cuda-bindings ({error}); {INSTALL}"
        ) from error
    try:
        library = load_nvidia_dynamic_lib("nvrtc").abs_path
    except RuntimeError as error:  # what pathfinder raises when it does not find a library
        raise MissingToolError(f"compiling CUDA kernels needs NVIDIA's library NVRTC ({error}); {INSTALL}") from error
    major, minor = _checked(api, api.nvrtcVersion())
    (architectures,) = _checked(api, api.nvrtcGetSupportedArchs())
    # NVRTC tells major and minor only; the size of the library tells patch releases apart.
    size = Path(library).stat().st_size if library else 0
    return Nvrtc(api, (major, minor), tuple(architectures), f"NVRTC {major}.{minor} ({size} bytes)")


def _checked(api: ModuleType, result: Sequence[Any]) -> Sequence[Any]:
    status, *values = result
    if status != api.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVRTC failed: {status.name}")
    return values


def check_arch(arch: str) -> None:
    """Raise BuildError if this NVRTC cannot compile for `arch` (such as ``"sm_90"``)."""
    match = _ARCH.fullmatch(arch)
    if match is None:
        raise ValueError(f"arch {arch!r}: expected the form 'sm_90'")
    compiler = load_nvrtc()
    if int(match[1]) in compiler.architectures:
        return
    if int(match[1]) < min(compiler.architectures):
        remedy = 'a GPU this old needs the compiler of CUDA 12: pip install "mace-fast[cuda12]"'
    else:
        remedy = "a newer one may: pip install --upgrade cuda-bindings nvidia-cuda-nvrtc"
    known = ", ".join(f"sm_{number}" for number in compiler.architectures)
    version = ".".join(map(str, compiler.version))
    raise BuildError(f"NVRTC {version} cannot compile for {arch}, only for {known}; {remedy}")


def compile_cuda(source: CudaSource, arch: str) -> CompiledCuda:
    """Compile for `arch` (such as ``"sm_90"``), or read the result of an earlier compilation from the cache.

    Raises BuildError with the compiler's log, MissingToolError without NVRTC, CacheError without a usable
    cache.
    """
    check_arch(arch)
    no_cache = ("--no-cache",) if load_nvrtc().version >= _DRIVER_CACHE_SINCE else ()
    options = (f"--gpu-architecture={arch}", *_BASE_OPTIONS, *no_cache, *source.options)
    inputs = {
        "kind": "cuda",
        "mace_fast": mace_fast.__version__,
        "compiler": load_nvrtc().identity,
        "options": options,
        "source": asdict(source),
    }

    def build(directory: Path) -> None:
        cubin, log = _compile(source, options)
        resources = parse_resources(log)
        missing = [entry for entry in source.entry_points if entry not in resources]
        if missing:
            raise BuildError(
                f"the kernel source {source.name!r} has no entry point {', '.join(missing)}, only "
                f'{", ".join(resources) or "none"}; declare it extern "C" __global__'
            )
        facts = {"log": log, "resources": {entry: asdict(resources[entry]) for entry in source.entry_points}}
        (directory / _CUBIN).write_bytes(cubin)
        (directory / _FACTS).write_text(json.dumps(facts, indent=1))

    entry = get_or_build(f"cuda-{arch}-{source.name}", inputs, build)
    facts = json.loads(entry.files[_FACTS])
    resources = {name: KernelResources(**values) for name, values in facts["resources"].items()}
    return CompiledCuda(entry.files[_CUBIN], resources, facts["log"], entry.from_cache)


def _compile(source: CudaSource, options: tuple[str, ...]) -> tuple[bytes, str]:
    """The cubin, and the log."""
    api = load_nvrtc().api
    file_name = f"{source.name}.cu"
    names = [name.encode() for name, _ in source.headers]
    texts = [text.encode() for _, text in source.headers]
    started = time.perf_counter()
    (program,) = _checked(
        api, api.nvrtcCreateProgram(source.text.encode(), file_name.encode(), len(names), texts, names)
    )
    try:
        (status,) = api.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        (size,) = _checked(api, api.nvrtcGetProgramLogSize(program))
        buffer = bytearray(size)
        _checked(api, api.nvrtcGetProgramLog(program, buffer))
        log = buffer.decode(errors="replace").replace("\0", "")
        if status != api.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(
                f"NVRTC cannot compile the kernel source {source.name!r} ({status.name}, options "
                f"{' '.join(options)}). {keep_failed_source(file_name, source.text, source.headers, log)} "
                f"The compiler's log:\n{log}"
            )
        (size,) = _checked(api, api.nvrtcGetCUBINSize(program))
        cubin = bytearray(size)
        _checked(api, api.nvrtcGetCUBIN(program, cubin))
    finally:
        api.nvrtcDestroyProgram(program)
    _LOG.info("compiled %s with %s in %.2f s", file_name, options[0], time.perf_counter() - started)
    return bytes(cubin), log
