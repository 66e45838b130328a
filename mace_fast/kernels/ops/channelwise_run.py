"""Running a kernel of a channelwise product: compiled when first called, then launched with what a call brings."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, architecture, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.plan.channelwise import ChannelwisePlan, Schedule, plan
from mace_fast.kernels.plan.sharing import share
from mace_fast.kernels.source.channelwise import OVERFLOW_THREADS, Variant, cpu_source, cuda_source, overflow_source
from mace_fast.kernels.source.fitted import fitted_source

Graph = tuple[Tensor | None, ...]
"""Sender, receiver, order, row, sender order, sender row and poison of an ``EdgeGraph``; all None: no graph."""
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
Operands = tuple[Tensor, Tensor, Tensor | None]
Spline = tuple[Tensor | None, Tensor | None, Tensor | None, int, float]
"""Edge lengths, table of each edge, knots, intervals of a table, intervals per unit of length."""
NO_SPLINE: Spline = (None, None, None, 0, 0.0)
_OVERFLOW_BLOCKS = 2112
"""Thread blocks that add the sums of parts and windows: as many as an H100 runs at once."""
_ALIGNMENT = 16
"""Bytes; rows of operands are read in words of up to so many."""


def sizes(y: Tensor, graph: Graph) -> tuple[int, int]:
    """(receivers, edges)"""
    row = graph[3]
    return (y.shape[0] if row is None else row.shape[0] - 1), y.shape[0]


def _row_strides(x: Tensor, y: Tensor, w: Tensor | None) -> tuple[int, int, int]:
    return x.shape[1], y.shape[1], (0 if w is None or w.dim() == 1 else w.shape[1])


@lru_cache(maxsize=512)
def _cpu_function(key: str, item_bytes: int, variant: Variant) -> Callable[..., None]:
    source = cpu_source(ChannelwiseTensorProduct.parse(key), item_bytes, variant)
    function = getattr(load_cpu(source), variant.entry)
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    outputs = [pointer, integer, *[pointer] * 3, integer, integer] if variant.backward else [pointer, integer]
    spline = [pointer, pointer, pointer, integer, ctypes.c_double]
    head = [pointer] * 3 + [ctypes.c_float, integer] + [pointer] * 6 + [integer] * 3
    function.argtypes = [*head, *spline, *outputs, ctypes.c_int]
    function.restype = None
    return function


class Launch(NamedTuple):
    """Everything about a CUDA kernel that does not change from call to call."""

    module: CudaModule
    layout: ChannelwisePlan
    kernels: tuple[tuple[str, int, int], ...]
    """(entry, bytes of shared memory, segments side by side), one after the other."""

    @property
    def parts(self) -> int:
        """Shares of an edge's gradient of y, which are written apart and summed afterwards."""
        return len(self.layout.segments) * self.layout.channel_blocks


@lru_cache(maxsize=512)
def cuda_launch(
    key: str, item_bytes: int, variant: Variant, device: torch.device, schedule: Schedule | None = None
) -> Launch:
    description = ChannelwiseTensorProduct.parse(key)
    if schedule is None and device.type == "cuda":
        source, layout = fitted_source(description, item_bytes, variant, architecture(device))
    else:
        layout = plan(description, item_bytes, variant.role, schedule)
        source = cuda_source(description, item_bytes, variant, schedule)
    shared = [layout.shared_bytes(segment, want_y=variant.want_y) for segment in layout.segments]
    side_by_side = [max(shared)] if layout.together else shared
    kernels = tuple(
        (entry, bytes_, len(shared) if layout.together else 1)
        for entry, bytes_ in zip(source.entry_points, side_by_side, strict=True)
    )
    return Launch(load_cuda(source, device), layout, kernels)


def gradient_parts(key: str, like: Tensor, variant: Variant, schedule: Schedule | None = None) -> int:
    """Into how many parts a backward kernel for operands like this writes the gradient of y: [parts, E, ...]."""
    return cuda_launch(key, like.element_size(), variant, like.device, schedule).parts if on_gpu(like) else 1


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run_cpu(
    key: str,
    variant: Variant,
    operands: Operands,
    tangents: Tangents,
    graph: Graph,
    outputs: tuple[Any, ...],
    spline: Spline,
) -> None:
    x, y, w = operands
    function = _cpu_function(key, x.element_size(), variant)
    sender, _, order, row, _, _, poison = graph
    receivers, _ = sizes(y, graph)
    function(
        _pointer(order),
        _pointer(row),
        _pointer(sender),
        float(poison) if poison is not None else 0.0,
        receivers,
        *(_pointer(t) for t in (x, y, w, *tangents)),
        *_row_strides(x, y, w),
        *(_pointer(t) for t in spline[:3]),
        *spline[3:],
        *(value if isinstance(value, int) else _pointer(value) for value in outputs),
        cpu_threads(),
    )


def _run_cuda(
    key: str,
    variant: Variant,
    operands: Operands,
    tangents: Tangents,
    graph: Graph,
    outputs: tuple[Any, ...],
    spline: Spline,
    schedule: Schedule | None,
) -> None:
    x, y, w = operands
    launch = cuda_launch(key, x.element_size(), variant, x.device, schedule)
    layout = launch.layout
    receivers, edges = sizes(y, graph)
    if receivers == 0:
        return
    sender, receiver, order, row, _, _, poison = graph
    work = share(layout, receivers, edges, windows=row is not None, side_by_side=launch.kernels[0][2])
    grid = (work.blocks, layout.channel_blocks * work.parts)
    block = (layout.warps * 32, layout.groups, 1)
    strides = _row_strides(x, y, w)
    read = [_aligned(t) for t in (x, y, w, *tangents)]
    head = (order, row, sender, receiver, poison, receivers, *work.numbers, *read, *strides, *spline)
    tail: tuple[Any, ...]
    if variant.backward:
        g, g_row, *gradients = outputs
        tail = (_aligned(g), g_row, *gradients, edges)
    else:
        z, z_row = outputs
        # Parts and windows write what the product writes, no more.
        make = z.new_empty if ChannelwiseTensorProduct.parse(key).covers_z else z.new_zeros
        partial = None
        if work.partial_sums:
            partial = make((work.partial_sums, z_row))
        tail = (z, partial, z_row)
    for entry, shared, depth in launch.kernels:
        launch.module.launch(entry, (*grid, depth), block, shared, head + tail)
    if not variant.backward and partial is not None:
        wide = _ALIGNMENT // x.element_size()
        vector = wide if z_row % wide == 0 else 1
        overflow = load_cuda(overflow_source(x.element_size(), vector), x.device)
        columns = -(-z_row // (vector * OVERFLOW_THREADS))
        in_turn = min(receivers, max(1, _OVERFLOW_BLOCKS // columns))
        sums = (z, partial, row, receivers, work.limit, work.parts, work.blocks * layout.groups, z_row)
        overflow.launch("overflow", (in_turn, columns, 1), (OVERFLOW_THREADS, 1, 1), 0, sums)


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """The same numbers at an address that wide loads accept; only a view into the middle of a row is copied."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % _ALIGNMENT else tensor


def run_kernel(
    key: str,
    variant: Variant,
    operands: Operands,
    tangents: Tangents,
    graph: Graph,
    outputs: tuple[Any, ...],
    spline: Spline = NO_SPLINE,
    schedule: Schedule | None = None,
) -> None:
    """Run one kernel of a description; operands are contiguous, outputs (z, its row length), or (g, its row length, dx,
    dy in ``gradient_parts``, dw, first, end). Only the edges from ``first`` up to ``end`` are worked on, and ``dx`` has
    rows from ``first`` on; without a spline these are all. ``schedule`` overrides what the plan chooses for a GPU."""
    if on_gpu(operands[0]):
        _run_cuda(key, variant, operands, tangents, graph, outputs, spline, schedule)
    else:
        _run_cpu(key, variant, operands, tangents, graph, outputs, spline)
