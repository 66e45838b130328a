"""C++ text for dividing rows by a function of their density, and for the gradients of that."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.source.text import header

NORMALISE, GRADIENT = "normalise_rows", "normalise_rows_gradient"
MOST_THREADS = 1024
"""Of a block on CUDA, which has a row: few and long rows must fill a GPU too."""

_NUMBERS = "double slope, double offset, long long columns, long long rows"
_PARAMETERS = {
    NORMALISE: f"const NUMBER* x, const NUMBER* density, NUMBER* out, {_NUMBERS}",
    GRADIENT: "const NUMBER* g, const NUMBER* out, const NUMBER* density, NUMBER* dx, NUMBER* ddensity, " + _NUMBERS,
}
_DIVISOR = "    const NUMBER divisor = NUMBER(slope) * density[n] + NUMBER(offset);"
_BODY = {
    NORMALISE: [
        _DIVISOR,
        "    mf::normalise_row(x + n * columns, divisor, out + n * columns, columns, thread, threads);",
    ],
    GRADIENT: [
        _DIVISOR,
        "    const long long at = n * columns;",
        "    const NUMBER sum = mf::normalise_row_gradient(g + at, out + at, divisor, dx + at, columns, thread, threads);",
        "    if (thread == 0) ddensity[n] = -NUMBER(slope) * sum;",
    ],
}
_INCLUDES = ['#include "number.h"', '#include "lanes.h"', '#include "normalise.h"']


def _headers() -> tuple[tuple[str, str], ...]:
    return tuple((name, header(name)) for name in ("number.h", "lanes.h", "normalise.h"))


@cache
def normalise_cuda(ctype: str) -> CudaSource:
    """Kernels ``normalise_rows`` and ``normalise_rows_gradient``, a block for each row."""
    text = list(_INCLUDES)
    for entry, body in _BODY.items():
        text += [
            f'extern "C" __global__ void __launch_bounds__({MOST_THREADS}) {entry}({_PARAMETERS[entry]}) {{',
            "    const long long n = blockIdx.x;",
            "    const int thread = threadIdx.x, threads = blockDim.x;",
            *body,
            "}",
        ]
    whole = "\n".join(text).replace("NUMBER", ctype) + "\n"
    return CudaSource(f"normalise_{ctype}", whole, _headers(), tuple(_BODY))


@cache
def normalise_cpu(ctype: str) -> CpuSource:
    """The same functions, looping over rows."""
    text = list(_INCLUDES)
    for entry, body in _BODY.items():
        text += [
            f'extern "C" __attribute__((visibility("default"))) void {entry}({_PARAMETERS[entry]}, int team) {{',
            "#pragma omp parallel for num_threads(team)",
            "for (long long n = 0; n < rows; ++n) {",
            "    const int thread = 0, threads = 1;",
            *body,
            "}",
            "}",
        ]
    return CpuSource(f"normalise_{ctype}", "\n".join(text).replace("NUMBER", ctype) + "\n", _headers())
