"""C++ text for a fully connected tensor product: the generated lists of paths and batches, and one entry point.

The algorithms are in headers/fully_connected.cuh (CUDA) and headers/fully_connected.h (CPU).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.description.channelwise import Segment
from mace_fast.kernels.description.fully_connected import FullyConnectedTensorProduct, ResolvedPath
from mace_fast.kernels.plan.coupling import coupling
from mace_fast.kernels.plan.fully_connected import Batch, FullyConnectedPlan, plan
from mace_fast.kernels.source.text import header, indent

CUDA_OPTIONS = ("-default-device",)
"""NVRTC 13.0 takes the body of a generic lambda for host code without it; later versions do not."""

_RESIDENT = 1
"""Blocks that must fit on a multiprocessor. Left unsaid, the compiler spills a few numbers to fit more than that."""


@dataclass(frozen=True)
class Variant:
    """Which kernel of a description: forward, or backward with the gradients that it writes."""

    backward: bool = False
    want_x: bool = False
    want_y: bool = False
    want_w: bool = False

    @property
    def entry(self) -> str:
        wants = "".join(name for name, want in zip("xyw", (self.want_x, self.want_y, self.want_w), strict=True) if want)
        return f"fully_connected_{'backward_' + wants if self.backward else 'forward'}"

    @property
    def flags(self) -> str:
        """The wants as template arguments."""
        return ", ".join("true" if want else "false" for want in (self.want_x, self.want_y, self.want_w))


def _contraction(
    triples: Iterable[tuple[int, int, int, float]],
    first: tuple[str, int],
    second: tuple[str, int],
    target: tuple[str, int],
) -> list[str]:
    """Statements target[c] += value * first[a] * second[b]; of each triple, the ints say which index is which."""
    products: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for triple in triples:
        a, b, c = (int(triple[place]) for _, place in (first, second, target))
        products.setdefault((a, b), []).append((c, triple[3]))
    lines = []
    for (a, b), uses in products.items():
        sums = " ".join(f"{target[0]}[{c}] += T({value.hex()}) * p;" for c, value in uses)
        lines.append(f"{{ const T p = {first[0]}[{a}] * {second[0]}[{b}]; {sums} }}")
    return lines


def _constants(**values: int) -> str:
    return "static constexpr int " + ", ".join(f"{name} = {value}" for name, value in values.items()) + ";"


def _path_struct(number: int, path: ResolvedPath, lanes: int) -> str:
    """The constants and the straight-line code of one path."""
    triples = coupling(path.l1, path.l2, path.l3, path.coefficient).triples
    x, y, t = ("x", 0), ("y", 1), ("t", 2)
    constants = _constants(
        MUL_X=path.mul_x,
        MUL_Y=path.mul_y,
        MUL_Z=path.mul_z,
        DX=2 * path.l1 + 1,
        DY=2 * path.l2 + 1,
        DZ=2 * path.l3 + 1,
        X=path.x_offset,
        Y=path.y_offset,
        Z=path.z_offset,
        W=path.w_offset,
        ROWS=path.rows,
        LANES=lanes,
    )
    lines = [
        f"struct Path{number} {{  // l = {path.l1} x {path.l2} -> {path.l3}",
        f"    {constants}",
        "    MF_INLINE static void couple(const T* x, const T* y, T* t) {",
        *indent(_contraction(triples, x, y, t), 8),
        "    }",
        "    MF_INLINE static void gradient_x(const T* y, const T* t, T* x) {",
        *indent(_contraction(triples, y, t, x), 8),
        "    }",
        "    MF_INLINE static void gradient_y(const T* x, const T* t, T* y) {",
        *indent(_contraction(triples, x, t, y), 8),
        "    }",
        "};",
    ]
    return "\n".join(lines)


def _ctype(item_bytes: int) -> str:
    return {4: "float", 8: "double"}[item_bytes]


def _offset(blocks: tuple[Segment, ...], block: int) -> int:
    return sum(mul * (2 * degree + 1) for mul, degree in blocks[:block])


def _flag(value: bool) -> str:
    return f"static constexpr bool FRESH = {'true' if value else 'false'};"


def _batch_struct(number: int, batch: Batch, layout: FullyConnectedPlan, d: FullyConnectedTensorProduct) -> str:
    def names(members: Iterable[int]) -> str:
        return ", ".join(f"Piece{member}" for member in members)

    parts = [f"namespace batch{number} {{"]
    for index, piece in enumerate(batch.pieces):
        constants = _constants(FIRST=piece.first, ROWS=piece.rows, AT=piece.at, SHIFT=piece.shift)
        parts.append(f"struct Piece{index} {{ typedef Path{piece.path} Path; {constants} }};")
    shift = 0
    for index, group in enumerate(batch.groups):
        mul, degree = d.z[group.block]
        constants = _constants(
            MUL=mul,
            DIM=2 * degree + 1,
            Z=_offset(d.z, group.block),
            ABREAST=group.abreast,
            PARTIAL=group.partial,
            SHIFT=shift % layout.threads,
        )
        shift += mul * (2 * degree + 1)
        members = names(group.pieces)
        parts.append(f"struct Group{index} {{ typedef mf::List<{members}> Pieces; {constants} {_flag(group.fresh)} }};")
    for kind, uses, blocks in (("X", batch.x, d.x), ("Y", batch.y, d.y)):
        for index, use in enumerate(uses):
            mul, degree = blocks[use.block]
            constants = _constants(MUL=mul, DIM=2 * degree + 1, OFFSET=_offset(blocks, use.block), SHIFT=use.shift)
            members = names(use.pieces)
            parts.append(
                f"struct {kind}{index} {{ typedef mf::List<{members}> Pieces; {constants} {_flag(use.fresh)} }};"
            )
    lists = {
        "Pieces": ("Piece", batch.pieces),
        "Groups": ("Group", batch.groups),
        "X": ("X", batch.x),
        "Y": ("Y", batch.y),
    }
    parts.append("struct Batch {")
    for name, (prefix, items) in lists.items():
        parts.append(f"    typedef mf::List<{', '.join(f'{prefix}{i}' for i in range(len(items)))}> {name};")
    parts += ["};", f"}}  // namespace batch{number}"]
    return "\n".join(parts)


def _sizes(d: FullyConnectedTensorProduct) -> dict[str, int]:
    return {"NX": d.x_dim, "NY": d.y_dim, "NZ": d.z_dim}


@lru_cache(maxsize=512)
def cuda_source(description: FullyConnectedTensorProduct, item_bytes: int, variant: Variant) -> CudaSource:
    """One CUDA translation unit with the kernel ``<variant.entry>``."""
    layout = plan(description, item_bytes)
    constants = _constants(THREADS=layout.threads, PRODUCTS=layout.products, **_sizes(description))
    batches = ", ".join(f"batch{number}::Batch" for number in range(len(layout.batches)))
    if variant.backward:
        outputs, arguments = "const T* g, T* dx, T* dy, T* dw", "g, dx, dy, dw"
        call = f"mf::fully_connected_backward<problem::Product, {variant.flags}>"
    else:
        outputs, arguments = "T* z", "z"
        call = "mf::fully_connected_forward<problem::Product>"
    text = [
        '#include "fully_connected.cuh"',
        f"namespace problem {{\ntypedef {_ctype(item_bytes)} T;",
        *(
            _path_struct(i, p, lanes)
            for i, (p, lanes) in enumerate(zip(description.resolved, layout.lanes, strict=True))
        ),
        *(_batch_struct(i, batch, layout, description) for i, batch in enumerate(layout.batches)),
        f"struct Product {{ {constants} static constexpr mf::index_t NW = {description.weight_numel}; "
        f"typedef mf::List<{batches}> Batches; }};",
        "}  // namespace problem",
        "typedef problem::T T;",
        f'extern "C" __global__ void __launch_bounds__({layout.threads}, {_RESIDENT}) {variant.entry}(const int* sender, '
        "const int* receiver, const T* x, const T* y, const T* w, long long w_row, long long edges, "
        f"{outputs}) {{",
        f"    {call}(mf::Edges<T>{{sender, receiver, x, y, w, w_row, edges}}, {arguments});",
        "}",
    ]
    headers = tuple((name, header(name)) for name in ("number.h", "fully_connected.cuh"))
    return CudaSource(variant.entry, "\n".join(text) + "\n", headers, (variant.entry,), CUDA_OPTIONS)


@lru_cache(maxsize=512)
def cpu_source(description: FullyConnectedTensorProduct, item_bytes: int, variant: Variant) -> CpuSource:
    """One C++ translation unit with the extern "C" function ``<variant.entry>``."""
    paths = description.resolved
    products = max(path.rows * (2 * path.l3 + 1) for path in paths)
    constants = _constants(PRODUCTS=products, **_sizes(description))
    names = ", ".join(f"Path{number}" for number in range(len(paths)))
    if variant.backward:
        outputs = "long long edges, long long stretches, const T* g, T* dx, T* dy, T* dw"
        call = f"mf::fully_connected_backward<problem::Product, {variant.flags}>"
        arguments = "edges, stretches, g, dx, dy, dw"
    else:
        outputs, arguments = "long long receivers, T* z", "receivers, z"
        call = "mf::fully_connected_forward<problem::Product>"
    text = [
        '#include "fully_connected.h"',
        f"namespace problem {{\ntypedef {_ctype(item_bytes)} T;",
        *(_path_struct(number, path, 1) for number, path in enumerate(paths)),
        f"struct Product {{ {constants} static constexpr mf::index_t NW = {description.weight_numel}; "
        f"typedef mf::List<{names}> Paths; }};",
        "}  // namespace problem",
        "typedef problem::T T;",
        f'extern "C" __attribute__((visibility("default"))) void {variant.entry}(const int* order, const int* row, '
        "const int* sender, const int* receiver, const T* x, const T* y, const T* w, long long w_row, "
        f"{outputs}, int threads) {{",
        f"    {call}(mf::Edges<T>{{order, row, sender, receiver, x, y, w, w_row}}, {arguments}, threads);",
        "}",
    ]
    headers = tuple((name, header(name)) for name in ("number.h", "fully_connected.h"))
    return CpuSource(variant.entry, "\n".join(text) + "\n", headers)
