"""Small kernels, and helpers, that the tests of building share."""

from __future__ import annotations

import re
from pathlib import Path

from mace_fast.errors import BuildError
from mace_fast.kernels.build import CpuSource, CudaSource

SCALE_H = ("scale.h", "#pragma once\ntemplate <class T> struct Scale { static constexpr T value = 2; };\n")

AXPY_CUDA = CudaSource(
    name="axpy",
    text="""
#include "scale.h"
extern "C" __global__ void axpy(float* y, const float* x, float a, int stride, long long n) {
    __shared__ float factor[32];
    factor[threadIdx.x % 32] = a * Scale<float>::value;
    __syncthreads();
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i * stride] += factor[0] * x[i * stride];
}
""",
    headers=(SCALE_H,),
    entry_points=("axpy",),
)

AXPY_CPU = CpuSource(
    name="axpy",
    text="""
#include "scale.h"
extern "C" int omp_get_num_threads();
template <class T> static void axpy(T* y, const T* x, T a, long long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long long i = 0; i < n; i++) y[i] += a * Scale<T>::value * x[i];
}
void internal() {}
extern "C" void axpy_f32(float* y, const float* x, float a, long long n, int t) { axpy(y, x, a, n, t); }
extern "C" void axpy_f64(double* y, const double* x, double a, long long n, int t) { axpy(y, x, a, n, t); }
extern "C" int team(int threads) {
    int size = 0;
    #pragma omp parallel num_threads(threads)
    #pragma omp single
    size = omp_get_num_threads();
    return size;
}
""",
    headers=(SCALE_H,),
)


def constant_cpu(value: int, name: str = "constant") -> CpuSource:
    return CpuSource(name, f'extern "C" int constant() {{ return {value}; }}\n', ())


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def kept_source(error: BuildError) -> Path:
    match = re.search(r"The source is kept in (\S+)\.\s", str(error))
    assert match is not None, str(error)
    return Path(match[1])
