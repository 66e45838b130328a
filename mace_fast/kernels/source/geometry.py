"""C++ text from positions to edge vectors, lengths and harmonics, and back from the gradients of their users."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.source.harmonics import functions, headers

GEOMETRY, GRADIENT = "edge_geometry", "edge_gradient"


def _geometry_parameters(ctype: str) -> str:
    return (
        "const double* positions, const double* shifts, const int* sender, const int* receiver, "
        f"{ctype}* vectors, {ctype}* radius, {ctype}* y, long long edges"
    )


def _gradient_parameters(ctype: str, radii: int, harmonics: int) -> str:
    users = [f"const {ctype}* dradius_{k}, long long dradius_row_{k}, " for k in range(radii)]
    users += [f"const {ctype}* dy_{k}, long long dy_row_{k}, " for k in range(harmonics)]
    return f"const {ctype}* vectors, {''.join(users)}const int* count, {ctype}* dvectors, long long edges"


_GEOMETRY_CALL = (
    "mf::edge_geometry(positions, sender[e], receiver[e], shifts + 3 * e, vectors + 3 * e, radius + e, "
    "y + e * problem::COUNT);"
)


def _gradient_body(radii: int, harmonics: int) -> list[str]:
    """Of edge e: what pads a list beyond ``*count`` gets exactly zero, whatever its gradients hold."""
    dradius = " + ".join(f"dradius_{k}[e * dradius_row_{k}]" for k in range(radii)) or "problem::T(0)"
    dy = " + ".join(f"dy_{k}[e * dy_row_{k} + j]" for k in range(harmonics)) or "problem::T(0)"
    return [
        "    if (count && e >= *count) {",
        "        for (int a = 0; a < 3; ++a) dvectors[3 * e + a] = problem::T(0);",
        "    } else {",
        "        problem::T g[problem::COUNT];",
        f"        for (int j = 0; j < problem::COUNT; ++j) g[j] = {dy};",
        f"        mf::edge_backward(vectors + 3 * e, g, {dradius}, dvectors + 3 * e);",
        "    }",
    ]


@cache
def geometry_cuda(lmax: int, ctype: str) -> CudaSource:
    """Kernel ``edge_geometry``, a thread for each edge."""
    text = [
        '#include "number.h"',
        *functions(lmax, ctype),
        f'extern "C" __global__ void {GEOMETRY}({_geometry_parameters(ctype)}) {{',
        "    const long long e = blockIdx.x * (long long)blockDim.x + threadIdx.x;",
        f"    if (e < edges) {_GEOMETRY_CALL}",
        "}",
    ]
    return CudaSource(GEOMETRY, "\n".join(text) + "\n", headers(), (GEOMETRY,))


@cache
def gradient_cuda(lmax: int, ctype: str, radii: int, harmonics: int) -> CudaSource:
    """Kernel ``edge_gradient`` for so many gradients of lengths and of harmonics, a thread for each edge."""
    text = [
        '#include "number.h"',
        *functions(lmax, ctype),
        f'extern "C" __global__ void {GRADIENT}({_gradient_parameters(ctype, radii, harmonics)}) {{',
        "    const long long e = blockIdx.x * (long long)blockDim.x + threadIdx.x;",
        "    if (e >= edges) return;",
        *_gradient_body(radii, harmonics),
        "}",
    ]
    return CudaSource(GRADIENT, "\n".join(text) + "\n", headers(), (GRADIENT,))


_EXPORT = 'extern "C" __attribute__((visibility("default"))) void'
_LOOP = "    #pragma omp parallel for num_threads(threads)\n    for (long long e = 0; e < edges; ++e) {"


@cache
def geometry_cpu(lmax: int, ctype: str) -> CpuSource:
    """The same function, looping over edges."""
    text = [
        "#include <cmath>",
        '#include "number.h"',
        *functions(lmax, ctype),
        f"{_EXPORT} {GEOMETRY}({_geometry_parameters(ctype)}, int threads) {{",
        _LOOP,
        f"    {_GEOMETRY_CALL}",
        "    }",
        "}",
    ]
    return CpuSource(GEOMETRY, "\n".join(text) + "\n", headers())


@cache
def gradient_cpu(lmax: int, ctype: str, radii: int, harmonics: int) -> CpuSource:
    """The same function, looping over edges."""
    text = [
        "#include <cmath>",
        '#include "number.h"',
        *functions(lmax, ctype),
        f"{_EXPORT} {GRADIENT}({_gradient_parameters(ctype, radii, harmonics)}, int threads) {{",
        _LOOP,
        *_gradient_body(radii, harmonics),
        "    }",
        "}",
    ]
    return CpuSource(GRADIENT, "\n".join(text) + "\n", headers())
