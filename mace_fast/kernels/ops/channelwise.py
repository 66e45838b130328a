"""torch ops for the channelwise tensor product, with and without the graph, differentiable to any order.

Five ops close the algebra of a product that is linear in x, y and w:

    conv               F(x, y, w)
    conv_backward      gradients of <g, F> with respect to x, y, w
    conv_jvp           derivative of F along (x', y', w')
    conv_backward_jvp  derivative of conv_backward along (x', y', w'), g fixed
    conv_both_jvp      the last two at once, which gradients of conv_backward consist of

The gradient of each is again made of these, so there is no order at which derivation stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.ops.channelwise_run import (
    NO_GRAPH,
    Call,
    Graph,
    Tangents,
    clusters_of,
    gradient_rows,
    makes_sums_beside_gradients,
    run_kernel,
    sizes,
)
from mace_fast.kernels.ops.graph import EdgeGraph
from mace_fast.kernels.ops.mapping import map_one_by_one
from mace_fast.kernels.ops.segment import Segments, segment_sum, sum_on_gpu
from mace_fast.kernels.plan.channelwise import plan
from mace_fast.kernels.plan.layout import ChannelwisePlan, Role
from mace_fast.kernels.source.channelwise import Variant

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_GRAPH = (
    "Tensor? sender, Tensor? receiver, Tensor? order, Tensor? row, Tensor? sender_order, Tensor? sender_row, "
    "Tensor? poison, Tensor? cluster_order, Tensor? cluster_row, Tensor? run_order, Tensor? run_row"
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
_LIBRARY.define(
    f"conv_both_jvp(Tensor x, Tensor y, Tensor w, Tensor g, {_TANGENTS}, {_GRAPH}, str description, bool want_x, "
    "bool want_y, bool want_w) -> (Tensor, Tensor, Tensor, Tensor)"
)


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
    return torch.ops.mace_fast.conv(x, y, w, *graph.lists, description.key)


def channelwise_tp(description: ChannelwiseTensorProduct, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The same tensor product sample by sample: x [B, x_dim], y [B, y_dim], w [B, weight_numel] or [weight_numel].

    Returns [B, z_dim]. Raises as :func:`channelwise_tp_conv`.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [batch, {description.x_dim}]")
    x, y, w = _without_autocast(x, y, w)
    _check(description, x, y, w, rows=x.shape[0], edges=x.shape[0], device=x.device)
    return torch.ops.mace_fast.conv(x, y, w, *NO_GRAPH, description.key)


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


# --- values and gradients


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(x: Tensor, y: Tensor, w: Tensor, tangents: Tangents, graph: Graph, key: str, *, dual: bool) -> Tensor:
    x, y, w = x.contiguous(), y.contiguous(), w.contiguous()
    z, z_dim = _sums(x, y, graph, key)
    a, b, c = (_dense(t) for t in tangents)
    run_kernel(Call(key, Variant(dual, False), (x, y, w), graph, (z, z_dim), (a, b, c)))
    return z


def _sums(x: Tensor, y: Tensor, graph: Graph, key: str) -> tuple[Tensor, int]:
    """Room for sums at receivers, and the length of its rows."""
    description = ChannelwiseTensorProduct.parse(key)
    make = x.new_empty if description.covers_z else x.new_zeros
    return make((sizes(y, graph)[0], description.z_dim)), description.z_dim


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
    sums: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sums``: where to leave what ``_forward`` returns as well; there is an edge then, and something wanted."""
    description = ChannelwiseTensorProduct.parse(key)
    x, y, w, g = x.contiguous(), y.contiguous(), w.contiguous(), g.contiguous()
    _, edges = sizes(y, graph)
    want_x, want_y, want_w = wants
    want_w = want_w and description.weight_numel > 0
    variant = Variant(dual, True, want_x, want_y, want_w, want_z=sums is not None)
    parts, of_runs = gradient_rows(key, x, variant, graph) if edges else (1, False)
    empty = x.new_empty(0)
    make = x.new_empty if description.covers_x else x.new_zeros
    x_of_edges = make((edges, description.x_dim)) if want_x else empty
    y_parts = x.new_empty((parts, edges, description.y_dim)) if want_y else empty
    w_of_edges = x.new_empty((edges, description.weight_numel)) if want_w else empty
    if edges and (want_x or want_y or want_w):
        a, b, c = (_dense(t) for t in tangents)
        outputs = (g, description.z_dim, x_of_edges, y_parts, w_of_edges, 0, edges, *(sums or ()))
        run_kernel(Call(key, variant, (x, y, w), graph, outputs, (a, b, c)))
    dx = _sum_at_senders(x_of_edges, graph, of_runs=of_runs) if want_x else empty
    dy = (y_parts[0] if parts == 1 else y_parts.sum(0)) if want_y else empty
    dw = (w_of_edges.sum(0) if w.dim() == 1 else w_of_edges) if wants[2] else empty
    if wants[2] and not want_w:
        dw = torch.zeros_like(w)
    return dx, dy, dw


def _sum_at_senders(values: Tensor, graph: Graph, *, of_runs: bool) -> Tensor:
    """Of gradients of edges, or of runs of them."""
    if graph[0] is None:
        return values
    clusters = clusters_of(graph)
    if of_runs and clusters is not None:
        return sum_on_gpu(values, clusters.run_order, clusters.run_row, all_listed=False)
    sender, order, row = graph[0], graph[4], graph[5]
    assert sender is not None and order is not None and row is not None
    return segment_sum(values, Segments(sender, order, row))


# --- the ops


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


def _conv_both_jvp(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    g: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # By one kernel where there is one that fits, which is on a GPU, and some gradient to write beside the sums.
    *graph, key, want_x, want_y, want_w = rest
    call = (a, b, c), tuple(graph), key
    wants = (want_x, want_y, want_w)
    sums = None
    if y.shape[0] and (want_x or want_y or (want_w and w.numel())) and makes_sums_beside_gradients(key, x):
        sums = _sums(x, y, tuple(graph), key)
    z = _forward(x, y, w, *call, dual=True) if sums is None else sums[0]
    return (z, *_backward(x, y, w, g, *call, wants, dual=True, sums=sums))


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
    ("conv_both_jvp", _conv_both_jvp),
):
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")


@torch.library.register_fake("mace_fast::conv")
def _(x: Tensor, y: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return _fake_z(x, y, rest[3], rest[11])


@torch.library.register_fake("mace_fast::conv_jvp")
def _(x: Tensor, y: Tensor, w: Tensor, a: Any, b: Any, c: Any, *rest: Any) -> Tensor:
    return _fake_z(x, y, rest[3], rest[11])


@torch.library.register_fake("mace_fast::conv_backward")
def _(x: Tensor, y: Tensor, w: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, y, w, rest[12:])


@torch.library.register_fake("mace_fast::conv_backward_jvp")
def _(x: Tensor, y: Tensor, w: Tensor, g: Tensor, a: Any, b: Any, c: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, y, w, rest[12:])


@torch.library.register_fake("mace_fast::conv_both_jvp")
def _(
    x: Tensor, y: Tensor, w: Tensor, g: Tensor, a: Any, b: Any, c: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (_fake_z(x, y, rest[3], rest[11]), *_fake_gradients(x, y, w, rest[12:]))


# --- derivatives


def _wanted(result: Sequence[Tensor], wants: Sequence[bool]) -> list[Tensor | None]:
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
    _save(ctx, inputs[:3], inputs[3:14], inputs[14])


def _grad_conv(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (x, y, w), tail = _saved(ctx)
    return (*_gradient(x, y, w, g, tail, ctx.needs_input_grad[:3]), *(None,) * 12)


def _setup_conv_jvp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:6], inputs[6:17], inputs[17])


def _of_sums(
    x: Tensor, y: Tensor, w: Tensor, tangents: Tangents, g: Tensor, tail: tuple[Any, ...], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of <g, conv_jvp> with respect to x, y, w and the tangents."""
    points = _gradient_jvp(x, y, w, g, tangents, tail, needs[:3])
    return points + _gradient(x, y, w, g, tail, needs[3:6])


def _grad_conv_jvp(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (x, y, w, a, b, c), tail = _saved(ctx)
    return (*_of_sums(x, y, w, (a, b, c), g, tail, ctx.needs_input_grad), *(None,) * 12)


def _setup_conv_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:4], inputs[4:15], inputs[15])
    ctx.set_materialize_grads(False)
    ctx.wants = inputs[16:19]


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
        return (None,) * 19
    if needs[3] and any(needs[:3]):
        g_grad, *gradients = torch.ops.mace_fast.conv_both_jvp(x, y, w, g, *directions, *tail, *needs[:3])
        return (*_wanted(gradients, needs[:3]), g_grad, *(None,) * 15)
    points = _gradient_jvp(x, y, w, g, directions, tail, needs[:3])
    g_grad = torch.ops.mace_fast.conv_jvp(x, y, w, *directions, *tail) if needs[3] else None
    return (*points, g_grad, *(None,) * 15)


def _setup_conv_backward_jvp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:7], inputs[7:18], inputs[18])
    ctx.set_materialize_grads(False)
    ctx.wants = inputs[19:22]


def _grad_conv_backward_jvp(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    (x, y, w, g, *tangents), tail = _saved(ctx)
    results = _of_gradients((x, y, w), g, tangents, _cotangents(ctx, cotangents), tail, ctx.needs_input_grad)
    return (*results, *(None,) * 15)


def _of_gradients(
    point: tuple[Tensor, Tensor, Tensor],
    g: Tensor,
    tangents: Sequence[Tensor | None],
    cotangents: Tangents,
    tail: tuple[Any, ...],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of <cotangents, conv_backward_jvp> with respect to x, y, w, g and the tangents."""
    # With cotangents (p, q, r) of the three results the loss is <g, second derivative of F along (a, b, c) and
    # (p, q, r)>: the derivatives of F at (p, y, w) along (0, b, c), at (x, q, w) along (a, 0, c), and at (x, y, r)
    # along (a, b, 0), summed.
    results: list[Tensor | None] = [None] * 7
    for slot, direction in enumerate(cotangents):
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
    return results


def _grad_conv_both_jvp(ctx: Any, h: Tensor | None, *cotangents: Tensor | None) -> tuple[Any, ...]:
    (x, y, w, g, a, b, c), tail = _saved(ctx)
    needs = ctx.needs_input_grad
    results = _of_gradients((x, y, w), g, (a, b, c), _cotangents(ctx, cotangents), tail, needs)
    if h is not None:
        places = (0, 1, 2, 4, 5, 6)
        of_sums = _of_sums(x, y, w, (a, b, c), h, tail, [needs[place] for place in places])
        for place, value in zip(places, of_sums, strict=True):
            results[place] = _add(results[place], value)
    return (*results, *(None,) * 15)


torch.library.register_autograd("mace_fast::conv", _grad_conv, setup_context=_setup_conv)
torch.library.register_autograd("mace_fast::conv_jvp", _grad_conv_jvp, setup_context=_setup_conv_jvp)
torch.library.register_autograd("mace_fast::conv_backward", _grad_conv_backward, setup_context=_setup_conv_backward)
torch.library.register_autograd(
    "mace_fast::conv_backward_jvp", _grad_conv_backward_jvp, setup_context=_setup_conv_backward_jvp
)
torch.library.register_autograd("mace_fast::conv_both_jvp", _grad_conv_both_jvp, setup_context=_setup_conv_backward_jvp)

map_one_by_one("conv", "conv_backward", "conv_jvp", "conv_backward_jvp", "conv_both_jvp")


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
