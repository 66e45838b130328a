"""Backward by clusters of receivers: their lists, and the kernels on the emulated GPU."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from oracles import mace_product
from simt import emulated_gpu

from mace_fast.kernels import EdgeGraph, edge_graph
from mace_fast.kernels.ops.channelwise_run import Call, gradient_parts, run_kernel
from mace_fast.kernels.ops.clusters import Clusters, find_clusters
from mace_fast.kernels.ops.sender_sum import sum_at_senders
from mace_fast.kernels.plan.channelwise import CLUSTER_SHARES, Role, Schedule, plan
from mace_fast.kernels.source.channelwise import Variant


def some_graph(rng: np.random.Generator, senders: int, receivers: int, edges: int) -> EdgeGraph:
    """Edges in any order, some of them twice; every third receiver has none."""
    sender = torch.from_numpy(rng.integers(0, senders, edges))
    receiver = torch.from_numpy(rng.choice([n for n in range(receivers) if n % 3 != 1], edges))
    return edge_graph(sender, receiver, senders, receivers)


@pytest.mark.parametrize("edges", [0, 1, 300])
@pytest.mark.parametrize("receivers", [1, 4])
def test_runs(edges: int, receivers: int, rng: np.random.Generator) -> None:
    graph = some_graph(rng, 7, 21, edges)
    clusters = find_clusters(graph, receivers)
    sender, cluster = graph.sender.numpy(), graph.receiver.numpy() // receivers
    assert np.array_equal(clusters.order, np.lexsort((np.arange(edges), sender, cluster)))
    runs: dict[int, list[int]] = {n: [] for n in range(7)}
    for number in range(-(-21 // receivers)):
        begin, end = clusters.row[number : number + 2].tolist()
        assert end - begin == (cluster == number).sum()
        size = -(-(end - begin) // CLUSTER_SHARES)
        before = None
        for position in range(begin, end):
            mine = sender[clusters.order[position]]
            if mine != before or (position - begin) % size == 0:
                runs[mine].append(position)
            before = mine
    for n, expected in runs.items():
        begin, end = clusters.run_row[n : n + 2].tolist()
        assert clusters.run_order[begin:end].tolist() == expected


class Case:
    """Operands of a product of 64 channels, which fill a warp of two each, on one graph."""

    def __init__(self, graph: EdgeGraph, variant: Variant, dtype: torch.dtype, device: str) -> None:
        graph = EdgeGraph(*(t.to(device) for t in graph))
        self.graph, self.variant, self.d, edges = graph, variant, mace_product(1, 64), graph.num_edges
        sizes = ((graph.num_senders, self.d.x_dim), (edges, self.d.y_dim), (edges, self.d.weight_numel))
        self.operands = tuple(torch.randn(n, m, dtype=dtype, device=device) for n, m in sizes)
        none = (None, None, None)
        self.tangents = tuple(torch.randn_like(t) for t in self.operands) if variant.dual else none
        self.g = torch.randn(graph.num_receivers, self.d.z_dim, dtype=dtype, device=device)

    def gradients(self, schedule: Schedule, clusters: Clusters | None) -> list[torch.Tensor]:
        """Of x at the nodes, y and w, those that are wanted; computed by the CUDA kernels."""
        graph, key, variant, (x, y, w) = self.graph, self.d.key, self.variant, self.operands
        with nullcontext() if x.is_cuda else emulated_gpu():
            parts = gradient_parts(key, x, variant, schedule)
            rows, dw = (x.new_full((len(y), t.shape[1]), torch.nan) for t in (x, w))
            dy = x.new_full((parts, *y.shape), torch.nan)
            outputs = (self.g, self.d.z_dim, rows, dy, dw, 0, len(y))
            run_kernel(
                Call(
                    key, variant, (x, y, w), tuple(graph), outputs, self.tangents, schedule=schedule, clusters=clusters
                )
            )
        dx = torch.full_like(x, torch.nan)
        if variant.want_x:
            lists = graph[4:6] if clusters is None else (clusters.run_order, clusters.run_row)
            sum_at_senders(rows, *lists, dx, 0, len(y), len(y) / len(x))
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
        found = case.gradients(schedule, find_clusters(case.graph, 4))
        expected = case.gradients(Schedule(2, 80, False), None)
        for ours, theirs in zip(found, expected, strict=True):
            assert not theirs.isnan().any()
            assert float((ours - theirs).norm() / theirs.norm()) < tolerance


def test_refusals(rng: np.random.Generator) -> None:
    d = mace_product(1, 64)
    case = Case(some_graph(rng, 9, 10, 120), Variant(False, True, True, True, True), torch.float32, "cpu")
    for schedule, clusters in (
        (Schedule(2, 80, False, 0, 4), None),
        (Schedule(2, 80, False, 0, 4), find_clusters(case.graph, 2)),
        (Schedule(2, 80, False), find_clusters(case.graph, 4)),
    ):
        with pytest.raises(ValueError, match="lists of clusters of [024] receivers for a plan of [04]"):
            case.gradients(schedule, clusters)
    for role, schedule in (
        (Role(False, False), Schedule(2, 80, False, 0, 4)),
        (Role(False, True, True), Schedule(2, 80, False, 0, 4)),
        (Role(False, True), Schedule(1, 80, False, 0, 4)),
    ):
        with pytest.raises(ValueError, match="clusters are for gradients"):
            plan(d, 4, role, schedule)
    with pytest.raises(ValueError, match="64 receivers takes"):
        plan(d, 4, Role(False, True), Schedule(2, 160, False, 0, 64))
