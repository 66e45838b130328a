"""The channelwise ('uvu') tensor product: z[u] = sum over paths of w[u] * (x[u] (x) y) coupled to an output irrep.

A description is data: frozen, hashable, printable, free of torch. It says what is computed, not how.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mace_fast.errors import UnsupportedDescriptionError

Segment = tuple[int, int]
"""One irreps block: (multiplicity, degree l). Parity does not enter the arithmetic and is left to the caller."""

MAX_DEGREE = 6


@dataclass(frozen=True)
class Path:
    """One coupling: block ``x`` times block ``y`` into block ``z``, multiplied by ``coefficient``.

    The coupling is the real Clebsch-Gordan block with unit sum of squares (e3nn's ``wigner_3j``), so ``coefficient``
    is what e3nn keeps in ``Instruction.path_weight``. With ``weighted`` the path takes multiplicity(x) *
    multiplicity(y) numbers from the weights, ordered [u, v] as e3nn does, and paths take them one after the other.
    """

    x: int
    y: int
    z: int
    coefficient: float
    weighted: bool = True


@dataclass(frozen=True)
class FlatPath:
    """A path for one copy of the second operand, with every offset resolved: what planning and emission work on.

    Component i of channel u of x is at ``x_offset + i * mul + u``; component j of y at ``y_offset + j * y_stride``;
    component k of z at ``z_offset + k * mul + u``; the weight at ``w_offset + u * w_stride``.
    """

    mul: int
    l1: int
    l2: int
    l3: int
    x_offset: int
    y_offset: int
    y_stride: int
    z_offset: int
    w_offset: int
    w_stride: int
    weighted: bool
    coefficient: float


@dataclass(frozen=True)
class ChannelwiseTensorProduct:
    """Operands and paths of a channelwise tensor product, all in ``ir_mul`` layout (block = [2l+1, multiplicity]).

    Attributes:
        x: blocks of the first operand (node features).
        y: blocks of the second operand (spherical harmonics, usually multiplicity 1).
        z: blocks of the result; a block's multiplicity equals that of every x block that couples into it.
        paths: the couplings; several may share an output block, whose contributions add up.

    Raises:
        UnsupportedDescriptionError: a path breaks a selection rule, multiplicities do not match, l > 6.
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
            raise UnsupportedDescriptionError("a channelwise tensor product needs at least one path")
        for number, path in enumerate(self.paths):
            for name, index, blocks in (("x", path.x, self.x), ("y", path.y, self.y), ("z", path.z, self.z)):
                if not 0 <= index < len(blocks):
                    raise UnsupportedDescriptionError(
                        f"path {number} names block {index} of {name}, which has {len(blocks)}"
                    )
            (mul_x, l1), (_, l2), (mul_z, l3) = self.x[path.x], self.y[path.y], self.z[path.z]
            if mul_x != mul_z:
                raise UnsupportedDescriptionError(
                    f"path {number} couples multiplicity {mul_x} into {mul_z}; 'uvu' keeps the multiplicity of x"
                )
            if not abs(l1 - l2) <= l3 <= l1 + l2:
                raise UnsupportedDescriptionError(f"path {number}: l = {l1} x {l2} cannot give {l3}")
        # Known from the start: torch.compile cannot trace the lock with which Python up to 3.11 caches a property.
        _ = self.key, self.x_dim, self.y_dim, self.z_dim, self.weight_numel

    @staticmethod
    def _dim(blocks: tuple[Segment, ...]) -> int:
        return sum(mul * (2 * degree + 1) for mul, degree in blocks)

    @cached_property
    def x_dim(self) -> int:
        return self._dim(self.x)

    @cached_property
    def y_dim(self) -> int:
        return self._dim(self.y)

    @cached_property
    def z_dim(self) -> int:
        return self._dim(self.z)

    @cached_property
    def weight_numel(self) -> int:
        return sum(self.x[p.x][0] * self.y[p.y][0] for p in self.paths if p.weighted)

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
                "paths": [[p.x, p.y, p.z, p.coefficient.hex(), int(p.weighted)] for p in self.paths],
            },
            separators=(",", ":"),
        )

    @staticmethod
    def parse(key: str) -> ChannelwiseTensorProduct:
        """The description whose ``key`` this is (one parse for each key and process)."""
        return _parse(key)

    def flat_paths(self) -> tuple[FlatPath, ...]:
        """Every path split by the copies of the second operand, offsets resolved, in weight order."""
        x_offsets, y_offsets, z_offsets = (_offsets(blocks) for blocks in (self.x, self.y, self.z))
        flat = []
        w_offset = 0
        for path in self.paths:
            (mul, l1), (mul_y, l2), (_, l3) = self.x[path.x], self.y[path.y], self.z[path.z]
            for copy in range(mul_y):
                flat.append(
                    FlatPath(
                        mul=mul,
                        l1=l1,
                        l2=l2,
                        l3=l3,
                        x_offset=x_offsets[path.x],
                        y_offset=y_offsets[path.y] + copy,
                        y_stride=mul_y,
                        z_offset=z_offsets[path.z],
                        w_offset=w_offset + copy,
                        w_stride=mul_y,
                        weighted=path.weighted,
                        coefficient=path.coefficient,
                    )
                )
            if path.weighted:
                w_offset += mul * mul_y
        return tuple(flat)


def _offsets(blocks: tuple[Segment, ...]) -> list[int]:
    offsets, position = [], 0
    for mul, degree in blocks:
        offsets.append(position)
        position += mul * (2 * degree + 1)
    return offsets


@lru_cache(maxsize=256)
def _parse(key: str) -> ChannelwiseTensorProduct:
    data = json.loads(key)

    def blocks(name: str) -> tuple[Segment, ...]:
        return tuple((int(mul), int(degree)) for mul, degree in data[name])

    paths = tuple(Path(x, y, z, float.fromhex(c), bool(weighted)) for x, y, z, c, weighted in data["paths"])
    return ChannelwiseTensorProduct(blocks("x"), blocks("y"), blocks("z"), paths)
