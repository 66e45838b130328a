// Receivers whose edges were shared out to windows (see channelwise_conv.cuh): the sums of their windows are added to what
// their first edges gave, in order.
#pragma once
#include "number.h"

namespace mf {

template <class T>
MF_INLINE void add_windows(T* z, const T* partial, const int* order, const int* row, const int* receiver,
                           index_t receivers, index_t limit, index_t z_row) {
    const index_t column = index_t(blockIdx.y) * blockDim.x + threadIdx.x;
    const index_t window = blockIdx.x, opens = window * limit;
    if (column >= z_row || opens >= row[receivers]) return;
    const index_t n = receiver[order ? order[opens] : opens];
    const index_t rest = row[n] + limit, end = row[n + 1];
    if (rest >= end || window != rest / limit) return;  // only the first window of a receiver adds
    const index_t last = (end - 1) / limit;
    T sum = z[n * z_row + column];
#pragma unroll 4
    for (index_t other = window; other <= last; ++other) sum += partial[other * z_row + column];
    z[n * z_row + column] = sum;
}

}  // namespace mf
