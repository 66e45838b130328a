"""From positions to edge vectors, lengths and harmonics in one kernel, and back to the gradient of each vector."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.ops.checks import FLOATS, require_like, require_shape, require_values
from mace_fast.kernels.source.geometry import (
    GEOMETRY,
    GRADIENT,
    geometry_cpu,
    geometry_cuda,
    gradient_cpu,
    gradient_cuda,
)

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define(
    "edge_geometry(Tensor positions, Tensor shifts, Tensor sender, Tensor receiver, int lmax, ScalarType dtype) -> "
    "(Tensor, Tensor, Tensor)"
)
_LIBRARY.define("edge_gradient(Tensor vectors, Tensor[] dradius, Tensor[] dy, Tensor? count, int lmax) -> Tensor")
_BLOCK = 128
_CTYPES = {torch.float32: "float", torch.float64: "double"}


def edge_geometry(
    positions: Tensor, shifts: Tensor, sender: Tensor, receiver: Tensor, lmax: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Edge vectors [E, 3] from sender to receiver, lengths [E] and harmonics [E, (lmax + 1)^2]; no autograd.

    Differences are formed in float64 and rounded once; the rest is as :func:`..harmonics.edge_harmonics` computes it.

    Args:
        positions: [N, 3] float64.
        shifts: [E, 3] float64, added to the difference of positions.
        sender, receiver: [E] int32, inside [0, N).
        lmax: 0 to 6.
        dtype: of the results, float32 or float64.

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    vectors, radius, y = torch.ops.mace_fast.edge_geometry(positions, shifts, sender, receiver, lmax, dtype)
    return vectors, radius, y


def edge_gradient(
    vectors: Tensor, dradius: Sequence[Tensor], dy: Sequence[Tensor], lmax: int, count: Tensor | None = None
) -> Tensor:
    """[E, 3], the gradient with respect to edge vectors from those of lengths and harmonics, each a sum of any number.

    Args:
        vectors: [E, 3] float32 or float64.
        dradius: each [E]; rows may be strided.
        dy: each [E, (lmax + 1)^2]; rows may be strided.
        lmax: 0 to 6.
        count: [1] int32 on the same device; edges from there on get exactly zero, whatever the gradients hold.

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    out: Tensor = torch.ops.mace_fast.edge_gradient(vectors, list(dradius), list(dy), count, lmax)
    return out


def _require_degree(op: str, lmax: int) -> None:
    if not 0 <= lmax <= 6:
        raise ValueError(f"{op}: lmax is {lmax}; spherical harmonics exist here for 0 to 6")


@lru_cache(maxsize=64)
def _geometry_module(lmax: int, ctype: str, device: torch.device) -> CudaModule:
    return load_cuda(geometry_cuda(lmax, ctype), device)


@lru_cache(maxsize=64)
def _gradient_module(lmax: int, ctype: str, radii: int, harmonics: int, device: torch.device) -> CudaModule:
    return load_cuda(gradient_cuda(lmax, ctype, radii, harmonics), device)


@lru_cache(maxsize=64)
def _geometry_function(lmax: int, ctype: str) -> Any:
    function = getattr(load_cpu(geometry_cpu(lmax, ctype)), GEOMETRY)
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_longlong, ctypes.c_int]
    function.restype = None
    return function


@lru_cache(maxsize=64)
def _gradient_function(lmax: int, ctype: str, radii: int, harmonics: int) -> Any:
    function = getattr(load_cpu(gradient_cpu(lmax, ctype, radii, harmonics)), GRADIENT)
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    users = [pointer, integer] * (radii + harmonics)
    function.argtypes = [pointer, *users, pointer, pointer, integer, ctypes.c_int]
    function.restype = None
    return function


def _geometry(
    positions: Tensor, shifts: Tensor, sender: Tensor, receiver: Tensor, lmax: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    results = _geometry_fake(positions, shifts, sender, receiver, lmax, dtype)
    edges = sender.shape[0]
    if edges == 0:
        return results
    operands = [t.contiguous() for t in (positions, shifts, sender, receiver)]
    if on_gpu(positions):
        module = _geometry_module(lmax, _CTYPES[dtype], positions.device)
        grid = (-(-edges // _BLOCK), 1, 1)
        module.launch(GEOMETRY, grid, (_BLOCK, 1, 1), 0, (*operands, *results, edges))
    else:
        pointers = (t.data_ptr() for t in (*operands, *results))
        _geometry_function(lmax, _CTYPES[dtype])(*pointers, edges, cpu_threads())
    return results


def _geometry_fake(
    positions: Tensor, shifts: Tensor, sender: Tensor, receiver: Tensor, lmax: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    op, edges = "edge_geometry", sender.shape[0]
    _require_degree(op, lmax)
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}; it must be torch.float32 or torch.float64")
    for name, tensor, wanted, shape in (
        ("positions", positions, torch.float64, (positions.shape[0], 3)),
        ("shifts", shifts, torch.float64, (edges, 3)),
        ("sender", sender, torch.int32, (edges,)),
        ("receiver", receiver, torch.int32, (edges,)),
    ):
        if tensor.dtype != wanted:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {wanted}")
        if tensor.device != positions.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but positions are on {positions.device}; move it")
        require_shape(op, name, tensor, shape)
    vectors = positions.new_empty((edges, 3), dtype=dtype)
    return vectors, vectors.new_empty(edges), vectors.new_empty((edges, (lmax + 1) ** 2))


def _gradient(vectors: Tensor, dradius: list[Tensor], dy: list[Tensor], count: Tensor | None, lmax: int) -> Tensor:
    out = _gradient_fake(vectors, dradius, dy, count, lmax)
    edges = vectors.shape[0]
    if edges == 0:
        return out
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in dy]
    users = [part for t in (*dradius, *rows) for part in (t, t.stride(0))]
    arguments = [vectors.contiguous(), *users, count, out]
    ctype = _CTYPES[vectors.dtype]
    if on_gpu(vectors):
        module = _gradient_module(lmax, ctype, len(dradius), len(dy), vectors.device)
        module.launch(GRADIENT, (-(-edges // _BLOCK), 1, 1), (_BLOCK, 1, 1), 0, (*arguments, edges))
    else:
        plain = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        _gradient_function(lmax, ctype, len(dradius), len(dy))(*plain, edges, cpu_threads())
    return out


def _gradient_fake(vectors: Tensor, dradius: list[Tensor], dy: list[Tensor], count: Tensor | None, lmax: int) -> Tensor:
    op, edges = "edge_gradient", vectors.shape[0]
    _require_degree(op, lmax)
    require_values(op, "vectors", vectors, 2)
    require_shape(op, "vectors", vectors, (edges, 3))
    for name, parts, shape in (("dradius", dradius, (edges,)), ("dy", dy, (edges, (lmax + 1) ** 2))):
        for number, tensor in enumerate(parts):
            require_like(op, f"{name}[{number}]", tensor, vectors, "vectors")
            require_shape(op, f"{name}[{number}]", tensor, shape)
    if count is not None:
        if count.dtype != torch.int32:
            raise TypeError(f"{op}: count is {count.dtype}; it must be torch.int32")
        if count.device != vectors.device:
            raise ValueError(f"{op}: count is on {count.device}, but vectors are on {vectors.device}; move it")
        require_shape(op, "count", count, (1,))
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


for _name, _implementation, _shapes in (
    ("edge_geometry", _geometry, _geometry_fake),
    ("edge_gradient", _gradient, _gradient_fake),
):
    _LIBRARY.impl(_name, _implementation, "CPU")
    _LIBRARY.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"mace_fast::{_name}", _shapes, lib=_LIBRARY)
