"""Running a kernel of a channelwise product: compiled when first called, then launched with what a call brings."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.build import (
    CudaModule,
    architecture,
    cpu_threads,
    cuda_index,
    load_cpu,
    load_cuda,
    most_shared_bytes,
    on_gpu,
)
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.ops.clusters import Clusters
from mace_fast.kernels.plan.channelwise import clustered, plan, sums_beside_gradients
from mace_fast.kernels.plan.layout import CLUSTER_BYTES, ChannelwisePlan, Schedule
from mace_fast.kernels.plan.sharing import cluster_window, share
from mace_fast.kernels.source.channelwise import OVERFLOW_THREADS, Variant, cpu_source, cuda_source, overflow_source
from mace_fast.kernels.source.fitted import fitted_source

Graph = tuple[Tensor | None, ...]
"""The ``lists`` of an ``EdgeGraph``; all None: no graph."""
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
Operands = tuple[Tensor, Tensor, Tensor | None]
Spline = tuple[Tensor | None, Tensor | None, Tensor | None, int, float]
"""Edge lengths, table of each edge, knots, intervals of a table, intervals per unit of length."""
NO_SPLINE: Spline = (None, None, None, 0, 0.0)
_OVERFLOW_BLOCKS = 2112
"""Thread blocks that add the sums of parts and windows: as many as an H100 runs at once."""
_ALIGNMENT = 16
"""Bytes; rows of operands are read in words of up to so many."""


NO_GRAPH: Graph = (None,) * 11


def clusters_of(graph: Graph) -> Clusters | None:
    """The lists of clusters, where a graph has them."""
    lists = [each for each in graph[7:] if each is not None]
    return Clusters(*lists) if lists else None


def sizes(y: Tensor, graph: Graph) -> tuple[int, int]:
    """(receivers, edges)"""
    row = graph[3]
    return (y.shape[0] if row is None else row.shape[0] - 1), y.shape[0]


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
    key: str,
    item_bytes: int,
    variant: Variant,
    device: torch.device,
    schedule: Schedule | None = None,
    clusters: bool = False,
) -> Launch:
    """``clusters``: whether the graph has lists of them."""
    description = ChannelwiseTensorProduct.parse(key)
    if schedule is None and device.type == "cuda":
        most_shared = most_shared_bytes(cuda_index(device)) if clusters else 0
        source, layout = fitted_source(description, item_bytes, variant, architecture(device), most_shared)
    else:
        if schedule is None and clusters and variant.want_x:
            schedule = clustered(description, item_bytes, variant.role, CLUSTER_BYTES)
        layout = plan(description, item_bytes, variant.role, schedule)
        source = cuda_source(description, item_bytes, variant, schedule)
    shared = [layout.shared_bytes(segment, want_y=variant.want_y) for segment in layout.segments]
    side_by_side = [max(shared)] if layout.together else shared
    kernels = tuple(
        (entry, bytes_, len(shared) if layout.together else 1)
        for entry, bytes_ in zip(source.entry_points, side_by_side, strict=True)
    )
    return Launch(load_cuda(source, device), layout, kernels)


def gradient_rows(
    key: str, like: Tensor, variant: Variant, graph: Graph = NO_GRAPH, schedule: Schedule | None = None
) -> tuple[int, bool]:
    """How a backward kernel for operands like this writes gradients of edges.

    Returns:
        Parts of the gradient of y, [parts, E, ...]; and whether gradients of x are those of runs of edges, at the
        places that the graph's clusters list.
    """
    if not on_gpu(like):
        return 1, False
    launch = _cuda_launch(key, like, variant, graph, schedule)
    return launch.parts, launch.layout.schedule.cluster > 0


def makes_sums_beside_gradients(key: str, like: Tensor) -> bool:
    """Whether one kernel makes tangents of sums and of gradients, of operands like this."""
    return on_gpu(like) and sums_beside_gradients(ChannelwiseTensorProduct.parse(key), like.element_size())


def _cuda_launch(key: str, like: Tensor, variant: Variant, graph: Graph, schedule: Schedule | None) -> Launch:
    return cuda_launch(key, like.element_size(), variant, like.device, schedule, clusters_of(graph) is not None)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Call(NamedTuple):
    """A kernel of a description and what it works on. Tensors are contiguous.

    Attributes:
        key: of the description.
        operands: x, y, w; no w where a spline gives the weights.
        graph: which x an edge reads, and which z it adds to.
        outputs: forward's (z, its row length), or backward's (g, its row length, dx, dy in parts, dw, first, end); see
            ``gradient_rows``. Only the edges from ``first`` up to ``end`` are worked on, and ``dx`` has rows from
            ``first`` on; without a spline these are all. Forward's follow where the variant wants z besides.
        tangents: of the operands; None stands for zeros.
        schedule: on a GPU, instead of what the plan chooses. With clusters the graph's lists are of as many receivers.
    """

    key: str
    variant: Variant
    operands: Operands
    graph: Graph
    outputs: tuple[Any, ...]
    tangents: Tangents = (None, None, None)
    spline: Spline = NO_SPLINE
    schedule: Schedule | None = None

    @property
    def item_bytes(self) -> int:
        return self.operands[0].element_size()

    @property
    def row_strides(self) -> tuple[int, int, int]:
        """Of x, y and w; 0 for one set of weights."""
        x, y, w = self.operands
        return x.shape[1], y.shape[1], (0 if w is None or w.dim() == 1 else w.shape[1])


def run_kernel(call: Call) -> None:
    """Run a kernel on the device of its operands."""
    if on_gpu(call.operands[0]):
        _run_cuda(call)
    else:
        _run_cpu(call)


def _run_cpu(call: Call) -> None:
    function = _cpu_function(call.key, call.item_bytes, call.variant)
    sender, _, order, row, _, _, poison = call.graph[:7]
    receivers, _ = sizes(call.operands[1], call.graph)
    function(
        _pointer(order),
        _pointer(row),
        _pointer(sender),
        float(poison) if poison is not None else 0.0,
        receivers,
        *(_pointer(t) for t in (*call.operands, *call.tangents)),
        *call.row_strides,
        *(_pointer(t) for t in call.spline[:3]),
        *call.spline[3:],
        *(value if isinstance(value, int) else _pointer(value) for value in call.outputs),
        cpu_threads(),
    )


def _run_cuda(call: Call) -> None:
    x = call.operands[0]
    launch = _cuda_launch(call.key, x, call.variant, call.graph, call.schedule)
    receivers, edges = sizes(call.operands[1], call.graph)
    if receivers == 0:
        return
    if launch.layout.schedule.cluster:
        _run_clusters(call, launch, receivers, edges)
        return
    layout, (sender, receiver, order, row, _, _, poison) = launch.layout, call.graph[:7]
    side_by_side, working = launch.kernels[0][2], edges
    if call.variant.backward:
        first, end = call.outputs[5:7]
        working = end - first
    work = share(layout, receivers, edges, windows=row is not None, side_by_side=side_by_side, working=working)
    lists = (order, row, sender, receiver, poison, receivers, *work.numbers)
    grid = (work.blocks, layout.channel_blocks * work.parts)
    gradients = _gradients(call, edges) if call.variant.backward else ()
    if call.variant.backward and not call.variant.want_z:
        _launch(call, launch, grid, lists, gradients)
        return
    z, z_row = call.outputs[-2:]
    partial = None
    if work.partial_sums:
        # Parts and windows write what the product writes, no more.
        make = z.new_empty if ChannelwiseTensorProduct.parse(call.key).covers_z else z.new_zeros
        partial = make((work.partial_sums, z_row))
    _launch(call, launch, grid, lists, (*gradients, z, partial, z_row))
    if partial is not None:
        wide = _ALIGNMENT // call.item_bytes
        vector = wide if z_row % wide == 0 else 1
        overflow = load_cuda(overflow_source(call.item_bytes, vector), x.device)
        columns = -(-z_row // (vector * OVERFLOW_THREADS))
        in_turn = min(receivers, max(1, _OVERFLOW_BLOCKS // columns))
        sums = (z, partial, row, receivers, work.limit, work.parts, work.blocks * layout.groups, z_row)
        overflow.launch("overflow", (in_turn, columns, 1), (OVERFLOW_THREADS, 1, 1), 0, sums)


def _run_clusters(call: Call, launch: Launch, receivers: int, edges: int) -> None:
    clusters, (sender, receiver, *_, poison) = clusters_of(call.graph), call.graph[:7]
    count = -(-receivers // launch.layout.schedule.cluster)
    if clusters is None or clusters.row.shape[0] != count + 1:
        raise ValueError(f"the graph lists no {count} clusters of {launch.layout.schedule.cluster} receivers")
    window = cluster_window(edges, count)
    blocks = count + (-(-edges // window) if edges > window else 0)
    lists = (clusters.order, clusters.row, sender, receiver, poison, receivers, 1, count, window, 1)
    _launch(call, launch, (blocks, launch.layout.channel_blocks), lists, _gradients(call, edges))


def _launch(
    call: Call, launch: Launch, grid: tuple[int, int], lists: tuple[Any, ...], outputs: tuple[Any, ...]
) -> None:
    """All kernels of a launch, with arguments as cuda_source declares them."""
    read = [_aligned(t) for t in (*call.operands, *call.tangents)]
    arguments = (*lists, *read, *call.row_strides, *call.spline, *outputs)
    block = (launch.layout.warps * 32, launch.layout.groups, 1)
    for entry, shared, depth in launch.kernels:
        launch.module.launch(entry, (*grid, depth), block, shared, arguments)


def _gradients(call: Call, edges: int) -> tuple[Any, ...]:
    g, g_row, *gradients = call.outputs[:7]
    return (_aligned(g), g_row, *gradients, edges)


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """The same numbers at an address that wide loads accept; only a view into the middle of a row is copied."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % _ALIGNMENT else tensor
