"""CUDA kernels run on the CPU, thread by thread, so that machines without a GPU test their texts too."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mace_fast.kernels.build import CpuSource, CudaSource, Float32, Int32, load_cpu
from mace_fast.kernels.ops import (
    channelwise_run,
    fully_connected,
    geometry,
    harmonics,
    linear,
    linear_cuda,
    normalise,
    readout,
    repulsion,
    segment,
    sender_sum,
    symmetric,
    totals,
)

_HEADER = ("simt.h", (Path(__file__).parent / "simt.h").read_text())
_ASYNC_COPY = """
#pragma once
namespace mf {
inline void copy_async(void* shared, const void* global) { simt::start_copy(shared, global); }
inline void close_copies() { simt::self().copies.push_back({}); }
template <int N> inline void await_copies() { simt::await_copies(N); }
}
"""
_DYNAMIC = re.compile(r"extern __shared__ __align__\(16\) (\w[\w ]*?) memory\[\];")
_SHARED_BYTES = 227 * 1024  # what a block can have on an H100
_CODES = {int: "q", float: "d", Int32: "i", Float32: "f"}


def _extern(text: str) -> str:
    return _DYNAMIC.sub(r"extern __align__(16) \1 memory[];", text)


class LaunchError(RuntimeError):
    """What a GPU would have hung or crashed on."""


class EmulatedModule:
    """Stands for ``CudaModule``: the same source, compiled for the CPU, launched with the same arguments."""

    def __init__(self, source: CudaSource) -> None:
        self.source = source
        kinds = {kind for _, text in (*source.headers, ("", source.text)) for kind in _DYNAMIC.findall(text)}
        headers = tuple(
            (name, _ASYNC_COPY if name == "async_copy.cuh" else _extern(text)) for name, text in source.headers
        )
        memory = "nullptr, 0"
        definition = ""
        if kinds:
            (type_name,) = kinds
            definition = f"namespace mf {{ __align__(16) {type_name} memory[{_SHARED_BYTES}]; }}\n"
            memory = f"reinterpret_cast<char*>(mf::memory), {_SHARED_BYTES}"
        entries = "".join(
            f'extern "C" __attribute__((visibility("default"))) const char* simt_{entry}(const int* grid, '
            f"const int* block, void* const* values, const int* sizes, int count) {{\n"
            f"    return simt::launch(&{entry}, grid, block, values, sizes, count, {memory});\n}}\n"
            for entry in source.entry_points
        )
        text = f'#include "simt.h"\n{_extern(source.text)}\n{definition}{entries}'
        # Longjmp between stacks is what fortified libraries take for an error.
        options = ("-O1", "-U_FORTIFY_SOURCE", "-fno-openmp", "-w")
        self._library = load_cpu(CpuSource(f"simt_{source.name}"[:80], text, (_HEADER, *headers), options))

    def launch(
        self,
        entry: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: Sequence[Any],
    ) -> None:
        """As ``CudaModule.launch``."""
        if shared_bytes > _SHARED_BYTES:
            raise LaunchError(f"{entry}: {shared_bytes} bytes of shared memory, more than an H100 has")
        packed = []
        for argument in args:
            if argument is None:
                packed.append(struct.pack("P", 0))
            elif isinstance(argument, torch.Tensor):
                packed.append(struct.pack("P", argument.data_ptr()))
            else:
                packed.append(struct.pack(_CODES[type(argument)], argument))
        if 0 in grid:
            return
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in packed]
        values = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(buffer) for buffer in buffers))
        sizes = (ctypes.c_int * len(buffers))(*(len(value) for value in packed))
        function = getattr(self._library, f"simt_{entry}")
        function.restype = ctypes.c_char_p
        fault = function((ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block), values, sizes, len(buffers))
        if fault:
            raise LaunchError(f"{entry}: {fault.decode()}")


@cache
def _load(source: CudaSource) -> EmulatedModule:
    return EmulatedModule(source)


def load_emulated(source: CudaSource, device: torch.device | str) -> EmulatedModule:
    """In place of ``load_cuda``."""
    return _load(source)


_MODULES = (
    channelwise_run,
    fully_connected,
    geometry,
    harmonics,
    normalise,
    readout,
    repulsion,
    sender_sum,
    symmetric,
    totals,
)
_OPS = (
    ("csr", segment._csr_cuda),
    ("segment_sum", segment._segment_sum_cuda),
    ("segment_gather", segment._segment_gather_cuda),
    ("linear", linear._linear_cuda),
    ("linear_add", linear._linear_add_cuda),
    ("indexed_linear_add", linear._indexed_add_cuda),
    ("indexed_linear", linear._indexed_cuda),
    ("indexed_linear_weight_grad", linear._indexed_weight_grad_cuda),
)


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Tensors on the CPU are served by the CUDA kernels, emulated."""
    library = torch.library.Library("mace_fast", "IMPL")  # noqa: TOR901
    with pytest.MonkeyPatch.context() as patch:
        for module in (*_MODULES, segment, linear_cuda):
            patch.setattr(module, "load_cuda", load_emulated)
        for module in _MODULES:
            patch.setattr(module, "on_gpu", lambda tensor: True)
        for name, function in _OPS:
            library.impl(name, function, "CPU", allow_override=True)
        yield
    library._destroy()
