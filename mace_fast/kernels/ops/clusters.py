"""Edges in the order in which backward goes through clusters of receivers; see headers/channelwise_clusters.cuh."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.plan.layout import CLUSTER_SHARES
from mace_fast.kernels.plan.sharing import cluster_window


class Clusters(NamedTuple):
    """Edges by cluster of receivers and sender. All tensors int32, on one device.

    Attributes:
        order: [E], the edges.
        row: [clusters + 1], where each cluster's edges begin in ``order``.
        run_order: [E], by sender the places in ``order`` where runs of edges begin; the rest is of no use.
        run_row: [num_senders + 1].
    """

    order: Tensor
    row: Tensor
    run_order: Tensor
    run_row: Tensor


def find_clusters(sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int, size: int) -> Clusters:
    """Sort edges by clusters of ``size`` receivers; does not wait for the device.

    ``sender`` and ``receiver``: [E] int32, in range.
    """
    device, (edges,) = sender.device, sender.shape
    cluster = receiver.long() // size
    keys, order = torch.sort((cluster << 32) | sender, stable=True)
    cluster = keys >> 32
    count = -(-num_receivers // size)
    row = torch.searchsorted(cluster, torch.arange(count + 1, device=device))
    # What a block works on: the first edges of a cluster, or what a window has of the others.
    limit = cluster_window(edges, max(count, 1))
    position = torch.arange(edges, device=device)
    first, last = row[cluster], row[cluster + 1]
    inside = position < first + limit
    window = position - position % limit
    begin = torch.where(inside, first, torch.maximum(first + limit, window))
    end = torch.minimum(torch.where(inside, first, window) + limit, last)
    share = (end - begin + CLUSTER_SHARES - 1) // CLUSTER_SHARES
    begins = (position - begin) % share == 0
    begins[1:] |= keys[1:] != keys[:-1]
    of, run_order = torch.sort(torch.where(begins, keys & 0xFFFFFFFF, num_senders), stable=True)
    run_row = torch.searchsorted(of, torch.arange(num_senders + 1, device=device))
    return Clusters(*(each.to(torch.int32) for each in (order, row, run_order, run_row)))
