// Receivers whose edges were shared out to windows (see channelwise_conv.cuh): the sums of their windows are added to what
// their first edges gave, in order.
#pragma once
#include "number.h"

namespace mf {

template <class T, int V> struct alignas(V * sizeof(T)) Columns {
    T v[V];
};

// Blocks x take receivers in turn, and y the columns of z, V for each thread. A window opens inside of the receiver that has
// edges there, so that `row` alone tells which windows are whose.
template <class T, int V>
MF_INLINE void add_windows(T* z, const T* partial, const int* row, index_t receivers, index_t limit, index_t z_row) {
    typedef Columns<T, V> Pack;
    const index_t column = (index_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
    if (column >= z_row) return;
    for (index_t n = blockIdx.x; n < receivers; n += gridDim.x) {
        const unsigned rest = unsigned(row[n]) + unsigned(limit), end = row[n + 1];
        if (rest >= end) continue;
        const unsigned first = rest / unsigned(limit), last = (end - 1) / unsigned(limit);
        Pack* sum = reinterpret_cast<Pack*>(z + n * z_row + column);
        Pack total = *sum;
#pragma unroll 4
        for (unsigned window = first; window <= last; ++window) {
            const Pack part = *reinterpret_cast<const Pack*>(partial + window * z_row + column);
#pragma unroll
            for (int i = 0; i < V; ++i) total.v[i] += part.v[i];
        }
        *sum = total;
    }
}

}  // namespace mf
