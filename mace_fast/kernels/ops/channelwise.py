"""torch ops for the channelwise tensor product, with and without the graph, differentiable to any order.

Four ops close the algebra of a product that is linear in x, y and w:

    conv               F(x, y, w)
    conv_backward      gradients of <g, F> with respect to x, y, w
    conv_jvp           derivative of F along (x', y', w')
    conv_backward_jvp  derivative of conv_backward along (x', y', w'), g fixed

The gradient of each is again made of these four, so there is no order at which derivation stops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.build import (
    CudaModule,
    architecture,
    compile_cuda_all,
    cpu_threads,
    cuda_index,
    load_cpu,
    load_cuda,
    on_gpu,
)
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.ops.graph import EdgeGraph
from mace_fast.kernels.ops.segment import Segments, segment_sum
from mace_fast.kernels.plan.channelwise import ChannelwisePlan, Role, Schedule, plan
from mace_fast.kernels.source.channelwise import (
    OVERFLOW_THREADS,
    PASSES,
    Variant,
    cpu_source,
    cuda_source,
    overflow_source,
)
from mace_fast.kernels.source.fitted import fitted_source

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_GRAPH = (
    "Tensor? sender, Tensor? receiver, Tensor? order, Tensor? row, Tensor? sender_order, Tensor? sender_row, "
    "Tensor? poison"
)
_TANGENTS = "Tensor? x_tangent, Tensor? y_tangent, Tensor? w_tangent"
_LIBRARY.define(f"conv(Tensor x, Tensor y, Tensor w, {_GRAPH}, str description) -> Tensor")
_LIBRARY.define(
    f"conv_backward(Tensor x, Tensor y, Tensor w, Tensor g, {_GRAPH}, str description, bool want_x, bool want_y, "
    "bool want_w) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(f"conv_jvp(Tensor x, Tensor y, Tensor w, {_TANGENTS}, {_GRAPH}, str description) -> Tensor")
_LIBRARY.define(
    f"conv_backward_jvp(Tensor x, Tensor y, Tensor w, Tensor g, {_TANGENTS}, {_GRAPH}, str description, bool want_x, "
    "bool want_y, bool want_w) -> (Tensor, Tensor, Tensor)"
)

Graph = tuple[Tensor | None, ...]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
Operands = tuple[Tensor, Tensor, Tensor | None]
Spline = tuple[Tensor | None, Tensor | None, Tensor | None, int, float]
"""Edge lengths, table of each edge, knots, intervals of a table, intervals per unit of length."""
NO_SPLINE: Spline = (None, None, None, 0, 0.0)
_NO_GRAPH: Graph = (None,) * 7
_TARGET_EDGES = 32
"""Edges that one group of warps should see at least: with fewer a receiver, it takes several receivers in a row."""
_MANY_GROUPS = 768
"""Groups of warps that keep a GPU busy; where receivers give fewer, several groups share the edges of each."""
_MOST_EDGES = 512
"""Edges of one receiver that a group works on in any case; the rest is shared out."""
_MULTIPROCESSORS = 132
"""Of an H100. A constant, so that sums are split alike on all GPUs that run the same code."""
_LEAST_EDGES = {False: 16, True: 8}
"""Edges that a part of a receiver should have at least: of a sum, which is added to others, and of gradients (True)."""
_PART_COST = 2
"""What a part costs before its first edge and after its last, in edges."""
_OVERFLOW_BLOCKS = 2112
"""Thread blocks that add the sums of parts and windows: as many as an H100 runs at once."""
_ALIGNMENT = 16
"""Bytes; rows of operands are read in words of up to so many."""


def channelwise_tp_conv(
    description: ChannelwiseTensorProduct, x: Tensor, y: Tensor, w: Tensor, graph: EdgeGraph
) -> Tensor:
    """Graph convolution: gather x at senders, couple with y and w on each edge, sum at receivers.

    Args:
        description: what couples to what.
        x: [num_senders, x_dim] node features, ``ir_mul``, float32 or float64.
        y: [E, y_dim] edge attributes (spherical harmonics), ``ir_mul``.
        w: [E, weight_numel] weights of each edge, or [weight_numel] for all; e3nn's order.
        graph: from :func:`edge_graph`; edges in any order.

    Returns:
        [num_receivers, z_dim], ``ir_mul``. The same inputs give the same bits.

    Raises:
        TypeError: operands differ in dtype, or are neither float32 nor float64.
        ValueError: a shape or device does not match the description or graph.
    """
    x, y, w = _without_autocast(x, y, w)
    _check(description, x, y, w, rows=graph.num_senders, edges=graph.num_edges, device=graph.sender.device)
    return torch.ops.mace_fast.conv(x, y, w, *graph, description.key)


def channelwise_tp(description: ChannelwiseTensorProduct, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The same tensor product sample by sample: x [B, x_dim], y [B, y_dim], w [B, weight_numel] or [weight_numel].

    Returns [B, z_dim]. Raises as :func:`channelwise_tp_conv`.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [batch, {description.x_dim}]")
    x, y, w = _without_autocast(x, y, w)
    _check(description, x, y, w, rows=x.shape[0], edges=x.shape[0], device=x.device)
    return torch.ops.mace_fast.conv(x, y, w, *_NO_GRAPH, description.key)


def prepare_channelwise(
    descriptions: Sequence[ChannelwiseTensorProduct], dtype: torch.dtype, device: torch.device | str, *, order: int = 2
) -> None:
    """Compile what products on a GPU will need, side by side; else each kernel is compiled when it is first called.

    Args:
        descriptions: the products.
        dtype: float32 or float64.
        device: a CUDA device.
        order: of the highest derivative that will be asked for, with respect to x, y and w: 0, 1 or 2.

    Raises:
        ValueError: the device is not a CUDA device, or the order is another.
        BuildError, MissingToolError: as for the first call of a kernel.
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order is {order}; kernels are prepared for derivatives of order 0, 1 and 2")
    device = torch.device("cuda", cuda_index(device))
    kernels = [(d, variant) for d in descriptions for variant in PASSES[: (1, 2, 4)[order]]]
    compile_cuda_all([cuda_source(d, dtype.itemsize, variant) for d, variant in kernels], architecture(device))
    for d, variant in kernels:
        _cuda_launch(d.key, dtype.itemsize, variant, device)


def _without_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what other operations made half as wide is widened: sums over many edges are kept in float32."""
    if not torch.is_autocast_enabled(operands[0].device.type):
        return operands
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in operands)


def _check(
    description: ChannelwiseTensorProduct,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    *,
    rows: int,
    edges: int,
    device: torch.device,
) -> None:
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "x": (x, (rows, description.x_dim)),
        "y": (y, (edges, description.y_dim)),
    }
    numel = description.weight_numel
    expected["w"] = (w, (numel,) if w.dim() == 1 else (edges, numel))
    for name, (operand, shape) in expected.items():
        if operand.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} has dtype {operand.dtype}; kernels exist for float32 and float64")
        if operand.dtype != x.dtype:
            raise TypeError(
                f"{name} has dtype {operand.dtype} and x {x.dtype}; convert one of them, operands share a dtype"
            )
        if operand.device != device:
            raise ValueError(f"{name} is on {operand.device} and the graph or x on {device}; move them to one device")
        if tuple(operand.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(operand.shape)}; this product needs {list(shape)}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"operands are on {device}; kernels exist for cpu and cuda")


# --- running a kernel


def _sizes(y: Tensor, graph: Graph) -> tuple[int, int]:
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


class _Launch(NamedTuple):
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
def _cuda_launch(
    key: str, item_bytes: int, variant: Variant, device: torch.device, schedule: Schedule | None = None
) -> _Launch:
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
    return _Launch(load_cuda(source, device), layout, kernels)


def gradient_parts(key: str, like: Tensor, variant: Variant, schedule: Schedule | None = None) -> int:
    """Into how many parts a backward kernel for operands like this writes the gradient of y: [parts, E, ...]."""
    return _cuda_launch(key, like.element_size(), variant, like.device, schedule).parts if on_gpu(like) else 1


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
    receivers, _ = _sizes(y, graph)
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
    launch = _cuda_launch(key, x.element_size(), variant, x.device, schedule)
    layout = launch.layout
    receivers, edges = _sizes(y, graph)
    if receivers == 0:
        return
    sender, receiver, order, row, _, _, poison = graph
    run = _run_length(receivers, edges)
    groups = -(-receivers // run)
    limit = _edge_limit(groups, receivers, edges)
    windows = -(-edges // limit) if row is not None and edges > limit else 0
    parts = 1
    if run == 1:
        side_by_side = layout.channel_blocks * launch.kernels[0][2]
        slots = _MULTIPROCESSORS * layout.resident
        parts = _parts(receivers, edges, layout.groups, side_by_side, slots, _LEAST_EDGES[variant.backward])
    blocks = -(-(groups + windows) // layout.groups)
    grid = (blocks, layout.channel_blocks * parts)
    block = (layout.warps * 32, layout.groups, 1)
    strides = _row_strides(x, y, w)
    read = [_aligned(t) for t in (x, y, w, *tangents)]
    head = (order, row, sender, receiver, poison, receivers, run, groups, limit, parts, *read, *strides, *spline)
    tail: tuple[Any, ...]
    if variant.backward:
        g, g_row, *gradients = outputs
        tail = (_aligned(g), g_row, *gradients, edges)
    else:
        z, z_row = outputs
        # Parts and windows write what the product writes, no more.
        make = z.new_empty if ChannelwiseTensorProduct.parse(key).covers_z else z.new_zeros
        partial = None
        if windows or parts > 1:
            partial = make((blocks * layout.groups * parts - groups, z_row))
        tail = (z, partial, z_row)
    for entry, shared, depth in launch.kernels:
        launch.module.launch(entry, (*grid, depth), block, shared, head + tail)
    if not variant.backward and partial is not None:
        wide = _ALIGNMENT // x.element_size()
        vector = wide if z_row % wide == 0 else 1
        overflow = load_cuda(overflow_source(x.element_size(), vector), x.device)
        columns = -(-z_row // (vector * OVERFLOW_THREADS))
        in_turn = min(receivers, max(1, _OVERFLOW_BLOCKS // columns))
        sums = (z, partial, row, receivers, limit, parts, blocks * layout.groups, z_row)
        overflow.launch("overflow", (in_turn, columns, 1), (OVERFLOW_THREADS, 1, 1), 0, sums)


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """The same numbers at an address that wide loads accept; only a view into the middle of a row is copied."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % _ALIGNMENT else tensor


def _edge_limit(groups: int, receivers: int, edges: int) -> int:
    """Edges of a receiver beyond which they are shared out to windows of so many. Of few receivers only those that have
    half as many again as others have windows: parts are of equal lengths, and whole."""
    if groups >= _MANY_GROUPS:
        return _MOST_EDGES
    return max(_TARGET_EDGES, -(-3 * edges // (2 * receivers)))


@lru_cache(maxsize=512)
def _parts(receivers: int, edges: int, per_block: int, side_by_side: int, slots: int, least: int) -> int:
    """Into how many parts the edges of each receiver, or of a window, are split: 1 where receivers fill a GPU.

    Blocks run in rounds of ``slots``, each as long as a part takes; the shortest wins. Nothing but shapes decides.

    Args:
        per_block: groups of a block.
        side_by_side: blocks that a group's work is spread over anyway.
        slots: blocks that run at a time.
        least: edges of a part, on average.
    """
    if receivers >= _MANY_GROUPS:
        return 1
    mean = edges / receivers

    def time(parts: int) -> float:
        blocks = -(-receivers * parts // per_block) * side_by_side
        return -(-blocks // slots) * (mean / parts + _PART_COST)

    return min(range(1, max(1, min(int(mean / least), slots)) + 1), key=time)


def _run_length(receivers: int, edges: int) -> int:
    """Receivers a group works through: enough for a full tile of edges where receivers have few."""
    return max(1, min(_TARGET_EDGES, _TARGET_EDGES * receivers // max(edges, 1)))


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


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(x: Tensor, y: Tensor, w: Tensor, tangents: Tangents, graph: Graph, key: str, *, dual: bool) -> Tensor:
    description = ChannelwiseTensorProduct.parse(key)
    receivers, _ = _sizes(y, graph)
    x, y, w = x.contiguous(), y.contiguous(), w.contiguous()
    make = x.new_empty if description.covers_z else x.new_zeros
    z = make((receivers, description.z_dim))
    a, b, c = (_dense(t) for t in tangents)
    run_kernel(key, Variant(dual, False), (x, y, w), (a, b, c), graph, (z, description.z_dim))
    return z


def _backward(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    g: Tensor,
    tangents: Tangents,
    graph: Graph,
    key: str,
    wants: tuple[bool, bool, bool],
    *,
    dual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    description = ChannelwiseTensorProduct.parse(key)
    x, y, w, g = x.contiguous(), y.contiguous(), w.contiguous(), g.contiguous()
    _, edges = _sizes(y, graph)
    want_x, want_y, want_w = wants
    want_w = want_w and description.weight_numel > 0
    variant = Variant(dual, True, want_x, want_y, want_w)
    parts = gradient_parts(key, x, variant) if want_y else 1
    empty = x.new_empty(0)
    make = x.new_empty if description.covers_x else x.new_zeros
    x_of_edges = make((edges, description.x_dim)) if want_x else empty
    y_parts = x.new_empty((parts, edges, description.y_dim)) if want_y else empty
    w_of_edges = x.new_empty((edges, description.weight_numel)) if want_w else empty
    if edges and (want_x or want_y or want_w):
        a, b, c = (_dense(t) for t in tangents)
        outputs = (g, description.z_dim, x_of_edges, y_parts, w_of_edges, 0, edges)
        run_kernel(key, variant, (x, y, w), (a, b, c), graph, outputs)
    dx = _sum_at_senders(x_of_edges, graph) if want_x else empty
    dy = (y_parts[0] if parts == 1 else y_parts.sum(0)) if want_y else empty
    dw = (w_of_edges.sum(0) if w.dim() == 1 else w_of_edges) if wants[2] else empty
    if wants[2] and not want_w:
        dw = torch.zeros_like(w)
    return dx, dy, dw


def _sum_at_senders(values: Tensor, graph: Graph) -> Tensor:
    if graph[0] is None:
        return values
    sender, order, row = graph[0], graph[4], graph[5]
    assert sender is not None and order is not None and row is not None
    return segment_sum(values, Segments(sender, order, row))


# --- the four ops


def _conv(x: Tensor, y: Tensor, w: Tensor, *rest: Any) -> Tensor:
    *graph, key = rest
    return _forward(x, y, w, (None, None, None), tuple(graph), key, dual=False)


def _conv_jvp(
    x: Tensor, y: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None, *rest: Any
) -> Tensor:
    *graph, key = rest
    return _forward(x, y, w, (a, b, c), tuple(graph), key, dual=True)


def _conv_backward(x: Tensor, y: Tensor, w: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *graph, key, want_x, want_y, want_w = rest
    return _backward(x, y, w, g, (None, None, None), tuple(graph), key, (want_x, want_y, want_w), dual=False)


def _conv_backward_jvp(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    g: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *graph, key, want_x, want_y, want_w = rest
    return _backward(x, y, w, g, (a, b, c), tuple(graph), key, (want_x, want_y, want_w), dual=True)


def _fake_z(x: Tensor, y: Tensor, row: Tensor | None, key: str) -> Tensor:
    receivers = y.shape[0] if row is None else row.shape[0] - 1
    return x.new_empty((receivers, ChannelwiseTensorProduct.parse(key).z_dim))


def _fake_gradients(x: Tensor, y: Tensor, w: Tensor, wants: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    empty = [x.new_empty(0) for _ in range(3)]
    shapes = (x, y, w)
    dx, dy, dw = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else e
        for t, want, e in zip(shapes, wants, empty, strict=True)
    )
    return dx, dy, dw


for _name, _function in (
    ("conv", _conv),
    ("conv_backward", _conv_backward),
    ("conv_jvp", _conv_jvp),
    ("conv_backward_jvp", _conv_backward_jvp),
):
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")


@torch.library.register_fake("mace_fast::conv")
def _(x: Tensor, y: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return _fake_z(x, y, rest[3], rest[7])


@torch.library.register_fake("mace_fast::conv_jvp")
def _(x: Tensor, y: Tensor, w: Tensor, a: Any, b: Any, c: Any, *rest: Any) -> Tensor:
    return _fake_z(x, y, rest[3], rest[7])


@torch.library.register_fake("mace_fast::conv_backward")
def _(x: Tensor, y: Tensor, w: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, y, w, rest[8:])


@torch.library.register_fake("mace_fast::conv_backward_jvp")
def _(x: Tensor, y: Tensor, w: Tensor, g: Tensor, a: Any, b: Any, c: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, y, w, rest[8:])


# --- derivatives


def _wanted(result: tuple[Tensor, Tensor, Tensor], wants: Sequence[bool]) -> list[Tensor | None]:
    return [value if want else None for value, want in zip(result, wants, strict=True)]


def _gradient(
    x: Tensor, y: Tensor, w: Tensor, g: Tensor, tail: tuple[Any, ...], wants: Sequence[bool]
) -> list[Tensor | None]:
    """conv_backward, with None for what is not wanted."""
    if not any(wants):
        return [None, None, None]
    return _wanted(torch.ops.mace_fast.conv_backward(x, y, w, g, *tail, *wants), wants)


def _gradient_jvp(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    g: Tensor,
    tangents: Tangents,
    tail: tuple[Any, ...],
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """conv_backward_jvp, with None for what is not wanted."""
    if not any(wants) or all(t is None for t in tangents):
        return [None, None, None]
    return _wanted(torch.ops.mace_fast.conv_backward_jvp(x, y, w, g, *tangents, *tail, *wants), wants)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _save(ctx: Any, tensors: Sequence[Tensor | None], graph: Sequence[Tensor | None], key: str) -> None:
    ctx.key = key
    ctx.operands = len(tensors)
    ctx.save_for_backward(*tensors, *graph)


def _saved(ctx: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """(operands, graph and key)"""
    saved = ctx.saved_tensors
    return list(saved[: ctx.operands]), (*saved[ctx.operands :], ctx.key)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:3], inputs[3:10], inputs[10])


def _grad_conv(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (x, y, w), tail = _saved(ctx)
    return (*_gradient(x, y, w, g, tail, ctx.needs_input_grad[:3]), *(None,) * 8)


def _setup_conv_jvp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:6], inputs[6:13], inputs[13])


def _grad_conv_jvp(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (x, y, w, a, b, c), tail = _saved(ctx)
    needs = ctx.needs_input_grad
    points = _gradient_jvp(x, y, w, g, (a, b, c), tail, needs[:3])
    tangents = _gradient(x, y, w, g, tail, needs[3:6])
    return (*points, *tangents, *(None,) * 8)


def _setup_conv_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:4], inputs[4:11], inputs[11])
    ctx.set_materialize_grads(False)
    ctx.wants = inputs[12:15]


def _cotangents(ctx: Any, cotangents: tuple[Tensor | None, ...]) -> Tangents:
    """Cotangents of outputs that were computed; the others are empty placeholders."""
    a, b, c = (value if want else None for value, want in zip(cotangents, ctx.wants, strict=True))
    return a, b, c


def _grad_conv_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    # <a, dx> + <b, dy> + <c, dw> = <g, derivative of F along (a, b, c)>
    (x, y, w, g), tail = _saved(ctx)
    directions = _cotangents(ctx, cotangents)
    needs = ctx.needs_input_grad
    if all(t is None for t in directions):
        return (None,) * 15
    points = _gradient_jvp(x, y, w, g, directions, tail, needs[:3])
    g_grad = torch.ops.mace_fast.conv_jvp(x, y, w, *directions, *tail) if needs[3] else None
    return (*points, g_grad, *(None,) * 11)


def _setup_conv_backward_jvp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:7], inputs[7:14], inputs[14])
    ctx.set_materialize_grads(False)
    ctx.wants = inputs[15:18]


def _grad_conv_backward_jvp(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    # With cotangents (p, q, r) of the three results the loss is <g, second derivative of F along (a, b, c) and
    # (p, q, r)>: the derivatives of F at (p, y, w) along (0, b, c), at (x, q, w) along (a, 0, c), and at (x, y, r)
    # along (a, b, 0), summed.
    (x, y, w, g, *tangents), tail = _saved(ctx)
    needs = ctx.needs_input_grad
    results: list[Tensor | None] = [None] * 7
    point: list[Tensor] = [x, y, w]
    for slot, direction in enumerate(_cotangents(ctx, cotangents)):
        if direction is None:
            continue
        at = list(point)
        at[slot] = direction
        along = [None if other == slot else tangents[other] for other in range(3)]
        if all(t is None for t in along):
            continue
        if needs[3]:
            results[3] = _add(results[3], torch.ops.mace_fast.conv_jvp(*at, *along, *tail))
        wants = [needs[other] and other != slot for other in range(3)]
        for other, value in enumerate(
            _gradient_jvp(at[0], at[1], at[2], g, (along[0], along[1], along[2]), tail, wants)
        ):
            results[other] = _add(results[other], value)
        wants = [needs[4 + other] and along[other] is not None for other in range(3)]
        for other, value in enumerate(_gradient(at[0], at[1], at[2], g, tail, wants)):
            results[4 + other] = _add(results[4 + other], value)
    return (*results, *(None,) * 11)


torch.library.register_autograd("mace_fast::conv", _grad_conv, setup_context=_setup_conv)
torch.library.register_autograd("mace_fast::conv_jvp", _grad_conv_jvp, setup_context=_setup_conv_jvp)
torch.library.register_autograd("mace_fast::conv_backward", _grad_conv_backward, setup_context=_setup_conv_backward)
torch.library.register_autograd(
    "mace_fast::conv_backward_jvp", _grad_conv_backward_jvp, setup_context=_setup_conv_backward_jvp
)


def describe_plan(
    description: ChannelwiseTensorProduct,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    dual: bool = False,
    spline: bool = False,
) -> ChannelwisePlan:
    """The plan that a CUDA kernel of this description follows; ``print`` it to read the decisions.

    Args:
        description: what couples to what.
        dtype: float32 or float64.
        backward: of the gradients, rather than of the product.
        dual: of the derivative along tangents, which double backward is made of.
        spline: with weights interpolated from the edge length.
    """
    return plan(description, dtype.itemsize, Role(dual, backward, spline))
