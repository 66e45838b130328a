// Gradients of edges summed at their senders, on CUDA, for one stretch of the edges: those from `first` up to `end`,
// whose rows are in `values`. Nothing is added atomically: the order of additions is a function of the lists alone.
//
// A block has one sender and 32 packs of columns. Its warps take the sender's rows in turn, UNROLL of them in flight,
// and are then added in order.
//
// T (float or double) comes from the including text.
#pragma once

#include "pack.cuh"

namespace mf {

constexpr int UNROLL = 4;
constexpr int MOST_WARPS = 8;

// The first position in [low, high) of an ascending list whose entry is not below `bound`.
MF_INLINE index_t not_below(const int* list, index_t low, index_t high, index_t bound) {
    while (low < high) {
        const index_t middle = (low + high) >> 1;
        if (list[middle] < bound) low = middle + 1;
        else high = middle;
    }
    return low;
}

// `fresh`: out is written, otherwise added to.
template <int V>
MF_INLINE void sender_sum(const T* values, const int* order, const int* row, T* out, index_t first, index_t end,
                          index_t dim, bool fresh) {
    __shared__ Pack<V> all[MOST_WARPS][32];
    const index_t n = blockIdx.x;
    const index_t c = (index_t(blockIdx.y) * 32 + threadIdx.x) * V;
    const index_t begin = not_below(order, row[n], row[n + 1], first), stop = not_below(order, begin, row[n + 1], end);
    if (begin == stop && !fresh) return;  // the same for all threads of the block
    const int warp = threadIdx.y, warps = blockDim.y;
    Pack<V> total = filled<V>(T(0));
    if (c < dim) {
        index_t j = begin + warp;
        for (; j + (UNROLL - 1) * warps < stop; j += UNROLL * warps) {
            Pack<V> item[UNROLL];
#pragma unroll
            for (int q = 0; q < UNROLL; ++q) item[q] = load<V>(values + (order[j + q * warps] - first) * dim + c);
#pragma unroll
            for (int q = 0; q < UNROLL; ++q) add(total, item[q]);
        }
        for (; j < stop; j += warps) add(total, load<V>(values + (order[j] - first) * dim + c));
    }
    all[warp][threadIdx.x] = total;
    __syncthreads();
    if (warp > 0 || c >= dim) return;
    for (int other = 1; other < warps; ++other) add(total, all[other][threadIdx.x]);
    if (!fresh) add(total, load<V>(out + n * dim + c));
    store<V>(out + n * dim + c, total);
}

}  // namespace mf
