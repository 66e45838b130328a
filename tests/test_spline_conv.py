"""The convolution with weights from splines against the convolution with the same weights written out."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_close, mace_product
from test_channelwise import use_schedule

from mace_fast.inference.tables import SplineTable, tabulate
from mace_fast.kernels import ChannelwiseTensorProduct, channelwise_tp_conv, edge_graph
from mace_fast.kernels.description.channelwise import Path
from mace_fast.kernels.ops import spline_conv as ops
from mace_fast.kernels.ops.spline_conv import FrozenGraph, RadialSpline, spline_conv
from mace_fast.kernels.plan import sharing
from mace_fast.kernels.plan.layout import Schedule

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CUTOFF = 5.0


def functions(numel: int, tables: int) -> list:
    """Smooth functions of the distance, different for each table."""
    a, b = torch.randn(tables, numel, dtype=torch.float64), torch.rand(tables, numel, dtype=torch.float64)
    return [lambda r, n=n: torch.sin(a[n] * r[:, None]) * torch.exp(-b[n] * r[:, None]) for n in range(tables)]


def on_device(table: SplineTable, pair: torch.Tensor | None, device: str, dtype: torch.dtype) -> RadialSpline:
    return RadialSpline(pair, table.rows.to(device, dtype).contiguous(), table.intervals, table.per_length)


def problem(d: ChannelwiseTensorProduct, device: str, dtype: torch.dtype, nodes: int, edges: int) -> tuple:
    x = torch.randn(nodes, d.x_dim, dtype=torch.float64).to(device, dtype).requires_grad_()
    y = torch.randn(edges, d.y_dim, dtype=torch.float64).to(device, dtype).requires_grad_()
    r = (0.5 + (CUTOFF - 0.6) * torch.rand(edges, dtype=torch.float64)).to(device, dtype).requires_grad_()
    sender, receiver = (torch.randint(0, nodes, (edges,), device=device) for _ in range(2))
    graph = edge_graph(sender, receiver, nodes, nodes)
    frozen = FrozenGraph(graph.sender, graph.receiver, graph.order, graph.row, graph.sender_order, graph.sender_row)
    return x, y, r, graph, frozen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tables", [1, 3])
def test_equals_written_weights(seed: int, device: str, dtype: torch.dtype, tables: int, mul: int = 20) -> None:
    d = mace_product(1, mul)
    x, y, r, graph, frozen = problem(d, device, dtype, 7, 90)
    radial = functions(d.weight_numel, tables)
    pair = torch.randint(0, tables, (90,), dtype=torch.int32, device=device) if tables > 1 else None
    table = tabulate("f", radial, CUTOFF, torch.float64)
    z = spline_conv(d, x, y, r, frozen, on_device(table, pair, device, dtype))
    x2, y2, r2 = (t.detach().cpu().double().requires_grad_() for t in (x, y, r))
    which = torch.zeros(90, dtype=torch.int64) if pair is None else pair.cpu().long()
    weights = torch.stack([f(r2) for f in radial])[which, torch.arange(90)]
    cpu_graph = graph.to("cpu")
    oracle = channelwise_tp_conv(d, x2, y2, weights, cpu_graph)
    # A length in float32 has a place in its interval to 2^-24 * intervals; the weights inherit that.
    terms = 1e4
    assert_close(z, oracle, terms=terms)
    g = torch.randn_like(oracle)
    got = torch.autograd.grad(z, (x, y, r), g.to(device, dtype))
    for a, b in zip(got, torch.autograd.grad(oracle, (x2, y2, r2), g), strict=True):
        assert_close(a, b, terms=terms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stretch", [1, 7, 45, 64, 1000])
@pytest.mark.parametrize("mul", [8, 20])
def test_stretches_of_edges_add_up(
    seed: int, monkeypatch: pytest.MonkeyPatch, device: str, stretch: int, mul: int
) -> None:
    """Gradients of edges are summed at senders in pieces of any length: the same edges, wherever a piece ends, with a
    list that is padded, and with a receiver whose edges several groups share."""
    d = mace_product(1, mul)
    dtype, edges, padding = torch.float64, 90, 5
    x, y, r, _, _ = problem(d, device, dtype, 7, edges + padding)
    sender, receiver = torch.randint(0, 6, (edges,)), torch.randint(0, 6, (edges,))
    receiver[:40] = 3
    receiver = receiver.sort().values
    graph = edge_graph(sender.to(device), receiver.to(device), 7, 7)
    filled = torch.nn.functional.pad
    rest = torch.arange(edges, edges + padding, dtype=torch.int32, device=device)
    sender_row = filled(graph.sender_row, (0, 1), value=edges + padding)
    lists = (filled(graph.receiver, (0, padding)), None, graph.row, torch.cat([graph.sender_order, rest]), sender_row)
    frozen = FrozenGraph(filled(graph.sender, (0, padding)), *lists)
    table = tabulate("f", functions(d.weight_numel, 1), CUTOFF, torch.float64)
    z = spline_conv(d, x, y, r, frozen, on_device(table, None, device, dtype))
    g = torch.randn_like(z)
    whole = torch.autograd.grad(z, (x, y, r), g, retain_graph=True)
    monkeypatch.setattr(sharing, "edge_limit", lambda groups, receivers, edges: 16)
    scratch = stretch * d.x_dim * 8
    for bound in ("_LEAST_SCRATCH_BYTES", "_MOST_SCRATCH_BYTES"):
        monkeypatch.setattr(ops, bound, {True: scratch, False: scratch})
    pieces = torch.autograd.grad(z, (x, y, r), g)
    assert whole[0][6].abs().max() == 0 and whole[0][:6].abs().min() > 0
    for a, b in zip(whole, pieces, strict=True):
        assert_close(b[: len(a)], a, terms=256)


@pytest.mark.parametrize("device", DEVICES)
def test_beyond_the_cutoff_is_exactly_zero_and_nan_stays(seed: int, device: str) -> None:
    d = mace_product(0, 8)
    x, y, r, _, frozen = problem(d, device, torch.float64, 4, 30)
    spline = on_device(tabulate("f", functions(d.weight_numel, 1), CUTOFF, torch.float64), None, device, torch.float64)
    far = torch.full_like(r, CUTOFF + 0.1).detach().requires_grad_()
    z = spline_conv(d, x, y, far, frozen, spline)
    assert torch.equal(z, torch.zeros_like(z))
    for gradient in torch.autograd.grad(z.sum(), (x, y, far)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.isnan(spline_conv(d, x, y, torch.full_like(r, torch.nan), frozen, spline)).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [16, 512])
@pytest.mark.parametrize("mul", [20, 128])
def test_edges_beyond_the_cutoff_change_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch, device: str, limit: int, mul: int
) -> None:
    """Those of a moving structure's list that are too long just now are left out, wherever they are in the list, and
    have gradients of zero."""
    d = mace_product(1, mul)
    dtype, edges = torch.float64, 150
    x, y, r, graph, frozen = problem(d, device, dtype, 7, edges)
    far = torch.rand(edges, device=device) < 0.5
    far[graph.order[64:100].long()] = True  # a tile without any other
    lengths = torch.where(far, CUTOFF + torch.rand_like(r), r).detach().requires_grad_()
    monkeypatch.setattr(sharing, "edge_limit", lambda groups, receivers, edges: limit)
    spline = on_device(tabulate("f", functions(d.weight_numel, 1), CUTOFF, torch.float64), None, device, dtype)
    z = spline_conv(d, x, y, lengths, frozen, spline)
    g = torch.randn_like(z)
    got = torch.autograd.grad(z, (x, y, lengths), g)

    near = ~far
    y_near, r_near = (t.detach()[near].requires_grad_() for t in (y, r))
    few = edge_graph(graph.sender[near], graph.receiver[near], 7, 7)
    lists = FrozenGraph(few.sender, few.receiver, few.order, few.row, few.sender_order, few.sender_row)
    expected = spline_conv(d, x, y_near, r_near, lists, spline)
    gradients = torch.autograd.grad(expected, (x, y_near, r_near), g)
    assert_close(z, expected, terms=256)
    assert_close(got[0], gradients[0], terms=256)
    for of_all, of_near in zip(got[1:], gradients[1:], strict=True):
        assert_close(of_all[near], of_near, terms=256)
        assert torch.equal(of_all[far], torch.zeros_like(of_all[far]))
    if device == "cpu" and limit == 512:  # a GPU shares receivers out by the length of the list
        assert torch.equal(z, expected)


STREAMS = [(1, 9, torch.float64), (2, 80, torch.float32), (4, 40, torch.float32)]
"""Channels of a thread, and registers for outputs: segments of one path, of several, and several segments."""


@pytest.mark.gpu
@pytest.mark.parametrize("vector, registers, dtype", STREAMS)
def test_coefficients_in_a_stream(
    seed: int, monkeypatch: pytest.MonkeyPatch, vector: int, registers: int, dtype: torch.dtype
) -> None:
    check_streams(seed, monkeypatch, "cuda", vector, registers, dtype)


def check_streams(
    seed: int, patch: pytest.MonkeyPatch, device: str, vector: int, registers: int, dtype: torch.dtype
) -> None:
    use_schedule(patch, Schedule(vector, registers, prefetch=True), splines_alone=True)
    test_equals_written_weights(seed, device, dtype, tables=3, mul=32 * vector)
    if dtype == torch.float64:
        test_edges_beyond_the_cutoff_change_nothing(seed, patch, device, 16, 32 * vector)
        test_paths_without_weights(seed, device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_paths_without_weights(seed: int, device: str, dtype: torch.dtype) -> None:
    """First, last and between those that have weights."""
    degrees = [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    paths = tuple(Path(a, b, k, 0.5 + k, weighted=k in (1, 3)) for k, (a, b, _) in enumerate(degrees))
    d = ChannelwiseTensorProduct(((32, 0), (32, 1)), ((1, 0), (1, 1)), tuple((32, c) for _, _, c in degrees), paths)
    x, y, r, graph, frozen = problem(d, device, dtype, 7, 90)
    (radial,) = functions(d.weight_numel, 1)
    table = tabulate("f", [radial], CUTOFF, torch.float64)
    z = spline_conv(d, x, y, r, frozen, on_device(table, None, device, dtype))
    x2, y2, r2 = (t.detach().cpu().double().requires_grad_() for t in (x, y, r))
    oracle = channelwise_tp_conv(d, x2, y2, radial(r2), graph.to("cpu"))
    assert_close(z, oracle, terms=1e4)
    g = torch.randn_like(oracle)
    got = torch.autograd.grad(z, (x, y, r), g.to(device, dtype))
    for a, b in zip(got, torch.autograd.grad(oracle, (x2, y2, r2), g), strict=True):
        assert_close(a, b, terms=1e4)


def test_wrong_operands_are_named(seed: int) -> None:
    d = mace_product(0, 8)
    x, y, r, _, frozen = problem(d, "cpu", torch.float64, 4, 30)
    spline = on_device(tabulate("f", functions(d.weight_numel, 1), CUTOFF, torch.float64), None, "cpu", torch.float64)
    with pytest.raises(ValueError, match="y has shape"):
        spline_conv(d, x, y[:, :3], r, frozen, spline)
    with pytest.raises(ValueError, match="rows has shape"):
        spline_conv(d, x, y, r, frozen, spline._replace(rows=spline.rows[:, :, :3]))
    with pytest.raises(TypeError, match="float32"):
        spline_conv(d, x.float(), y, r, frozen, spline)
    with pytest.raises(ValueError, match="sender_order"):
        spline_conv(d, x, y, r, frozen._replace(sender_order=None), spline)
