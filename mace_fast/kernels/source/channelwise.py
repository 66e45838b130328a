"""C++ text for a channelwise tensor product: the generated lists of blocks and paths, and a few entry points.

The algorithms are in headers/channelwise_conv.cuh (CUDA) and headers/channelwise_conv.h (CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.plan.channelwise import plan, sums_beside_gradients
from mace_fast.kernels.plan.coupling import of_path
from mace_fast.kernels.plan.layout import ChannelwisePlan, PlannedPath, Role, Schedule, SegmentPlan, Slot
from mace_fast.kernels.source.text import header, indent

CPU_TILE = 16

OVERFLOW_THREADS = 128

CUDA_OPTIONS = ("-default-device",)
"""NVRTC 13.0 takes the body of a generic lambda for host code without it; later versions do not."""

_SPLINE = "const T* radius, const int* table, const T* rows, long long intervals, double per_length"
_SPLINE_SETUP = "    const mf::Spline<T> spline{radius, table, rows, intervals, problem::T(per_length)};"

_CUDA_HEADERS = (
    "async_copy.cuh",
    "number.h",
    "spline.h",
    "channels.cuh",
    "channelwise_operands.cuh",
    "channelwise_ring.cuh",
    "channelwise_tile.cuh",
    "channelwise_stream.cuh",
    "channelwise_walk.cuh",
    "channelwise_gradient.cuh",
    "channelwise_conv.cuh",
    "channelwise_clusters.cuh",
)


@dataclass(frozen=True)
class Variant:
    """Which kernel of a description: the number kind, forward or backward, and which gradients backward writes.

    ``want_z``: on CUDA, backward writes what forward would as well. ``order`` > 0 (even) takes the weights from piecewise polynomials of the edge length with that many coefficients; 0
    reads them from memory.
    """

    dual: bool
    backward: bool
    want_x: bool = False
    want_y: bool = False
    want_w: bool = False
    order: int = 0
    want_z: bool = False

    @property
    def role(self) -> Role:
        """What the plan needs to know."""
        return Role(self.dual, self.backward, self.order > 0, self.want_z)

    @property
    def entry(self) -> str:
        wanted = {"x": self.want_x, "y": self.want_y, "w": self.want_w, "z": self.want_z}
        wants = "".join(name for name, want in wanted.items() if want)
        return f"channelwise_{'backward_' + wants if self.backward else 'forward'}{'_tangent' if self.dual else ''}" + (
            f"_spline{self.order}" if self.order else ""
        )


_ADD = {1: "add", -1: "subtract"}
_USING = "using mf::across;\nusing mf::multiply;\nusing mf::multiply_add;\nusing mf::multiply_subtract;"


PASSES = (
    Variant(False, False),
    Variant(False, True, True, True, True),
    Variant(True, False),
    Variant(True, True, True, True, True),
)
"""What a product, its gradients and gradients of those run, in this order."""

BOTH = Variant(True, True, True, True, True, want_z=True)


def gpu_passes(description: ChannelwiseTensorProduct, item_bytes: int) -> tuple[Variant, ...]:
    """The same on a GPU, where one kernel may do what the last two do."""
    return (*PASSES[:2], BOTH) if sums_beside_gradients(description, item_bytes) else PASSES


def _terms(target: str, terms: list[str]) -> str:
    return f"{target} = {' + '.join(terms) if terms else '0'};"


class _Places:
    """Where the images of a segment have their blocks and weights: constants, and for all but the first image a shift that
    is looked up. Paths with the same shift share it, so that one address serves them all."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.shifts: list[tuple[int, ...]] = []

    def function(self, name: str, offsets: list[int]) -> str:
        """A function of the image that gives its offset."""
        if self.images == 1:
            return f"MF_INLINE static constexpr int {name}(int) {{ return {offsets[0]}; }}"
        shift = tuple(offset - offsets[0] for offset in offsets)
        if shift not in self.shifts:
            self.shifts.append(shift)
        entry = f"shifts[image * SHIFTS + {self.shifts.index(shift)}]"
        return f"MF_INLINE static int {name}(int image) {{ return {offsets[0]} + {entry}; }}"

    def table(self) -> list[str]:
        """What the functions look up, in constant memory: the image is the same for all threads of a block."""
        if self.images == 1:
            return []
        rows = [", ".join(str(shift[image]) for shift in self.shifts) for image in range(self.images)]
        return [
            f"constexpr int SHIFTS = {len(self.shifts)};",
            f"__constant__ int shifts[{self.images} * SHIFTS] = {{{',  '.join(rows)}}};",
        ]


def _path_struct(images: list[PlannedPath], name: str, places: _Places, piece: int) -> str:
    """The constants and the straight-line code of one path, the same in all images of its segment."""
    path = images[0]
    flat, structure = path.flat, of_path(path.flat)

    def y(j: int) -> int:
        return flat.y_offset + j * flat.y_stride

    def literal(value: float) -> str:
        return f"T({value.hex()})"

    couple = [
        _terms(f"m[{q}]", [f"{literal(value)} * y[{y(j)}]" for j, value in entry])
        for q, entry in enumerate(structure.entries)
    ]
    forward = [f"multiply_{_ADD[u.sign]}(z[{u.k}], x[{u.i}], m[{u.entry}]);" for u in structure.uses]
    transpose = []
    for i in range(2 * flat.l1 + 1):
        uses = sorted((u for u in structure.uses if u.i == i), key=lambda u: -u.sign)
        first = (
            f"multiply(t[{i}], g[{uses[0].k}], {'' if uses[0].sign > 0 else '-'}m[{uses[0].entry}]);" if uses else ""
        )
        transpose.append(first or f"t[{i}] = zero(t[{i}]);")
        transpose.extend(f"multiply_{_ADD[u.sign]}(t[{i}], g[{u.k}], m[{u.entry}]);" for u in uses[1:])
    gradient = []
    products: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for i, j, k, value in structure.triples:
        products.setdefault((i, k), []).append((j, value))
    for (i, k), terms in products.items():
        gradient.append(f"{{ Y_ p; across(p, x[{i}], g[{k}]);")
        gradient.extend(f"  multiply_add(dy[{y(j)}], p, {literal(value)});" for j, value in terms)
        gradient.append("}")
    constants = {
        "INDEX": path.index,
        "PIECE": piece,
        "WARP": path.warp,
        "MUL": flat.mul,
        "X": path.x,
        "DX": 2 * flat.l1 + 1,
        "Z": path.z,
        "DZ": 2 * flat.l3 + 1,
        "Y": flat.y_offset,
        "DY": 2 * flat.l2 + 1,
        "Y_STRIDE": flat.y_stride,
        "M": path.m,
        "FORMS": len(structure.entries),
        "PADDED": path.padded,
        "W_STRIDE": flat.w_stride,
    }
    lines = [
        f"struct {name} {{  // l = {flat.l1} x {flat.l2} -> {flat.l3}",
        "    static constexpr int " + ", ".join(f"{key} = {value}" for key, value in constants.items()) + ";",
        f"    static constexpr bool WEIGHTED = {'true' if flat.weighted else 'false'};",
        "    " + places.function("column", [image.flat.w_offset for image in images]),
        "    " + places.function("x_offset", [image.flat.x_offset for image in images]),
        "    " + places.function("z_offset", [image.flat.z_offset for image in images]),
        "    template <class V> MF_INLINE static void couple(const V* y, V* m) {",
        *indent(couple, 8),
        "    }",
        "    template <class N, class M_> MF_INLINE static void forward(const N* x, const M_* m, N* z) {",
        *indent(forward, 8),
        "    }",
        "    template <class G, class M_, class N> MF_INLINE static void transpose(const G* g, const M_* m, N* t) {",
        *indent(transpose, 8),
        "    }",
        "    template <class N, class G, class Y_> MF_INLINE static void couple_gradient(const N* x, const G* g, Y_* dy) {",
        *indent(gradient, 8),
        "    }",
        "};",
    ]
    return "\n".join(lines)


def _slot_struct(images: list[Slot], name: str, places: _Places) -> str:
    slot = images[0]
    return (
        f"struct {name} {{ static constexpr int BASE = {slot.base}, DIM = {slot.dim}, MUL = {slot.mul}; "
        f"static constexpr bool FRESH = {'true' if slot.fresh else 'false'}; "
        f"{places.function('offset', [image.offset for image in images])} }};"
    )


def _segment_struct(
    number: int,
    images: list[SegmentPlan],
    layout: ChannelwisePlan,
    description: ChannelwiseTensorProduct,
    tile: int,
    order: int,
) -> str:
    """``images``: segments that differ in nothing but the places of their blocks and weights."""
    segment, places = images[0], _Places(len(images))
    structs = []
    lists = {}
    for kind in "XZ":
        columns = list(zip(*(image.x if kind == "X" else image.z for image in images), strict=True))
        names = [f"{kind}{i}" for i in range(len(columns))]
        structs += [_slot_struct(list(slots), name, places) for slots, name in zip(columns, names, strict=True)]
        lists[kind] = ", ".join(names)
    paths = zip(*(image.paths for image in images), strict=True)
    weighted = 0
    for i, path in enumerate(paths):
        structs.append(_path_struct(list(path), f"Path{i}", places, weighted))
        weighted += path[0].flat.weighted
    parts = [f"namespace segment{number} {{", *places.table(), *structs]
    lists["Paths"] = ", ".join(f"Path{i}" for i in range(len(segment.paths)))
    forms = sum(path.padded for path in segment.paths)
    constants = {
        "NX": segment.x_registers,
        "NZ": segment.z_registers,
        "NY": description.y_dim,
        "NW": len(segment.paths),
        "NUMEL": description.weight_numel,
        "FORMS": forms,
        "STRIDE": segment.stride,
        "TILE": tile,
        "WARPS": layout.warps,
        "CHANNEL_BLOCKS": layout.channel_blocks,
        "ORDER": order,
        "OUT": description.y_dim + (1 if order else 0),
        "VEC": layout.schedule.vector,
        "RING": layout.schedule.ring,
        "PIECES": weighted,
        "X_ROW": description.x_dim,
    }
    parts += [
        "struct Segment {",
        "    typedef problem::T T;",
        *(f"    typedef mf::List<{names}> {kind}_;" for kind, names in lists.items()),
        "    typedef X_ X; typedef Z_ Z; typedef Paths_ Paths;",
        "    static constexpr int " + ", ".join(f"{key} = {value}" for key, value in constants.items()) + ";",
        f"    static constexpr bool EXACT = {'true' if layout.exact else 'false'};",
        f"    static constexpr bool PREFETCH = {'true' if layout.schedule.prefetch else 'false'};",
        "    static constexpr bool STREAMED = ORDER > 0 && PREFETCH;",
        "};",
        f"}}  // namespace segment{number}",
    ]
    return "\n".join(parts)


def _ctype(item_bytes: int) -> str:
    return {4: "float", 8: "double"}[item_bytes]


def _wants(variant: Variant) -> str:
    return ", ".join("true" if want else "false" for want in (variant.want_x, variant.want_y, variant.want_w))


@lru_cache(maxsize=512)
def cuda_source(
    description: ChannelwiseTensorProduct,
    item_bytes: int,
    variant: Variant,
    schedule: Schedule | None = None,
    resident: int | None = None,
) -> CudaSource:
    """One CUDA translation unit: the kernel ``<variant.entry>_0`` for all segments of the plan, side by side; or one for
    each segment, ``_0``, ``_1`` ..., where they have to follow one another. ``resident``: blocks that must fit on a
    multiprocessor, if it is not left to the compiler how many should; streams of coefficients ask for one anyway."""
    layout = plan(description, item_bytes, variant.role, schedule)
    segments = layout.segments
    if variant.order and layout.schedule.prefetch and resident is None:
        # Left to itself, the compiler gives up registers for more warps, and what is on its way no longer fits.
        resident = 1
    ctype = _ctype(item_bytes)
    dual = "true" if variant.dual else "false"
    text = [
        f'#include "channelwise_{"clusters" if layout.schedule.cluster else "conv"}.cuh"',
        f"namespace problem {{\ntypedef {ctype} T;",
        _USING,
        "template <class V> MF_INLINE V zero(V) { return V(); }",
        *(
            _segment_struct(
                numbers[0],
                [segments[n] for n in numbers],
                layout,
                description,
                segments[numbers[0]].tile,
                variant.order,
            )
            for numbers in layout.alike
        ),
        "}  // namespace problem",
        "typedef problem::T T;",
    ]
    parameters = (
        "const int* order, const int* row, const int* sender, const int* receiver, const float* poison, "
        "long long receivers, long long run, long long groups, long long limit, long long parts, "
        "const T* x, const T* y, const T* w, const T* x_tangent, const T* y_tangent, const T* w_tangent, "
        f"long long x_row, long long y_row, long long w_row, {_SPLINE}"
    )
    setup = [
        "    const mf::Graph graph{order, row, sender, receiver, poison, receivers, run, groups, limit, int(parts)};",
        "    const mf::Operands<T> in{x, y, w, x_row, y_row, w_row}, "
        "tangent{x_tangent, y_tangent, w_tangent, x_row, y_row, w_row};",
        _SPLINE_SETUP,
    ]
    sums = variant.want_z or not variant.backward
    if sums:
        setup.append("    const mf::Sums<T> sums{z, partial, z_row};")
    launches = [layout.alike] if layout.together else [(numbers,) for numbers in layout.alike]
    entries = tuple(f"{variant.entry}_{launch}" for launch in range(len(launches)))
    bounds = str(layout.threads) if resident is None else f"{layout.threads}, {resident}"
    for entry, members in zip(entries, launches, strict=True):
        outputs = "const T* g, long long g_row, T* dx, T* dy, T* dw, long long first, long long end, long long edges"
        if sums:
            outputs = (f"{outputs}, " if variant.backward else "") + "T* z, T* partial, long long z_row"
        # Only where the weights of edges are not written may the gradients of edges be too many to write.
        stretch = "mf::Stretch{int(first), int(end)}, int(first)" if variant.order else "mf::AllEdges(), 0"
        calls = []
        place = 0
        for numbers in members:
            segment = f"problem::segment{numbers[0]}::Segment"
            image = f"int(blockIdx.z) - {place}"
            if variant.backward and layout.schedule.cluster:
                call = (
                    f"mf::conv_backward_clusters<{segment}, {dual}, {_wants(variant)}, {layout.schedule.cluster}>"
                    f"(graph, in, tangent, spline, {image}, g, g_row, dx, dy, dw, edges, {numbers[0]} + {image});"
                )
            elif variant.backward:
                with_sums = "true" if sums else "false"
                call = (
                    f"mf::conv_backward<{segment}, {dual}, {_wants(variant)}, {with_sums}>(graph, {stretch}, in, tangent, "
                    f"spline, {image}, g, g_row, dx, dy, dw, {'sums' if sums else 'mf::Sums<T>()'}, edges, "
                    f"{numbers[0]} + {image});"
                )
            else:
                call = f"mf::conv_forward<{segment}, {dual}>(graph, in, tangent, spline, {image}, sums);"
            last = place + len(numbers) - 1
            where = f"blockIdx.z == {place}" if len(numbers) == 1 else f"blockIdx.z >= {place} && blockIdx.z <= {last}"
            calls.append(f"    if ({where}) {call}")
            place += len(numbers)
        text += [
            f'extern "C" __global__ void __launch_bounds__({bounds}) {entry}({parameters}, {outputs}) {{',
            *(line.replace("<T>", f"<{ctype}>") for line in setup),
            *calls,
            "}",
        ]
    headers = tuple((name, header(name)) for name in _CUDA_HEADERS)
    return CudaSource(variant.entry, "\n".join(text) + "\n", headers, entries, CUDA_OPTIONS)


@lru_cache(maxsize=8)
def overflow_source(item_bytes: int, vector: int) -> CudaSource:
    """The kernel ``overflow`` that adds the sums of parts and windows to receivers whose edges several groups share;
    ``vector`` columns a thread."""
    ctype = _ctype(item_bytes)
    text = f"""
#include "overflow.cuh"
extern "C" __global__ void __launch_bounds__({OVERFLOW_THREADS}) overflow({ctype}* z, const {ctype}* partial,
        const int* row, long long receivers, long long limit, long long parts, long long part_groups, long long z_row) {{
    mf::add_partial_sums<{ctype}, {vector}>(z, partial, row, receivers, limit, int(parts), part_groups, z_row);
}}
"""
    headers = tuple((name, header(name)) for name in ("number.h", "overflow.cuh"))
    return CudaSource(f"overflow_{ctype}", text, headers, ("overflow",), CUDA_OPTIONS)


@lru_cache(maxsize=512)
def cpu_source(description: ChannelwiseTensorProduct, item_bytes: int, variant: Variant) -> CpuSource:
    """One C++ translation unit with the extern "C" function ``<variant.entry>``. The CPU needs no segments."""
    layout = plan(description, item_bytes, Role(), Schedule())
    ctype = _ctype(item_bytes)
    dual = "true" if variant.dual else "false"
    merged = _one_segment(layout)
    outputs = (
        "const T* g, long long g_row, T* dx, T* dy, T* dw, long long first, long long end"
        if variant.backward
        else "T* z, long long z_row"
    )
    call = (
        f"mf::conv_backward<problem::segment0::Segment, {dual}, {_wants(variant)}>"
        "(graph, in, tangent, spline, g, g_row, dx, dy, dw, first, end, threads);"
        if variant.backward
        else f"mf::conv_forward<problem::segment0::Segment, {dual}>(graph, in, tangent, spline, z, z_row, threads);"
    )
    text = [
        '#include "channelwise_conv.h"',
        f"namespace problem {{\ntypedef {ctype} T;",
        _USING,
        "template <class V> MF_INLINE V zero(V) { return V{}; }",
        _segment_struct(0, [merged], layout, description, CPU_TILE, variant.order),
        "}  // namespace problem",
        "typedef problem::T T;",
        f'extern "C" __attribute__((visibility("default"))) void {variant.entry}(const int* order, const int* row, '
        "const int* sender, float poison, long long receivers, const T* x, const T* y, const T* w, const T* x_tangent, "
        "const T* y_tangent, const T* w_tangent, long long x_row, long long y_row, long long w_row, "
        f"{_SPLINE}, {outputs}, int threads) {{",
        "    const mf::Graph graph{order, row, sender, poison, receivers};",
        "    const mf::Operands<T> in{x, y, w, x_row, y_row, w_row}, "
        "tangent{x_tangent, y_tangent, w_tangent, x_row, y_row, w_row};",
        _SPLINE_SETUP.replace("<T>", f"<{ctype}>"),
        f"    {call}",
        "}",
    ]
    headers = tuple((name, header(name)) for name in ("number.h", "spline.h", "channelwise_conv.h"))
    return CpuSource(variant.entry, "\n".join(text) + "\n", headers)


def _one_segment(layout: ChannelwisePlan) -> SegmentPlan:
    """All segments as one, forms and registers renumbered: the CPU walks path by path and keeps only one in registers."""
    x: dict[int, Slot] = {}
    z: dict[int, Slot] = {}
    paths: list[PlannedPath] = []
    x_used = z_used = m_used = 0
    for segment in layout.segments:
        for slot in segment.x:
            if slot.offset not in x:
                x[slot.offset] = Slot(x_used, slot.dim, slot.mul, slot.offset)
                x_used += slot.dim
        for slot in segment.z:
            z[slot.offset] = Slot(z_used, slot.dim, slot.mul, slot.offset)
            z_used += slot.dim
        for path in segment.paths:
            paths.append(
                PlannedPath(
                    path.flat,
                    len(paths),
                    x[path.flat.x_offset].base,
                    z[path.flat.z_offset].base,
                    m_used,
                    path.padded,
                    0,
                )
            )
            m_used += path.padded
    return SegmentPlan(tuple(x.values()), tuple(z.values()), tuple(paths), m_used, CPU_TILE)
