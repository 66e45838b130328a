"""How a channelwise tensor product is laid on a GPU by a schedule: what lives in registers, what in shared memory, what
is split, and what that is expected to cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct, FlatPath
from mace_fast.kernels.plan.coupling import of_path
from mace_fast.kernels.plan.segments import Paths, split

OUTPUT_REGISTERS = 80
"""32-bit registers of outputs a thread may hold unless a schedule says otherwise; a product with more is cut into
segments."""

THREAD_REGISTERS = 240
"""32-bit registers that a plan may count on; the hardware has 255, and the estimate errs by a tenth."""

_BOOKKEEPING = 40
"""Registers for addresses, counters and what the compiler keeps between loads, as seen in its reports."""

SHARED_BYTES = 64 * 1024
"""Shared memory that one block may take, so that at least three blocks stay resident on sm_80 and later."""

RING_BYTES = 96 * 1024
"""Shared memory that a block with rings may take: what sm_86, sm_89 and sm_120 give; two then fit a multiprocessor of
sm_90."""

_COPY_BYTES = 16
"""Of one copy into a ring; it reads from an address that is a multiple of this."""

_GROUPS = 4
"""Receivers that a block works on where one warp has all channels, unless shared memory makes their tiles too short."""

CLUSTER = 4
"""Receivers of a cluster in the lists of graphs."""

CLUSTER_SHARES = 8
"""Groups of one warp that share the edges of a block that works on a cluster of receivers."""

CLUSTER_BYTES = 160 * 1024
"""Shared memory that a block with a cluster may take: what sm_80 gives."""

_SHORT_TILE = 8
"""Edges of a tile below which a block takes one receiver instead."""

_LEAST_TILE = 4
"""Edges of a tile whose numbers of edges take a multiple of 16 bytes: what follows them is read so many at a time."""

_REGISTER_FILE = 64 * 1024
"""32-bit registers of a multiprocessor."""

_REGISTER_STEP = 8
"""A thread gets a multiple of so many."""

_SHARED_FILE, _SHARED_OF_BLOCK = 228 * 1024, 1024
"""Bytes of shared memory of a multiprocessor of sm_90, and what each block takes besides its own."""

_MOST_THREADS = 2048
"""Of a multiprocessor."""

_BUSY_WARPS = {False: 16, True: 8}
"""Warps that keep a multiprocessor busy: of sums, which wait for memory, and of gradients (True), which compute."""

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
    """A flat path with its place among its segment's (index), in registers (x, z), in the shared forms (m, padded) and
    the warp that couples it."""

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

    @property
    def structure(self) -> SegmentPlan:
        """This segment without the places of its blocks and weights in memory; mirror images share it."""

        def placeless(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
            return tuple(replace(slot, offset=0) for slot in slots)

        paths = tuple(replace(p, flat=replace(p.flat, x_offset=0, z_offset=0, w_offset=0)) for p in self.paths)
        return replace(self, x=placeless(self.x), z=placeless(self.z), paths=paths)


@dataclass(frozen=True)
class Schedule:
    """The free choices of a plan.

    Attributes:
        vector: neighbouring channels that a thread holds: 1, 2 or 4. What is the same for all channels (indices, forms
            of y, the sum over channels for the gradient of y) is then done once for several, and loads are wider.
        registers: 32-bit registers of outputs a thread may hold; decides how many segments there are.
        prefetch: whether operands of the next edge are loaded while the current one is worked on; those of splines are
            a stream then, see headers/channelwise_stream.cuh.
        ring: edges whose weights and x are in shared memory or on their way there, instead of in registers: 0 (none),
            or 3 and more. For products whose channels fill all warps, with weights that lie side by side.
        cluster: receivers whose edges a block of backward goes through by sender, their gradients in shared memory:
            0 (each receiver has a group of its own), or a few. For weights that are read.
        tile: edges whose forms are made at a time, at most: 32, or fewer, which leaves shared memory to more blocks.
    """

    vector: int = 1
    registers: int = OUTPUT_REGISTERS
    prefetch: bool = True
    ring: int = 0
    cluster: int = 0
    tile: int = 32


@dataclass(frozen=True)
class Role:
    """What a kernel computes, as far as its plan depends on it; ``sums``: gradients, and sums at receivers besides."""

    dual: bool = False
    backward: bool = False
    spline: bool = False
    sums: bool = False


@dataclass(frozen=True)
class ChannelwisePlan:
    """Launch shape and segments for one description, element size and role.

    ``together``: no two segments write the gradient of the same block of x, so one launch runs them all side by side.
    Otherwise they are launched one after the other, and later ones add to what earlier ones wrote.
    """

    schedule: Schedule
    role: Role
    warps: int
    groups: int
    channel_blocks: int
    exact: bool
    item_bytes: int
    segments: tuple[SegmentPlan, ...]
    together: bool
    y_dim: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * 32 * self.groups

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor works on side by side, by the estimate of registers, and gains from."""
        fit = _REGISTER_FILE // (self.most_registers * self.threads)
        return max(1, min(fit, _BUSY_WARPS[self.role.backward] * 32 // self.threads))

    def shared_bytes(self, segment: SegmentPlan, *, want_y: bool) -> int:
        """Dynamic shared memory of a block, as the header's ``Shared`` lays it out."""
        forms = segment.tile * segment.stride * (2 if self.role.dual else 1)
        gradients = self.warps * segment.tile * (self.y_dim + self.role.spline) if want_y else 0
        places = segment.tile if self.role.spline else 0
        weighted = 16 if self.role.spline else 0
        rings = self.warps * self.ring_numbers(segment)
        numbers = rings + forms + gradients + places
        of_groups = (numbers * self.item_bytes + 3 * segment.tile * 4 + weighted) * self.groups
        return of_groups + self.schedule.cluster * segment.z_registers * 32 * self.schedule.vector * self.item_bytes

    def ring_numbers(self, segment: SegmentPlan) -> int:
        """Numbers of a warp's ring, as the header's ``Ring`` lays it out."""
        piece = 32 * self.schedule.vector
        abreast = 32 * 16 // (piece * self.item_bytes)
        weighted = sum(path.flat.weighted for path in segment.paths)
        copies = -(-weighted // abreast) - (-segment.x_registers // abreast)
        return self.schedule.ring * copies * abreast * piece * (2 if self.role.dual else 1)

    @property
    def alike(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of segments; those that share one code are together. They run side by side and differ in offsets."""
        runs: list[list[int]] = []
        for number, segment in enumerate(self.segments):
            if self.together and runs and self.segments[runs[-1][0]].structure == segment.structure:
                runs[-1].append(number)
            else:
                runs.append([number])
        return tuple(map(tuple, runs))

    @property
    def most_registers(self) -> int:
        """Of the segments' estimates."""
        return max(self.registers(segment) for segment in self.segments)

    def registers(self, segment: SegmentPlan) -> int:
        """An estimate of the 32-bit registers that a thread needs."""
        words = self.item_bytes // 4 * (2 if self.role.dual else 1)
        weights = len(segment.paths)
        operands = segment.x_registers + weights * (2 if self.role.spline and self.role.backward else 1)
        held = operands * (2 if self.schedule.prefetch else 1)
        if self.role.backward:
            # gradients of x, and of y for one chunk of 16; the outputs' gradients carry no tangent
            of_z = 5 if self.schedule.cluster else segment.z_registers  # of one path at a time
            of_z += segment.z_registers * self.role.sums  # of which tangents are kept alone
            outputs = of_z / (2 if self.role.dual else 1) + segment.x_registers
            fixed = 16 * words
        else:
            outputs, fixed = segment.z_registers, 0
        return int(words * self.schedule.vector * (outputs + held)) + fixed + _BOOKKEEPING

    def occupancy(self, segment: SegmentPlan) -> int:
        """Blocks that a multiprocessor of sm_90 has room for, by registers (the estimate) and shared memory."""
        of_thread = -(-self.registers(segment) // _REGISTER_STEP) * _REGISTER_STEP
        shared = self.shared_bytes(segment, want_y=self.role.backward) + _SHARED_OF_BLOCK
        return min(_REGISTER_FILE // (of_thread * self.threads), _SHARED_FILE // shared, _MOST_THREADS // self.threads)

    def traffic(self, segment: SegmentPlan) -> tuple[int, int, int]:
        """Bytes an edge: read from memory, gathered at its sender (from a cache where it is large enough), written.

        Splines' coefficients, which caches hold, and what is read and written once a receiver are left out.
        """
        weights = 0 if self.role.spline else sum(p.flat.mul for p in segment.paths if p.flat.weighted)
        x = sum(slot.dim * slot.mul for slot in segment.x)
        numbers = 2 if self.role.dual else 1
        read, gathered = numbers * (weights + self.y_dim), numbers * x
        written = weights + x + self.channel_blocks * (self.y_dim + self.role.spline) if self.role.backward else 0
        return read * self.item_bytes, gathered * self.item_bytes, written * self.item_bytes

    def multiply_adds(self, segment: SegmentPlan) -> int:
        """Of an edge, over all channels; those that interpolate splines are left out."""
        total = 0
        for path in segment.paths:
            uses, x = len(of_path(path.flat).uses), 2 * path.flat.l1 + 1
            once = x + uses  # weights times x, times forms
            if self.role.backward:
                products = len({(i, k) for i, _, k, _ in of_path(path.flat).triples})
                once = uses + 3 * x + products + len(of_path(path.flat).triples) + self.role.sums * uses
            total += path.flat.mul * once
        return total * (2 if self.role.dual else 1)

    def __str__(self) -> str:
        many = "side by side" if self.together else "one after the other"
        lines = [
            f"{self.warps} warp(s) of {self.schedule.vector} channel(s) a thread for a receiver x {self.groups} "
            f"receiver(s) a block, {self.channel_blocks} channel block(s), "
            f"{'all lanes busy' if self.exact else 'some lanes idle'}, {len(self.segments)} segment(s)"
            + (f" {many}" if len(self.segments) > 1 else "")
            + (f", a ring of {self.schedule.ring} edges in shared memory" if self.schedule.ring else "")
            + (f", {self.schedule.cluster} receivers a block, by sender" if self.schedule.cluster else "")
            + (f", {len(self.alike)} of them distinct" if len(self.alike) < len(self.segments) else "")
        ]
        for number, segment in enumerate(self.segments):
            forms = sum(len(of_path(p.flat).entries) for p in segment.paths)
            fmas = sum(len(of_path(p.flat).uses) for p in segment.paths)
            lines.append(
                f"segment {number}: {len(segment.paths)} paths, {segment.x_registers} x and "
                f"{segment.z_registers} z values a channel, {forms} forms of y in shared memory, "
                f"{fmas} multiply-adds an edge and channel, tile of {segment.tile} edges, "
                f"about {self.registers(segment)} registers"
            )
            read, gathered, written = self.traffic(segment)
            lines.append(
                f"  an edge: {read} bytes read, {gathered} gathered, {written} written, {self.multiply_adds(segment)} "
                f"multiply-adds; a multiprocessor: {self.occupancy(segment)} block(s) of {self.threads} threads with "
                f"{self.shared_bytes(segment, want_y=self.role.backward)} bytes of shared memory each"
            )
        return "\n".join(lines)


def _vectors(description: ChannelwiseTensorProduct, item_bytes: int) -> tuple[int, ...]:
    """Channels a thread may hold, most first: loads of up to 16 bytes, rows that begin on such a boundary."""
    muls = [mul for blocks in (description.x, description.z) for mul, _ in blocks]
    plain = all(mul == 1 for mul, _ in description.y)
    most = max(path.mul for path in description.flat_paths())
    return tuple(
        count
        for count in (4, 2, 1)
        if count == 1
        or (plain and count * item_bytes <= 16 and all(m % count == 0 for m in muls) and most >= 32 * count)
    )


def lay_out(description: ChannelwiseTensorProduct, item_bytes: int, role: Role, schedule: Schedule) -> ChannelwisePlan:
    """The plan that follows a schedule.

    Raises:
        ValueError: it does not fit the product; the message says why.
    """
    if schedule.vector not in _vectors(description, item_bytes):
        raise ValueError(f"{schedule.vector} channels a thread do not fit the multiplicities of {description.x}")
    flat = description.flat_paths()
    channels = -(-max(path.mul for path in flat) // schedule.vector)
    warps = 1 if schedule.cluster else min(-(-channels // 32), MAX_WARPS)
    channel_blocks = -(-channels // (warps * 32))
    exact = all(path.mul == warps * 32 * channel_blocks * schedule.vector for path in flat)
    quad = 16 // item_bytes
    limit = schedule.registers * 4 // (item_bytes * schedule.vector)
    groups_of_paths, together = split(flat, limit)
    form_bytes = item_bytes * (2 if role.dual else 1)
    if schedule.cluster:
        several: tuple[int, ...] = (CLUSTER_SHARES,)
    elif warps == 1 and not schedule.ring:
        several = (_GROUPS, 1)
    else:
        several = (1,)
    for groups in several:
        written: set[int] = set()
        segments = []
        for paths in groups_of_paths:
            segment = _segment(paths, warps, quad, groups, form_bytes, description.y_dim, item_bytes, written)
            segments.append(replace(segment, tile=min(segment.tile, schedule.tile)))
            written.update(slot.offset for slot in segments[-1].x)
        if min(segment.tile for segment in segments) >= _SHORT_TILE:
            break
    layout = ChannelwisePlan(
        schedule,
        role,
        warps,
        groups,
        channel_blocks,
        exact,
        item_bytes,
        tuple(segments),
        together or not role.backward,
        description.y_dim,
    )
    if schedule.ring:
        _require_ring(layout, description)
    if schedule.cluster:
        _require_cluster(layout)
    return layout


def _require_cluster(layout: ChannelwisePlan) -> None:
    role, schedule = layout.role, layout.schedule
    if not role.backward or role.spline or schedule.ring:
        raise ValueError("clusters are for gradients, with weights that are read, without rings")
    if min(segment.tile for segment in layout.segments) < _LEAST_TILE:
        raise ValueError(f"forms of y leave no room for tiles of {_LEAST_TILE} edges of {CLUSTER_SHARES} groups")
    most = max(layout.shared_bytes(segment, want_y=True) for segment in layout.segments)
    if most > CLUSTER_BYTES:
        raise ValueError(f"a cluster of {schedule.cluster} receivers takes {most} bytes of shared memory")


def _require_ring(layout: ChannelwisePlan, d: ChannelwiseTensorProduct) -> None:
    ring, tile = layout.schedule.ring, min(segment.tile for segment in layout.segments)
    side_by_side = all(path.flat.w_stride == 1 for segment in layout.segments for path in segment.paths)
    if layout.role.spline or not layout.exact or not side_by_side or layout.schedule.prefetch:
        raise ValueError(
            "a ring is for weights that are read, of products whose channels fill all warps, without prefetch"
        )
    places = [d.x_dim, d.weight_numel]
    for segment in layout.segments:
        places += [slot.offset for slot in segment.x] + [path.flat.w_offset for path in segment.paths]
    if any(place * layout.item_bytes % _COPY_BYTES for place in places):
        raise ValueError(
            f"a ring copies {_COPY_BYTES} bytes at a time: rows of x and weights, and blocks in them, begin there"
        )
    most = max(layout.shared_bytes(segment, want_y=layout.role.backward) for segment in layout.segments)
    if not 3 <= ring <= tile or most > RING_BYTES:
        raise ValueError(f"a ring of {ring} edges takes {most} bytes of shared memory, with tiles of {tile} edges")


def _segment(
    paths: Paths,
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
    for index, (_, path) in enumerate(paths):
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
    while tile > 1 and (tile * stride * form_bytes + warps * tile * y_dim * item_bytes) * groups > SHARED_BYTES:
        tile //= 2
    return SegmentPlan(tuple(x_slots.values()), tuple(z_slots.values()), tuple(planned), stride, tile)
