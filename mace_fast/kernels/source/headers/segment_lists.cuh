// The rows of each of a few segments as lists (order, row_ptr), stable, in one launch.
//
// One block per segment counts the ids below its own (where its list begins), then writes its rows in
// ascending order. Every block reads all ids, which for atoms by species or by structure is far cheaper than
// a radix sort's many launches. Rows with a negative id are listed first, rows with an id of `segments` or
// more last, outside every segment. I is the type of the ids, THREADS a power of two, both from the including
// text.
#pragma once

#include "number.h"

namespace mf {

// Exclusive prefix sum of one number per thread; `total` is the sum of all.
MF_INLINE index_t prefix_sum(index_t mine, index_t& total) {
    __shared__ index_t warps[THREADS / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    index_t inclusive = mine;
    for (int step = 1; step < 32; step <<= 1) {
        const index_t other = __shfl_up_sync(0xffffffffu, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = inclusive;
    __syncthreads();
    index_t before = 0;
    total = 0;
    for (int w = 0; w < THREADS / 32; ++w) {
        if (w == warp) before = total;
        total += warps[w];
    }
    return before + inclusive - mine;
}

MF_INLINE void segment_lists(const I* index, long long* order, long long* row_ptr, index_t segments, index_t rows) {
    const index_t own = index_t(blockIdx.x) - 1;  // -1: negative ids; segments: ids that are too large
    const index_t share = (rows + THREADS - 1) / THREADS;
    const index_t first = threadIdx.x * share, last = first + share < rows ? first + share : rows;
    index_t below = 0, equal = 0;
    for (index_t e = first; e < last; ++e) {
        const index_t id = index[e] < 0 ? -1 : (index[e] > segments ? segments : index_t(index[e]));
        below += id < own;
        equal += id == own;
    }
    index_t begin, count;
    prefix_sum(below, begin);
    index_t position = prefix_sum(equal, count);
    position += begin;
    if (threadIdx.x == 0 && own >= 0) row_ptr[own] = begin;
    for (index_t e = first; e < last; ++e) {
        const index_t id = index[e] < 0 ? -1 : (index[e] > segments ? segments : index_t(index[e]));
        if (id == own) order[position++] = e;
    }
}

}  // namespace mf
