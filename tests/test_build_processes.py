"""The kernel cache under several processes, killed processes and bad file systems."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import stat
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from mace_fast.errors import BuildError, CacheError
from mace_fast.kernels.build import CpuSource, CudaSource, compile_cpu, compile_cuda
from mace_fast.kernels.build.cache import get_or_build

PROCESSES = 8
PAYLOAD = "payload.bin"
CUDA = CudaSource("race", 'extern "C" __global__ void race(float* x) { x[threadIdx.x] *= 2; }\n', (), ("race",))
CPU = CpuSource("race", 'extern "C" int race() { return 42; }\n', ())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("MACE_FAST_CACHE", str(directory))
    return directory


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Fresh processes that have imported mace_fast, without the state and the threads of this one."""
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["mace_fast.kernels.build", __name__])
    return chosen


def in_child(function: Callable, cache: str, queue: multiprocessing.Queue, *args: object) -> None:
    os.environ["MACE_FAST_CACHE"] = cache
    try:
        queue.put(function(*args))
    except BaseException as error:
        queue.put(error)


def run_all(context: ForkServerContext, cache: Path, calls: list[tuple]) -> list:
    """Run every (function, *arguments) in a process of its own; what they return, or raise."""
    queue = context.Queue()
    processes = [
        context.Process(target=in_child, args=(function, str(cache), queue, *args)) for function, *args in calls
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return results


def run_one(context: ForkServerContext, cache: Path, function: Callable, *args: object) -> object:
    return run_all(context, cache, [(function, *args)])[0]


def compile_both(barrier: Barrier) -> tuple[bytes, bytes, bool, bool]:
    barrier.wait()
    cuda = compile_cuda(CUDA, "sm_90")
    barrier.wait()
    cpu = compile_cpu(CPU)
    return cuda.cubin, cpu.path.read_bytes(), cuda.from_cache, cpu.from_cache


def test_many_processes_compile_the_same_kernel(context: ForkServerContext, cache: Path) -> None:
    barrier = context.Barrier(PROCESSES)
    results = run_all(context, cache, [(compile_both, barrier)] * PROCESSES)
    for result in results:
        assert isinstance(result, tuple), result
    assert len({result[:2] for result in results}) == 1
    assert not all(result[2] for result in results) and not all(result[3] for result in results)
    names = sorted(path.name.rsplit("-", 1)[0] for path in cache.iterdir())
    assert names == ["cpu-race", "cuda-sm_90-race"]
    assert compile_cuda(CUDA, "sm_90").from_cache and compile_cpu(CPU).from_cache


def build_together(barrier: Barrier, number: int) -> tuple[bytes, bool]:
    def build(directory: Path) -> None:
        (directory / PAYLOAD).write_bytes(bytes([number]) * 1_000_000)
        barrier.wait()

    entry = get_or_build("together", {}, build)
    return entry.files[PAYLOAD], entry.path.joinpath(PAYLOAD).read_bytes() == entry.files[PAYLOAD]


def test_all_publish_at_once_and_use_the_winners(context: ForkServerContext, cache: Path) -> None:
    barrier = context.Barrier(PROCESSES)
    results = run_all(context, cache, [(build_together, barrier, number) for number in range(PROCESSES)])
    for result in results:
        assert isinstance(result, tuple) and result[1], result
    assert len({payload for payload, _ in results}) == 1
    assert len(list(cache.iterdir())) == 1


def build_and_hang(started: Barrier) -> None:
    def build(directory: Path) -> None:
        (directory / PAYLOAD).write_bytes(b"half")
        started.wait()
        time.sleep(600)

    get_or_build("killed", {}, build)


def write_whole(directory: Path) -> None:
    (directory / PAYLOAD).write_bytes(b"whole")


def test_killed_build_blocks_nobody_and_is_cleaned_up(
    context: ForkServerContext, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = context.Barrier(2)
    queue = context.Queue()
    process = context.Process(target=in_child, args=(build_and_hang, str(cache), queue, started))
    process.start()
    started.wait(timeout=120)
    process.kill()
    process.join()
    (left,) = cache.iterdir()

    entry = get_or_build("killed", {}, write_whole)
    assert entry.files[PAYLOAD] == b"whole" and not entry.from_cache
    assert sorted(cache.iterdir()) == sorted([left, entry.path]), "a young leftover may be a running build"

    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    with caplog.at_level(logging.INFO):
        other = get_or_build("other", {}, write_whole)
    assert sorted(cache.iterdir()) == sorted([entry.path, other.path])
    assert left.name in caplog.text


def test_failed_build_leaves_nothing(cache: Path) -> None:
    def fail(directory: Path) -> None:
        write_whole(directory)
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        get_or_build("failed", {}, fail)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_error(code: int, cache: Path) -> None:
    def full(directory: Path) -> None:
        write_whole(directory)
        raise OSError(code, os.strerror(code))

    with pytest.raises(CacheError, match="no space left.*MACE_FAST_CACHE"):
        get_or_build("full", {}, full)
    assert list(cache.iterdir()) == []


def compile_with_small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    compile_cuda(CUDA, "sm_90")


def test_no_half_written_entry_when_writing_fails(context: ForkServerContext, cache: Path) -> None:
    error = run_one(context, cache, compile_with_small_files)
    assert isinstance(error, CacheError), error
    assert "MACE_FAST_CACHE" in str(error)
    assert list(cache.iterdir()) == []
    assert not compile_cuda(CUDA, "sm_90").from_cache


def test_cpu_disk_full_is_not_a_fault_of_the_source(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "full-compiler"
    message = f"kernel.s: final close failed: {os.strerror(errno.ENOSPC)}"
    compiler.write_text(f"#!/bin/sh\ncase \"$*\" in *race.cpp*) echo '{message}' >&2; exit 1;; esac\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CacheError, match="no space left.*MACE_FAST_CACHE"):
        compile_cpu(CPU)
    assert list(cache.iterdir()) == []


def compile_as_nobody() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may write everywhere
    compile_cuda(CUDA, "sm_90")


def test_unwritable_cache(context: ForkServerContext, cache: Path) -> None:
    cache.mkdir(mode=0o555)
    try:
        error = run_one(context, cache, compile_as_nobody)
        assert isinstance(error, CacheError), error
        assert str(cache) in str(error) and "MACE_FAST_CACHE" in str(error)
        assert list(cache.iterdir()) == []
    finally:
        cache.chmod(0o755)


def test_cache_is_a_file(cache: Path) -> None:
    cache.write_text("not a directory")
    with pytest.raises(CacheError, match="MACE_FAST_CACHE"):
        compile_cuda(CUDA, "sm_90")
    assert cache.read_text() == "not a directory"


def test_entries_follow_the_umask(context: ForkServerContext, cache: Path) -> None:
    """A cache that a group shares is readable for the group, if the user's umask says so."""
    error = run_one(context, cache, build_with_umask)
    assert error is None
    (entry,) = cache.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o750
    assert stat.S_IMODE((entry / PAYLOAD).stat().st_mode) == 0o640


def build_with_umask() -> None:
    os.umask(0o027)
    get_or_build("umask", {}, write_whole)
