"""How a channelwise tensor product is laid on a GPU: what lives in registers, what in shared memory, what is split.

The decision is made once, from the description and stated limits alone, and prints itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct, FlatPath
from mace_fast.kernels.plan.coupling import of_path

ACCUMULATOR_BYTES = {False: 80 * 4, True: 40 * 4}
"""Bytes of outputs a thread keeps in registers; a product with more is cut into segments of output blocks. Operands
with tangents take twice the registers, so less is left for outputs."""

SHARED_BYTES = 64 * 1024
"""Shared memory that one block may take, so that at least three blocks stay resident on sm_80 and later."""

MAX_WARPS = 8
"""Warps that share one receiver, 32 channels each; more channels go to further blocks."""


@dataclass(frozen=True)
class Slot:
    """A block of x or z that a segment holds in registers: first register, dimension, multiplicity, offset in a row.

    ``fresh`` is false when an earlier segment has written this block's gradient, to which this one then adds.
    """

    base: int
    dim: int
    mul: int
    offset: int
    fresh: bool = True


@dataclass(frozen=True)
class PlannedPath:
    """A flat path with its place in registers (x, z), in the shared forms (m, padded) and the warp that couples it."""

    flat: FlatPath
    index: int
    x: int
    z: int
    m: int
    padded: int
    warp: int


@dataclass(frozen=True)
class SegmentPlan:
    """A set of output blocks whose sums fit the registers of a thread; each segment is one kernel."""

    x: tuple[Slot, ...]
    z: tuple[Slot, ...]
    paths: tuple[PlannedPath, ...]
    stride: int
    tile: int

    @property
    def x_registers(self) -> int:
        return sum(slot.dim for slot in self.x)

    @property
    def z_registers(self) -> int:
        return sum(slot.dim for slot in self.z)


@dataclass(frozen=True)
class ChannelwisePlan:
    """Launch shape and segments for one description, element size and kind of number."""

    warps: int
    groups: int
    channel_blocks: int
    exact: bool
    item_bytes: int
    segments: tuple[SegmentPlan, ...]
    y_dim: int

    def shared_bytes(self, segment: SegmentPlan, *, dual: bool, backward: bool, order: int = 0) -> int:
        """Dynamic shared memory of a block, as the header's ``Shared`` lays it out."""
        forms = segment.tile * segment.stride * (2 if dual else 1)
        gradients = self.warps * segment.tile * (self.y_dim + (1 if order else 0)) if backward else 0
        blend = segment.tile * 4 * order
        return ((forms + gradients + blend) * self.item_bytes + 3 * segment.tile * 4) * self.groups

    def __str__(self) -> str:
        lines = [
            f"{self.warps} warp(s) a receiver x {self.groups} receiver(s) a block, "
            f"{self.channel_blocks} channel block(s), "
            f"{'all lanes busy' if self.exact else 'some lanes idle'}"
        ]
        for number, segment in enumerate(self.segments):
            forms = sum(len(of_path(p.flat).entries) for p in segment.paths)
            fmas = sum(len(of_path(p.flat).uses) for p in segment.paths)
            lines.append(
                f"segment {number}: {len(segment.paths)} paths, {segment.x_registers} x and "
                f"{segment.z_registers} z values a thread, {forms} forms of y in shared memory, "
                f"{fmas} multiply-adds an edge and channel, tile of {segment.tile} edges"
            )
        return "\n".join(lines)


@lru_cache(maxsize=256)
def plan(description: ChannelwiseTensorProduct, item_bytes: int, dual: bool) -> ChannelwisePlan:
    """The plan for one description. ``item_bytes`` is 4 or 8; ``dual`` plans for operands with tangents."""
    flat = description.flat_paths()
    channels = max(path.mul for path in flat)
    warps = min(-(-channels // 32), MAX_WARPS)
    channel_blocks = -(-channels // (warps * 32))
    groups = 4 if warps == 1 else 1
    exact = all(path.mul == warps * 32 * channel_blocks for path in flat)
    quad = 16 // item_bytes
    written: set[int] = set()
    segments = []
    for paths in _split(flat, ACCUMULATOR_BYTES[dual] // item_bytes):
        form_bytes = item_bytes * (2 if dual else 1)
        segments.append(_segment(paths, warps, quad, groups, form_bytes, description.y_dim, item_bytes, written))
        written.update(slot.offset for slot in segments[-1].x)
    return ChannelwisePlan(warps, groups, channel_blocks, exact, item_bytes, tuple(segments), description.y_dim)


def _split(flat: tuple[FlatPath, ...], limit: int) -> list[list[tuple[int, FlatPath]]]:
    """Paths grouped so that the output blocks of a group fit the limit; paths of one output block stay together."""
    blocks: dict[int, list[tuple[int, FlatPath]]] = {}
    for index, path in enumerate(flat):
        blocks.setdefault(path.z_offset, []).append((index, path))
    groups: list[list[tuple[int, FlatPath]]] = []
    room = 0
    total = sum(2 * paths[0][1].l3 + 1 for paths in blocks.values())
    count = -(-total // limit)
    target = min(limit, -(-total // count) + 6)  # even shares: a small last segment reads x and y for little work
    for paths in blocks.values():
        size = 2 * paths[0][1].l3 + 1
        if not groups or room < size:
            groups.append([])
            room = target
        groups[-1].extend(paths)
        room -= size
    return groups


def _segment(
    paths: list[tuple[int, FlatPath]],
    warps: int,
    quad: int,
    groups: int,
    form_bytes: int,
    y_dim: int,
    item_bytes: int,
    written: set[int],
) -> SegmentPlan:
    x_slots: dict[int, Slot] = {}
    z_slots: dict[int, Slot] = {}
    x_used = z_used = m_used = 0
    load = [0] * warps
    planned = []
    for index, path in paths:
        if path.x_offset not in x_slots:
            x_slots[path.x_offset] = Slot(
                x_used, 2 * path.l1 + 1, path.mul, path.x_offset, path.x_offset not in written
            )
            x_used += 2 * path.l1 + 1
        if path.z_offset not in z_slots:
            z_slots[path.z_offset] = Slot(z_used, 2 * path.l3 + 1, path.mul, path.z_offset)
            z_used += 2 * path.l3 + 1
        structure = of_path(path)
        padded = -(-max(len(structure.entries), 1) // quad) * quad
        warp = load.index(min(load))
        load[warp] += sum(len(entry) for entry in structure.entries) + padded // quad
        planned.append(
            PlannedPath(path, index, x_slots[path.x_offset].base, z_slots[path.z_offset].base, m_used, padded, warp)
        )
        m_used += padded
    stride = m_used if (m_used // quad) % 2 else m_used + quad  # an odd number of 16-byte words: no bank conflicts
    tile = 32
    while tile > 4 and (tile * stride * form_bytes + warps * tile * y_dim * item_bytes) * groups > SHARED_BYTES:
        tile //= 2
    return SegmentPlan(tuple(x_slots.values()), tuple(z_slots.values()), tuple(planned), stride, tile)
