"""torch ops for the fully connected tensor product, with and without the graph, differentiable to any order.

Two ops close the algebra of a product F that is linear in x, y and W:

    fully_connected           F(x, y, W)
    fully_connected_backward  gradients of <g, F> with respect to x, y, W

With cotangents (a, b, c) of those gradients the loss <a, dx> + <b, dy> + <c, dW> is <g, F(a, y, W) + F(x, b, W) +
F(x, y, c)>. Its gradients are again made of the two, so there is no order at which derivation stops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.description.fully_connected import FullyConnectedTensorProduct
from mace_fast.kernels.ops.checks import require_like, require_shape, require_values
from mace_fast.kernels.ops.graph import EdgeGraph
from mace_fast.kernels.ops.mapping import map_one_by_one
from mace_fast.kernels.ops.segment import Segments, segment_sum
from mace_fast.kernels.plan.fully_connected import FullyConnectedPlan, plan
from mace_fast.kernels.source.fully_connected import Variant, cpu_source, cuda_source

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_GRAPH = (
    "Tensor? sender, Tensor? receiver, Tensor? order, Tensor? row, Tensor? sender_order, Tensor? sender_row, "
    "Tensor? poison"
)
_LIBRARY.define(f"fully_connected(Tensor x, Tensor y, Tensor w, {_GRAPH}, str description) -> Tensor")
_LIBRARY.define(
    f"fully_connected_backward(Tensor x, Tensor y, Tensor w, Tensor g, {_GRAPH}, str description, bool want_x, "
    "bool want_y, bool want_w) -> (Tensor, Tensor, Tensor)"
)

Graph = tuple[Tensor | None, ...]
_NO_GRAPH: Graph = (None,) * 7
_SHARED_BLOCKS = 264
"""Blocks that each keep a sum of the gradient of shared weights on a GPU: two for each multiprocessor of an H100."""
_SHARED_STRETCHES = 16
"""Stretches of edges that do so on a CPU."""
_MOST_BLOCKS = 2**31 - 1


def fully_connected_tp_conv(
    description: FullyConnectedTensorProduct, x: Tensor, y: Tensor, w: Tensor, graph: EdgeGraph
) -> Tensor:
    """Graph convolution: gather x at senders, couple with y and w on each edge, sum at receivers.

    Args:
        description: what couples to what.
        x: [num_senders, x_dim] node features, ``ir_mul``, float32 or float64.
        y: [E, y_dim] edge attributes, ``ir_mul``.
        w: [E, weight_numel] weights of each edge, or [weight_numel] for all; e3nn's order.
        graph: from :func:`edge_graph`; edges in any order.

    Returns:
        [num_receivers, z_dim], ``ir_mul``. The same inputs give the same bits.

    Raises:
        TypeError: operands differ in dtype, or are neither float32 nor float64.
        ValueError: a shape or device does not match the description or graph.
    """
    _check("fully_connected_tp_conv", description, x, y, w, rows=graph.num_senders, edges=graph.num_edges)
    if graph.sender.device != x.device:
        raise ValueError(
            f"fully_connected_tp_conv: the graph is on {graph.sender.device}, but x is on {x.device}; move one of them"
        )
    return torch.ops.mace_fast.fully_connected(x, y, w, *graph[:7], description.key)


def fully_connected_tp(description: FullyConnectedTensorProduct, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The same tensor product sample by sample: x [B, x_dim], y [B, y_dim], w [B, weight_numel] or [weight_numel].

    Returns [B, z_dim]. Raises as :func:`fully_connected_tp_conv`.
    """
    rows = x.shape[0] if x.dim() else 0
    _check("fully_connected_tp", description, x, y, w, rows=rows, edges=rows)
    return torch.ops.mace_fast.fully_connected(x, y, w, *_NO_GRAPH, description.key)


def describe_fully_connected_plan(description: FullyConnectedTensorProduct, dtype: torch.dtype) -> FullyConnectedPlan:
    """The plan that CUDA kernels of this description follow; ``print`` it to read the decisions."""
    return plan(description, dtype.itemsize)


def _check(
    op: str, description: FullyConnectedTensorProduct, x: Tensor, y: Tensor, w: Tensor, *, rows: int, edges: int
) -> None:
    require_values(op, "x", x, 2)
    require_like(op, "y", y, x, "x")
    require_like(op, "w", w, x, "x")
    numel = description.weight_numel
    require_shape(op, "x", x, (rows, description.x_dim))
    require_shape(op, "y", y, (edges, description.y_dim))
    require_shape(op, "w", w, (numel,) if w.dim() == 1 else (edges, numel))
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{op}: operands are on {x.device}; kernels exist for cpu and cuda")


# --- running a kernel


def _receivers(y: Tensor, graph: Graph) -> int:
    row = graph[3]
    return y.shape[0] if row is None else row.shape[0] - 1


@lru_cache(maxsize=512)
def _cpu_function(key: str, item_bytes: int, variant: Variant) -> Callable[..., None]:
    source = cpu_source(FullyConnectedTensorProduct.parse(key), item_bytes, variant)
    function = getattr(load_cpu(source), variant.entry)
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    outputs = [integer, integer, *[pointer] * 4] if variant.backward else [integer, pointer]
    function.argtypes = [*[pointer] * 7, integer, *outputs, ctypes.c_int]
    function.restype = None
    return function


@lru_cache(maxsize=512)
def _cuda_module(key: str, item_bytes: int, variant: Variant, device: torch.device) -> tuple[CudaModule, int, int]:
    """(module, threads, bytes of shared memory)"""
    description = FullyConnectedTensorProduct.parse(key)
    layout = plan(description, item_bytes)
    shared = layout.backward_shared(want_y=variant.want_y) if variant.backward else layout.forward_shared
    return load_cuda(cuda_source(description, item_bytes, variant), device), layout.threads, shared


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _weight_row(w: Tensor) -> int:
    return 0 if w.dim() == 1 else w.shape[1]


def _launch(
    key: str, variant: Variant, x: Tensor, y: Tensor, w: Tensor, graph: Graph, blocks: int, outputs: tuple[Tensor, ...]
) -> None:
    module, threads, shared = _cuda_module(key, x.element_size(), variant, x.device)
    arguments = (graph[0], graph[1], x, y, w, _weight_row(w), y.shape[0], *outputs)
    module.launch(variant.entry, (blocks, 1, 1), (threads, 1, 1), shared, arguments)


def _forward(x: Tensor, y: Tensor, w: Tensor, *rest: Any) -> Tensor:
    *graph_, key = rest
    graph: Graph = tuple(graph_)
    description = FullyConnectedTensorProduct.parse(key)
    x, y, w = x.contiguous(), y.contiguous(), w.contiguous()
    edges, receivers = y.shape[0], _receivers(y, graph)
    if not on_gpu(x):
        z = x.new_empty((receivers, description.z_dim))
        sender, receiver, order, row = graph[:4]
        function = _cpu_function(key, x.element_size(), Variant())
        pointers = (_pointer(t) for t in (order, row, sender, receiver, x, y, w))
        function(*pointers, _weight_row(w), receivers, z.data_ptr(), cpu_threads())
        return z
    make = x.new_empty if description.covers_z else x.new_zeros
    z_of_edges = make((edges, description.z_dim))
    if edges:
        _launch(key, Variant(), x, y, w, graph, min(edges, _MOST_BLOCKS), (z_of_edges,))
    if graph[0] is None:
        return z_of_edges
    _, receiver, order, row, _, _, poison = graph
    assert receiver is not None and order is not None and row is not None and poison is not None
    # An index out of range makes every result NaN, those of receivers without edges too.
    return segment_sum(z_of_edges, Segments(receiver, order, row)).add_(poison)


def _backward(x: Tensor, y: Tensor, w: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *graph_, key, want_x, want_y, want_w = rest
    graph: Graph = tuple(graph_)
    description = FullyConnectedTensorProduct.parse(key)
    x, y, w, g = x.contiguous(), y.contiguous(), w.contiguous(), g.contiguous()
    edges = y.shape[0]
    shared = w.dim() == 1
    gpu = on_gpu(x)
    parts = min(edges, (_SHARED_BLOCKS if gpu else _SHARED_STRETCHES) if shared and want_w else _MOST_BLOCKS)
    empty = x.new_empty(0)
    make = x.new_empty if description.covers_x else x.new_zeros
    x_of_edges = make((edges, description.x_dim)) if want_x else empty
    dy = torch.empty_like(y) if want_y else empty
    dw = x.new_empty((parts if shared else edges, description.weight_numel)) if want_w else empty
    if edges and (want_x or want_y or want_w):
        variant = Variant(True, want_x, want_y, want_w)
        outputs = (g, x_of_edges, dy, dw)
        if gpu:
            _launch(key, variant, x, y, w, graph, parts, outputs)
        else:
            sender, receiver, order, row = graph[:4]
            function = _cpu_function(key, x.element_size(), variant)
            pointers = (_pointer(t) for t in (order, row, sender, receiver, x, y, w))
            function(*pointers, _weight_row(w), edges, parts, *(_pointer(t) for t in outputs), cpu_threads())
    if shared and want_w:
        dw = dw.sum(0)
    return (_sum_at_senders(x_of_edges, graph) if want_x else empty), dy, dw


def _sum_at_senders(values: Tensor, graph: Graph) -> Tensor:
    sender, order, row = graph[0], graph[4], graph[5]
    if sender is None:
        return values
    assert order is not None and row is not None
    return segment_sum(values, Segments(sender, order, row))


for _name, _function in (("fully_connected", _forward), ("fully_connected_backward", _backward)):
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")


@torch.library.register_fake("mace_fast::fully_connected")
def _(x: Tensor, y: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((_receivers(y, rest[:7]), FullyConnectedTensorProduct.parse(rest[7]).z_dim))


@torch.library.register_fake("mace_fast::fully_connected_backward")
def _(x: Tensor, y: Tensor, w: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dy, dw = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for t, want in zip((x, y, w), rest[8:], strict=True)
    )
    return dx, dy, dw


# --- derivatives


def _gradient(
    point: Sequence[Tensor], g: Tensor, tail: tuple[Any, ...], wants: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """fully_connected_backward, with None for what is not wanted."""
    if not any(wants):
        return None, None, None
    result = torch.ops.mace_fast.fully_connected_backward(*point, g, *tail, *wants)
    return tuple(value if want else None for value, want in zip(result, wants, strict=True))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.key = inputs[10]
    ctx.save_for_backward(*inputs[:10])


def _grad_forward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, y, w, *graph = ctx.saved_tensors
    return (*_gradient((x, y, w), g, (*graph, ctx.key), ctx.needs_input_grad[:3]), *(None,) * 8)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.key = inputs[11]
    ctx.wants = inputs[12:15]
    ctx.save_for_backward(*inputs[:11])
    ctx.set_materialize_grads(False)


def _grad_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    x, y, w, g, *graph = ctx.saved_tensors
    tail = (*graph, ctx.key)
    needs = ctx.needs_input_grad
    results: list[Tensor | None] = [None] * 4
    for slot, (direction, computed) in enumerate(zip(cotangents, ctx.wants, strict=True)):
        if direction is None or not computed:
            continue
        point = [x, y, w]
        point[slot] = direction
        for other, value in enumerate(
            _gradient(point, g, tail, [needs[other] and other != slot for other in range(3)])
        ):
            results[other] = _add(results[other], value)
        if needs[3]:
            results[3] = _add(results[3], torch.ops.mace_fast.fully_connected(*point, *tail))
    return (*results, *(None,) * 11)


torch.library.register_autograd("mace_fast::fully_connected", _grad_forward, setup_context=_setup_forward)
torch.library.register_autograd("mace_fast::fully_connected_backward", _grad_backward, setup_context=_setup_backward)
map_one_by_one("fully_connected", "fully_connected_backward")
