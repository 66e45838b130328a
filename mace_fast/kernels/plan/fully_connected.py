"""How a fully connected tensor product is laid on a GPU: threads of a block, and what is in shared memory at a time.

The weights of an edge are thousands of numbers, each used once: everything is arranged so that they are read, and
their gradient written, once and in order. What they multiply, the coupled products t of x and y, is small and lies in
shared memory; where all of it does not fit, it is made in batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mace_fast.kernels.description.fully_connected import FullyConnectedTensorProduct

_THREADS = (96, 128, 160, 192)

BATCH_BYTES = 16 * 1024
"""Shared memory for t, and again for sums that wait for one another: fourteen blocks then share a multiprocessor."""

_WARP = 32


@dataclass(frozen=True)
class Piece:
    """Rows [first, first + rows) of a path's weights, their t at ``at`` in shared memory; ``shift``: the first thread
    that couples."""

    path: int
    first: int
    rows: int
    at: int
    shift: int


@dataclass(frozen=True)
class Group:
    """The pieces of a batch that add to one block of z.

    ``abreast`` rows of weights are worked on at a time; with more than one, their sums meet at ``partial`` in shared
    memory. ``fresh`` is false when an earlier batch has written the block, to which this one adds.
    """

    block: int
    pieces: tuple[int, ...]
    abreast: int
    partial: int
    fresh: bool


@dataclass(frozen=True)
class Use:
    """The pieces of a batch that read one block of x or y; ``fresh`` as in :class:`Group`."""

    block: int
    pieces: tuple[int, ...]
    shift: int
    fresh: bool


@dataclass(frozen=True)
class Batch:
    """What is in shared memory at a time. Members refer to ``pieces`` by number."""

    pieces: tuple[Piece, ...]
    groups: tuple[Group, ...]
    x: tuple[Use, ...]
    y: tuple[Use, ...]


@dataclass(frozen=True)
class FullyConnectedPlan:
    """Threads of a block, which works on one edge at a time, and its batches.

    Attributes:
        threads: of a block.
        lanes: for each path, the lanes of a warp (a power of two) that share a row of weights in backward.
        batches: what is coupled, used and forgotten in turn.
        products: numbers of shared memory for t (in backward, for its gradient too).
        partials: numbers of shared memory for sums of rows that are worked on abreast.
    """

    threads: int
    lanes: tuple[int, ...]
    batches: tuple[Batch, ...]
    products: int
    partials: int
    item_bytes: int
    y_dim: int

    @property
    def forward_shared(self) -> int:
        """Bytes of dynamic shared memory of the forward kernel."""
        return (self.products + self.partials) * self.item_bytes

    def backward_shared(self, *, want_y: bool) -> int:
        """Bytes of dynamic shared memory of a backward kernel; each warp has a sum of its own for the gradient of y."""
        return (self.products + (self.threads // _WARP * self.y_dim if want_y else 0)) * self.item_bytes

    def __str__(self) -> str:
        lines = [
            f"a block of {self.threads} threads an edge, {len(self.batches)} batch(es), "
            f"{self.forward_shared} bytes of shared memory forward, {self.backward_shared(want_y=True)} backward"
        ]
        for number, batch in enumerate(self.batches):
            rows = sum(piece.rows for piece in batch.pieces)
            abreast = ", ".join(f"{group.abreast} into block {group.block}" for group in batch.groups)
            lines.append(f"batch {number}: {len(batch.pieces)} paths, {rows} rows of weights; at a time {abreast}")
        return "\n".join(lines)


@lru_cache(maxsize=512)
def plan(description: FullyConnectedTensorProduct, item_bytes: int) -> FullyConnectedPlan:
    """The plan for one description; ``item_bytes`` is 4 or 8."""
    threads = max(_THREADS, key=lambda count: _busy(description, count))
    limit = BATCH_BYTES // item_bytes
    resolved = description.resolved
    drafts: list[list[Piece]] = [[]]
    products = sums = largest_products = largest_sums = shift = 0
    blocks: set[int] = set()
    for number in sorted(range(len(resolved)), key=lambda index: resolved[index].block_z):
        path = resolved[number]
        degree = 2 * path.l3 + 1
        first = 0
        while first < path.rows:
            wanted = 0 if path.block_z in blocks else _partial(path.mul_z, degree, threads)
            rows = min(path.rows - first, (limit - products) // degree)
            if rows == 0 or (blocks and sums + wanted > limit):
                drafts.append([])
                products = sums = shift = 0
                blocks = set()
                continue
            drafts[-1].append(Piece(number, first, rows, products, shift % threads))
            blocks.add(path.block_z)
            shift += -(-rows // _WARP) * _WARP
            products += rows * degree
            sums += wanted
            first += rows
            largest_products, largest_sums = max(largest_products, products), max(largest_sums, sums)
    seen: tuple[set[int], set[int]] = (set(), set())
    batches = tuple(_batch(description, tuple(pieces), threads, *seen) for pieces in drafts)
    return FullyConnectedPlan(
        threads=threads,
        lanes=tuple(_lanes(path.mul_z) for path in resolved),
        batches=batches,
        products=largest_products,
        partials=largest_sums,
        item_bytes=item_bytes,
        y_dim=description.y_dim,
    )


def _batch(
    description: FullyConnectedTensorProduct,
    pieces: tuple[Piece, ...],
    threads: int,
    seen_x: set[int],
    seen_z: set[int],
) -> Batch:
    resolved = description.resolved

    def members(name: str) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for number, piece in enumerate(pieces):
            found.setdefault(getattr(resolved[piece.path], name), []).append(number)
        return found

    groups, partial = [], 0
    for block, numbers in members("block_z").items():
        mul, degree = description.z[block][0], 2 * description.z[block][1] + 1
        groups.append(Group(block, tuple(numbers), max(1, threads // mul), partial, block not in seen_z))
        partial += _partial(mul, degree, threads)
        seen_z.add(block)
    uses_x, shift = [], 0
    for block, numbers in members("block_x").items():
        uses_x.append(Use(block, tuple(numbers), shift % threads, block not in seen_x))
        shift += -(-description.x[block][0] // _WARP) * _WARP
        seen_x.add(block)
    uses_y = [Use(block, tuple(numbers), 0, False) for block, numbers in members("block_y").items()]
    return Batch(pieces, tuple(groups), tuple(uses_x), tuple(uses_y))


def _partial(mul: int, degree: int, threads: int) -> int:
    """Numbers of shared memory in which rows worked on abreast meet."""
    abreast = max(1, threads // mul)
    return abreast * mul * degree if abreast > 1 else 0


def _busy(description: FullyConnectedTensorProduct, threads: int) -> float:
    """Mean share of threads that have a weight to read."""
    total = sum(path.rows * path.mul_z for path in description.resolved)
    rounds = 0.0
    for path in description.resolved:
        abreast = threads // path.mul_z
        rounds += -(-path.rows // abreast) if abreast else path.rows * -(-path.mul_z // threads)
    return total / (rounds * threads)


def _lanes(mul: int) -> int:
    """Lanes that share a row of ``mul`` weights: few idle ones, and at least 8 where the row has as many."""
    widest = min(_WARP, 1 << (mul - 1).bit_length())
    choices = [lanes for lanes in (32, 16, 8, 4, 2, 1) if min(8, widest) <= lanes <= widest]
    return min(choices, key=lambda lanes: (-(-mul // lanes) * lanes, -lanes))
