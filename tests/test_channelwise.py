"""The channelwise convolution against a dense float64 definition: values and derivatives to third order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracles import EPSILON, assert_close, channelwise_conv, mace_product, operands, random_product

from mace_fast.errors import UnsupportedDescriptionError
from mace_fast.kernels import ChannelwiseTensorProduct, Path, channelwise_tp, channelwise_tp_conv, edge_graph
from mace_fast.kernels.ops import channelwise_run
from mace_fast.kernels.plan.layout import Schedule

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64]


def random_graph(nodes: int, edges: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsorted edges with duplicates and isolated nodes."""
    return torch.randint(0, nodes, (edges,), device=device), torch.randint(
        0, max(1, nodes - 1), (edges,), device=device
    )


def gradients(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Differentiable gradients, zero where an input plays no part: a random product may well have no weights at all."""
    used = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    outputs, cotangents = [o for o, _ in used], [c for _, c in used]
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, materialize_grads=True)


def check_all_orders(d: ChannelwiseTensorProduct, dtype: torch.dtype, device: str, *, nodes: int, edges: int) -> None:
    """z, its gradients and gradients of those, each against torch's derivatives of the float64 definition."""
    sender, receiver = random_graph(nodes, edges, device)
    graph = edge_graph(sender, receiver, nodes, nodes)
    ours = operands(d, nodes, edges, dtype=dtype, device=device)
    theirs = [t.detach().double().requires_grad_() for t in ours]
    z = channelwise_tp_conv(d, *ours, graph)
    oracle = channelwise_conv(d, *theirs, sender, receiver, nodes)
    terms = 64.0 * max(1.0, edges / nodes)
    assert_close(z, oracle, terms=terms)
    g = torch.randn_like(oracle)
    first = torch.autograd.grad(z, ours, g.to(dtype), create_graph=True)
    first_oracle = gradients([oracle], theirs, [g])
    for a, b in zip(first, first_oracle, strict=True):
        assert_close(a, b, terms=terms)
    cotangents = [torch.randn_like(t) for t in first_oracle]
    second = gradients(first, ours, [c.to(dtype) for c in cotangents])
    second_oracle = gradients(first_oracle, theirs, cotangents)
    for a, b in zip(second, second_oracle, strict=True):
        assert_close(a, b, terms=4 * terms)


@pytest.mark.parametrize(
    "device, mul", [("cpu", 21), *(pytest.param("cuda", mul, marks=pytest.mark.gpu) for mul in (5, 32, 128))]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lmax", [0, 1, 2])
def test_mace_products(seed: int, device: str, mul: int, dtype: torch.dtype, lmax: int) -> None:
    """21 channels: a full vector and a part of one, in either dtype. Every count costs the host compiler its time."""
    check_all_orders(mace_product(lmax, mul), dtype, device, nodes=7, edges=90)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_products(rng: np.random.Generator, device: str, dtype: torch.dtype) -> None:
    for _ in range(2 if device == "cpu" else 12):
        check_all_orders(random_product(rng), dtype, device, nodes=5, edges=40)


@pytest.mark.gpu
@pytest.mark.parametrize("mul", [1, 33, 64, 192, 257, 512])
def test_channel_counts_on_gpu(seed: int, mul: int) -> None:
    check_all_orders(mace_product(1, mul), torch.float32, "cuda", nodes=7, edges=60)


def use_schedule(patch: pytest.MonkeyPatch, schedule: Schedule, *, splines_alone: bool = False) -> None:
    """One schedule for all kernels, or for those of splines, whatever the plan prefers."""
    launch = channelwise_run.cuda_launch

    def scheduled(*args: Any) -> channelwise_run.Launch:
        variant = args[2]
        return launch(*args[:4], schedule) if variant.order or not splines_alone else launch(*args)

    patch.setattr(channelwise_run, "cuda_launch", scheduled)


@pytest.mark.gpu
@pytest.mark.parametrize("vector, ring", [(1, 3), (2, 4), (4, 3)])
def test_operands_in_a_ring_on_gpu(seed: int, monkeypatch: pytest.MonkeyPatch, vector: int, ring: int) -> None:
    use_schedule(monkeypatch, Schedule(vector, 80, prefetch=False, ring=ring))
    check_all_orders(mace_product(1, 128), torch.float32, "cuda", nodes=9, edges=900)


@pytest.mark.gpu
def test_many_segments_on_gpu(seed: int) -> None:
    """A product whose outputs do not fit the registers of a thread is cut into several kernels."""
    x = tuple((40, degree) for degree in (0, 0, 1, 1, 2, 2, 3, 3))
    y = tuple((1, degree) for degree in range(4))
    z, paths = [], []
    for i, (mul, l1) in enumerate(x):
        for j, (_, l2) in enumerate(y):
            for l3 in range(abs(l1 - l2), min(l1 + l2, 3) + 1):
                paths.append(Path(i, j, len(z), 0.5))
                z.append((mul, l3))
    check_all_orders(ChannelwiseTensorProduct(x, y, tuple(z), tuple(paths)), torch.float32, "cuda", nodes=5, edges=80)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [False, True], ids=["own-weights", "shared-weights"])
def test_without_graph(rng: np.random.Generator, device: str, shared: bool) -> None:
    d = random_product(rng)
    ours = operands(d, 37, 37, dtype=torch.float64, device=device, shared=shared)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    index = torch.arange(37, device=device)
    z, oracle = channelwise_tp(d, *ours), channelwise_conv(d, *theirs, index, index, 37)
    assert_close(z, oracle, terms=64)
    g = torch.randn_like(oracle)
    got, expected = torch.autograd.grad(z, ours, g), torch.autograd.grad(oracle, theirs, g, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b if b is not None else torch.zeros_like(a), terms=256)


def test_gradcheck_to_third_order(seed: int) -> None:
    d = mace_product(1, 3, 1)
    sender, receiver = torch.randint(0, 3, (5,)), torch.randint(0, 3, (5,))
    graph = edge_graph(sender, receiver, 3, 3)
    inputs = operands(d, 3, 5, dtype=torch.float64)

    def conv(*args: torch.Tensor) -> torch.Tensor:
        return channelwise_tp_conv(d, *args, graph)

    def gradients(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad((conv(*args) ** 2).sum(), args, create_graph=True)
        return torch.autograd.grad(sum((t**2).sum() for t in first), args, create_graph=True)

    assert torch.autograd.gradcheck(conv, inputs)
    assert torch.autograd.gradgradcheck(conv, inputs)
    assert torch.autograd.gradcheck(gradients, inputs, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
def test_graph_shapes(seed: int, device: str) -> None:
    """No edges, no nodes, all edges into one node, one edge, every node isolated but one."""
    d = mace_product(1, 8, 2)
    for nodes, sender, receiver in (
        (0, [], []),
        (4, [], []),
        (1, [0], [0]),
        (3, [0] * 1000, [1] * 1000),
        (1001, list(range(1, 1001)), [0] * 1000),
        (50, [49, 49, 0], [0, 0, 49]),
    ):
        s = torch.tensor(sender, dtype=torch.int64, device=device)
        r = torch.tensor(receiver, dtype=torch.int64, device=device)
        ours = operands(d, nodes, len(sender), dtype=torch.float64, device=device)
        graph = edge_graph(s, r, nodes, nodes)
        z = channelwise_tp_conv(d, *ours, graph)
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        oracle = channelwise_conv(d, *theirs, s, r, nodes)
        assert_close(z, oracle, terms=64e3)
        g = torch.randn_like(z)
        expected = torch.autograd.grad(oracle, theirs, g)
        for a, b in zip(torch.autograd.grad(z, ours, g), expected, strict=True):
            assert_close(a, b, terms=64e3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice_and_in_any_edge_order_close(seed: int, device: str, dtype: torch.dtype) -> None:
    d = mace_product(1, 32)
    nodes, edges = 20, 700
    sender, receiver = random_graph(nodes, edges, device)
    x, y, w = operands(d, nodes, edges, dtype=dtype, device=device)
    graph = edge_graph(sender, receiver, nodes, nodes)

    def run() -> list[torch.Tensor]:
        z = channelwise_tp_conv(d, x, y, w, graph)
        return [z, *torch.autograd.grad(z, (x, y, w), torch.ones_like(z))]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
    shuffle = torch.randperm(edges, device=device)
    moved = channelwise_tp_conv(
        d, x, y[shuffle], w[shuffle], edge_graph(sender[shuffle], receiver[shuffle], nodes, nodes)
    )
    assert_close(moved, run()[0].double(), terms=edges)


def test_inputs_of_any_stride_and_index_type(seed: int) -> None:
    d = mace_product(1, 4)
    x, y, w = (t.detach() for t in operands(d, 6, 11, dtype=torch.float64))
    sender, receiver = random_graph(6, 11, "cpu")
    plain = channelwise_tp_conv(d, x, y, w, edge_graph(sender, receiver, 6, 6))
    strided = [torch.stack([t, -t], -1)[..., 0] for t in (x, y, w)]
    assert not strided[0].is_contiguous()
    graph = edge_graph(sender.int(), receiver.int(), 6, 6)
    assert torch.equal(plain, channelwise_tp_conv(d, *strided, graph))


def test_wrong_operands_are_named() -> None:
    d = mace_product(0, 4)
    graph = edge_graph(torch.tensor([0, 1]), torch.tensor([1, 0]), 2, 2)
    x, y, w = torch.randn(2, d.x_dim), torch.randn(2, d.y_dim), torch.randn(2, d.weight_numel)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\)"):
        channelwise_tp_conv(d, x[:, :3], y, w, graph)
    with pytest.raises(ValueError, match="y has shape"):
        channelwise_tp_conv(d, x, y[:1], w, graph)
    with pytest.raises(ValueError, match="w has shape"):
        channelwise_tp_conv(d, x, y, w.T, graph)
    with pytest.raises(TypeError, match=r"w has dtype torch\.float64"):
        channelwise_tp_conv(d, x, y, w.double(), graph)
    with pytest.raises(TypeError, match="float16"):
        channelwise_tp_conv(d, x.half(), y.half(), w.half(), graph)
    with pytest.raises(ValueError, match="outside"):
        edge_graph(torch.tensor([0, 2]), torch.tensor([1, 0]), 2, 2)
    with pytest.raises(ValueError, match="outside"):
        edge_graph(torch.tensor([0, 1]), torch.tensor([1, -1]), 2, 2)
    with pytest.raises(TypeError, match="float"):
        edge_graph(torch.tensor([0.0]), torch.tensor([0]), 1, 1)
    with pytest.raises(ValueError, match="one shape and device"):
        edge_graph(torch.tensor([0]), torch.tensor([0, 0]), 1, 1)


@pytest.mark.gpu
def test_out_of_range_edges_poison_results_on_gpu() -> None:
    d = mace_product(0, 32)
    x, y, w = (t.detach() for t in operands(d, 4, 3, dtype=torch.float32, device="cuda"))
    graph = edge_graph(torch.tensor([0, 9, 1], device="cuda"), torch.tensor([1, 0, 2], device="cuda"), 4, 4)
    assert torch.isnan(channelwise_tp_conv(d, x, y, w, graph)).all()
    with pytest.raises(ValueError, match="outside"):
        graph.check()


def test_descriptions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UnsupportedDescriptionError, match="cannot give 2"):
        ChannelwiseTensorProduct(((4, 0),), ((1, 1),), ((4, 2),), (Path(0, 0, 0, 1.0),))
    with pytest.raises(UnsupportedDescriptionError, match="multiplicity 4 into 5"):
        ChannelwiseTensorProduct(((4, 0),), ((1, 1),), ((5, 1),), (Path(0, 0, 0, 1.0),))
    with pytest.raises(UnsupportedDescriptionError, match="at least one path"):
        ChannelwiseTensorProduct(((4, 0),), ((1, 1),), ((4, 1),), ())
    with pytest.raises(UnsupportedDescriptionError, match="l=7"):
        ChannelwiseTensorProduct(((4, 7),), ((1, 0),), ((4, 7),), (Path(0, 0, 0, 1.0),))


def test_key_round_trip(rng: np.random.Generator) -> None:
    d = random_product(rng)
    assert ChannelwiseTensorProduct.parse(d.key) == d
    assert hash(ChannelwiseTensorProduct.parse(d.key)) == hash(d)


@pytest.mark.parametrize("device", DEVICES)
def test_fake_kernels_and_schemas(seed: int, device: str) -> None:
    d = mace_product(1, 4, 1)
    x, y, w = operands(d, 3, 5, dtype=torch.float64, device=device)
    graph = edge_graph(*random_graph(3, 5, device), 3, 3)
    torch.library.opcheck(torch.ops.mace_fast.conv.default, (x, y, w, *graph.lists, d.key))


@pytest.mark.gpu
def test_streams_and_graph_capture(seed: int) -> None:
    d = mace_product(1, 32)
    x, y, w = (t.detach() for t in operands(d, 20, 300, dtype=torch.float32, device="cuda"))
    graph = edge_graph(*random_graph(20, 300, "cuda"), 20, 20)
    expected = channelwise_tp_conv(d, x, y, w, graph)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        z = channelwise_tp_conv(d, x, y, w, graph)
    x.mul_(2.0)
    captured.replay()
    torch.cuda.synchronize()
    assert_close(z, 2.0 * expected.double())


def test_tolerances_can_fail(seed: int) -> None:
    """The comparison used throughout rejects an error of a few hundred roundings."""
    oracle = torch.randn(100, dtype=torch.float64)
    for dtype, epsilon in EPSILON.items():
        with pytest.raises(AssertionError):
            assert_close((oracle * (1 + 2000 * epsilon)).to(dtype), oracle)
