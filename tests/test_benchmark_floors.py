"""The floors that benchmarks/profile_step.py compares with, against counts by hand."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from benchmarks.floors import Recorder, conv_operations
from mace_fast.kernels import ChannelwiseTensorProduct, edge_graph
from mace_fast.kernels.description.channelwise import Path
from mace_fast.kernels.ops.spline_conv import FrozenGraph, RadialSpline, spline_conv


def test_operations_of_a_scalar_product() -> None:
    d = ChannelwiseTensorProduct(((8, 0),), ((1, 0),), ((8, 0),), (Path(0, 0, 0, 1.0),))
    # Forward: a polynomial of 4 coefficients, w * x, times the harmonic. Backward: the polynomial and its slope, the
    # cotangent times the harmonic, x times the cotangent, times w; summed over x for the length; and for dx times w.
    assert conv_operations(d, 4, False, False) == 2 * 8 * (4 + 1 + 1)
    assert conv_operations(d, 4, True, False) == 2 * 8 * (2 * 4 + 1 + 1 + 2)
    assert conv_operations(d, 4, True, True) == 2 * 8 * (2 * 4 + 1 + 1 + 2 + 1)


def test_bytes_of_a_convolution(seed: int) -> None:
    d = ChannelwiseTensorProduct(((8, 0),), ((1, 0),), ((8, 0),), (Path(0, 0, 0, 1.0),))
    nodes, edges, intervals = 3, 5, 100
    graph = edge_graph(torch.randint(0, nodes, (edges,)), torch.zeros(edges, dtype=torch.int64), nodes, nodes)
    frozen = FrozenGraph(graph.sender, graph.receiver, None, graph.row, None, None)
    x, y, radius = torch.randn(nodes, 8), torch.randn(edges, 1), torch.rand(edges)
    spline = RadialSpline(None, torch.randn(intervals + 1, 4, 8), intervals, float(intervals))
    recorder = Recorder(lambda number, name: nullcontext())
    with recorder:
        spline_conv(d, x, y, radius, frozen, spline)
    (operation,) = recorder.operations
    lists = edges + edges + nodes + 1  # sender, receiver, row
    table = edges * 4 * 8  # one interval an edge at most, not all there are
    assert operation.name == "mace_fast.spline_conv"
    assert operation.bytes == 4 * (nodes * 8 + edges + edges + lists + table + nodes * 8)
    assert operation.arithmetic == edges * conv_operations(d, 4, False, False)
    assert operation.floor_s(1e9, 1.0) == operation.arithmetic and operation.floor_s(1.0, None) == operation.bytes
