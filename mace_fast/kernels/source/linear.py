"""CUDA text of equivariant linear maps, and the tables that tell it the blocks and paths of one of them.

The text depends on number types and access widths alone, so that all linear maps of a model share two or
three compiled kernels; what a map connects is in tables that the kernel reads.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cache

from mace_fast.kernels.build import CudaSource
from mace_fast.kernels.description.linear import Block, Layout, Linear
from mace_fast.kernels.source.text import header

SUM_THREADS = 256

FLOATS = {"float32": "float", "float64": "double"}
IDS = {"int32": "int", "int64": "long long"}
PACK = {"float32": 4, "float64": 2}  # numbers in 16 bytes


@dataclass(frozen=True)
class Tiling:
    """Rows and columns of a thread block's tile, depth of a step, rows and columns of a thread, blocks per SM
    to aim for; how many warps share the depth of a tile, 1 if each has a part of its own of the tile.
    """

    bm: int
    bn: int
    bk: int
    tm: int
    tn: int
    per_sm: int
    split: int = 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.bm // self.tm * (self.bn // self.tn) * self.split


# From the largest tile to the smallest: the first that fills the device is taken. The first is for throughput;
# the others, with depths that take a path of 128 channels in one or two steps, for few nodes.
TILINGS = {
    "float32": (
        Tiling(64, 64, 16, 8, 4, 4),
        Tiling(32, 32, 64, 8, 4, 3, split=4),
        Tiling(16, 32, 128, 4, 4, 3, split=4),
    ),
    "float64": (Tiling(64, 64, 16, 8, 4, 2), Tiling(16, 32, 64, 4, 4, 3, split=4)),
}

_MAP = """const mf::Block* blocks, const mf::Path* paths, int block_count, int path_count, int x_dim, int
z_dim,
    int weight_numel, int species"""
_MAP_VALUE = "const mf::Map map = {blocks, paths, block_count, path_count, x_dim, z_dim, weight_numel, species};"


@dataclass(frozen=True)
class LinearTables:
    """The bytes of the kernel's `Block[]` and `Path[]`, and how many there are."""

    blocks: bytes
    paths: bytes
    block_count: int
    path_count: int


def linear_tables(d: Linear) -> LinearTables:
    """Tables of a map, as the structs of headers/indexed_linear_tiles.cuh."""
    paths: list[bytes] = []
    blocks: list[bytes] = []
    biases = {bias.z: bias for bias in d.biases}
    for z, (mul, degree) in enumerate(d.z):
        first = len(paths)
        for p in d.paths:
            mul_x = d.x[p.x][0]
            if p.z == z and mul_x and mul:
                x = (d.x_starts[p.x], *_strides(d.x[p.x], d.x_layout), mul_x)
                paths.append(struct.pack("=d8i", p.coefficient, z, *x, p.offset, p.x_stride, p.z_stride))
        bias = biases.get(z)
        out = (d.z_starts[z], *_strides((mul, degree), d.z_layout), mul, 2 * degree + 1, first, len(paths))
        blocks.append(struct.pack("=d8i", bias.coefficient if bias else 0.0, *out, bias.offset if bias else -1))
    return LinearTables(b"".join(blocks), b"".join(paths), len(blocks), len(paths))


def row_tiles(nodes: int, species: int | None, dim: int, size: int) -> int:
    """An upper bound of the tiles that `nodes * dim` rows need; None is one species that needs no lists.

    The same formula as `row_tiles` in headers/indexed_linear_tiles.cuh.
    """
    if species is None:
        return -(-nodes * dim // size)
    return nodes * dim // size + min(species + 1, nodes)


def forward_blocks(description: Linear, nodes: int, species: int | None, tiling: Tiling) -> int:
    """Thread blocks of linear_forward."""
    return sum(
        row_tiles(nodes, species, 2 * degree + 1, tiling.bm) * -(-mul // tiling.bn) for mul, degree in description.z
    )


def shared_tables(d: Linear, tiling: Tiling) -> int:
    """Bytes of dynamic shared memory of linear_forward: where warps share a tile, it keeps the map's tables there."""
    tables = linear_tables(d)
    return 0 if tiling.split == 1 else len(tables.blocks) + len(tables.paths)


def weight_tiles(d: Linear, tiling: Tiling) -> int:
    """Thread blocks of linear_grad_partial per chunk of nodes."""
    return sum(-(-d.x[p.x][0] // tiling.bm) * -(-d.z[p.z][0] // tiling.bn) for p in d.paths)


def forward_cuda(description: Linear, values: str, ids: str, tiling: Tiling) -> CudaSource:
    """Entry point linear_forward."""
    widths = _widths(description, values)
    return _forward(*widths, weight_along_x(description), values, ids, _room(widths, tiling))


def grad_cuda(description: Linear, values: str, ids: str, tiling: Tiling) -> CudaSource:
    """Entry points linear_grad_partial and linear_grad_sum, for a map that is not a transposed one."""
    widths = _widths(description, values)
    return _grad(*widths, values, ids, _room(widths, tiling))


def covers_weight(d: Linear) -> bool:
    """Whether every weight belongs to a path (paths do not overlap)."""
    return sum(d.x[p.x][0] * d.z[p.z][0] for p in d.paths) == d.weight_numel


def aligned_multiplicities(d: Linear, values: str) -> bool:
    """Whether all blocks hold a multiple of 16 bytes per component: what the kernel is made for."""
    return all(mul % PACK[values] == 0 for mul, _ in (*d.x, *d.z))


def weight_along_x(description: Linear) -> bool:
    """Whether the weight is contiguous along the input channel: the map is a transposed one."""
    return bool(description.paths) and all(p.x_stride == 1 and p.z_stride != 1 for p in description.paths)


@cache
def _forward(vx: int, vw: int, vz: int, along_x: bool, values: str, ids: str, tiling: Tiling) -> CudaSource:
    algorithm = "indexed_linear.cuh" if tiling.split == 1 else "indexed_linear_split.cuh"
    text = f"""{_preamble(vx, vw, vz, along_x, values, ids, tiling)}
#include "{algorithm}"
using mf::index_t;

extern "C" __global__ void __launch_bounds__({tiling.threads}, {tiling.per_sm}) linear_forward(
    const T* x, const T* weight, const T* bias, const I* order, const I* row_ptr, const T* addend, T* z, index_t nodes,
    {_MAP}) {{
    {_MAP_VALUE}
    mf::linear_forward(x, weight, bias, order, row_ptr, addend, z, map, nodes);
}}
"""
    return _source("linear_forward", text, (algorithm,), ("linear_forward",))


@cache
def _grad(vx: int, vw: int, vz: int, values: str, ids: str, tiling: Tiling) -> CudaSource:
    text = f"""{_preamble(vx, vw, vz, False, values, ids, tiling)}
#include "indexed_linear_grad.cuh"
using mf::index_t;

extern "C" __global__ void __launch_bounds__({tiling.threads}, {tiling.per_sm}) linear_grad_partial(
    const T* x, const T* grad, const I* order, const I* row_ptr, T* partial, index_t nodes, int chunk,
    {_MAP}) {{
    {_MAP_VALUE}
    mf::linear_grad_partial(x, grad, order, row_ptr, partial, map, nodes, chunk);
}}
extern "C" __global__ void __launch_bounds__({SUM_THREADS}) linear_grad_sum(
    const T* partial, const I* row_ptr, T* gradient, index_t weight_numel, int chunk) {{
    mf::linear_grad_sum(partial, row_ptr, gradient, weight_numel, chunk);
}}
"""
    return _source("linear_grad", text, ("indexed_linear_grad.cuh",), ("linear_grad_partial", "linear_grad_sum"))


def _preamble(vx: int, vw: int, vz: int, along_x: bool, values: str, ids: str, tiling: Tiling) -> str:
    return f"""typedef {FLOATS[values]} T;
typedef {IDS[ids]} I;
constexpr int BM = {tiling.bm}, BN = {tiling.bn}, BK = {tiling.bk}, TM = {tiling.tm}, TN = {tiling.tn}, SPLIT = {tiling.split};
constexpr int VX = {vx}, VW = {vw}, VZ = {vz};
constexpr bool W_ALONG_X = {"true" if along_x else "false"};"""


def _source(name: str, text: str, headers: tuple[str, ...], entry_points: tuple[str, ...]) -> CudaSource:
    names = ("number.h", "pack.cuh", "indexed_linear_tiles.cuh", "indexed_linear_product.cuh", *headers)
    return CudaSource(name, text, tuple((name, header(name)) for name in names), entry_points)


def _room(widths: tuple[int, int, int], tiling: Tiling) -> Tiling:
    """Loads of single numbers keep more addresses in registers: fewer blocks then share a multiprocessor."""
    return replace(tiling, per_sm=tiling.per_sm - 1) if 1 in widths[:2] else tiling


@cache
def _widths(d: Linear, values: str) -> tuple[int, int, int]:
    """Numbers per access to x, weight and z."""
    width = PACK[values]
    return (
        width if _packable(d.x, d.x_layout, width) else 1,
        width if _weight_packable(d, width) else 1,
        width if _packable(d.z, d.z_layout, width) else 1,
    )


def _strides(block: Block, layout: Layout) -> tuple[int, int]:
    """(component, channel) strides inside a block."""
    mul, degree = block
    return (mul, 1) if layout == "ir_mul" else (1, 2 * degree + 1)


def _packable(blocks: tuple[Block, ...], layout: Layout, width: int) -> bool:
    """Whether all channels can be read `width` at a time: contiguous, and every block and row aligned."""
    return all(mul % width == 0 and (layout == "ir_mul" or degree == 0) for mul, degree in blocks)


def _weight_packable(d: Linear, width: int) -> bool:
    along_x = weight_along_x(d)
    for p in d.paths:
        fast, slow = (p.x_stride, p.z_stride) if along_x else (p.z_stride, p.x_stride)
        channels = d.x[p.x][0] if along_x else d.z[p.z][0]
        if fast != 1 or slow % width or p.offset % width or channels % width:
            return False
    return d.weight_numel % width == 0
