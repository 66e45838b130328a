"""Backward by clusters of receivers: their lists, and the kernels on the emulated GPU."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from oracles import mace_product
from simt import emulated_gpu

from mace_fast.kernels import EdgeGraph, channelwise_tp_conv, edge_graph
from mace_fast.kernels.ops import channelwise_run
from mace_fast.kernels.ops.channelwise_run import Call, gradient_rows, run_kernel
from mace_fast.kernels.ops.clusters import find_clusters
from mace_fast.kernels.ops.segment import sum_on_gpu
from mace_fast.kernels.plan.channelwise import clustered, plan
from mace_fast.kernels.plan.layout import CLUSTER, CLUSTER_BYTES, CLUSTER_SHARES, Role, Schedule
from mace_fast.kernels.plan.sharing import cluster_window
from mace_fast.kernels.source.channelwise import Variant


def some_graph(rng: np.random.Generator, senders: int, receivers: int, edges: int) -> EdgeGraph:
    """Edges in any order, some of them twice; every third receiver has none."""
    sender = torch.from_numpy(rng.integers(0, senders, edges))
    receiver = torch.from_numpy(rng.choice([n for n in range(receivers) if n % 3 != 1], edges))
    return edge_graph(sender, receiver, senders, receivers)


def with_clusters(graph: EdgeGraph, size: int = CLUSTER) -> EdgeGraph:
    lists = find_clusters(graph.sender, graph.receiver, graph.num_senders, graph.num_receivers, size)
    return graph._replace(clusters=lists)


@pytest.mark.parametrize("edges", [0, 1, 300, 700])
@pytest.mark.parametrize("receivers", [1, 4])
def test_runs(edges: int, receivers: int, rng: np.random.Generator) -> None:
    """Of the first 64 edges of a cluster, and of what stretches of 64 positions have of the others."""
    graph = some_graph(rng, 7, 21, edges)
    clusters = with_clusters(graph, receivers).clusters
    assert clusters is not None
    window = cluster_window(edges, -(-21 // receivers))
    assert window == 64
    sender, cluster = graph.sender.numpy(), graph.receiver.numpy() // receivers
    assert np.array_equal(clusters.order, np.lexsort((np.arange(edges), sender, cluster)))
    runs: dict[int, list[int]] = {n: [] for n in range(7)}
    for number in range(-(-21 // receivers)):
        begin, end = clusters.row[number : number + 2].tolist()
        assert end - begin == (cluster == number).sum()
        aligned = (place for place in range(0, end, window) if place > begin + window)
        cuts = sorted({begin, min(begin + window, end), *aligned, end})
        for first, last in pairwise(cuts):
            size = -(-(last - first) // CLUSTER_SHARES)
            before = None
            for position in range(first, last):
                mine = sender[clusters.order[position]]
                if mine != before or (position - first) % size == 0:
                    runs[mine].append(position)
                before = mine
    for n, expected in runs.items():
        begin, end = clusters.run_row[n : n + 2].tolist()
        assert clusters.run_order[begin:end].tolist() == expected


class Case:
    """Operands of a product of 64 channels, which fill a warp of two each, on one graph."""

    def __init__(self, graph: EdgeGraph, variant: Variant, dtype: torch.dtype, device: str) -> None:
        graph = graph.to(device)
        self.graph, self.variant, self.d, edges = graph, variant, mace_product(1, 64), graph.num_edges
        sizes = ((graph.num_senders, self.d.x_dim), (edges, self.d.y_dim), (edges, self.d.weight_numel))
        self.operands = tuple(torch.randn(n, m, dtype=dtype, device=device) for n, m in sizes)
        none = (None, None, None)
        self.tangents = tuple(torch.randn_like(t) for t in self.operands) if variant.dual else none
        self.g = torch.randn(graph.num_receivers, self.d.z_dim, dtype=dtype, device=device)

    def gradients(self, schedule: Schedule, size: int = 0) -> list[torch.Tensor]:
        """Of x at the nodes, y and w, those that are wanted; computed by the CUDA kernels."""
        graph = with_clusters(self.graph, size) if size else self.graph
        key, variant, (x, y, w) = self.d.key, self.variant, self.operands
        with nullcontext() if x.is_cuda else emulated_gpu():
            parts, of_runs = gradient_rows(key, x, variant, graph.lists, schedule)
            assert of_runs == (schedule.cluster > 0)
            rows, dw = (x.new_full((len(y), t.shape[1]), torch.nan) for t in (x, w))
            dy = x.new_full((parts, *y.shape), torch.nan)
            outputs = (self.g, self.d.z_dim, rows, dy, dw, 0, len(y))
            run_kernel(Call(key, variant, (x, y, w), graph.lists, outputs, self.tangents, schedule=schedule))
            lists = graph[4:6] if graph.clusters is None else graph.clusters[2:]
            dx = sum_on_gpu(rows, *lists, all_listed=graph.clusters is None) if variant.want_x else rows
        wants = (variant.want_x, variant.want_y, variant.want_w)
        return [value for value, want in zip((dx, dy.sum(0), dw), wants, strict=True) if want]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("wants", [(True, True, True), (True, False, False), (False, True, True)])
def test_gradients(
    rng: np.random.Generator, device: str, dual: bool, prefetch: bool, wants: tuple[bool, bool, bool]
) -> None:
    """Those of clusters are those of single receivers, in one segment and in several."""
    variant = Variant(dual, True, *wants)
    for dtype, tolerance, graph, budget, segments in (
        (torch.float32, 1e-6, some_graph(rng, 9, 10, 120), 160, 1),
        (torch.float64, 1e-14, some_graph(rng, 5, 6, 500), 120, 2),
    ):
        case, schedule = Case(graph, variant, dtype, device), Schedule(2, budget, prefetch, 0, 4)
        layout = plan(case.d, dtype.itemsize, variant.role, schedule)
        assert layout.groups == CLUSTER_SHARES and len(layout.segments) == segments
        found = case.gradients(schedule, 4)
        expected = case.gradients(Schedule(2, 80, False))
        for ours, theirs in zip(found, expected, strict=True):
            assert not theirs.isnan().any()
            assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ops_use_what_a_graph_lists(rng: np.random.Generator, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, and gradients of gradients, with and without clusters; kernels of clusters did run."""
    launched: list[str] = []
    launch = channelwise_run._run_clusters
    monkeypatch.setattr(
        channelwise_run, "_run_clusters", lambda *args: (launched.append(args[0].variant.entry), launch(*args))
    )
    case = Case(some_graph(rng, 9, 10, 400), Variant(False, True, True, True, True), torch.float32, device)
    x, y, w = (t.requires_grad_() for t in case.operands)
    g = case.g.requires_grad_()
    directions = [torch.randn_like(t) for t in (x, y, w)]
    found = []
    for graph in (case.graph, with_clusters(case.graph)):
        with nullcontext() if x.is_cuda else emulated_gpu():
            z = channelwise_tp_conv(case.d, x, y, w, graph)
            first = torch.autograd.grad(z, (x, y, w), g, create_graph=True)
            found.append([z, *first, *torch.autograd.grad(first, (x, y, w, g), directions)])
    assert launched == ["channelwise_backward_xyw"]  # both tangents come from one kernel, by receivers
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_runs_of_a_hub_are_shared_out(rng: np.random.Generator, device: str) -> None:
    """Rows that begin no run are not read, and one sender's many runs are added in chunks, as those of others."""
    listed, rows, dim = 1200, 1500, 12
    order = torch.from_numpy(rng.permutation(rows)).to(torch.int32)
    ends = torch.tensor([0, 100, 100, 1050, 1200], dtype=torch.int32)  # one is longer than two chunks
    values = torch.from_numpy(rng.normal(size=(rows, dim))).float()
    values[order[listed:].long()] = torch.nan
    expected = torch.stack([values[order[a:b].long()].double().sum(0) for a, b in pairwise(ends.tolist())])
    values, order, ends = (t.to(device) for t in (values, order, ends))
    with nullcontext() if values.is_cuda else emulated_gpu():
        assert float((sum_on_gpu(values, order, ends, all_listed=False).cpu() - expected).abs().max()) < 1e-4
        assert sum_on_gpu(values, order, ends).isnan().all()  # which lists all rows, or is wrong


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_graphs_list_clusters_where_asked(rng: np.random.Generator, device: str) -> None:
    plain = some_graph(rng, 9, 10, 120)
    sender, receiver = plain.sender.to(device), plain.receiver.to(device)
    assert edge_graph(sender, receiver, 9, 10).clusters is None
    graph = edge_graph(sender, receiver, 9, 10, clusters=True)
    if device == "cpu":
        assert graph.clusters is None and graph.lists[7:] == (None,) * 4
        return
    assert graph.clusters is not None
    expected = with_clusters(plain).clusters
    assert all(torch.equal(a.cpu(), b) for a, b in zip(graph.clusters[:2], expected[:2], strict=True))


def test_a_graph_moves_with_all_that_it_lists(rng: np.random.Generator) -> None:
    for graph in (some_graph(rng, 9, 10, 120), with_clusters(some_graph(rng, 9, 10, 120))):
        moved = graph.to("meta")
        assert {t.device.type for t in moved.lists if t is not None} == {"meta"}
        assert all(a is b is None or a.shape == b.shape for a, b in zip(graph.lists, moved.lists, strict=True))


def test_op_of_lists(rng: np.random.Generator) -> None:
    graph = some_graph(rng, 9, 10, 120)
    torch.library.opcheck(torch.ops.mace_fast.edge_clusters.default, (graph.sender, graph.receiver, 9, 10))


@pytest.mark.parametrize("item_bytes", [4, 8])
@pytest.mark.parametrize("dual", [False, True])
def test_what_groups_share_begins_at_16_bytes(item_bytes: int, dual: bool) -> None:
    """Tiles of two edges once put the second group's forms at an address that wide reads do not accept."""
    seen = 0
    for degree, mul, budget, cluster in product((0, 1, 2), (64, 128), (54, 80, 160), (2, 4, 8)):
        for vector in (1, 2, 4):
            try:
                layout = plan(
                    mace_product(degree, mul), item_bytes, Role(dual, True), Schedule(vector, budget, False, 0, cluster)
                )
            except ValueError:
                continue
            for segment in layout.segments:
                gradients = cluster * segment.z_registers * 32 * vector * item_bytes
                for want_y in (False, True):
                    of_groups = layout.shared_bytes(segment, want_y=want_y) - gradients
                    assert of_groups % (16 * CLUSTER_SHARES) == gradients % 16 == 0, layout
                    seen += 1
    assert seen > 50


def test_none_where_memory_is_too_small() -> None:
    d, role = mace_product(1, 64), Role(False, True)
    assert clustered(d, 4, role, CLUSTER_BYTES) is not None
    assert clustered(d, 4, role, 48 * 1024) is None
    assert clustered(d, 4, Role(False, False), CLUSTER_BYTES) is None


def test_refusals(rng: np.random.Generator) -> None:
    d = mace_product(1, 64)
    case = Case(some_graph(rng, 9, 10, 120), Variant(False, True, True, True, True), torch.float32, "cpu")
    for graph in (case.graph, with_clusters(case.graph, 2)):
        case.graph = graph
        with pytest.raises(ValueError, match="the graph lists no 3 clusters of 4 receivers"):
            case.gradients(Schedule(2, 80, False, 0, 4))
    for role in (Role(False, False), Role(False, True, True)):
        with pytest.raises(ValueError, match="clusters are for gradients"):
            plan(d, 4, role, Schedule(2, 80, False, 0, 4))
    with pytest.raises(ValueError, match="64 receivers takes"):
        plan(d, 4, Role(False, True), Schedule(2, 160, False, 0, 64))
