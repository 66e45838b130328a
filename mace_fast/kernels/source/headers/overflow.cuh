// Receivers whose edges several groups share (see channelwise_conv.cuh): the sums of the other parts and of windows are added
// to what the first part gave, in order.
#pragma once
#include "number.h"

namespace mf {

template <class T, int V> struct alignas(V * sizeof(T)) Columns {
    T v[V];
};

template <class T, int V> MF_INLINE void add_columns(Columns<T, V>& sum, const T* from) {
    const Columns<T, V> more = *reinterpret_cast<const Columns<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) sum.v[i] += more.v[i];
}

// Whether a part of so many edges has any.
MF_INLINE bool has_edges(int part, int edges, int parts) { return part * ((edges + parts - 1) / parts) < edges; }

// Blocks x take receivers in turn, and y the columns of z, V for each thread. A window opens inside of the receiver that has
// edges there, so that `row` alone tells which windows are whose. `part_groups`: groups of a part, which are receivers,
// windows and what fills the last block; the first part of receivers is in z, and what follows it in `partial`.
template <class T, int V>
MF_INLINE void add_partial_sums(T* z, const T* partial, const int* row, index_t receivers, index_t limit, int parts,
                                index_t part_groups, index_t z_row) {
    const index_t column = (index_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
    if (column >= z_row) return;
    for (index_t n = blockIdx.x; n < receivers; n += gridDim.x) {
        const index_t begin = row[n], end = row[n + 1], rest = begin + limit;
        if (parts == 1 && rest >= end) continue;
        Columns<T, V>* sum = reinterpret_cast<Columns<T, V>*>(z + n * z_row + column);
        Columns<T, V> total = *sum;
        const int edges = int(end < rest ? end - begin : limit);
        const T* head = partial + (n - receivers) * z_row + column;
#pragma unroll 4
        for (int part = 1; part < parts; ++part)
            if (has_edges(part, edges, parts)) add_columns(total, head + part * part_groups * z_row);
        if (rest < end) {
            const int last = int((end - 1) / limit + 1) * parts;
#pragma unroll 4
            for (int number = int(rest / limit) * parts; number < last; ++number) {
                const int window = number / parts, part = number - window * parts;
                const index_t opens = window * limit, stop = opens + limit < end ? opens + limit : end;
                if (has_edges(part, int(stop - (opens > rest ? opens : rest)), parts))
                    add_columns(total, partial + (part * part_groups + window) * z_row + column);
            }
        }
        *sum = total;
    }
}

}  // namespace mf
