"""Messages divided by a function of the density of their atom: one kernel, and one for both gradients."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.ops.checks import require_like, require_shape, require_values
from mace_fast.kernels.source.normalise import GRADIENT, MOST_THREADS, NORMALISE, normalise_cpu, normalise_cuda

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define("normalise_rows(Tensor x, Tensor density, float slope, float offset) -> Tensor")
_LIBRARY.define(
    "normalise_rows_gradient(Tensor g, Tensor out, Tensor density, float slope, float offset) -> (Tensor, Tensor)"
)
_CTYPES = {torch.float32: "float", torch.float64: "double"}
_COLUMNS_A_THREAD = 4


def normalise_rows(x: Tensor, density: Tensor, slope: float = 1.0, offset: float = 1.0) -> Tensor:
    """``x / (slope * density + offset)``, differentiable once.

    Args:
        x: [N, D] float32 or float64.
        density: [N, 1].

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    out: Tensor = torch.ops.mace_fast.normalise_rows(x, density, slope, offset)
    return out


def _check(op: str, x: Tensor, density: Tensor) -> None:
    require_values(op, "x", x, 2)
    require_like(op, "density", density, x, "x")
    require_shape(op, "density", density, (x.shape[0], 1))


def _normalise(x: Tensor, density: Tensor, slope: float, offset: float) -> Tensor:
    out = _normalise_fake(x, density, slope, offset)
    _run(NORMALISE, [x.contiguous(), density.contiguous(), out], slope, offset, x)
    return out


def _normalise_fake(x: Tensor, density: Tensor, slope: float, offset: float) -> Tensor:
    _check("normalise_rows", x, density)
    return x.new_empty(x.shape)


def _gradient(g: Tensor, out: Tensor, density: Tensor, slope: float, offset: float) -> tuple[Tensor, Tensor]:
    dx, ddensity = _gradient_fake(g, out, density, slope, offset)
    _run(GRADIENT, [g.contiguous(), out.contiguous(), density.contiguous(), dx, ddensity], slope, offset, g)
    return dx, ddensity


def _gradient_fake(g: Tensor, out: Tensor, density: Tensor, slope: float, offset: float) -> tuple[Tensor, Tensor]:
    _check("normalise_rows_gradient", g, density)
    return g.new_empty(g.shape), density.new_empty(density.shape)


def _run(entry: str, tensors: list[Tensor], slope: float, offset: float, like: Tensor) -> None:
    rows, columns = like.shape
    if rows == 0:
        return
    ctype = _CTYPES[like.dtype]
    if on_gpu(like):
        threads = min(MOST_THREADS, 32 * max(1, columns // (32 * _COLUMNS_A_THREAD)))
        arguments: list[Any] = [*tensors, slope, offset, columns, rows]
        _cuda(ctype, like.device).launch(entry, (rows, 1, 1), (threads, 1, 1), 0, arguments)
    else:
        pointers = [t.data_ptr() for t in tensors]
        _function(entry, ctype, len(tensors))(*pointers, slope, offset, columns, rows, cpu_threads())


@lru_cache(maxsize=16)
def _cuda(ctype: str, device: torch.device) -> CudaModule:
    return load_cuda(normalise_cuda(ctype), device)


@lru_cache(maxsize=16)
def _function(entry: str, ctype: str, pointers: int) -> Any:
    function = getattr(load_cpu(normalise_cpu(ctype)), entry)
    numbers = [ctypes.c_double] * 2 + [ctypes.c_longlong] * 2 + [ctypes.c_int]
    function.argtypes = [ctypes.c_void_p] * pointers + numbers
    function.restype = None
    return function


for _name, _op, _fake in (
    ("normalise_rows", _normalise, _normalise_fake),
    ("normalise_rows_gradient", _gradient, _gradient_fake),
):
    _LIBRARY.impl(_name, _op, "CPU")
    _LIBRARY.impl(_name, _op, "CUDA")
    torch.library.register_fake(f"mace_fast::{_name}", _fake, lib=_LIBRARY)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, density, ctx.slope, ctx.offset = inputs
    ctx.save_for_backward(output, density)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    out, density = ctx.saved_tensors
    dx, ddensity = torch.ops.mace_fast.normalise_rows_gradient(g, out, density, ctx.slope, ctx.offset)
    return dx, ddensity, None, None


torch.library.register_autograd("mace_fast::normalise_rows", _backward, setup_context=_setup)
