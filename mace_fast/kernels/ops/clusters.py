"""Edges in the order in which backward goes through clusters of receivers; see headers/channelwise_clusters.cuh."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.ops.graph import EdgeGraph
from mace_fast.kernels.plan.channelwise import CLUSTER_SHARES


class Clusters(NamedTuple):
    """Edges by cluster of receivers and sender. All tensors int32, on one device.

    Attributes:
        order: [E], the edges.
        row: [clusters + 1], where each cluster's edges begin in ``order``.
        run_order: [E], by sender the places in ``order`` where runs of edges begin; the rest is of no use.
        run_row: [num_senders + 1].
        receivers: of a cluster.
    """

    order: Tensor
    row: Tensor
    run_order: Tensor
    run_row: Tensor
    receivers: int


def find_clusters(graph: EdgeGraph, receivers: int) -> Clusters:
    """Sort the edges of a graph by clusters of so many receivers; does not wait for the device."""
    device, senders = graph.sender.device, graph.num_senders
    cluster = graph.receiver.long() // receivers
    keys, order = torch.sort((cluster << 32) | graph.sender, stable=True)
    cluster = keys >> 32
    count = -(-graph.num_receivers // receivers)
    row = torch.searchsorted(cluster, torch.arange(count + 1, device=device))
    lengths = row.diff()
    shares = (lengths + CLUSTER_SHARES - 1) // CLUSTER_SHARES
    place = torch.arange(graph.num_edges, device=device) - row[cluster]
    begins = (place % shares[cluster]) == 0
    begins[1:] |= keys[1:] != keys[:-1]
    of, run_order = torch.sort(torch.where(begins, keys & 0xFFFFFFFF, senders), stable=True)
    run_row = torch.searchsorted(of, torch.arange(senders + 1, device=device))
    order, row, run_order, run_row = (each.to(torch.int32) for each in (order, row, run_order, run_row))
    return Clusters(order, row, run_order, run_row, receivers)
