"""C++ text of the segment kernels: a choice of number and index type around headers/segment_sum and
segment_lists."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.source.text import header

SUM_THREADS = 256
LISTS_THREADS = 1024
LONG_SEGMENT = 512  # LONG in headers/segment_sum.cuh
CHUNK = 256  # CHUNK there

FLOATS = {"float32": "float", "float64": "double"}
IDS = {"int32": "int", "int64": "long long"}
PACK = {"float32": 4, "float64": 2}  # numbers in 16 bytes


@cache
def segment_cuda(values: str, ids: str) -> CudaSource:
    """Entry points segment_partial, segment_sum, segment_gather, each with `_1` and, 16 bytes per access,
    `_packed`."""
    parts = [
        f"typedef {FLOATS[values]} T;",
        f"typedef {IDS[ids]} I;",
        f"constexpr int THREADS = {SUM_THREADS};",
        # Fitting four blocks, the compiler for sm_120 spills a few bytes, the others do not.
        "#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200",
        "constexpr int RESIDENT = 3;",
        "#else",
        "constexpr int RESIDENT = 4;",
        "#endif",
        '#include "segment_sum.cuh"',
        "using mf::index_t;",
    ]
    names = []
    for suffix, width in (("1", 1), ("packed", PACK[values])):
        parts.append(
            f"""
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) segment_partial_{suffix}(
    const T* values, const I* order, const I* row_ptr, T* partial, index_t segments, index_t rows, index_t
    dim, int all, int log_columns, int log_lanes) {{ mf::segment_partial<{width}>(values, order, row_ptr, partial,
    segments, rows, dim, all, log_columns, log_lanes);
}}
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) segment_sum_{suffix}(
    const T* values, const I* order, const I* row_ptr, const T* partial, T* out, index_t segments, index_t
    rows, index_t dim, int all, int log_columns, int log_lanes) {{ mf::segment_sum<{width}>(values, order, row_ptr,
    partial, out, segments, rows, dim, all, log_columns, log_lanes);
}}
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) segment_gather_{suffix}(
    const T* values, const I* index, T* out, index_t segments, index_t rows, index_t dim, int log_columns) {{
    mf::segment_gather<{width}>(values, index, out, segments, rows, dim, log_columns);
}}"""
        )
        names += [f"segment_{kind}_{suffix}" for kind in ("partial", "sum", "gather")]
    return CudaSource(
        name=f"segment_{values}_{ids}",
        text="\n".join(parts) + "\n",
        headers=_headers("number.h", "pack.cuh", "segment_sum.cuh"),
        entry_points=tuple(names),
    )


@cache
def segment_lists_cuda(ids: str) -> CudaSource:
    """Entry point segment_lists."""
    text = f"""typedef {IDS[ids]} I;
constexpr int THREADS = {LISTS_THREADS};
#include "segment_lists.cuh"
using mf::index_t;

extern "C" __global__ void __launch_bounds__(THREADS) segment_lists(
    const I* index, long long* order, long long* row_ptr, index_t segments, index_t rows) {{
    mf::segment_lists(index, order, row_ptr, segments, rows);
}}
"""
    return CudaSource(
        name=f"segment_lists_{ids}",
        text=text,
        headers=_headers("number.h", "segment_lists.cuh"),
        entry_points=("segment_lists",),
    )


@cache
def segment_cpu() -> CpuSource:
    """Functions segment_sum_<values>_<ids>, which return 0 or check_lists' code for what is wrong with the
    lists, and segment_lists_<ids>, which return 1 unless an id is out of range."""
    parts = ['#include "segment_lists.h"', '#include "segment_sum.h"', "using mf::index_t;"]
    for ids, integer in IDS.items():
        parts.append(
            f"""
extern "C" int segment_lists_{ids}(
    const {integer}* index, index_t segments, index_t rows, long long* order, long long* row_ptr) {{
    return mf::segment_lists(index, segments, rows, order, row_ptr);
}}"""
        )
        for values, number in FLOATS.items():
            parts.append(
                f"""
extern "C" int segment_sum_{values}_{ids}(
    const {number}* values, const {integer}* order, const {integer}* row_ptr, index_t segments, index_t rows,
    index_t dim, {number}* out, int threads) {{
    return mf::segment_sum(values, order, row_ptr, segments, rows, dim, out, threads);
}}"""
            )
    return CpuSource(
        name="segment",
        text="\n".join(parts) + "\n",
        headers=_headers("number.h", "segment_lists.h", "segment_sum.h"),
    )


def _headers(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, header(name)) for name in names)
