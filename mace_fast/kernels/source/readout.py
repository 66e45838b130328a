"""C++ text for the energies of nodes: all readouts of a model, scale and shift, in one kernel."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.source.text import header

NODE_ENERGIES = "node_energies"
THREADS = 64
"""Threads of a block on CUDA: small, since each node is a warp and few nodes must fill a GPU."""


def _parameters(ctype: str, hidden: tuple[int, ...]) -> str:
    parts = [
        f"const {ctype}* features_{k}, long long dim_{k}, const {ctype}* first_{k}, long long width_{k}, "
        f"const {ctype}* second_{k}, {ctype}* gradient_{k}, "
        for k in range(len(hidden))
    ]
    return "".join(parts) + (
        f"const {ctype}* extra, const long long* head, const {ctype}* scale, const {ctype}* shift, const double* base, "
        "double* interaction, double* energy, long long nodes"
    )


def _body(ctype: str, hidden: tuple[int, ...]) -> list[str]:
    readouts = [
        f"    total += mf::read_out<{size}>(mf::Readout<{ctype}>{{features_{k}, dim_{k}, first_{k}, width_{k}, second_{k}, "
        f"gradient_{k}}}, n, lane, head_of_n, scale_of_n);"
        for k, size in enumerate(hidden)
    ]
    return [
        # Read first, and by all lanes: at the end they would be one more wait.
        f"    const {ctype} scale_of_n = scale[n], shift_of_n = shift[n];",
        "    const double base_of_n = base[n];",
        "    const long long head_of_n = head[n];",
        "    double total = extra ? double(extra[n]) : 0.0;",
        *readouts,
        "    if (lane == 0) {",
        "        const double value = double(scale_of_n) * total + double(shift_of_n);",
        "        interaction[n] = value;",
        "        energy[n] = base_of_n + value;",
        "    }",
    ]


def _headers() -> tuple[tuple[str, str], ...]:
    return tuple((name, header(name)) for name in ("number.h", "lanes.h", "readout.h"))


_INCLUDES = ['#include "number.h"', '#include "lanes.h"', '#include "readout.h"']


@cache
def readout_cuda(ctype: str, hidden: tuple[int, ...]) -> CudaSource:
    """Kernel ``node_energies``, a warp for each node. ``hidden``: the width of each readout's hidden layer; 0 has none."""
    text = [
        *_INCLUDES,
        f'extern "C" __global__ void {NODE_ENERGIES}({_parameters(ctype, hidden)}) {{',
        "    const long long n = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / mf::LANES;",
        "    const int lane = threadIdx.x % mf::LANES;",
        "    if (n >= nodes) return;",
        *_body(ctype, hidden),
        "}",
    ]
    return CudaSource(NODE_ENERGIES, "\n".join(text) + "\n", _headers(), (NODE_ENERGIES,))


@cache
def readout_cpu(ctype: str, hidden: tuple[int, ...]) -> CpuSource:
    """The same function, looping over nodes."""
    text = [
        "#include <cmath>",
        "using std::exp;",
        *_INCLUDES,
        f'extern "C" __attribute__((visibility("default"))) void {NODE_ENERGIES}({_parameters(ctype, hidden)}, int threads) {{',
        "#pragma omp parallel for num_threads(threads)",
        "for (long long n = 0; n < nodes; ++n) {",
        "    const int lane = 0;",
        *_body(ctype, hidden),
        "}",
        "}",
    ]
    return CpuSource(NODE_ENERGIES, "\n".join(text) + "\n", _headers())
