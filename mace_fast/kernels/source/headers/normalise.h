// Rows divided by a number of their own, and the gradients of that. A row is a block's on CUDA, a thread's on the CPU.
#pragma once

namespace mf {

template <class T>
MF_INLINE void normalise_row(const T* x, T divisor, T* out, index_t columns, int thread, int threads) {
MF_UNROLL_BY(4)
    for (index_t c = thread; c < columns; c += threads) out[c] = x[c] / divisor;
}

// From the gradient g of `out` that of x, and the sum that the gradient of the density is made of: the first thread's.
template <class T>
MF_INLINE T normalise_row_gradient(const T* g, const T* out, T divisor, T* dx, index_t columns, int thread, int threads) {
    T sum = T(0);
MF_UNROLL_BY(4)
    for (index_t c = thread; c < columns; c += threads) {
        const T value = g[c] / divisor;
        dx[c] = value;
        sum += value * out[c];
    }
    sum = sum_lanes(sum);
#ifdef __CUDACC__
    __shared__ T partial[32];
    if (thread % LANES == 0) partial[thread / LANES] = sum;
    __syncthreads();
    if (thread == 0)
        for (int warp = 1; warp < threads / LANES; ++warp) sum += partial[warp];
#endif
    return sum;
}

}  // namespace mf
