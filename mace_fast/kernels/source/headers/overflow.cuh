// Receivers whose edges several groups share (see channelwise_conv.cuh): the sums of the other parts and of windows are added
// to what the first part gave, in order.
#pragma once
#include "number.h"

namespace mf {

// Whether a part of so many edges has any.
MF_INLINE bool has_edges(int part, int edges, int parts) { return part * ((edges + parts - 1) / parts) < edges; }

// A block is a receiver; where there is one part, and so nothing to add but windows, it is a window, and only the first
// window of a receiver adds. `part_groups`: groups of a part, receivers and windows and what fills the last block.
template <class T>
MF_INLINE void add_partial_sums(T* z, const T* partial, const int* order, const int* row, const int* receiver,
                                index_t receivers, index_t limit, int parts, index_t part_groups, index_t z_row) {
    const index_t column = index_t(blockIdx.y) * blockDim.x + threadIdx.x;
    index_t n = blockIdx.x;
    if (column >= z_row) return;
    if (parts == 1) {
        const index_t opens = blockIdx.x * limit;
        if (opens >= row[receivers]) return;
        n = receiver[order ? order[opens] : opens];
    }
    const index_t begin = row[n], end = row[n + 1], rest = begin + limit;
    if (parts == 1 && (rest >= end || blockIdx.x != rest / limit)) return;
    T sum = z[n * z_row + column];
    const int edges = int(end < rest ? end - begin : limit);
    const T* head = partial + (n - receivers) * z_row + column;
#pragma unroll 4
    for (int part = 1; part < parts; ++part)
        sum += has_edges(part, edges, parts) ? head[part * part_groups * z_row] : T(0);
    if (rest < end) {
        const int last = int((end - 1) / limit + 1) * parts;
#pragma unroll 4
        for (int number = int(rest / limit) * parts; number < last; ++number) {
            const int window = number / parts, part = number - window * parts;
            const index_t opens = window * limit, stop = opens + limit < end ? opens + limit : end;
            const bool any = has_edges(part, int(stop - (opens > rest ? opens : rest)), parts);
            sum += any ? partial[(part * part_groups + window) * z_row + column] : T(0);
        }
    }
    z[n * z_row + column] = sum;
}

}  // namespace mf
