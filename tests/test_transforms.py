"""The convolution inside torch's program transforms: compile, export, autocast, vmap."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracles import mace_product
from torch import Tensor

from mace_fast.kernels import channelwise_tp, channelwise_tp_conv, edge_graph

pytestmark = pytest.mark.filterwarnings("ignore")
PRODUCT = mace_product(1, 5)
NODES = 4


class Conv(torch.nn.Module):
    """From edges in any order to messages."""

    def forward(self, x: Tensor, y: Tensor, w: Tensor, sender: Tensor, receiver: Tensor) -> Tensor:
        return channelwise_tp_conv(PRODUCT, x, y, w, edge_graph(sender, receiver, NODES, NODES))


def inputs(edges: int = 9) -> tuple[Tensor, ...]:
    x = torch.randn(NODES, PRODUCT.x_dim, requires_grad=True)
    y = torch.randn(edges, PRODUCT.y_dim, requires_grad=True)
    w = torch.randn(edges, PRODUCT.weight_numel, requires_grad=True)
    return x, y, w, torch.randint(NODES, (edges,)), torch.randint(NODES, (edges,))


def results(function: Any, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Value and gradients."""
    value = function(*given)
    return [value, *torch.autograd.grad(value.square().sum(), given[:3])]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(seed: int, backend: str) -> None:
    """Sizes that change are served without falling back, and bit for bit."""
    compiled = torch.compile(Conv(), fullgraph=True, dynamic=True, backend=backend)
    for edges in (9, 9, 14, 31):
        given = inputs(edges)
        for found, expected in zip(results(compiled, given), results(Conv(), given), strict=True):
            assert torch.equal(found, expected)


def test_compiled_edges_out_of_range_are_refused(seed: int) -> None:
    compiled = torch.compile(Conv(), fullgraph=True, backend="aot_eager")
    x, y, w, sender, receiver = inputs()
    compiled(x, y, w, sender, receiver)
    receiver[3] = NODES
    with pytest.raises(ValueError, match="outside"):
        compiled(x, y, w, sender, receiver)


def test_exports_with_any_number_of_edges(seed: int) -> None:
    edges = torch.export.Dim("edges", min=2, max=2**31 - 1)
    given = tuple(t.detach() for t in inputs())
    shapes = ({}, *({0: edges} for _ in range(4)))
    program = torch.export.export(Conv(), given, dynamic_shapes=shapes).module()
    for count in (2, 9, 40):
        given = tuple(t.detach() for t in inputs(count))
        assert torch.equal(program(*given), Conv()(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_narrow_the_sums(seed: int, dtype: torch.dtype) -> None:
    """What a linear map made narrow is widened; what is wide stays as it is."""
    x, y, w, sender, receiver = inputs()
    graph = edge_graph(sender, receiver, NODES, NODES)
    wide = channelwise_tp_conv(PRODUCT, x, y, w, graph)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(channelwise_tp_conv(PRODUCT, x, y, w, graph), wide)
        narrow = x @ torch.eye(PRODUCT.x_dim)
        assert narrow.dtype == dtype
        z = channelwise_tp_conv(PRODUCT, narrow, y, w, graph)
        z.sum().backward()
        assert channelwise_tp(PRODUCT, narrow[sender], y, w).dtype == torch.float32
    assert z.dtype == torch.float32 and x.grad is not None
    assert torch.equal(z, channelwise_tp_conv(PRODUCT, narrow.float(), y, w, graph))
    with pytest.raises(TypeError, match="bfloat16|float16"):
        channelwise_tp_conv(PRODUCT, narrow, y, w, graph)


def test_vmap_over_weights(seed: int) -> None:
    """A committee of radial networks on one graph."""
    x, y, _, sender, receiver = inputs()
    graph = edge_graph(sender, receiver, NODES, NODES)
    weights = torch.randn(3, 9, PRODUCT.weight_numel)
    found = torch.vmap(lambda w: channelwise_tp_conv(PRODUCT, x, y, w, graph))(weights)
    assert torch.equal(found, torch.stack([channelwise_tp_conv(PRODUCT, x, y, w, graph) for w in weights]))


def test_vmap_asks_users_for_nothing(seed: int) -> None:
    """A Hessian is a map over rows of second derivatives; torch warns for each op without a rule of its own."""
    x, y, w, sender, receiver = inputs()
    graph = edge_graph(sender, receiver, NODES, NODES)
    leaves = [t.detach().requires_grad_() for t in (x, y, w)]
    z = channelwise_tp_conv(PRODUCT, *leaves, graph)
    first = torch.autograd.grad(z.square().sum(), leaves, create_graph=True)
    rows = [torch.randn(4, *t.shape, dtype=t.dtype) for t in first]

    def second(*directions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(first, leaves, directions, retain_graph=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.vmap(second)(*rows)
    for ours, *expected in zip(found, *(second(*entry) for entry in zip(*rows, strict=True)), strict=True):
        assert torch.equal(ours, torch.stack(expected))
