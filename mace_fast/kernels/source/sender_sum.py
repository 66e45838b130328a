"""C++ text for the sum of edges' gradients at their senders, a stretch of edges at a time."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.source.text import header

SENDER_SUM = "sender_sum"
MOST_WARPS = 8  # as in headers/sender_sum.cuh
PACK = {"float": 4, "double": 2}
"""Numbers in 16 bytes."""

_PARAMETERS = "const T* values, const int* order, const int* row, T* out, long long first, long long end"


@cache
def sender_sum_cuda(ctype: str) -> CudaSource:
    """Entry points ``sender_sum_1`` and, with 16 bytes an access, ``sender_sum_packed``."""
    text = [f"typedef {ctype} T;", '#include "sender_sum.cuh"']
    entries = []
    for suffix, width in (("1", 1), ("packed", PACK[ctype])):
        entries.append(f"{SENDER_SUM}_{suffix}")
        text += [
            f'extern "C" __global__ void __launch_bounds__(32 * mf::MOST_WARPS) {entries[-1]}({_PARAMETERS}, '
            "long long dim, int fresh) {",
            f"    mf::sender_sum<{width}>(values, order, row, out, first, end, dim, fresh);",
            "}",
        ]
    headers = tuple((name, header(name)) for name in ("number.h", "pack.cuh", "sender_sum.cuh"))
    return CudaSource(f"{SENDER_SUM}_{ctype}", "\n".join(text) + "\n", headers, tuple(entries))


@cache
def sender_sum_cpu(ctype: str) -> CpuSource:
    """The function ``sender_sum``."""
    text = [
        f"typedef {ctype} T;",
        '#include "sender_sum.h"',
        f'extern "C" __attribute__((visibility("default"))) void {SENDER_SUM}({_PARAMETERS}, long long senders, '
        "long long dim, int fresh, int threads) {",
        "    mf::sender_sum(values, order, row, out, first, end, senders, dim, fresh, threads);",
        "}",
    ]
    headers = tuple((name, header(name)) for name in ("number.h", "sender_sum.h"))
    return CpuSource(f"{SENDER_SUM}_{ctype}", "\n".join(text) + "\n", headers)
