"""One kernel for the tangents of sums and of gradients, on the emulated GPU: what two kernels give."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import mace_product
from simt import emulated_gpu
from test_clusters import some_graph

from mace_fast.kernels import EdgeGraph, channelwise_tp, channelwise_tp_conv, edge_graph
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.ops import channelwise, channelwise_run
from mace_fast.kernels.ops.channelwise_run import Call, gradient_rows, run_kernel
from mace_fast.kernels.plan.channelwise import plan, sums_beside_gradients
from mace_fast.kernels.plan.layout import Schedule
from mace_fast.kernels.source.channelwise import BOTH, PASSES, Variant

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def star(edges: int) -> EdgeGraph:
    """One receiver with nearly all edges; others with one or none."""
    receiver = torch.zeros(edges, dtype=torch.int64)
    receiver[: edges // 50] = torch.arange(edges // 50) % 5 + 1
    return edge_graph(torch.arange(edges) % 7, receiver, 7, 8)


class Case:
    """Operands and tangents of a product on one graph."""

    def __init__(self, d: ChannelwiseTensorProduct, graph: EdgeGraph, dtype: torch.dtype, device: str) -> None:
        self.d, self.graph = d, graph.to(device)
        self.edges, self.receivers = graph.num_edges, graph.num_receivers
        sizes = ((graph.num_senders, d.x_dim), (self.edges, d.y_dim), (self.edges, d.weight_numel))
        self.operands = tuple(torch.randn(n, m, dtype=dtype, device=device) for n, m in sizes)
        self.tangents = tuple(torch.randn_like(t) for t in self.operands)
        self.g = torch.randn(self.receivers, d.z_dim, dtype=dtype, device=device)

    def run(self, variant: Variant, schedule: Schedule) -> list[torch.Tensor]:
        """Gradients of edges, or sums, or both; computed by the CUDA kernels."""
        key, x = self.d.key, self.operands[0]
        nan = {"dtype": x.dtype, "device": x.device}
        z = torch.full((self.receivers, self.d.z_dim), torch.nan, **nan)
        sums, gradients, outputs = (z, self.d.z_dim), [], ()
        with nullcontext() if x.is_cuda else emulated_gpu():
            if variant.backward:
                parts, _ = gradient_rows(key, x, variant, self.graph.lists, schedule)
                gradients = [torch.full((self.edges, m), torch.nan, **nan) for m in (self.d.x_dim, self.d.weight_numel)]
                gradients.insert(1, torch.full((parts, self.edges, self.d.y_dim), torch.nan, **nan))
                outputs = (self.g, self.d.z_dim, *gradients, 0, self.edges)
            if variant.want_z or not variant.backward:
                outputs = (*outputs, *sums)
            run_kernel(Call(key, variant, self.operands, self.graph.lists, outputs, self.tangents, schedule=schedule))
        if not variant.backward:
            return [z]
        dx, dy, dw = gradients
        return [dx, dy.sum(0), dw, *([z] if variant.want_z else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("schedule", "segments"),
    [
        (Schedule(1, 54, False, 3), 1),
        (Schedule(1, 54, False, 4, tile=8), 1),
        (Schedule(2, 54, False, tile=16), 2),
        (Schedule(1, 54, True), 1),
    ],
    ids=str,
)
def test_one_kernel_is_two(
    rng: np.random.Generator, device: str, dtype: torch.dtype, schedule: Schedule, segments: int
) -> None:
    """On graphs whose edges are shared out in runs of receivers, in parts of them and in windows."""
    d = mace_product(1, 64)
    if dtype == torch.float64:
        schedule = Schedule(schedule.vector, 120, schedule.prefetch, schedule.ring, tile=schedule.tile)
    assert dtype == torch.float64 or len(plan(d, 4, BOTH.role, schedule).segments) == segments
    for graph in (some_graph(rng, 9, 10, 120), some_graph(rng, 5, 60, 90), star(1300)):
        case = Case(d, graph, dtype, device)
        *gradients, sums = case.run(BOTH, schedule)
        plain = Schedule(1, 54, False)
        expected = [*case.run(PASSES[3], plain), *case.run(PASSES[2], plain)]
        for ours, theirs in zip([*gradients, sums], expected, strict=True):
            assert not theirs.isnan().any()
            assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_ops_use_it(rng: np.random.Generator, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of gradients, with and without a graph: that kernel ran, and results are those of the CPU's kernels."""
    entries: list[str] = []
    run = channelwise_run._run_cuda
    monkeypatch.setattr(channelwise_run, "_run_cuda", lambda call: (entries.append(call.variant.entry), run(call)))
    d, graph = mace_product(1, 64), some_graph(rng, 40, 40, 40)
    assert sums_beside_gradients(d, 4)
    for with_graph in (True, False):
        case = Case(d, graph, torch.float32, device)
        found = []
        for where in (device, "cpu"):
            operands = [t.detach().to(where).requires_grad_() for t in (*case.operands, case.g)]
            x, y, w, g = operands
            directions = [t.to(where) for t in case.tangents]
            with emulated_gpu() if where == "cpu" and not found else nullcontext():
                if with_graph:
                    z = channelwise_tp_conv(d, x, y, w, graph.to(where))
                else:
                    z = channelwise_tp(d, x, y, w)
                first = torch.autograd.grad(z, (x, y, w), g, create_graph=True)
                found.append([t.cpu() for t in torch.autograd.grad(first, operands, directions)])
        assert entries[-1] == BOTH.entry and len(entries) == 3
        entries.clear()
        for ours, theirs in zip(*found, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", ["xg", "yg", "wg", "xwg", "g", "xyw"])
def test_some_gradients_alone(rng: np.random.Generator, device: str, wanted: str) -> None:
    """What is asked for is what all gives, whichever kernels that takes."""
    d, graph = mace_product(1, 64), some_graph(rng, 9, 10, 120)
    case = Case(d, graph, torch.float32, device)
    operands = [t.detach().requires_grad_() for t in (*case.operands, case.g)]
    x, y, w, g = operands
    with emulated_gpu() if device == "cpu" else nullcontext():
        first = torch.autograd.grad(channelwise_tp_conv(d, x, y, w, case.graph), (x, y, w), g, create_graph=True)
        every = dict(zip("xywg", torch.autograd.grad(first, operands, case.tangents, retain_graph=True), strict=True))
        some = [operand for name, operand in zip("xywg", operands, strict=True) if name in wanted]
        found = torch.autograd.grad(first, some, case.tangents)
    for name, ours in zip(wanted, found, strict=True):
        assert float((ours - every[name]).norm() / every[name].norm()) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_indices_out_of_range_poison_sums_too(device: str) -> None:
    d, graph = mace_product(0, 64), edge_graph(torch.tensor([0, 1]), torch.tensor([1, 0]), 2, 2)
    poisoned = graph._replace(poison=torch.full((1,), torch.nan))
    sums = Case(d, poisoned, torch.float32, device).run(BOTH, Schedule(1, 54, False, 3))[-1]
    assert sums.isnan().all()


def test_only_where_threads_have_the_registers() -> None:
    """Products of public models at l up to 2 have it, one of l = 6 has not."""
    assert all(sums_beside_gradients(mace_product(lmax, 128), 4) for lmax in (0, 1, 2))
    assert not sums_beside_gradients(mace_product(6, 128), 4)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_written_where_no_gradient_is(
    rng: np.random.Generator, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product without weights, of which the gradient with respect to its no weights is asked for."""
    weighted, graph = mace_product(1, 64), some_graph(rng, 9, 10, 120)
    d = replace(weighted, paths=tuple(replace(path, weighted=False) for path in weighted.paths))
    assert d.weight_numel == 0 and sums_beside_gradients(d, 4)
    case = Case(d, graph, torch.float32, device)
    lists = case.graph.lists
    room = torch.full((graph.num_receivers, d.z_dim), torch.nan, device=device)
    monkeypatch.setattr(channelwise, "_sums", lambda *args: (room, d.z_dim))
    with emulated_gpu() if device == "cpu" else nullcontext():
        found, *_ = torch.ops.mace_fast.conv_both_jvp(
            *case.operands, case.g, *case.tangents, *lists, d.key, False, False, True
        )
        found = found.clone()
        expected = torch.ops.mace_fast.conv_jvp(*case.operands, *case.tangents, *lists, d.key)
    assert not expected.isnan().any()
    assert float((found - expected).norm() / expected.norm()) < 1e-6
