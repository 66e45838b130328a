"""The fully connected ('uvw') tensor product: z[w] = sum over paths, u and v of W[u, v, w] (x[u] (x) y[v]), coupled.

A description is data: frozen, hashable, printable, free of torch. It says what is computed, not how.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mace_fast.errors import UnsupportedDescriptionError
from mace_fast.kernels.description.channelwise import MAX_DEGREE, Path, Segment


@dataclass(frozen=True)
class ResolvedPath:
    """A path with every offset resolved: what planning and emission work on.

    Component i of copy u of x is at ``x_offset + i * mul_x + u``, and so for y (copy v) and z (copy w). The weight of
    (u, v, w) is at ``w_offset + (u * mul_y + v) * mul_z + w``; (u, v) together are a ``row`` of the path's weights.
    """

    block_x: int
    block_y: int
    block_z: int
    mul_x: int
    mul_y: int
    mul_z: int
    l1: int
    l2: int
    l3: int
    x_offset: int
    y_offset: int
    z_offset: int
    w_offset: int
    coefficient: float

    @property
    def rows(self) -> int:
        return self.mul_x * self.mul_y


@dataclass(frozen=True)
class FullyConnectedTensorProduct:
    """Operands and paths of a fully connected tensor product, all in ``ir_mul`` layout (block = [2l+1, multiplicity]).

    Every path has weights [multiplicity(x), multiplicity(y), multiplicity(z)], flat as e3nn's [u, v, w], one path after
    the other. ``Path.coefficient`` multiplies the Clebsch-Gordan block with unit sum of squares: it is what e3nn keeps
    in ``Instruction.path_weight``. Parity does not enter the arithmetic.

    Attributes:
        x: blocks of the first operand (node features).
        y: blocks of the second operand (spherical harmonics, or features of any multiplicity).
        z: blocks of the result.
        paths: the couplings; several may share an output block, whose contributions add up.

    Raises:
        UnsupportedDescriptionError: a path breaks a selection rule, names no block or has no weights; l > 6.
    """

    x: tuple[Segment, ...]
    y: tuple[Segment, ...]
    z: tuple[Segment, ...]
    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        for name, blocks in (("x", self.x), ("y", self.y), ("z", self.z)):
            for mul, degree in blocks:
                if mul < 1 or not 0 <= degree <= MAX_DEGREE:
                    raise UnsupportedDescriptionError(
                        f"block {mul} x l={degree} of operand {name}: multiplicity must be positive and "
                        f"0 <= l <= {MAX_DEGREE}"
                    )
        if not self.paths:
            raise UnsupportedDescriptionError("a fully connected tensor product needs at least one path")
        for number, path in enumerate(self.paths):
            for name, index, blocks in (("x", path.x, self.x), ("y", path.y, self.y), ("z", path.z, self.z)):
                if not 0 <= index < len(blocks):
                    raise UnsupportedDescriptionError(
                        f"path {number} names block {index} of {name}, which has {len(blocks)}"
                    )
            l1, l2, l3 = self.x[path.x][1], self.y[path.y][1], self.z[path.z][1]
            if not abs(l1 - l2) <= l3 <= l1 + l2:
                raise UnsupportedDescriptionError(f"path {number}: l = {l1} x {l2} cannot give {l3}")
            if not path.weighted:
                raise UnsupportedDescriptionError(f"path {number} has no weights; a path of mode 'uvw' always has them")
        # Known from the start: torch.compile cannot trace the lock with which Python up to 3.11 caches a property.
        _ = self.key, self.x_dim, self.y_dim, self.z_dim, self.weight_numel

    @cached_property
    def x_dim(self) -> int:
        return _offsets(self.x)[-1]

    @cached_property
    def y_dim(self) -> int:
        return _offsets(self.y)[-1]

    @cached_property
    def z_dim(self) -> int:
        return _offsets(self.z)[-1]

    @cached_property
    def weight_numel(self) -> int:
        return sum(path.rows * path.mul_z for path in self.resolved)

    @cached_property
    def covers_x(self) -> bool:
        """Whether every block of x takes part in a path; others have gradient zero."""
        return {path.x for path in self.paths} == set(range(len(self.x)))

    @cached_property
    def covers_z(self) -> bool:
        """Whether every block of z is the output of a path; others are zero."""
        return {path.z for path in self.paths} == set(range(len(self.z)))

    @cached_property
    def key(self) -> str:
        """Canonical text of the description; ``parse`` is its inverse. It travels as an argument of the ops."""
        return json.dumps(
            {
                "x": self.x,
                "y": self.y,
                "z": self.z,
                "paths": [[p.x, p.y, p.z, p.coefficient.hex()] for p in self.paths],
            },
            separators=(",", ":"),
        )

    @staticmethod
    def parse(key: str) -> FullyConnectedTensorProduct:
        """The description whose ``key`` this is (one parse for each key and process)."""
        return _parse(key)

    @cached_property
    def resolved(self) -> tuple[ResolvedPath, ...]:
        """Every path with its offsets, in weight order."""
        x_offsets, y_offsets, z_offsets = (_offsets(blocks) for blocks in (self.x, self.y, self.z))
        resolved = []
        w_offset = 0
        for path in self.paths:
            (mul_x, l1), (mul_y, l2), (mul_z, l3) = self.x[path.x], self.y[path.y], self.z[path.z]
            resolved.append(
                ResolvedPath(
                    block_x=path.x,
                    block_y=path.y,
                    block_z=path.z,
                    mul_x=mul_x,
                    mul_y=mul_y,
                    mul_z=mul_z,
                    l1=l1,
                    l2=l2,
                    l3=l3,
                    x_offset=x_offsets[path.x],
                    y_offset=y_offsets[path.y],
                    z_offset=z_offsets[path.z],
                    w_offset=w_offset,
                    coefficient=path.coefficient,
                )
            )
            w_offset += mul_x * mul_y * mul_z
        return tuple(resolved)


def _offsets(blocks: tuple[Segment, ...]) -> list[int]:
    """Where each block begins, and the length of the row."""
    offsets = [0]
    for mul, degree in blocks:
        offsets.append(offsets[-1] + mul * (2 * degree + 1))
    return offsets


@lru_cache(maxsize=256)
def _parse(key: str) -> FullyConnectedTensorProduct:
    data = json.loads(key)

    def blocks(name: str) -> tuple[Segment, ...]:
        return tuple((int(mul), int(degree)) for mul, degree in data[name])

    paths = tuple(Path(x, y, z, float.fromhex(c)) for x, y, z, c in data["paths"])
    return FullyConnectedTensorProduct(blocks("x"), blocks("y"), blocks("z"), paths)
