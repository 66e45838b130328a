"""Energies of nodes from their features by all readouts of a frozen model, with the gradient, in one kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.ops.checks import require_like, require_shape, require_values
from mace_fast.kernels.source.readout import NODE_ENERGIES, THREADS, readout_cpu, readout_cuda

MOST_HIDDEN = 64
"""Widest hidden layer that there is a kernel for: its values are kept in registers."""

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define(
    "node_energies(Tensor[] features, Tensor[] first, Tensor[] second, Tensor? extra, Tensor head, Tensor scale, "
    "Tensor shift, Tensor base, bool want_gradient) -> (Tensor, Tensor, Tensor[])"
)
_CTYPES = {torch.float32: "float", torch.float64: "double"}
_WARP = 32


def node_energies(
    features: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor | None],
    extra: Tensor | None,
    head: Tensor,
    scale: Tensor,
    shift: Tensor,
    base: Tensor,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """scale * (extra + sum of readouts) + shift for each node, and that with base added, both float64 [N].

    A readout is linear, ``features @ first[head]``, or ``second @ silu(first @ features)``. Features after the first
    ``width`` do not count. No autograd: the gradients are results.

    Args:
        features: of each readout [N, dim], float32 or float64, the same for all but integers and ``base``.
        first: of each readout [heads, width], or [hidden, width] with at most 64 hidden values.
        second: of each readout [hidden], or None for a linear one.
        extra: [N], or None.
        head: [N] int64, inside of the rows of ``first`` of linear readouts.
        scale, shift: [N].
        base: [N] float64.
        want_gradient: whether the third result is computed.

    Returns:
        Both energies, and for each readout with a hidden layer the gradient [N, dim] of the sum of all energies.

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    empty = scale.new_empty(0)
    flat = [empty if each is None else each for each in second]
    inter, energy, gradients = torch.ops.mace_fast.node_energies(
        list(features), list(first), flat, extra, head, scale, shift, base, want_gradient
    )
    return inter, energy, gradients


def _check(
    features: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    extra: Tensor | None,
    head: Tensor,
    scale: Tensor,
    shift: Tensor,
    base: Tensor,
) -> None:
    op, nodes = "node_energies", scale.shape[0]
    require_values(op, "scale", scale, 1)
    if not len(features) == len(first) == len(second):
        counts = f"{len(features)} features, {len(first)} first and {len(second)} second"
        raise ValueError(f"{op}: {counts}; each readout needs one")
    for k, (x, weights, last) in enumerate(zip(features, first, second, strict=True)):
        require_like(op, f"features[{k}]", x, scale, "scale")
        require_values(op, f"features[{k}]", x, 2)
        require_shape(op, f"features[{k}]", x, (nodes, x.shape[1]))
        require_like(op, f"first[{k}]", weights, scale, "scale")
        require_values(op, f"first[{k}]", weights, 2)
        if weights.shape[1] > x.shape[1]:
            raise ValueError(f"{op}: first[{k}] has width {weights.shape[1]}, but there are {x.shape[1]} features")
        if last.numel():
            require_like(op, f"second[{k}]", last, scale, "scale")
            require_shape(op, f"second[{k}]", last, (weights.shape[0],))
            if weights.shape[0] > MOST_HIDDEN:
                raise ValueError(f"{op}: readout {k} has {weights.shape[0]} hidden values; at most {MOST_HIDDEN}")
    for name, tensor in (("shift", shift), ("extra", extra)):
        if tensor is not None:
            require_like(op, name, tensor, scale, "scale")
            require_shape(op, name, tensor, (nodes,))
    for name, tensor, dtype in (("head", head, torch.int64), ("base", base, torch.float64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {dtype}")
        if tensor.device != scale.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but scale is on {scale.device}; move one of them")
        require_shape(op, name, tensor, (nodes,))


@lru_cache(maxsize=64)
def _cuda(ctype: str, hidden: tuple[int, ...], device: torch.device) -> CudaModule:
    return load_cuda(readout_cuda(ctype, hidden), device)


@lru_cache(maxsize=64)
def _function(ctype: str, hidden: tuple[int, ...]) -> Any:
    function = getattr(load_cpu(readout_cpu(ctype, hidden)), NODE_ENERGIES)
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    readout = [pointer, integer, pointer, integer, pointer, pointer]
    function.argtypes = readout * len(hidden) + [pointer] * 7 + [integer, ctypes.c_int]
    function.restype = None
    return function


def _node_energies(
    features: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    extra: Tensor | None,
    head: Tensor,
    scale: Tensor,
    shift: Tensor,
    base: Tensor,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    inter, energy, gradients = _fake(features, first, second, extra, head, scale, shift, base, want_gradient)
    nodes = scale.shape[0]
    hidden = tuple(last.shape[0] for last in second)
    left = iter(gradients)
    arguments: list[Any] = []
    for x, weights, last in zip(features, first, second, strict=True):
        linear = last.numel() == 0
        gradient = next(left) if want_gradient and not linear else None
        arguments += [x.contiguous(), x.shape[1], weights.contiguous(), weights.shape[1]]
        arguments += [None if linear else last.contiguous(), gradient]
    nodewise = (extra, head, scale, shift, base)
    arguments += [None if each is None else each.contiguous() for each in nodewise] + [inter, energy, nodes]
    ctype = _CTYPES[scale.dtype]
    if nodes == 0:
        return inter, energy, gradients
    if on_gpu(scale):
        grid = (-(-nodes * _WARP // THREADS), 1, 1)
        _cuda(ctype, hidden, scale.device).launch(NODE_ENERGIES, grid, (THREADS, 1, 1), 0, arguments)
    else:
        plain = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        _function(ctype, hidden)(*plain, cpu_threads())
    return inter, energy, gradients


def _fake(
    features: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    extra: Tensor | None,
    head: Tensor,
    scale: Tensor,
    shift: Tensor,
    base: Tensor,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check(features, first, second, extra, head, scale, shift, base)
    nonlinear = [x for x, last in zip(features, second, strict=True) if last.numel() and want_gradient]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in nonlinear]
    return torch.empty_like(base), torch.empty_like(base), gradients


_LIBRARY.impl("node_energies", _node_energies, "CPU")
_LIBRARY.impl("node_energies", _node_energies, "CUDA")
torch.library.register_fake("mace_fast::node_energies", _fake, lib=_LIBRARY)
