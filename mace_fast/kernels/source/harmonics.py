"""C++ text for edge lengths and real spherical harmonics of edge vectors, and the gradient with respect to the vectors.

Y_0 = 1, Y_1 = sqrt(3) (x, y, z) of the unit vector, and Y_{l+1} is the coupling of Y_l with Y_1, scaled so that
|Y_l|^2 = 2 l + 1 with a positive central component along y: e3nn's 'component' normalisation and signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.cg import clebsch_gordan
from mace_fast.kernels.source.text import header, indent

FORWARD, BACKWARD = "edge_harmonics", "edge_harmonics_backward"


@dataclass(frozen=True)
class _Step:
    """Y_{l+1}[k] = sum of value * Y_l[i] * Y_1[j] over (i, j, k, value)."""

    terms: tuple[tuple[int, int, int, float], ...]


@cache
def _steps(lmax: int) -> tuple[_Step, ...]:
    unit = np.array([0.0, 1.0, 0.0])
    first = np.sqrt(3.0) * unit
    steps, current = [], first
    for degree in range(1, lmax):
        c = clebsch_gordan(degree, 1, degree + 1)
        raw = np.einsum("ijk,i,j->k", c, current, first)
        scale = np.sqrt(2 * degree + 3) / np.linalg.norm(raw) * np.sign(raw[degree + 1])
        steps.append(_Step(tuple((i, j, k, float(c[i, j, k] * scale)) for i, j, k in zip(*np.nonzero(c), strict=True))))
        current = raw * scale
    return tuple(steps)


def _body(lmax: int) -> list[str]:
    """Y[0 .. (lmax+1)^2) from the unit vector u."""
    lines = ["Y[0] = T(1);"]
    if lmax >= 1:
        lines += [f"Y[{1 + j}] = T({np.sqrt(3.0).hex()}) * u[{j}];" for j in range(3)]
    for degree, step in enumerate(_steps(lmax), start=1):
        low, high = degree**2, (degree + 1) ** 2
        for k in range(2 * degree + 3):
            terms = [f"T({v.hex()}) * Y[{low + i}] * Y[{1 + j}]" for i, j, kk, v in step.terms if kk == k]
            lines.append(f"Y[{high + k}] = {' + '.join(terms)};")
    return lines


def _reverse(lmax: int) -> list[str]:
    """Adds to g[1 .. 4) what the gradients g of all higher components pass down to Y_1."""
    lines = []
    for degree, step in reversed(list(enumerate(_steps(lmax), start=1))):
        low, high = degree**2, (degree + 1) ** 2
        if degree == 1:  # Y_2 is quadratic in Y_1
            lines += [
                f"{{ const T p = T({v.hex()}) * g[{high + k}]; down[{i}] += p * Y[{1 + j}]; down[{j}] += p * Y[{1 + i}]; }}"
                for i, j, k, v in step.terms
            ]
        else:
            lines += [
                f"{{ const T p = T({v.hex()}) * g[{high + k}]; g[{low + i}] += p * Y[{1 + j}]; down[{j}] += p * Y[{low + i}]; }}"
                for i, j, k, v in step.terms
            ]
    return lines


def functions(lmax: int, ctype: str) -> list[str]:
    """What both kernels of a degree share."""
    count = (lmax + 1) ** 2
    return [
        "namespace problem {",
        f"typedef {ctype} T;",
        f"static constexpr int COUNT = {count};",
        "MF_INLINE void harmonics(const T* u, T* Y) {",
        *indent(_body(lmax), 4),
        "}",
        "MF_INLINE void reverse(const T* Y, T* g, T* down) {",
        *indent(_reverse(lmax), 4),
        *([f"    down[{j}] += g[{1 + j}];" for j in range(3)] if lmax >= 1 else []),
        "}",
        f"static constexpr T FIRST = T({np.sqrt(3.0).hex()});",
        "}  // namespace problem",
        '#include "edge_harmonics.h"',
    ]


def headers() -> tuple[tuple[str, str], ...]:
    """The headers that :func:`functions` wants."""
    return tuple((name, header(name)) for name in ("number.h", "edge_harmonics.h"))


@cache
def cuda_source(lmax: int, ctype: str) -> CudaSource:
    """Kernels ``edge_harmonics`` and ``edge_harmonics_backward``, a thread for each edge."""
    text = [
        '#include "number.h"',
        *functions(lmax, ctype),
        f'extern "C" __global__ void {FORWARD}(const {ctype}* vectors, {ctype}* radius, {ctype}* y, long long edges) {{',
        "    const long long e = blockIdx.x * (long long)blockDim.x + threadIdx.x;",
        "    if (e < edges) mf::edge_forward(vectors + 3 * e, radius + e, y + e * problem::COUNT);",
        "}",
        f'extern "C" __global__ void {BACKWARD}(const {ctype}* vectors, const {ctype}* dy, long long dy_row, const {ctype}* '
        f"dradius, long long dradius_row, {ctype}* dvectors, long long edges) {{",
        "    const long long e = blockIdx.x * (long long)blockDim.x + threadIdx.x;",
        "    if (e < edges) mf::edge_backward(vectors + 3 * e, dy + e * dy_row, dradius[e * dradius_row], dvectors + 3 * e);",
        "}",
    ]
    return CudaSource(FORWARD, "\n".join(text) + "\n", headers(), (FORWARD, BACKWARD))


@cache
def cpu_source(lmax: int, ctype: str) -> CpuSource:
    """The same two functions, looping over edges."""
    export = 'extern "C" __attribute__((visibility("default"))) void'
    loop = "    #pragma omp parallel for num_threads(threads)\n    for (long long e = 0; e < edges; ++e) "
    text = [
        "#include <cmath>",
        '#include "number.h"',
        *functions(lmax, ctype),
        f"{export} {FORWARD}(const {ctype}* vectors, {ctype}* radius, {ctype}* y, long long edges, int threads) {{",
        loop + "mf::edge_forward(vectors + 3 * e, radius + e, y + e * problem::COUNT);",
        "}",
        f"{export} {BACKWARD}(const {ctype}* vectors, const {ctype}* dy, long long dy_row, const {ctype}* dradius, "
        f"long long dradius_row, {ctype}* dvectors, long long edges, int threads) {{",
        loop + "mf::edge_backward(vectors + 3 * e, dy + e * dy_row, dradius[e * dradius_row], dvectors + 3 * e);",
        "}",
    ]
    return CpuSource(FORWARD, "\n".join(text) + "\n", headers())
