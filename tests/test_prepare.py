"""Kernels compiled side by side before the first call: they are those that calls load, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from simt import emulated_gpu

from mace_fast.errors import BuildError, MissingToolError
from mace_fast.inference import FrozenMACE
from mace_fast.kernels import prepare
from mace_fast.kernels.build import CpuSource, CudaSource, side_by_side
from mace_fast.kernels.ops import channelwise_run, linear_cuda, symmetric
from mace_fast.kernels.ops.prepare import sources
from mace_fast.patch.api import convert
from mace_fast.patch.prepare import model_sources, prepare_model
from mace_fast.zoo import alloy, checkpoint_path, graph

HEAVY = ("channelwise_", "symmetric_")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MACE_FAST_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def fast() -> torch.nn.Module:
    model = torch.load(checkpoint_path(), map_location="cpu", weights_only=False).to(torch.float32)
    return convert(model, verify=False).requires_grad_(True)


def train(fast: torch.nn.Module) -> None:
    """Everything that training on forces calls, second derivatives too."""
    data = graph(alloy((2, 1, 1)), fast, dtype=torch.float32, device="cpu")
    fast(data, training=True, compute_stress=True)["forces"].square().sum().backward()


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if not path.name.startswith(".")}


def clear_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, where no library is loaded."""
    for module, name in (
        (channelwise_run, "_cpu_function"),
        (channelwise_run, "cuda_launch"),
        (symmetric, "_cpu_function"),
        (symmetric, "_cuda_module"),
        (linear_cuda, "_forward_module"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


def test_what_training_calls_is_prepared(cache: Path, fast: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    prepare_model(fast, [torch.float32], torch.device("cpu"), done=lambda *counts: seen.append(counts))
    prepared = entries(cache)
    assert any("channelwise_backward_xyw_tangent" in name for name in prepared)
    assert seen[-1][0] == seen[-1][1] == len(seen) >= len(prepared)
    loaded: list[CpuSource] = []
    load = channelwise_run.load_cpu
    for module in (channelwise_run, symmetric):
        monkeypatch.setattr(module, "load_cpu", lambda source: loaded.append(source) or load.__wrapped__(source))
    clear_loaded(monkeypatch)
    train(fast)
    assert {source.name.split("_")[0] for source in loaded} == {"channelwise", "symmetric"}
    assert not [name for name in entries(cache) - prepared if any(heavy in name for heavy in HEAVY)]
    assert len({name for name in prepared if any(heavy in name for heavy in HEAVY)}) == len(set(loaded))


def test_what_a_frozen_model_calls_is_prepared(cache: Path, fast: torch.nn.Module) -> None:
    program = FrozenMACE(fast)
    data = graph(alloy((2, 1, 1)), fast, dtype=torch.float32, device="cpu")
    program.prepare(())
    prepared = {name for name in entries(cache) if "_spline" in name}
    assert any("backward_xy_" in name for name in prepared) and any("backward_y_" in name for name in prepared)
    program(data, compute_stress=True)
    assert {name for name in entries(cache) if "_spline" in name} == prepared


def test_the_same_sources_are_loaded_on_a_gpu(fast: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = {make() for make in model_sources(fast, [torch.float32], "sm_90", 2)}
    with emulated_gpu():
        loaded: list[CudaSource] = []
        clear_loaded(monkeypatch)
        for module in (channelwise_run, symmetric, linear_cuda):
            load = module.load_cuda
            monkeypatch.setattr(
                module, "load_cuda", lambda source, device, load=load: loaded.append(source) or load(source, device)
            )
        train(fast)
    heavy = {source for source in loaded if source.name.startswith((*HEAVY, "linear_forward"))}
    assert heavy and heavy == prepared


def test_orders() -> None:
    module = next(iter(fast_interactions()))
    counts = [len(sources(module, torch.float32, None, order)) for order in (0, 1, 2)]
    assert counts == [1, 2, 4]
    with pytest.raises(ValueError, match="order is 3"):
        prepare([module], torch.float32, "cpu", order=3)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingToolError, match="no CUDA device"):
        prepare(fast_interactions(), torch.float32, "cuda")


def fast_interactions() -> list:
    model = torch.load(checkpoint_path(), map_location="cpu", weights_only=False)
    return [block._plan.conv for block in convert(model, verify=False).interactions]


def test_builds_run_at_the_same_time_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mace_fast.kernels.build.together.processors", lambda: 3)
    together = threading.Barrier(3, timeout=30)

    def build(number: int) -> int:
        together.wait()
        time.sleep(0.01 * (3 - number))
        return number

    seen: list[tuple[int, int]] = []
    assert side_by_side([lambda n=n: build(n) for n in range(3)], lambda *counts: seen.append(counts)) == [0, 1, 2]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_compilers_start_side_by_side() -> None:
    """In a process that has not compiled anything: NVRTC 13.0 fails where two threads load it at the same time."""
    program = """
from dataclasses import replace
from functools import partial
from build_sources import AXPY_CUDA
from mace_fast.kernels.build import compile_cuda, side_by_side
side_by_side([partial(compile_cuda, replace(AXPY_CUDA, options=(f"-DNUMBER={n}",)), "sm_90") for n in range(8)])
"""
    for attempt in range(2):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "MACE_FAST_CACHE": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"attempt {attempt}: {done.stderr[-1500:]}"


def test_a_build_that_fails_lets_the_others_end() -> None:
    ended = []

    def fail() -> None:
        raise BuildError("first")

    with pytest.raises(BuildError, match="first"):
        side_by_side([fail, lambda: ended.append(1), lambda: ended.append(2)])
    assert sorted(ended) == [1, 2]
