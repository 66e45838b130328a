"""The kernel cache in one process: hits, keys, damage, and where it lies."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from build_sources import AXPY_CPU, AXPY_CUDA, SCALE_H, entries

import mace_fast
from mace_fast.errors import CacheError
from mace_fast.kernels.build import (
    compile_cpu,
    compile_cuda,
    default_cache_dir,
    host,
    nvrtc,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory for each test."""
    directory = tmp_path / "cache $dir with blanks"
    monkeypatch.setenv("MACE_FAST_CACHE", str(directory))
    return directory


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_second_time_is_read_from_cache(kind: str, cache: Path) -> None:
    first, second = (
        (compile_cuda(AXPY_CUDA, "sm_90"), compile_cuda(AXPY_CUDA, "sm_90"))
        if kind == "cuda"
        else (compile_cpu(AXPY_CPU), compile_cpu(AXPY_CPU))
    )
    assert (first.from_cache, second.from_cache) == (False, True)
    assert replace(first, from_cache=True) == second
    assert len(entries(cache)) == 1


def test_a_hit_writes_nothing(cache: Path) -> None:
    compile_cuda(AXPY_CUDA, "sm_90")
    before = cache.stat().st_mtime_ns
    assert compile_cuda(AXPY_CUDA, "sm_90").from_cache
    assert cache.stat().st_mtime_ns == before


def change_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mace_fast, "__version__", "0.0.0+other")


def change_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(nvrtc.load_nvrtc(), identity="another NVRTC")
    monkeypatch.setattr(nvrtc, "load_nvrtc", lambda: other)


def change_base_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_BASE_OPTIONS", (*nvrtc._BASE_OPTIONS, "-lineinfo"))


def change_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(host.host_compiler(), identity="another compiler, or another CPU")
    monkeypatch.setattr(host, "host_compiler", lambda: other)


def change_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_COMPILE_FLAGS", (*host._COMPILE_FLAGS, "-O2"))


SOURCE_CHANGES: dict[str, dict[str, Any]] = {
    "name": {"name": "other"},
    "text": {"text": AXPY_CPU.text + "\n"},
    "header text": {"headers": (("scale.h", SCALE_H[1] + "\n"),)},
    "header name": {"headers": (SCALE_H, ("unused.h", ""))},
    "options": {"options": ("-DUNUSED=1",)},
}


@pytest.mark.parametrize(
    "change", [*SOURCE_CHANGES, "arch", "entry points", change_version, change_nvrtc, change_base_options]
)
def test_every_input_changes_the_key_cuda(
    change: str | Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    two = replace(AXPY_CUDA, text=AXPY_CUDA.text + 'extern "C" __global__ void second(int* x) { *x = 1; }\n')
    compile_cuda(two, "sm_90")
    arch, changed = "sm_90", two
    if callable(change):
        change(monkeypatch)
    elif change == "arch":
        arch = "sm_90a"
    elif change == "entry points":
        changed = replace(two, entry_points=("axpy", "second"))
    elif change == "text":
        changed = replace(two, text=two.text + "\n")
    else:
        changed = replace(two, **SOURCE_CHANGES[change])
    assert not compile_cuda(changed, arch).from_cache
    assert compile_cuda(changed, arch).from_cache
    # The labels in front differ by name and architecture: the keys themselves have to.
    assert len({path.name.rsplit("-", 1)[1] for path in entries(cache)}) == 2


@pytest.mark.parametrize("change", [*SOURCE_CHANGES, change_version, change_compiler, change_flags])
def test_every_input_changes_the_key_cpu(
    change: str | Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    compile_cpu(AXPY_CPU)
    changed = AXPY_CPU
    if callable(change):
        change(monkeypatch)
    else:
        changed = replace(AXPY_CPU, **SOURCE_CHANGES[change])
    assert not compile_cpu(changed).from_cache
    assert compile_cpu(changed).from_cache
    assert len({path.name.rsplit("-", 1)[1] for path in entries(cache)}) == 2


def test_host_identity_holds_version_and_native_flags() -> None:
    compiler = host.host_compiler()
    assert re.search(r"\d+\.\d+", compiler.identity.splitlines()[0])
    # gcc writes -march=..., clang -target-cpu ...; "native" itself would be the same on every machine.
    assert re.search(r"-march=(?!native)\w|-target-cpu", compiler.identity)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("file", ["kernel.cubin", "kernel.json", "kernel.so", "log.txt", "manifest.json"])
def test_damaged_entry_is_built_again(
    file: str, damage: Callable[[Path], None], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compile_ = (
        (lambda: compile_cpu(AXPY_CPU))
        if file in ("kernel.so", "log.txt")
        else (lambda: compile_cuda(AXPY_CUDA, "sm_90"))
    )
    compile_()
    (entry,) = entries(cache)
    damage(entry / file)
    if file == "manifest.json" and damage is flip:
        # One bit of the manifest may turn a digit of a size or a sum, or break the JSON; never pass.
        assert (entry / file).stat().st_size > 0
    with caplog.at_level(logging.WARNING):
        assert not compile_().from_cache
    assert "damaged" in caplog.text and entry.name in caplog.text
    assert compile_().from_cache
    assert entries(cache) == [entry]


def test_manifest_lists_every_file(cache: Path) -> None:
    compile_cuda(AXPY_CUDA, "sm_90")
    (entry,) = entries(cache)
    listed = json.loads((entry / "manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == {path.name for path in entry.iterdir()}


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MACE_FAST_CACHE", "~/kernels")
    assert default_cache_dir() == tmp_path / "home" / "kernels"
    monkeypatch.setenv("MACE_FAST_CACHE", "relative")
    assert default_cache_dir() == Path.cwd() / "relative"
    monkeypatch.delenv("MACE_FAST_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "mace_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "mace_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "mace_fast"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CacheError, match="MACE_FAST_CACHE"):
        default_cache_dir()
