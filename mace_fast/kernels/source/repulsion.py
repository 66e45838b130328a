"""C++ text for the repulsion of nuclei and its gradient."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.source.text import header

REPULSION, GRADIENT = "nuclear_repulsion", "nuclear_repulsion_gradient"
THREADS = 128

_PARAMETERS = {
    REPULSION: "const NUMBER* radius, const long long* species, const int* sender, const int* row, const NUMBER* table, "
    "NUMBER* energy, NUMBER* slope, double share_0, double share_1, double share_2, double share_3, double length, "
    "long long p, long long atoms",
    GRADIENT: "const NUMBER* g, const NUMBER* slope, const int* row, NUMBER* dradius, long long atoms",
}
_BODY = {
    REPULSION: [
        "    const mf::Repulsion<NUMBER> form{table, {NUMBER(share_0), NUMBER(share_1), NUMBER(share_2), NUMBER(share_3)}, "
        "NUMBER(length), int(p)};",
        "    const NUMBER found = mf::atom_repulsion(form, radius, species, sender, row[n], row[n + 1], n, lane, slope);",
        "    if (lane == 0) energy[n] = found;",
    ],
    GRADIENT: [
        "    const NUMBER factor = g[n];",
        "    for (long long e = row[n] + lane; e < row[n + 1]; e += mf::LANES) dradius[e] = factor * slope[e];",
    ],
}
_INCLUDES = ['#include "number.h"', '#include "lanes.h"', '#include "repulsion.h"']


def _headers() -> tuple[tuple[str, str], ...]:
    return tuple((name, header(name)) for name in ("number.h", "lanes.h", "repulsion.h"))


@cache
def repulsion_cuda(ctype: str) -> CudaSource:
    """Kernels ``nuclear_repulsion`` and ``nuclear_repulsion_gradient``, a warp for each atom."""
    text = list(_INCLUDES)
    for entry, body in _BODY.items():
        text += [
            f'extern "C" __global__ void {entry}({_PARAMETERS[entry]}) {{',
            "    const long long n = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / mf::LANES;",
            "    const int lane = threadIdx.x % mf::LANES;",
            "    if (n >= atoms) return;",
            *body,
            "}",
        ]
    whole = "\n".join(text).replace("NUMBER", ctype) + "\n"
    return CudaSource(f"repulsion_{ctype}", whole, _headers(), tuple(_BODY))


@cache
def repulsion_cpu(ctype: str) -> CpuSource:
    """The same functions, looping over atoms."""
    text = ["#include <cmath>", "using std::exp;", *_INCLUDES]
    for entry, body in _BODY.items():
        text += [
            f'extern "C" __attribute__((visibility("default"))) void {entry}({_PARAMETERS[entry]}, int threads) {{',
            "#pragma omp parallel for num_threads(threads)",
            "for (long long n = 0; n < atoms; ++n) {",
            "    const int lane = 0;",
            *body,
            "}",
            "}",
        ]
    return CpuSource(f"repulsion_{ctype}", "\n".join(text).replace("NUMBER", ctype) + "\n", _headers())
