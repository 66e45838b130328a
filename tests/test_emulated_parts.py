"""Edges of a receiver that several groups of threads share, as they do where there are few receivers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from oracles import assert_close, mace_product
from simt import emulated_gpu
from test_channelwise import use_schedule
from test_spline_conv import CUTOFF, functions, on_device

from mace_fast.inference.tables import tabulate
from mace_fast.kernels import channelwise_tp_conv
from mace_fast.kernels.build import CudaSource
from mace_fast.kernels.ops import channelwise_run
from mace_fast.kernels.ops import spline_conv as ops
from mace_fast.kernels.ops.graph import EdgeGraph, edge_graph
from mace_fast.kernels.ops.spline_conv import FrozenGraph, spline_conv
from mace_fast.kernels.plan import sharing
from mace_fast.kernels.plan.channelwise import plan
from mace_fast.kernels.plan.layout import Schedule
from mace_fast.kernels.source.channelwise import Variant

DEGREES = (0, 1, 2, 5, 40, 0, 7, 71)
"""Without edges, with fewer than parts, with as many as a tile of 32 and more."""
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def gpu() -> Iterator[None]:
    with emulated_gpu():
        yield


def split(patch: pytest.MonkeyPatch, parts: int, limit: int) -> None:
    """All receivers in so many parts, windows of ``limit`` edges."""
    patch.setattr(sharing, "run_length", lambda receivers, edges: 1)
    patch.setattr(sharing, "parts_of", lambda *sizes: parts)
    patch.setattr(sharing, "edge_limit", lambda groups, receivers, edges: limit)


def graph_of(degrees: Sequence[int], *, ordered: bool) -> EdgeGraph:
    receiver = torch.repeat_interleave(torch.arange(len(degrees)), torch.tensor(degrees))
    if not ordered:
        receiver = receiver[torch.randperm(len(receiver))]
    return edge_graph(torch.randint(0, len(degrees), receiver.shape), receiver, len(degrees), len(degrees))


def assert_alike(found: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]) -> None:
    for a, b in zip(found, whole, strict=True):
        assert_close(a, b.double(), terms=256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mul", "ring"), [(20, 0), (64, 0), (64, 3), (600, 0)])
def test_parts_with_weights(
    seed: int, gpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mul: int, ring: int
) -> None:
    """Values, gradients and gradients of those; one and two warps a receiver, a ring, several blocks of channels."""
    degrees = (0, 1, 9, 33) if mul == 600 else DEGREES
    d = mace_product(0 if mul == 600 else 1, mul)
    if ring:
        use_schedule(monkeypatch, Schedule(4 // (dtype.itemsize // 2), 80, prefetch=False, ring=ring))
    graph = graph_of(degrees, ordered=False)
    edges = graph.num_edges
    leaves = [
        torch.randn(n, m, dtype=dtype, requires_grad=True)
        for n, m in ((len(degrees), d.x_dim), (edges, d.y_dim), (edges, d.weight_numel))
    ]
    g = torch.randn(len(degrees), d.z_dim, dtype=dtype)
    cotangents = [torch.randn_like(t) for t in leaves]

    def results() -> list[torch.Tensor]:
        z = channelwise_tp_conv(d, *leaves, graph)
        first = torch.autograd.grad(z, leaves, g, create_graph=True)
        return [z, *first, *torch.autograd.grad(first, leaves, cotangents)]

    split(monkeypatch, 1, 1000)
    whole = results()
    for parts, limit in ((2, 1000), (3, 16), (8, 1000)) if mul != 600 else ((3, 16),):
        split(monkeypatch, parts, limit)
        found = results()
        assert_alike(found, whole)
        assert all(torch.equal(a, b) for a, b in zip(found, results(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("mul", [20, 128])
def test_parts_with_splines(
    seed: int, gpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ordered: bool, mul: int
) -> None:
    """Where edges are ordered, also with gradients of edges in stretches, which begin and end inside of parts."""
    d = mace_product(1, mul)
    graph = graph_of(DEGREES, ordered=ordered)
    order = None if ordered else graph.order
    frozen = FrozenGraph(graph.sender, graph.receiver, order, graph.row, graph.sender_order, graph.sender_row)
    x = torch.randn(len(DEGREES), d.x_dim, dtype=dtype, requires_grad=True)
    y = torch.randn(graph.num_edges, d.y_dim, dtype=dtype, requires_grad=True)
    r = (0.5 + 4 * torch.rand(graph.num_edges, dtype=torch.float64)).to(dtype).requires_grad_()
    g = torch.randn(len(DEGREES), d.z_dim, dtype=dtype)
    spline = on_device(tabulate("f", functions(d.weight_numel, 1), CUTOFF, torch.float64), None, "cpu", dtype)

    def results() -> list[torch.Tensor]:
        z = spline_conv(d, x, y, r, frozen, spline)
        return [z, *torch.autograd.grad(z, (x, y, r), g)]

    split(monkeypatch, 1, 1000)
    whole = results()
    scratch = 23 * d.x_dim * dtype.itemsize
    for parts, limit in ((1, 16), (2, 1000), (3, 16), (8, 1000)):
        split(monkeypatch, parts, limit)
        if ordered and parts > 1:
            for bound in ("_LEAST_SCRATCH_BYTES", "_MOST_SCRATCH_BYTES"):
                monkeypatch.setattr(ops, bound, {True: scratch, False: scratch})
        assert_alike(results(), whole)


class _Recorder:
    """A module that notes its launches and runs nothing."""

    def __init__(self, launches: list[tuple[str, tuple[int, ...]]]) -> None:
        self.launches = launches

    def launch(self, entry: str, grid: tuple[int, ...], *rest: Any) -> None:
        self.launches.append((entry, grid))


@pytest.mark.parametrize(("receivers", "degree", "split"), [(64, 40, True), (64, 9, False), (4096, 40, False)])
def test_few_receivers_are_split_and_many_are_not(
    monkeypatch: pytest.MonkeyPatch, receivers: int, degree: int, split: bool
) -> None:
    launches: list[tuple[str, tuple[int, ...]]] = []

    def load(source: CudaSource, device: Any) -> _Recorder:
        return _Recorder(launches)

    d = mace_product(0, 32)
    graph = graph_of((degree,) * receivers, ordered=True)
    x, y = torch.zeros(receivers, d.x_dim), torch.zeros(graph.num_edges, d.y_dim)
    w = torch.zeros(graph.num_edges, d.weight_numel)
    channelwise_run.cuda_launch.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(channelwise_run, "load_cuda", load)
        patch.setattr(channelwise_run, "on_gpu", lambda tensor: True)
        channelwise_tp_conv(d, x, y, w, graph)
    channelwise_run.cuda_launch.cache_clear()
    assert [entry for entry, _ in launches] == ["channelwise_forward_0", "overflow"]
    assert (launches[0][1][1] > 1) == split  # else there are windows alone


@pytest.mark.parametrize(("backward", "lmax", "most"), [(False, 0, 16), (False, 1, 8), (True, 0, 20), (True, 1, 10)])
def test_parts_of_production_shapes(backward: bool, lmax: int, most: int) -> None:
    """A crystal of 64 atoms fills a GPU in one round; the more receivers, the fewer parts."""
    role = Variant(False, backward, True, True, False, 6).role
    layout = plan(mace_product(lmax, 128), 4, role)
    depth = len(layout.segments)

    def parts(receivers: int) -> int:
        return sharing.share(layout, receivers, 178 * receivers, windows=True, side_by_side=depth).parts

    assert 6 <= parts(64) <= most
    assert -(-64 * parts(64) // layout.groups) * depth <= 132 * layout.resident
    assert parts(700) < parts(64) <= parts(16)
    assert parts(4 * 132 * layout.resident * layout.groups) == 1  # four full rounds of blocks
    if not backward:
        assert parts(768) == parts(4096) == 1


def test_parts_fill_the_last_round_of_gradients() -> None:
    """A tenth more receivers than a GPU works on at once would take it two rounds; a launch that works on a third of
    the edges shares them out as if there were a third of the receivers."""
    role = Variant(False, True, True, True, False, 6).role
    layout = plan(mace_product(1, 128), 4, role)
    depth = len(layout.segments)
    once = 132 * layout.resident * layout.groups // depth

    def parts(receivers: int, working: float = 1.0) -> int:
        edges = 178 * receivers
        lists = {"windows": True, "side_by_side": depth, "working": int(working * edges)}
        return sharing.share(layout, receivers, edges, **lists).parts

    assert parts(once) == 1 < parts(once + once // 10)
    assert 2 * once > 768 and parts(2 * once) == 1 < parts(2 * once + once // 10)  # also where there are many
    assert parts(3 * once, 1 / 3) == parts(once)
    assert parts(once, 1 / 3) == parts(once // 3) > 1
