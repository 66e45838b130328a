"""Loading and launching CUDA kernels: streams, graphs, threads, arguments, shared memory."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_sources import AXPY_CUDA

from mace_fast.errors import BuildError
from mace_fast.kernels.build import (
    CudaModule,
    CudaSource,
    Float32,
    Int32,
    compile_cuda,
    load_cuda,
)
from mace_fast.kernels.build.arguments import Signature


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory for each test."""
    directory = tmp_path / "cache $dir with blanks"
    monkeypatch.setenv("MACE_FAST_CACHE", str(directory))
    return directory


def test_packing() -> None:
    kinds = (torch.Tensor, Int32, type(None), Float32, float, int, torch.nn.Parameter, Int32)
    signature = Signature("k", kinds, (8, 4, 8, 4, 8, 8, 8, 4))
    tensor, parameter = torch.zeros(3), torch.nn.Parameter(torch.zeros(3))
    args = (tensor, Int32(-5), None, Float32(0.5), 0.25, -(2**40), parameter, Int32(9))
    slot, other = signature.slot(), signature.slot()
    assert slot.address != other.address
    slot.pack(*signature.values("k", args, -1))
    codes: list[Any] = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_float, ctypes.c_double]
    pointers = (ctypes.c_void_p * 8).from_address(slot.address)
    expected = [tensor.data_ptr(), -5, None, 0.5, 0.25, -(2**40), parameter.data_ptr(), 9]
    codes += [ctypes.c_longlong, ctypes.c_void_p, ctypes.c_int]
    for pointer, kind, value in zip(pointers, codes, expected, strict=True):
        assert pointer % ctypes.sizeof(kind) == 0
        assert kind.from_address(pointer).value == value
    signature.free.append(slot)
    assert signature.slot() is slot


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (8,), (8, 8, 8), ()])
def test_signature_refuses_other_sizes(sizes: tuple[int, ...]) -> None:
    Signature("k", (int, float), (8, 8))
    Signature("k", (int, float), None)
    with pytest.raises(TypeError, match=r"kernel 'k' has parameters of .* bytes, the arguments have \[8, 8\]"):
        Signature("k", (int, float), sizes)


@pytest.mark.parametrize("kind", [np.float32, bool, str, complex, torch.dtype])
def test_signature_refuses_other_types(kind: type) -> None:
    with pytest.raises(TypeError, match=f"kernel 'k', argument 1: a {kind.__name__} cannot be passed"):
        Signature("k", (int, kind), None)


def axpy_arguments(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, x on the device, and y + 2 * 1.5 * x."""
    y, x = torch.randn(2, size, device="cuda")
    return y, x, (y.double() + 3.0 * x.double()).float()


def launch_axpy(module: CudaModule, y: torch.Tensor, x: torch.Tensor) -> None:
    blocks = -(-y.numel() // 128)
    module.launch("axpy", (blocks, 1, 1), (128, 1, 1), 0, (y, x, Float32(1.5), Int32(1), y.numel()))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_launch(size: int, seed: int) -> None:
    module = load_cuda(AXPY_CUDA, torch.device("cuda"))
    y, x, expected = axpy_arguments(size)
    launch_axpy(module, y, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    launch_axpy(module, y, x)
    torch.testing.assert_close(y, expected + 3 * x, rtol=0, atol=1e-5)
    assert load_cuda(replace(AXPY_CUDA), torch.device("cuda", 0)) is module
    major, minor = torch.cuda.get_device_capability()
    assert module.resources == compile_cuda(AXPY_CUDA, f"sm_{major}{minor}").resources


WAIT = CudaSource(
    "wait",
    """
extern "C" __global__ void wait_then_write(int* flag, long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
    *flag = 1;
}
""",
    (),
    ("wait_then_write",),
)


@pytest.mark.gpu
def test_launch_uses_the_current_stream_and_does_not_synchronise() -> None:
    module = load_cuda(WAIT, torch.device("cuda"))
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        module.launch("wait_then_write", (1, 1, 1), (1, 1, 1), 0, (flag, 1_000_000_000))
    # On another stream it would have ended there; synchronised, it would have ended here.
    torch.cuda.current_stream().synchronize()
    assert not stream.query()
    stream.synchronize()
    assert flag.item() == 1


@pytest.mark.gpu
def test_launch_on_side_stream_computes(seed: int) -> None:
    module = load_cuda(AXPY_CUDA, torch.device("cuda"))
    y, x, expected = axpy_arguments(5000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch_axpy(module, y, x)
    stream.synchronize()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("first_use_in_capture", [False, True])
def test_launch_in_cuda_graph(first_use_in_capture: bool, seed: int) -> None:
    # A source of its own, which nothing has loaded yet.
    source = replace(AXPY_CUDA, options=(f"-DCAPTURE_{first_use_in_capture}_{seed}",))
    y, x, expected = axpy_arguments(1000)
    start = y.clone()
    if not first_use_in_capture:
        launch_axpy(load_cuda(source, "cuda"), y, x)
        y.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_axpy(load_cuda(source, "cuda"), y, x)
        launch_axpy(load_cuda(source, "cuda"), y, x)
    torch.testing.assert_close(y, start, rtol=0, atol=0)
    graph.replay()
    torch.testing.assert_close(y, expected + 3 * x, rtol=0, atol=1e-5)
    x.neg_()
    graph.replay()
    torch.testing.assert_close(y, start, rtol=0, atol=1e-4)


SHARED = CudaSource(
    "shared",
    """
extern "C" __global__ void reverse(float* x, int n) {
    extern __shared__ float held[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) held[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = held[n - 1 - i];
}
""",
    (),
    ("reverse",),
)


@pytest.mark.gpu
def test_more_than_48_kb_of_shared_memory(seed: int) -> None:
    module = load_cuda(SHARED, "cuda")
    properties: Any = torch.cuda.get_device_properties(0)
    most = properties.shared_memory_per_block_optin
    for size in (1000, most // 4, 20_000, 1000):
        x = torch.randn(size, device="cuda")
        expected = x.flip(0)
        module.launch("reverse", (1, 1, 1), (256, 1, 1), 4 * size, (x, Int32(size)))
        assert torch.equal(x, expected)
    with pytest.raises(BuildError, match=f"{most + 4} bytes of shared memory per block.*{most}"):
        module.launch("reverse", (1, 1, 1), (256, 1, 1), most + 4, (x, Int32(1)))
    with pytest.raises(BuildError, match="shared memory"):
        module.set_shared("reverse", most + 4)


KINDS = CudaSource(
    "kinds",
    """
extern "C" __global__ void kinds(
    double* out, const float* null, const float* none, int i, long long j, float f, double d, int k) {
    out[0] = null == nullptr;
    out[1] = none == nullptr;
    out[2] = i;
    out[3] = j;
    out[4] = f;
    out[5] = d;
    out[6] = k;
}
""",
    (),
    ("kinds",),
)


@pytest.mark.gpu
def test_argument_kinds() -> None:
    module = load_cuda(KINDS, "cuda")
    out = torch.full((7,), -1.0, dtype=torch.float64, device="cuda")
    nothing = torch.zeros(4, device="cuda")[:0]
    args = (out, nothing, None, Int32(-3), -(2**40), Float32(0.1), 0.1, Int32(5))
    module.launch("kinds", (1, 1, 1), (1, 1, 1), 0, args)
    assert out.tolist() == [1, 1, -3, -(2**40), np.float32(0.1), 0.1, 5]


@pytest.mark.gpu
def test_wrong_arguments(seed: int) -> None:
    module = load_cuda(AXPY_CUDA, "cuda")
    y, x, _ = axpy_arguments(4)
    one = (1, 1, 1)
    good: list[Any] = [y, x, Float32(1.5), Int32(1), 4]
    for position, value in ((2, 1.5), (3, 1), (4, Int32(4))):
        with pytest.raises(TypeError, match="axpy.*parameters of"):
            module.launch("axpy", one, one, 0, [*good[:position], value, *good[position + 1 :]])
    for args in (good[:-1], [*good, 1]):
        with pytest.raises(TypeError, match="axpy.*parameters of"):
            module.launch("axpy", one, one, 0, args)
    wrongs: tuple[Any, ...] = (np.float32(1.5), True, "1", torch.float32)
    for wrong in wrongs:
        with pytest.raises(TypeError, match="argument 2"):
            module.launch("axpy", one, one, 0, [y, x, wrong, Int32(1), 4])
    with pytest.raises(ValueError, match="argument 1: the tensor is on cpu"):
        module.launch("axpy", one, one, 0, (y, x.cpu(), Float32(1.5), Int32(1), 4))
    with pytest.raises(ValueError, match="no kernel 'axpi', only axpy"):
        module.launch("axpi", one, one, 0, good)
    with pytest.raises(BuildError, match=r"block \(2048, 1, 1\).*CUDA_ERROR_INVALID_VALUE"):
        module.launch("axpy", one, (2048, 1, 1), 0, good)
    with pytest.raises(ValueError, match="cuda:99"):
        load_cuda(AXPY_CUDA, "cuda:99")
    module.launch("axpy", (0, 1, 1), one, 0, good)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_launch_from_threads_without_context(seed: int) -> None:
    module = load_cuda(AXPY_CUDA, "cuda")
    cases = [axpy_arguments(1000) for _ in range(8)]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(y: torch.Tensor, x: torch.Tensor) -> None:
        try:
            for _ in range(200):
                launch_axpy(module, y, x)
                launch_axpy(module, y, x.neg())
            launch_axpy(module, y, x)
        except BaseException as error:
            failures.append(error)

    def first_call(y: torch.Tensor, x: torch.Tensor) -> None:
        try:
            launch_axpy(module, y, x)
        except BaseException as error:
            failures.append(error)

    y, x, expected = axpy_arguments(100)
    torch.cuda.synchronize()
    fresh = threading.Thread(target=first_call, args=(y, x))
    fresh.start()
    fresh.join()
    threads = [threading.Thread(target=work, args=(y, x)) for y, x, _ in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failures
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    for y, _, expected in cases:
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_launch_on_second_device_while_first_is_current(seed: int) -> None:
    module = load_cuda(AXPY_CUDA, "cuda:1")
    y, x, expected = (tensor.to("cuda:1") for tensor in axpy_arguments(1000))
    with torch.cuda.device(0):
        launch_axpy(module, y, x)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="tensor is on cuda:0"):
        launch_axpy(module, y.to("cuda:0"), x)


@pytest.mark.gpu
def test_machine_code_that_the_device_cannot_run() -> None:
    major, _ = torch.cuda.get_device_capability()
    other = compile_cuda(AXPY_CUDA, "sm_80" if major != 8 else "sm_90")
    with pytest.raises(BuildError, match=r"loading the kernels of 'axpy'.*NVRTC \d+\.\d+"):
        CudaModule(AXPY_CUDA, 0, other)
