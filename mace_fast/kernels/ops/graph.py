"""The edges of a graph, sorted once for gathering and for both directions of summing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.ops.clusters import Clusters, find_clusters
from mace_fast.kernels.plan.layout import CLUSTER

_INT32_MAX = 2**31 - 1


class EdgeGraph(NamedTuple):
    """Edges in the caller's order, with the two orders in which kernels walk them. All tensors on one device.

    Attributes:
        sender: [E] int32, the node an edge gathers from.
        receiver: [E] int32, the node an edge adds to.
        order: [E] int32, edges sorted by receiver (stable).
        row: [num_receivers + 1] int32, where each receiver's edges begin in ``order``.
        sender_order: [E] int32, edges sorted by sender (stable).
        sender_row: [num_senders + 1] int32.
        poison: [1] float32, 0, or NaN when an index was out of range: a result computed with such a graph is NaN
            throughout. On the CPU such a graph is refused outright.
        clusters: edges in the order of the fastest gradients, where they were asked for.
    """

    sender: Tensor
    receiver: Tensor
    order: Tensor
    row: Tensor
    sender_order: Tensor
    sender_row: Tensor
    poison: Tensor
    clusters: Clusters | None = None

    @property
    def lists(self) -> tuple[Tensor | None, ...]:
        """As ops take them: the tensors, those of clusters last."""
        return (*self[:7], *(self.clusters or (None,) * 4))

    @property
    def num_edges(self) -> int:
        return self.sender.shape[0]

    @property
    def num_receivers(self) -> int:
        return self.row.shape[0] - 1

    @property
    def num_senders(self) -> int:
        return self.sender_row.shape[0] - 1

    def to(self, device: torch.device | str) -> EdgeGraph:
        """The same graph on another device."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in self._fields[:7]}
        if self.clusters is not None:
            moved["clusters"] = Clusters(*(t.to(device) for t in self.clusters))
        return self._replace(**moved)

    def check(self) -> None:
        """Wait for the device and raise if an index was out of range.

        Raises:
            ValueError: some sender or receiver does not name a node.
        """
        if bool(torch.isnan(self.poison).any()):
            raise ValueError(_out_of_range(self.num_senders, self.num_receivers))


def _out_of_range(num_senders: int, num_receivers: int) -> str:
    return (
        f"edge_index holds an index outside [0, {num_senders}) for senders or [0, {num_receivers}) for receivers; "
        "rebuild the neighbour list for these atoms"
    )


def edge_graph(
    sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int, *, clusters: bool = False
) -> EdgeGraph:
    """Sort edges by receiver and by sender, on their device and without waiting for it.

    Args:
        sender, receiver: [E] int32 or int64, in any order, duplicates allowed.
        num_senders, num_receivers: number of nodes on each side.
        clusters: also make the lists by which gradients of channelwise convolutions are up to a quarter faster on a
            GPU. It takes as long again as the rest, and pays where gradients of many edges are computed more than
            once. On the CPU, which has no use for them, there are none.

    Raises:
        TypeError: indices are not integers.
        ValueError: shapes or devices differ, more than 2^31 - 1 edges or nodes, or (on the CPU) an index out of range.
            On a GPU an index out of range makes every result computed with the graph NaN; ``check()`` names it.
    """
    for name, index in (("sender", sender), ("receiver", receiver)):
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {index.dtype}; edge indices are int32 or int64")
        if index.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(index.shape)}; expected [num_edges]")
    if sender.shape != receiver.shape or sender.device != receiver.device:
        raise ValueError(
            f"sender ({tuple(sender.shape)} on {sender.device}) and receiver ({tuple(receiver.shape)} on "
            f"{receiver.device}) must have one shape and device"
        )
    if any(size > _INT32_MAX for size in (sender.shape[0], num_senders, num_receivers)):
        raise ValueError("a graph holds at most 2^31 - 1 edges and nodes; split it into several")
    graph = EdgeGraph(*torch.ops.mace_fast.edge_graph(sender, receiver, num_senders, num_receivers))
    if not clusters or sender.device.type != "cuda":
        return graph
    lists = torch.ops.mace_fast.edge_clusters(graph.sender, graph.receiver, num_senders, num_receivers)
    return graph._replace(clusters=Clusters(*lists))


_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define(
    "edge_graph(Tensor sender, Tensor receiver, SymInt num_senders, SymInt num_receivers) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "edge_clusters(Tensor sender, Tensor receiver, SymInt num_senders, SymInt num_receivers) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


def _edge_graph(sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int) -> tuple[Tensor, ...]:
    """The fields of an :class:`EdgeGraph`; an op of its own, so that compiled programs need not look into indices."""
    bad = torch.zeros((), dtype=torch.bool, device=sender.device)
    if sender.shape[0]:
        bad = (
            (sender.amin() < 0)
            | (sender.amax() >= num_senders)
            | (receiver.amin() < 0)
            | (receiver.amax() >= num_receivers)
        )
        if sender.device.type == "cpu" and bool(bad):
            raise ValueError(_out_of_range(num_senders, num_receivers))
    poison = torch.where(bad, torch.nan, 0.0).to(torch.float32).reshape(1)
    if num_senders:
        sender = sender.clamp(0, num_senders - 1)
    order, row = _sort(receiver, num_receivers)
    sender_order, sender_row = _sort(sender, num_senders)
    if num_receivers:
        receiver = receiver.clamp(0, num_receivers - 1)
    sender, receiver = (index.to(torch.int32, copy=True) for index in (sender, receiver))
    return sender, receiver, order, row, sender_order, sender_row, poison


def _edge_clusters(sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int) -> tuple[Tensor, ...]:
    return find_clusters(sender, receiver, num_senders, num_receivers, CLUSTER)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("edge_graph", _edge_graph, _device)
    _LIBRARY.impl("edge_clusters", _edge_clusters, _device)


@torch.library.register_fake("mace_fast::edge_graph")
def _fake_edge_graph(sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int) -> tuple[Tensor, ...]:
    edges = sender.shape[0]
    sizes = (edges, edges, edges, num_receivers + 1, edges, num_senders + 1)
    lists = (sender.new_empty(size, dtype=torch.int32) for size in sizes)
    return (*lists, sender.new_empty(1, dtype=torch.float32))


@torch.library.register_fake("mace_fast::edge_clusters")
def _fake_edge_clusters(sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int) -> tuple[Tensor, ...]:
    edges, clusters = sender.shape[0], -(-num_receivers // CLUSTER)
    return tuple(sender.new_empty(size) for size in (edges, clusters + 1, edges, num_senders + 1))


def _sort(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(order, row pointer) of a stable sort of the index."""
    values, order = torch.sort(index, stable=True)
    rows = torch.arange(count + 1, device=index.device, dtype=values.dtype)
    return order.to(torch.int32), torch.searchsorted(values, rows).to(torch.int32)
