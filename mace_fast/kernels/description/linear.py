"""The equivariant linear map, as data: which input block goes into which output block, with which weights.

For every path (x block -> z block of the same degree l) and every component i of the 2l+1,

    z[i, w] += coefficient * sum_u x[i, u] * W[u, w],    W[u, w] = weight[offset + u * x_stride + w *
    z_stride]

so that the transposed map (for gradients) is again such a description over the *same* weight vector, and the
map indexed by species is the same description applied with one weight vector per species. Normalisations are
e3nn's (0.4.4): `o3.Linear` has 1/sqrt(sum of the multiplicities into an output block), in
`Instruction.path_weight`; a `FullyConnectedTensorProduct` with a scalar second operand has
`path_weight / sqrt(2l+1)`, the second factor from wigner_3j(l, 0, l) = delta / sqrt(2l+1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from mace_fast.errors import UnsupportedDescriptionError

Layout = Literal["ir_mul", "mul_ir"]
Block = tuple[int, int]  # (multiplicity, l)

LAYOUTS: tuple[Layout, ...] = ("ir_mul", "mul_ir")


@dataclass(frozen=True)
class LinearPath:
    """One weighted connection x[x] -> z[z]; `W[u, w] = weight[offset + u * x_stride + w * z_stride]`."""

    x: int
    z: int
    coefficient: float
    offset: int
    x_stride: int
    z_stride: int


@dataclass(frozen=True)
class LinearBias:
    """`z[z][w] += coefficient * bias[offset + w]`; only on blocks with l = 0."""

    z: int
    coefficient: float
    offset: int


@dataclass(frozen=True)
class Linear:
    """An equivariant linear map.

    Args:
        x, z: blocks `(multiplicity, l)` of the input and the output. A block of an ir_mul side is stored
            `[2l+1, multiplicity]`, of a mul_ir side `[multiplicity, 2l+1]`; blocks follow each other.
        paths: the weighted connections.
        biases: biases of scalar output blocks.
        weight_numel, bias_numel: lengths of the flat weight and bias.
        x_layout, z_layout: storage order inside the blocks, one choice per side.

    Raises:
        UnsupportedDescriptionError: a path between different degrees, an index out of range, an unknown
        layout.
    """

    x: tuple[Block, ...]
    z: tuple[Block, ...]
    paths: tuple[LinearPath, ...]
    weight_numel: int
    biases: tuple[LinearBias, ...] = ()
    bias_numel: int = 0
    x_layout: Layout = "ir_mul"
    z_layout: Layout = "ir_mul"

    def __post_init__(self) -> None:
        for name in ("x_layout", "z_layout"):
            if getattr(self, name) not in LAYOUTS:
                raise UnsupportedDescriptionError(f"{name} is {getattr(self, name)!r}; it must be one of {LAYOUTS}")
        for path in self.paths:
            if not (0 <= path.x < len(self.x) and 0 <= path.z < len(self.z)):
                raise UnsupportedDescriptionError(f"{path} names a block that does not exist in x={self.x}, z={self.z}")
            (mul_x, l_x), (mul_z, l_z) = self.x[path.x], self.z[path.z]
            if l_x != l_z:
                raise UnsupportedDescriptionError(f"{path} connects l={l_x} to l={l_z}; a linear map keeps l")
            last = path.offset + max(mul_x - 1, 0) * path.x_stride + max(mul_z - 1, 0) * path.z_stride
            if mul_x and mul_z and not (0 <= path.offset and last < self.weight_numel):
                raise UnsupportedDescriptionError(f"{path} reads outside the {self.weight_numel} weights")
        for bias in self.biases:
            if not 0 <= bias.z < len(self.z) or self.z[bias.z][1] != 0:
                raise UnsupportedDescriptionError(f"{bias} is not on a scalar block of z={self.z}")
            if not 0 <= bias.offset <= self.bias_numel - self.z[bias.z][0]:
                raise UnsupportedDescriptionError(f"{bias} reads outside the {self.bias_numel} biases")
        if len({bias.z for bias in self.biases}) < len(self.biases):
            raise UnsupportedDescriptionError(f"two biases on one block in {self.biases}")

    @classmethod
    def from_paths(
        cls,
        x: Sequence[Block],
        z: Sequence[Block],
        paths: Iterable[tuple[int, int, float]],
        biases: Iterable[tuple[int, float]] = (),
        *,
        x_layout: Layout = "ir_mul",
        z_layout: Layout = "ir_mul",
    ) -> Linear:
        """Weights flat in path order, each `[u, w]` in C order; biases likewise. `paths`: `(x, z,
        coefficient)`."""
        offset, made = 0, []
        for ix, iz, coefficient in paths:
            if not (0 <= ix < len(x) and 0 <= iz < len(z)):
                raise UnsupportedDescriptionError(f"path ({ix}, {iz}) names a block that does not exist")
            made.append(LinearPath(ix, iz, float(coefficient), offset, z[iz][0], 1))
            offset += x[ix][0] * z[iz][0]
        bias_offset, made_biases = 0, []
        for iz, coefficient in biases:
            made_biases.append(LinearBias(iz, float(coefficient), bias_offset))
            bias_offset += z[iz][0]
        return cls(
            x=_blocks(x),
            z=_blocks(z),
            paths=tuple(made),
            weight_numel=offset,
            biases=tuple(made_biases),
            bias_numel=bias_offset,
            x_layout=x_layout,
            z_layout=z_layout,
        )

    @cached_property
    def x_dim(self) -> int:
        """Width of an input row."""
        return sum(mul * (2 * degree + 1) for mul, degree in self.x)

    @cached_property
    def z_dim(self) -> int:
        """Width of an output row."""
        return sum(mul * (2 * degree + 1) for mul, degree in self.z)

    @cached_property
    def x_starts(self) -> tuple[int, ...]:
        """Where each input block begins in a row."""
        return _starts(self.x)

    @cached_property
    def z_starts(self) -> tuple[int, ...]:
        """Where each output block begins in a row."""
        return _starts(self.z)

    @cached_property
    def key(self) -> str:
        """Canonical JSON of this description: what travels through an op's signature and into a cache key."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @cached_property
    def transposed(self) -> Linear:
        """The transposed map over the same weights (without biases): the gradient with respect to x."""
        return Linear(
            x=self.z,
            z=self.x,
            paths=tuple(LinearPath(p.z, p.x, p.coefficient, p.offset, p.z_stride, p.x_stride) for p in self.paths),
            weight_numel=self.weight_numel,
            x_layout=self.z_layout,
            z_layout=self.x_layout,
        )

    @cached_property
    def without_bias(self) -> Linear:
        """The part that is linear in x."""
        return replace(self, biases=(), bias_numel=0)

    def scaled(self, factor: float) -> Linear:
        """The map times a constant, at no cost: the constant goes into the coefficients (of the biases,
        too)."""
        return replace(
            self,
            paths=tuple(replace(p, coefficient=p.coefficient * factor) for p in self.paths),
            biases=tuple(replace(b, coefficient=b.coefficient * factor) for b in self.biases),
        )

    def with_layouts(self, x_layout: Layout, z_layout: Layout) -> Linear:
        """The same map for other storage orders of its rows."""
        return replace(self, x_layout=x_layout, z_layout=z_layout)

    def split_x(self, blocks: Sequence[Block]) -> Linear:
        """The same map for an input whose blocks are cut finer along the multiplicity.

        A tensor product writes 128x1o + 128x1o where e3nn's linear, after `simplify()`, declares 256x1o. In
        mul_ir order that is the same row; in ir_mul order it is not, and the linear must know the finer
        blocks.

        Raises:
            UnsupportedDescriptionError: `blocks` is not a refinement of `x`.
        """
        pieces = _refine(self.x, _blocks(blocks))
        paths = tuple(
            LinearPath(piece, p.z, p.coefficient, p.offset + first * p.x_stride, p.x_stride, p.z_stride)
            for p in self.paths
            for piece, first in pieces[p.x]
        )
        return replace(self, x=_blocks(blocks), paths=paths)

    def split_z(self, blocks: Sequence[Block]) -> Linear:
        """The same map for an output whose blocks are cut finer along the multiplicity; see `split_x`."""
        blocks = _blocks(blocks)
        pieces = _refine(self.z, blocks)
        paths = tuple(
            LinearPath(p.x, piece, p.coefficient, p.offset + first * p.z_stride, p.x_stride, p.z_stride)
            for p in self.paths
            for piece, first in pieces[p.z]
        )
        biases = tuple(
            LinearBias(piece, b.coefficient, b.offset + first) for b in self.biases for piece, first in pieces[b.z]
        )
        return replace(self, z=blocks, paths=paths, biases=biases)


@cache
def parse_linear(key: str) -> Linear:
    """The description whose `key` this is."""
    data: dict[str, Any] = json.loads(key)
    data["x"] = _blocks(data["x"])
    data["z"] = _blocks(data["z"])
    data["paths"] = tuple(LinearPath(**path) for path in data["paths"])
    data["biases"] = tuple(LinearBias(**bias) for bias in data["biases"])
    return Linear(**data)


def describe_linear(module: Any, *, x_layout: Layout = "ir_mul", z_layout: Layout = "ir_mul") -> Linear:
    """The description of an e3nn `o3.Linear`, read from the live module's instructions.

    Its weight is `module.weight` and its bias `module.bias`, unchanged.

    Raises:
        UnsupportedDescriptionError: one weight per sample (`shared_weights=False`) or extra channel axes
        (`f_in`).
    """
    if not module.shared_weights:
        raise UnsupportedDescriptionError("o3.Linear with shared_weights=False has one weight per sample")
    x = [(mul, ir.l) for mul, ir in module.irreps_in]
    z = [(mul, ir.l) for mul, ir in module.irreps_out]
    used = [ins for ins in module.instructions if 0 not in ins.path_shape]
    description = Linear.from_paths(
        x,
        z,
        [(ins.i_in, ins.i_out, ins.path_weight) for ins in used if ins.i_in != -1],
        [(ins.i_out, ins.path_weight) for ins in used if ins.i_in == -1],
        x_layout=x_layout,
        z_layout=z_layout,
    )
    if module.weight_numel != description.weight_numel or module.weight.dim() > 1:
        raise UnsupportedDescriptionError(
            f"o3.Linear {module.irreps_in} -> {module.irreps_out}: weight {tuple(module.weight.shape)} is "
            f"not the flat vector of {description.weight_numel} numbers that its instructions imply "
            f"(f_in and f_out are not supported)"
        )
    return description


def describe_indexed_linear(
    module: Any, *, x_layout: Layout = "ir_mul", z_layout: Layout = "ir_mul"
) -> tuple[Linear, int]:
    """An e3nn tensor product whose second operand is one-hot, as a linear map per species: `(description,
    species)`.

    The per-species weight is made from `module.weight` by
    `mace_fast.kernels.ops.linear.arrange_indexed_weight`.

    Raises:
        UnsupportedDescriptionError: the second operand is not a single block of scalars, or an instruction is
            not a weighted 'uvw' path, or the weights are not shared.
    """
    name = f"tensor product {module.irreps_in1} x {module.irreps_in2} -> {module.irreps_out}"
    second = [(mul, ir.l) for mul, ir in module.irreps_in2]
    if len(second) != 1 or second[0][1] != 0 or second[0][0] == 0:
        raise UnsupportedDescriptionError(f"{name}: the second operand is not one block of scalars")
    if not module.shared_weights:
        raise UnsupportedDescriptionError(f"{name}: shared_weights=False has one weight per sample")
    species = second[0][0]
    x = [(mul, ir.l) for mul, ir in module.irreps_in1]
    z = [(mul, ir.l) for mul, ir in module.irreps_out]
    paths = []
    for ins in module.instructions:
        if ins.connection_mode != "uvw" or not ins.has_weight:
            raise UnsupportedDescriptionError(f"{name}: {ins} is not a weighted 'uvw' path")
        if 0 not in ins.path_shape:
            paths.append((ins.i_in1, ins.i_out, ins.path_weight / math.sqrt(2 * x[ins.i_in1][1] + 1)))
    description = Linear.from_paths(x, z, paths, x_layout=x_layout, z_layout=z_layout)
    if module.weight_numel != description.weight_numel * species:
        raise UnsupportedDescriptionError(
            f"{name}: {module.weight_numel} weights, but its instructions imply {description.weight_numel * species}"
        )
    return description, species


def _blocks(blocks: Iterable[Sequence[int]]) -> tuple[Block, ...]:
    made = tuple((int(mul), int(degree)) for mul, degree in blocks)
    for mul, degree in made:
        if mul < 0 or degree < 0:
            raise UnsupportedDescriptionError(f"block (multiplicity {mul}, l {degree}) has a negative number")
    return made


def _starts(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    starts, here = [], 0
    for mul, degree in blocks:
        starts.append(here)
        here += mul * (2 * degree + 1)
    return tuple(starts)


def _refine(coarse: tuple[Block, ...], fine: tuple[Block, ...]) -> list[list[tuple[int, int]]]:
    """For each coarse block its fine blocks as (index, first channel)."""
    pieces: list[list[tuple[int, int]]] = []
    here = 0
    for mul, degree in coarse:
        mine, filled = [], 0
        while filled < mul:
            while here < len(fine) and fine[here][0] == 0:
                here += 1
            if here == len(fine) or fine[here][1] != degree or filled + fine[here][0] > mul:
                raise UnsupportedDescriptionError(f"blocks {fine} do not cut {coarse} along the multiplicity")
            mine.append((here, filled))
            filled += fine[here][0]
            here += 1
        pieces.append(mine)
    if any(mul for mul, _ in fine[here:]):
        raise UnsupportedDescriptionError(f"blocks {fine} do not cut {coarse} along the multiplicity")
    return pieces
