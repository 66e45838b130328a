"""Compiling kernels for CUDA (no GPU needed) and for the CPU, and what happens when tools are missing."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from build_sources import AXPY_CPU, AXPY_CUDA, SCALE_H, constant_cpu, entries, kept_source

from mace_fast.errors import BuildError, MissingToolError
from mace_fast.kernels.build import (
    CpuSource,
    CudaSource,
    Int32,
    KernelResources,
    compile_cpu,
    compile_cuda,
    cpu_available,
    cpu_threads,
    host,
    load_cpu,
    load_cuda,
    nvrtc,
    side_by_side,
)
from mace_fast.kernels.build.resources import parse_resources

TOLERANCE = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory for each test."""
    directory = tmp_path / "cache $dir with blanks"
    monkeypatch.setenv("MACE_FAST_CACHE", str(directory))
    return directory


# --- CUDA: compiling


def test_cuda_compiles_several_at_once() -> None:
    others = [replace(AXPY_CUDA, options=(f"-DNUMBER={number}",)) for number in range(3)]
    compiled = side_by_side([partial(compile_cuda, source, "sm_90") for source in others])
    assert [c.cubin for c in compiled] == [compile_cuda(source, "sm_90").cubin for source in others]
    assert not any(c.from_cache for c in compiled) and compile_cuda(others[0], "sm_90").from_cache
    assert side_by_side([]) == []
    broken = replace(AXPY_CUDA, name="broken", text="nonsense")
    with pytest.raises(BuildError, match="broken"):
        side_by_side([partial(compile_cuda, source, "sm_90") for source in (broken, others[0])])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_90a"])
def test_cuda_compiles_without_gpu(arch: str) -> None:
    compiled = compile_cuda(AXPY_CUDA, arch=arch)
    assert compiled.cubin.startswith(b"\x7fELF") and b"axpy" in compiled.cubin
    assert not compiled.from_cache
    resources = compiled.resources["axpy"]
    assert 4 <= resources.registers <= 64
    assert resources.static_shared >= 128
    assert (resources.spill_stores, resources.spill_loads, resources.stack) == (0, 0, 0)
    assert "entry function 'axpy'" in compiled.log


def spilling() -> CudaSource:
    """A kernel that keeps 64 values alive, held to 24 registers."""
    text = 'extern "C" __global__ void heavy(float* x, int n) {\n'
    text += "".join(f"  float v{i} = x[{i} * n];\n" for i in range(64))
    text += "  for (int k = 0; k < n; k++) {\n"
    text += "".join(f"    v{i} = v{i} * v{(i * 7 + 3) % 64} + v{(i * 5 + 1) % 64};\n" for i in range(64))
    text += "  }\n" + "".join(f"  x[{i} * n] = v{i};\n" for i in range(64)) + "}\n"
    return CudaSource("heavy", text, (), ("heavy",), ("--maxrregcount=24",))


def test_spills_are_reported() -> None:
    resources = compile_cuda(spilling(), "sm_90").resources["heavy"]
    assert resources.registers <= 24
    assert resources.spill_stores > 0 and resources.spill_loads > 0 and resources.stack > 0
    free = compile_cuda(replace(spilling(), options=()), "sm_90").resources["heavy"]
    assert free.spill_stores == free.spill_loads == 0 and free.registers > 64


def test_resources_of_several_kernels_and_their_functions() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
ptxas         .     256 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes cumulative stack size, 512 bytes smem
ptxas info    : Function properties for _Z4deepPfi
ptxas         .     16 bytes stack frame, 100 bytes spill stores, 200 bytes spill loads
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 360 bytes cmem[0]
"""
    assert parse_resources(log) == {
        "one": KernelResources(32, 104, 208, 272, 512),
        "two": KernelResources(10, 0, 0, 0, 0),
    }


@pytest.mark.parametrize(("arch", "remedy"), [("sm_35", "cuda12"), ("sm_999", "--upgrade")])
def test_unsupported_arch(arch: str, remedy: str) -> None:
    with pytest.raises(BuildError, match=f"cannot compile for {arch}, only for .*sm_90.*{remedy}"):
        compile_cuda(AXPY_CUDA, arch)


@pytest.mark.parametrize("arch", ["90", "sm90", "compute_90", "sm_90 ", ""])
def test_malformed_arch(arch: str) -> None:
    with pytest.raises(ValueError, match="expected the form 'sm_90'"):
        compile_cuda(AXPY_CUDA, arch)


def test_cuda_error_shows_log_and_keeps_source(cache: Path) -> None:
    broken = replace(AXPY_CUDA, headers=(("scale.h", SCALE_H[1] + "\n\nno_such_type x;\n"),))
    with pytest.raises(BuildError) as caught:
        compile_cuda(broken, "sm_90")
    assert "scale.h(5): error" in str(caught.value) and "no_such_type" in str(caught.value)
    kept = kept_source(caught.value)
    assert (kept / "axpy.cu").read_text() == broken.text
    assert (kept / "scale.h").read_text() == broken.headers[0][1]
    assert "no_such_type" in (kept / "log.txt").read_text()
    shutil.rmtree(kept)
    assert entries(cache) == []


def test_missing_entry_point(cache: Path) -> None:
    with pytest.raises(BuildError, match=r"no entry point axpy_typo, only axpy; declare it extern"):
        compile_cuda(replace(AXPY_CUDA, entry_points=("axpy", "axpy_typo")), "sm_90")
    assert entries(cache) == []


# --- CPU: compiling and running


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 17, 100_003])
def test_cpu_kernel_computes(dtype: type[np.floating], size: int, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, size)).astype(dtype)
    a = dtype(rng.standard_normal())
    expected = y.astype(np.float64) + np.float64(a) * 2 * x.astype(np.float64)
    function = getattr(load_cpu(AXPY_CPU), {np.float32: "axpy_f32", np.float64: "axpy_f64"}[dtype])
    scalar = {np.float32: ctypes.c_float, np.float64: ctypes.c_double}[dtype]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, scalar, ctypes.c_longlong, ctypes.c_int]
    function(y.ctypes.data, x.ctypes.data, a, size, cpu_threads())
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE[np.dtype(dtype)] * 10)


def test_cpu_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    team = load_cpu(AXPY_CPU).team
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert cpu_threads() == count
            assert team(cpu_threads()) == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_cpu_kernels_use_torchs_threads() -> None:
    """A second OpenMP runtime would start threads of its own, which spin against torch's."""
    script = """
import os, torch
from mace_fast.kernels.build import CpuSource, cpu_threads, load_cpu
team = load_cpu(CpuSource("team", '''
extern "C" int team(int threads) {
    int size = 0;
    #pragma omp parallel num_threads(threads) reduction(+ : size)
    size += 1;
    return size;
}''', ())).team
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
without = count()
numbers = torch.ones(4_000_000).sin_()
with_torchs = count()
assert team(cpu_threads()) == 4
numbers.sin_()
assert (with_torchs - without, count() - with_torchs) == (3, 0), (without, with_torchs, count())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cpu_symbols_are_private() -> None:
    one, two = load_cpu(constant_cpu(1)), load_cpu(constant_cpu(2))
    assert (one.constant(), two.constant()) == (1, 2)
    with pytest.raises(AttributeError):
        ctypes.CDLL(None).constant  # noqa: B018
    library = load_cpu(AXPY_CPU)
    assert library.team(1) == 1
    with pytest.raises(AttributeError):
        library._Z8internalv  # noqa: B018


def test_cpu_error_shows_log_and_keeps_source(cache: Path) -> None:
    broken = replace(AXPY_CPU, headers=(("scale.h", SCALE_H[1] + "\n\nno_such_type x;\n"),))
    with pytest.raises(BuildError) as caught:
        load_cpu(broken)
    assert "scale.h:5:" in str(caught.value) and "no_such_type" in str(caught.value)
    kept = kept_source(caught.value)
    assert (kept / "axpy.cpp").read_text() == broken.text
    assert (kept / "scale.h").exists() and "no_such_type" in (kept / "log.txt").read_text()
    shutil.rmtree(kept)
    assert entries(cache) == []


def test_cpu_undefined_function_fails_when_built() -> None:
    source = CpuSource("undefined", 'extern "C" int absent(); extern "C" int call() { return absent(); }', ())
    with pytest.raises(BuildError, match="undefined reference to .?absent") as caught:
        compile_cpu(source)
    shutil.rmtree(kept_source(caught.value))


def test_cpu_header_in_folder_and_options_with_special_characters() -> None:
    source = CpuSource(
        "special",
        '#include "inner/text.h"\nextern "C" const char* text() { return TEXT; }\n',
        (("inner/text.h", "#pragma once\n"),),
        ('-DTEXT="a $HOME b"',),
    )
    function = load_cpu(source).text
    function.restype = ctypes.c_char_p
    assert function() == b"a $HOME b"


# --- what is not there


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    assert cpu_available()
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(MissingToolError, match=r"'/nonexistent/g\+\+'.*apt install.*conda.*CXX"):
        compile_cpu(AXPY_CPU)
    assert not cpu_available()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match=r"needs a C\+\+ compiler.*apt install.*conda.*CXX"):
        compile_cpu(AXPY_CPU)
    assert not cpu_available()
    assert not cache.exists()


def test_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", shutil.which("false") or "/bin/false")
    with pytest.raises(MissingToolError, match="does not work: .*false --version ended with status 1"):
        compile_cpu(AXPY_CPU)


def test_cxx_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = host.host_compiler().command[0]
    calls = tmp_path / "calls"
    monkeypatch.chdir(tmp_path)
    wrapper = tmp_path / "my compiler"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nshift\nexec "{real}" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"'./{wrapper.name}' first-word")
    assert load_cpu(constant_cpu(7, "through_wrapper")).constant() == 7
    assert re.search(r"first-word -std=c\+\+17 .*through_wrapper\.cpp", calls.read_text())


def test_missing_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", host.host_compiler().command[0])
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match="pip install ninja"):
        compile_cpu(AXPY_CPU)
    assert not cpu_available()


@pytest.fixture
def fresh_nvrtc() -> Iterator[None]:
    nvrtc._load_nvrtc.cache_clear()
    yield
    nvrtc._load_nvrtc.cache_clear()


@pytest.mark.parametrize("module", ["cuda.bindings", "cuda.pathfinder"])
def test_missing_cuda_package(module: str, fresh_nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingToolError, match=r'pip install "mace-fast\[cuda\]"'):
        compile_cuda(AXPY_CUDA, "sm_90")


def test_missing_nvrtc_library(fresh_nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda import pathfinder

    def absent(name: str) -> None:
        raise pathfinder.DynamicLibNotFoundError(f"no lib{name}.so")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", absent)
    with pytest.raises(MissingToolError, match=r'no libnvrtc.so.*pip install "mace-fast\[cuda\]"'):
        compile_cuda(AXPY_CUDA, "sm_90")


def test_import_needs_nothing() -> None:
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cuda", "ninja"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from mace_fast.kernels.build import *
from mace_fast.errors import MissingToolError
assert not cpu_available()
cuda, cpu = CudaSource("a", "", (), ("a",)), CpuSource("a", "", ())
for function, *arguments in ((compile_cuda, cuda, "sm_90"), (load_cpu, cpu)):
    try:
        function(*arguments)
    except MissingToolError as error:
        print(error)
"""
    environment = {**os.environ, "PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd())}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 'pip install "mace-fast[cuda]"' in done.stdout and "apt install g++" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_no_gpu() -> None:
    with pytest.raises(MissingToolError, match="no CUDA device here"):
        load_cuda(AXPY_CUDA, torch.device("cuda"))


def test_load_cuda_on_cpu_device() -> None:
    with pytest.raises(ValueError, match="device cpu"):
        load_cuda(AXPY_CUDA, torch.device("cpu"))


# --- sources


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"name": "../evil"}, "C identifier"),
        ({"name": ""}, "C identifier"),
        ({"headers": [SCALE_H]}, "tuples"),
        ({"options": ["-O1"]}, "tuples"),
        ({"options": (1,)}, "not a string"),
        ({"headers": (("/etc/passwd", ""),)}, "plain relative path"),
        ({"headers": (("../up.h", ""),)}, "plain relative path"),
        ({"headers": (SCALE_H, SCALE_H)}, "given twice"),
        ({"entry_points": ()}, "at least one"),
        ({"entry_points": ("a", "a")}, "given twice"),
    ],
)
def test_malformed_source(changes: dict, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        replace(AXPY_CUDA, **changes)


def test_sources_are_values() -> None:
    assert hash(replace(AXPY_CUDA, name="axpy")) == hash(AXPY_CUDA) and replace(AXPY_CPU) == AXPY_CPU
    assert load_cpu(constant_cpu(3)) is load_cpu(constant_cpu(3))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_int32_refuses_what_does_not_fit(value: int) -> None:
    assert Int32(2**31 - 1) == 2**31 - 1 and Int32(-(2**31)) == -(2**31)
    with pytest.raises(OverflowError, match=str(value)):
        Int32(value)
