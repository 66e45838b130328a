"""The channelwise convolution whose weights are splines of the edge length: nothing of size edges x weights is written.

For inference: the gradient goes to node features, edge attributes and edge lengths, once. The coefficients are
constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.ops.branches import in_turn
from mace_fast.kernels.ops.channelwise_run import Call, Spline, gradient_rows, run_kernel
from mace_fast.kernels.ops.sender_sum import sum_at_senders
from mace_fast.kernels.source.channelwise import Variant

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_GRAPH = "Tensor sender, Tensor receiver, Tensor? order, Tensor row, Tensor? sender_order, Tensor? sender_row"
_SPLINE = "Tensor? table, Tensor rows, int intervals, float per_length"
_LIBRARY.define(f"spline_conv(Tensor x, Tensor y, Tensor radius, {_GRAPH}, {_SPLINE}, str description) -> Tensor")
_LIBRARY.define(
    f"spline_conv_backward(Tensor x, Tensor y, Tensor radius, Tensor g, {_GRAPH}, {_SPLINE}, str description, "
    "bool want_x) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"spline_conv_edge_parts(Tensor x, Tensor y, Tensor radius, Tensor g, {_GRAPH}, {_SPLINE}, str description, "
    "bool want_x) -> (Tensor, Tensor)"
)

_LEAST_SCRATCH_BYTES = {True: 1 << 27, False: 1 << 26}
"""Room for gradients of edges on their way to their senders, on a GPU and on a CPU; more edges are taken in turn."""
_MOST_SCRATCH_BYTES = {True: 1 << 29, False: 1 << 26}
"""The same for many edges, where shorter stretches would take longer: in between, a third of what all edges need."""
_ROOMS = {True: 3, False: 1}
"""Parts of this room, each for a stretch of edges, where there are several."""


def _stretches(edges: int, row_bytes: int, *, on_gpu: bool) -> tuple[int, int]:
    """How many edges are worked on at a time, and how many such stretches have room at once. Nothing but shapes
    decides: gradients at senders are added up stretch by stretch."""
    scratch = min(_MOST_SCRATCH_BYTES[on_gpu], max(_LEAST_SCRATCH_BYTES[on_gpu], edges * row_bytes // 3))
    if edges * row_bytes <= scratch:
        return max(edges, 1), 1
    rooms = _ROOMS[on_gpu]
    return max(1, scratch // (rooms * row_bytes)), rooms


class FrozenGraph(NamedTuple):
    """Edges of a program with fixed shapes: there may be more edges than ``row`` lists; those are never read.

    Attributes:
        sender: [E] int32, row of x that an edge gathers.
        receiver: [E] int32, row of z that an edge adds to.
        order: [E] int32, edges by receiver; None where they lie in that order.
        row: [num_receivers + 1] int32.
        sender_order, sender_row: edges by sender, for the gradient of x; None where x has none. Where the list is
            padded, one segment beyond the rows of x takes the padding.
    """

    sender: Tensor
    receiver: Tensor
    order: Tensor | None
    row: Tensor
    sender_order: Tensor | None
    sender_row: Tensor | None


class RadialSpline(NamedTuple):
    """Piecewise polynomials of the edge length, for all weights of a convolution.

    Attributes:
        table: [E] int32, which table an edge uses, or None when there is one.
        rows: [tables * (intervals + 1), order, weight_numel], coefficients of each interval in powers of the place
            inside it (0 to 1), order even.
            The last row of a table is zero and serves all lengths from intervals / per_length on.
        intervals: intervals of a table.
        per_length: intervals per unit of length.
    """

    table: Tensor | None
    rows: Tensor
    intervals: int
    per_length: float

    @property
    def order(self) -> int:
        """Coefficients of an interval."""
        return self.rows.shape[1]


def spline_conv(
    description: ChannelwiseTensorProduct,
    x: Tensor,
    y: Tensor,
    radius: Tensor,
    graph: FrozenGraph,
    spline: RadialSpline,
    sink: list[Tensor] | None = None,
) -> Tensor:
    """Graph convolution with weights interpolated inside the kernel; differentiable once, in x, y and radius.

    Args:
        description: what couples to what.
        x: [rows, x_dim] node features, ``ir_mul``, float32 or float64.
        y: [E, y_dim] edge attributes.
        radius: [E] edge lengths.
        graph: who gathers and sums.
        spline: the weights.
        sink: if given, the gradient with respect to the edges is not returned through autograd, but appended here when
            the gradient is computed: [parts, E, y_dim + 1], to be summed over parts, the last column of the radius,
            and anything in the rows of edges that ``row`` does not list. It takes a kernel less to make and to use.

    Returns:
        [num_receivers, z_dim], ``ir_mul``.

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    for name, operand, shape in (
        ("x", x, (x.shape[0], description.x_dim)),
        ("y", y, (radius.shape[0], description.y_dim)),
        ("rows", spline.rows, (*spline.rows.shape[:2], description.weight_numel)),
    ):
        if operand.dtype != radius.dtype or operand.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} is {operand.dtype} and radius {radius.dtype}; both must be float32 or both float64"
            )
        if operand.device != radius.device:
            raise ValueError(f"{name} is on {operand.device} and radius on {radius.device}; move them to one device")
        if tuple(operand.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(operand.shape)}; this convolution needs {list(shape)}")
    if x.requires_grad and (graph.sender_order is None or graph.sender_row is None):
        raise ValueError("x requires a gradient, but the graph has no sender_order and sender_row; give it both")
    if sink is not None:
        z: Tensor = _WithSink.apply(x, y, radius, graph, spline, description.key, sink)
        return z
    return torch.ops.mace_fast.spline_conv(x, y, radius, *graph, *spline, description.key)


class _WithSink(torch.autograd.Function):
    """The same where gradients of edges go to a list."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        radius: Tensor,
        graph: FrozenGraph,
        spline: RadialSpline,
        key: str,
        sink: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, y, radius)
        ctx.constants, ctx.sink = (*graph, *spline, key), sink
        z: Tensor = torch.ops.mace_fast.spline_conv(x, y, radius, *ctx.constants)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, y, radius = ctx.saved_tensors
        want_x = ctx.needs_input_grad[0]
        dx, parts = torch.ops.mace_fast.spline_conv_edge_parts(x, y, radius, g, *ctx.constants, want_x)
        ctx.sink.append(parts)
        return (dx if want_x else None, *(None,) * 6)


def _graph_for_kernels(graph: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    return (*graph, None)


def _spline_for_kernels(radius: Tensor, spline: tuple[Any, ...]) -> Spline:
    table, rows, intervals, per_length = spline
    return radius, table, rows, intervals, per_length


def _spline_conv(x: Tensor, y: Tensor, radius: Tensor, *rest: Any) -> Tensor:
    graph, spline, key = rest[:6], rest[6:10], rest[10]
    description = ChannelwiseTensorProduct.parse(key)
    make = x.new_empty if description.covers_z else x.new_zeros
    z = make((graph[3].shape[0] - 1, description.z_dim))
    variant = Variant(False, False, order=spline[1].shape[1])
    operands, of_length = (x.contiguous(), y.contiguous(), None), _spline_for_kernels(radius.contiguous(), spline)
    run_kernel(Call(key, variant, operands, _graph_for_kernels(graph), (z, description.z_dim), spline=of_length))
    return z


def _spline_conv_backward(x: Tensor, y: Tensor, radius: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # Zeroed, since edges that pad the list are never written.
    dx, edge_grad = _backward(x, y, radius, g, *rest, make_edge_grad=x.new_zeros)
    return dx, edge_grad[0] if edge_grad.shape[0] == 1 else edge_grad.sum(0)


def _spline_conv_edge_parts(x: Tensor, y: Tensor, radius: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _backward(x, y, radius, g, *rest, make_edge_grad=x.new_empty)


def _backward(
    x: Tensor, y: Tensor, radius: Tensor, g: Tensor, *rest: Any, make_edge_grad: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    graph, spline, key, want_x = rest[:6], rest[6:10], rest[10], rest[11]
    description = ChannelwiseTensorProduct.parse(key)
    variant = Variant(False, True, want_x, True, False, spline[1].shape[1])
    edges = radius.shape[0]
    edge_grad = make_edge_grad((gradient_rows(key, x, variant)[0], edges, description.y_dim + 1))
    x, y, g, radius = x.contiguous(), y.contiguous(), g.contiguous(), radius.contiguous()
    order, sender_order, sender_row = graph[2], graph[4], graph[5]
    stretch, rooms = max(edges, 1), 1
    if want_x and order is None:
        stretch, rooms = _stretches(edges, description.x_dim * x.element_size(), on_gpu=x.is_cuda)
    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    make = x.new_empty if description.covers_x else x.new_zeros
    x_of_edges = [make((min(stretch, edges), description.x_dim)) for _ in range(rooms if want_x else 0)]
    of_length = _spline_for_kernels(radius, spline)

    def ends(piece: int) -> tuple[int, int]:
        return piece * stretch, min((piece + 1) * stretch, edges)

    def gradients(piece: int, room: int) -> None:
        rows = x_of_edges[room] if want_x else x.new_empty(0)
        outputs = (g, description.z_dim, rows, edge_grad, None, *ends(piece))
        run_kernel(Call(key, variant, (x, y, None), _graph_for_kernels(graph), outputs, spline=of_length))

    def at_senders(piece: int, room: int) -> None:
        if want_x:
            per_sender = stretch / max(x.shape[0], 1)
            sum_at_senders(x_of_edges[room], sender_order, sender_row, dx, *ends(piece), per_sender)

    in_turn(max(1, -(-edges // stretch)), rooms, x.device, gradients, at_senders)
    return dx, edge_grad


for _name, _function in (
    ("spline_conv", _spline_conv),
    ("spline_conv_backward", _spline_conv_backward),
    ("spline_conv_edge_parts", _spline_conv_edge_parts),
):
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")


@torch.library.register_fake("mace_fast::spline_conv")
def _(x: Tensor, y: Tensor, radius: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((rest[3].shape[0] - 1, ChannelwiseTensorProduct.parse(rest[10]).z_dim))


@torch.library.register_fake("mace_fast::spline_conv_backward")
def _(x: Tensor, y: Tensor, radius: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if rest[11] else x.new_empty(0)
    return dx, x.new_empty((radius.shape[0], ChannelwiseTensorProduct.parse(rest[10]).y_dim + 1))


@torch.library.register_fake("mace_fast::spline_conv_edge_parts")
def _(x: Tensor, y: Tensor, radius: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if rest[11] else x.new_empty(0)
    parts, _ = gradient_rows(rest[10], x, Variant(False, True, rest[11], True, False, rest[7].shape[1]))
    return dx, x.new_empty((parts, radius.shape[0], ChannelwiseTensorProduct.parse(rest[10]).y_dim + 1))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, radius, *graph = inputs[:9]
    table, rows, ctx.intervals, ctx.per_length, ctx.key = inputs[9:]
    ctx.save_for_backward(x, y, radius, *graph, table, rows)


def _gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, y, radius, *rest = ctx.saved_tensors
    dx, edge = torch.ops.mace_fast.spline_conv_backward(
        x, y, radius, g, *rest, ctx.intervals, ctx.per_length, ctx.key, ctx.needs_input_grad[0]
    )
    return (dx if ctx.needs_input_grad[0] else None, edge[:, :-1], edge[:, -1], *(None,) * 11)


torch.library.register_autograd("mace_fast::spline_conv", _gradient, setup_context=_setup)
