"""C++ text for forces and virials of atoms from derivatives of edges, and for energies and stress of structures."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.source.text import header

FORCES, FORCES_AND_VIRIALS, ENERGIES, STRESS = "atom_forces", "atom_virials", "structure_energies", "structure_stress"
ATOM_THREADS = 128
STRUCTURE_THREADS = 256

_LISTS = "const int* receiver_row, const int* sender_order, const int* sender_row"
_GROUPS = "const long long* order, const long long* row"
_PARAMETERS = {
    FORCES: f"const NUMBER* derivatives, {_LISTS}, double* forces, long long atoms",
    FORCES_AND_VIRIALS: f"const NUMBER* vectors, const NUMBER* derivatives, {_LISTS}, double* forces, double* virials, "
    "long long atoms",
    ENERGIES: f"const double* values, {_GROUPS}, const double* base, double* sums, double* energies, long long structures",
    STRESS: f"const double* virials, {_GROUPS}, const double* cells, double* total, double* stress, long long structures",
}
_ATOM = {
    FORCES: "mf::atom_totals<false, NUMBER>(nullptr, derivatives, receiver_row, sender_order, sender_row, forces, nullptr, n, "
    "lane);",
    FORCES_AND_VIRIALS: "mf::atom_totals<true, NUMBER>(vectors, derivatives, receiver_row, sender_order, sender_row, forces, "
    "virials, n, lane);",
}
_STRUCTURE = {
    ENERGIES: [
        "    double found[1];",
        "    mf::structure_sum<1>(values, order, row[s], row[s + 1], found);",
        "    if (leader) {",
        "        sums[s] = found[0];",
        "        energies[s] = base[s] + found[0];",
        "    }",
    ],
    STRESS: [
        "    double found[9];",
        "    mf::structure_sum<9>(virials, order, row[s], row[s + 1], found);",
        "    if (leader) mf::strain_results(found, cells + 9 * s, total + 9 * s, stress + 9 * s);",
    ],
}
ATOM_ENTRIES = tuple(_ATOM)
_INCLUDES = ['#include "number.h"', '#include "lanes.h"', '#include "totals.h"']


def _headers() -> tuple[tuple[str, str], ...]:
    return tuple((name, header(name)) for name in ("number.h", "lanes.h", "totals.h"))


@cache
def totals_cuda(ctype: str) -> CudaSource:
    """A warp for each atom, a block for each structure."""
    text = list(_INCLUDES)
    for entry, call in _ATOM.items():
        text += [
            f'extern "C" __global__ void {entry}({_PARAMETERS[entry]}) {{',
            "    const long long n = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / mf::LANES;",
            "    const int lane = threadIdx.x % mf::LANES;",
            f"    if (n < atoms) {call}",
            "}",
        ]
    for entry, lines in _STRUCTURE.items():
        text += [
            f'extern "C" __global__ void {entry}({_PARAMETERS[entry]}) {{',
            "    const long long s = blockIdx.x;",
            "    const bool leader = threadIdx.x == 0;",
            *lines,
            "}",
        ]
    entries = (*_ATOM, *_STRUCTURE)
    return CudaSource("totals", "\n".join(text).replace("NUMBER", ctype) + "\n", _headers(), entries)


@cache
def totals_cpu(ctype: str) -> CpuSource:
    """The same functions, looping over atoms and structures."""
    export = 'extern "C" __attribute__((visibility("default"))) void'
    text = list(_INCLUDES)
    for entry, call in _ATOM.items():
        text += [
            f"{export} {entry}({_PARAMETERS[entry]}, int threads) {{",
            "    const int lane = 0;",
            "#pragma omp parallel for num_threads(threads)",
            f"    for (long long n = 0; n < atoms; ++n) {call}",
            "}",
        ]
    for entry, lines in _STRUCTURE.items():
        text += [
            f"{export} {entry}({_PARAMETERS[entry]}, int threads) {{",
            "    const bool leader = true;",
            "#pragma omp parallel for num_threads(threads)",
            "    for (long long s = 0; s < structures; ++s) {",
            *lines,
            "    }",
            "}",
        ]
    return CpuSource("totals", "\n".join(text).replace("NUMBER", ctype) + "\n", _headers())
