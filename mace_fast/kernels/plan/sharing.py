"""How the edges of a graph are shared out among the groups of warps that run a plan.

A group works on one receiver after another. Many edges of one receiver, and those of few receivers, are split between
groups, whose sums another kernel adds in a fixed order; see headers/channelwise_conv.cuh. Nothing but shapes decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mace_fast.kernels.plan.layout import ChannelwisePlan

_TARGET_EDGES = 32
"""Edges that one group of warps should see at least: with fewer a receiver, it takes several receivers in a row."""
_MANY_GROUPS = 768
"""Groups of warps that keep a GPU busy. Where receivers give fewer, several groups share the edges of each; where they
give more, only of gradients alone, which need not be added, and only to fill the last round of blocks."""
_MOST_EDGES = 512
"""Edges of one receiver that a group works on in any case; the rest is shared out."""
_MULTIPROCESSORS = 132
"""Of an H100. A constant, so that sums are split alike on all GPUs that run the same code."""
_LEAST_EDGES = {False: 16, True: 8}
"""Edges that a part of a receiver should have at least: of a sum, which is added to others, and of gradients (True)."""
_PART_COST = 2
"""What a part costs before its first edge and after its last, in edges."""
_WORTH = 0.95
"""Of the time without parts that they may take, where receivers keep a GPU busy."""
_CLUSTER_BLOCKS = 256
"""Blocks that keep a GPU busy with clusters of receivers, each of 8 warps; fewer clusters are shared out."""
_LEAST_OF_CLUSTER = 64
"""Edges that such a block should have at least."""


@dataclass(frozen=True)
class Sharing:
    """Who works on what.

    Attributes:
        run: receivers that one group works through.
        groups: that work through receivers; those after them have windows, stretches of ``limit`` edges.
        limit: edges of a receiver beyond which they are left to windows.
        parts: groups that share a receiver or window.
        blocks: of threads, for each part and block of channels.
        partial_sums: rows of sums that are to be added to a receiver's.
    """

    run: int
    groups: int
    limit: int
    parts: int
    blocks: int
    partial_sums: int

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """As the kernels take them: run, groups, limit, parts."""
        return self.run, self.groups, self.limit, self.parts


def share(
    layout: ChannelwisePlan,
    receivers: int,
    edges: int,
    *,
    windows: bool,
    side_by_side: int,
    working: int | None = None,
) -> Sharing:
    """Share out the edges of a graph.

    Args:
        layout: what runs.
        receivers, edges: at least one receiver.
        windows: whether there is a list of edges by receiver for windows to be stretches of.
        side_by_side: segments of the plan that one launch runs.
        working: edges that a launch works on, which are next to each other by receiver, if not all.
    """
    run = run_length(receivers, edges)
    groups = -(-receivers // run)
    limit = edge_limit(groups, receivers, edges)
    stretches = -(-edges // limit) if windows and edges > limit else 0
    parts = 1
    if run == 1:
        slots = _MULTIPROCESSORS * layout.resident
        least = _LEAST_EDGES[layout.role.backward]
        if working is not None and working < edges:  # to be shared among as many groups, of fewer receivers
            receivers, edges = max(1, receivers * working // edges), working
        sums = layout.role.sums or not layout.role.backward
        parts = parts_of(receivers, edges, layout.groups, layout.channel_blocks * side_by_side, slots, least, sums)
    blocks = -(-(groups + stretches) // layout.groups)
    partial_sums = blocks * layout.groups * parts - groups if stretches or parts > 1 else 0
    return Sharing(run, groups, limit, parts, blocks, partial_sums)


def cluster_window(edges: int, clusters: int) -> int:
    """Edges of a cluster of receivers that one block works on; others have windows of so many, each with a block.

    Where clusters fill a GPU that is twice the average: few have windows. Nothing but shapes decides, so that those who
    look for runs of edges and those who go through them agree.
    """
    if 2 * clusters >= _CLUSTER_BLOCKS:
        return max(_LEAST_OF_CLUSTER, -(-2 * edges // clusters))
    return max(_LEAST_OF_CLUSTER, -(-edges // _CLUSTER_BLOCKS))


def run_length(receivers: int, edges: int) -> int:
    """Receivers a group works through: enough for a full tile of edges where receivers have few."""
    return max(1, min(_TARGET_EDGES, _TARGET_EDGES * receivers // max(edges, 1)))


def edge_limit(groups: int, receivers: int, edges: int) -> int:
    """Edges of a receiver beyond which they are shared out to windows of so many. Of few receivers only those that have
    half as many again as others have windows: parts are of equal lengths, and whole."""
    if groups >= _MANY_GROUPS:
        return _MOST_EDGES
    return max(_TARGET_EDGES, -(-3 * edges // (2 * receivers)))


@lru_cache(maxsize=512)
def parts_of(receivers: int, edges: int, per_block: int, side_by_side: int, slots: int, least: int, sums: bool) -> int:
    """Into how many parts the edges of each receiver, or of a window, are split: 1 where receivers fill a GPU evenly.

    Blocks run in rounds of ``slots``, each as long as a part takes; the shortest wins. Nothing but shapes decides.

    Args:
        per_block: groups of a block.
        side_by_side: blocks that a group's work is spread over anyway.
        slots: blocks that run at a time.
        least: edges of a part, on average.
        sums: whether parts are summed, which takes memory and another kernel.
    """
    many, mean = receivers >= _MANY_GROUPS, edges / receivers
    if many and sums:
        return 1

    def time(parts: int) -> float:
        blocks = -(-receivers * parts // per_block) * side_by_side
        return -(-blocks // slots) * (mean / parts + _PART_COST)

    best = min(range(1, max(1, min(int(mean / least), slots)) + 1), key=time)
    return 1 if many and time(best) > _WORTH * time(1) else best
