"""Edge lengths and spherical harmonics of edge vectors in one kernel, differentiable once."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.ops.mapping import map_one_by_one
from mace_fast.kernels.source.harmonics import BACKWARD, FORWARD, cpu_source, cuda_source

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define("edge_harmonics(Tensor vectors, int lmax) -> (Tensor, Tensor)")
_LIBRARY.define("edge_harmonics_backward(Tensor vectors, Tensor dradius, Tensor dy, int lmax) -> Tensor")
_BLOCK = 128
_CTYPES = {torch.float32: "float", torch.float64: "double"}


def edge_harmonics(vectors: Tensor, lmax: int) -> tuple[Tensor, Tensor]:
    """Lengths [E] and real spherical harmonics [E, (lmax + 1)^2] of edge vectors [E, 3].

    e3nn's order, signs and 'component' normalisation, of the normalised vector. A vector of length zero gives NaN.
    The gradient (first order) goes to the vectors.

    Raises:
        TypeError: vectors are not float32 or float64.
        ValueError: wrong shape, or lmax outside 0 .. 6.
    """
    if vectors.dtype not in _CTYPES:
        raise TypeError(f"vectors have dtype {vectors.dtype}; kernels exist for float32 and float64")
    if vectors.dim() != 2 or vectors.shape[1] != 3:
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; expected [num_edges, 3]")
    if not 0 <= lmax <= 6:
        raise ValueError(f"lmax is {lmax}; spherical harmonics exist here for 0 to 6")
    radius, y = torch.ops.mace_fast.edge_harmonics(vectors, lmax)
    return radius, y


@lru_cache(maxsize=64)
def _cuda(lmax: int, ctype: str, device: torch.device) -> CudaModule:
    return load_cuda(cuda_source(lmax, ctype), device)


@lru_cache(maxsize=64)
def _function(lmax: int, ctype: str, name: str) -> Any:
    function = getattr(load_cpu(cpu_source(lmax, ctype)), name)
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    forward = [pointer, pointer, pointer, integer, ctypes.c_int]
    backward = [pointer, pointer, integer, pointer, integer, pointer, integer, ctypes.c_int]
    function.argtypes = forward if name == FORWARD else backward
    function.restype = None
    return function


def _forward(vectors: Tensor, lmax: int) -> tuple[Tensor, Tensor]:
    vectors = vectors.contiguous()
    edges = vectors.shape[0]
    radius, y = vectors.new_empty(edges), vectors.new_empty((edges, (lmax + 1) ** 2))
    ctype = _CTYPES[vectors.dtype]
    if on_gpu(vectors):
        if edges:
            module = _cuda(lmax, ctype, vectors.device)
            module.launch(FORWARD, (-(-edges // _BLOCK), 1, 1), (_BLOCK, 1, 1), 0, (vectors, radius, y, edges))
    else:
        _function(lmax, ctype, FORWARD)(vectors.data_ptr(), radius.data_ptr(), y.data_ptr(), edges, cpu_threads())
    return radius, y


def _backward(vectors: Tensor, dradius: Tensor, dy: Tensor, lmax: int) -> Tensor:
    vectors = vectors.contiguous()
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    edges = vectors.shape[0]
    out = torch.empty_like(vectors)
    ctype = _CTYPES[vectors.dtype]
    if on_gpu(vectors):
        if edges:
            arguments = (vectors, dy, dy.stride(0), dradius, dradius.stride(0), out, edges)
            module = _cuda(lmax, ctype, vectors.device)
            module.launch(BACKWARD, (-(-edges // _BLOCK), 1, 1), (_BLOCK, 1, 1), 0, arguments)
    else:
        _function(lmax, ctype, BACKWARD)(
            vectors.data_ptr(),
            dy.data_ptr(),
            dy.stride(0),
            dradius.data_ptr(),
            dradius.stride(0),
            out.data_ptr(),
            edges,
            cpu_threads(),
        )
    return out


for _name, _impl in (("edge_harmonics", _forward), ("edge_harmonics_backward", _backward)):
    _LIBRARY.impl(_name, _impl, "CPU")
    _LIBRARY.impl(_name, _impl, "CUDA")


@torch.library.register_fake("mace_fast::edge_harmonics")
def _(vectors: Tensor, lmax: int) -> tuple[Tensor, Tensor]:
    return vectors.new_empty(vectors.shape[0]), vectors.new_empty((vectors.shape[0], (lmax + 1) ** 2))


@torch.library.register_fake("mace_fast::edge_harmonics_backward")
def _(vectors: Tensor, dradius: Tensor, dy: Tensor, lmax: int) -> Tensor:
    return torch.empty_like(vectors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.lmax = inputs[1]


def _gradient(ctx: Any, dradius: Tensor, dy: Tensor) -> tuple[Any, ...]:
    (vectors,) = ctx.saved_tensors
    return torch.ops.mace_fast.edge_harmonics_backward(vectors, dradius, dy, ctx.lmax), None


torch.library.register_autograd("mace_fast::edge_harmonics", _gradient, setup_context=_setup)
map_one_by_one("edge_harmonics", "edge_harmonics_backward")
