// Rows divided by a number of their own, a linear function of the row's density, and the gradients of that.
#pragma once

namespace mf {

// out = x / (slope * density + offset)
template <class T>
MF_INLINE void normalise_row(const T* x, T divisor, T* out, index_t columns, int lane) {
MF_UNROLL_BY(8)
    for (index_t c = lane; c < columns; c += LANES) out[c] = x[c] / divisor;
}

// From the gradient g of `out` that of x, and the sum that the gradient of the density is made of.
template <class T>
MF_INLINE T normalise_row_gradient(const T* g, const T* out, T divisor, T* dx, index_t columns, int lane) {
    T sum = T(0);
MF_UNROLL_BY(8)
    for (index_t c = lane; c < columns; c += LANES) {
        const T value = g[c] / divisor;
        dx[c] = value;
        sum += value * out[c];
    }
    return sum_lanes(sum);
}

}  // namespace mf
