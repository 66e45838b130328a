// Sums of rows over segments, on CUDA, without atomics: the order of additions is a function of the shapes
// and lists alone.
//
// T (float or double), I (int or long long) and THREADS come from the including text. A block's threads are
// groups x lanes x columns: a group owns one segment, its lanes take the segment's rows in turn, and are then
// added as a tree. A segment of more than LONG rows is first summed in chunks of CHUNK rows by blocks of
// their own (segment_partial), so that one crowded node is never one block's serial work.
#pragma once

#include "pack.cuh"

namespace mf {

constexpr index_t CHUNK = 256;
constexpr index_t LONG = 2 * CHUNK;
constexpr int UNROLL = 4;  // rows in flight per thread

struct Shape {
    int column, lane, group, lanes, columns, groups;
    MF_INLINE Shape(int log_columns, int log_lanes) {
        columns = 1 << log_columns;
        lanes = 1 << log_lanes;
        groups = THREADS >> (log_columns + log_lanes);
        column = threadIdx.x & (columns - 1);
        lane = (threadIdx.x >> log_columns) & (lanes - 1);
        group = threadIdx.x >> (log_columns + log_lanes);
    }
};

// Sum over the lanes of a group; every thread of the block takes part. The result is lane 0's.
template <int V> MF_INLINE Pack<V> sum_lanes(Pack<V> mine, const Shape& shape) {
    __shared__ Pack<V> all[THREADS];
    for (int half = shape.lanes >> 1; half > 0; half >>= 1) {
        __syncthreads();
        all[threadIdx.x] = mine;
        __syncthreads();
        if (shape.lane < half) add(mine, all[threadIdx.x + half * shape.columns]);
    }
    return mine;
}

// Sum of items first, first + lanes, ... below last, each `row(item)`, UNROLL loads in flight.
template <int V, class Row> MF_INLINE Pack<V> sum_rows(index_t first, index_t last, int lanes, Row row) {
    Pack<V> total = filled<V>(T(0));
    index_t j = first;
    for (; j + (UNROLL - 1) * lanes < last; j += UNROLL * lanes) {
        Pack<V> item[UNROLL];
#pragma unroll
        for (int q = 0; q < UNROLL; ++q) item[q] = load<V>(row(j + q * lanes));
#pragma unroll
        for (int q = 0; q < UNROLL; ++q) add(total, item[q]);
    }
    for (; j < last; j += lanes) add(total, load<V>(row(j)));
    return total;
}

// The segment that owns a position: the last n with row_ptr[n] <= position.
MF_INLINE index_t owner(const I* row_ptr, index_t segments, index_t position) {
    index_t low = 0, high = segments;  // row_ptr[low] <= position < row_ptr[high]
    while (high - low > 1) {
        const index_t middle = (low + high) >> 1;
        if (row_ptr[middle] <= position)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Whether the lists are of rows that there are; with `all` of each.
MF_INLINE bool covers(const I* row_ptr, index_t segments, index_t rows, bool all) {
    return row_ptr[0] == 0 && (all ? row_ptr[segments] == rows : row_ptr[segments] <= rows);
}

// partial[chunk][0]: the chunk's share of the long segment that owns its first position; partial[chunk][1]:
// of another long segment that begins inside the chunk. A long segment is longer than a chunk, so there is no
// third.
template <int V>
MF_INLINE void segment_partial(
    const T* values, const I* order, const I* row_ptr, T* partial, index_t segments, index_t rows, index_t dim,
    bool all, int log_columns, int log_lanes) {
    const Shape shape(log_columns, log_lanes);
    const index_t c = (index_t(blockIdx.y) * shape.columns + shape.column) * V;
    if (!covers(row_ptr, segments, rows, all)) return;
    const index_t listed = row_ptr[segments], start = blockIdx.x * CHUNK;
    if (start >= listed) return;
    const index_t stop = start + CHUNK < listed ? start + CHUNK : listed;
    const index_t head = owner(row_ptr, segments, start), tail = owner(row_ptr, segments, stop - 1);
    const int slots = head == tail ? 1 : 2;
    for (int slot = 0; slot < slots; ++slot) {
        const index_t n = slot == 0 ? head : tail;
        const index_t begin = row_ptr[n], end = row_ptr[n + 1];
        if (end - begin <= LONG) continue;
        const index_t first = begin > start ? begin : start, last = end < stop ? end : stop;
        Pack<V> total = filled<V>(T(0));
        if (c < dim)
            total = sum_rows<V>(first + shape.lane, last, shape.lanes, [&](index_t j) {
                return values + (order ? index_t(order[j]) : j) * dim + c;
            });
        total = sum_lanes<V>(total, shape);
        if (c < dim && shape.lane == 0) store<V>(partial + (2 * index_t(blockIdx.x) + slot) * dim + c, total);
    }
}

template <int V>
MF_INLINE void segment_sum(
    const T* values, const I* order, const I* row_ptr, const T* partial, T* out, index_t segments, index_t rows,
    index_t dim, bool all, int log_columns, int log_lanes) {
    const Shape shape(log_columns, log_lanes);
    const index_t n = index_t(blockIdx.x) * shape.groups + shape.group;
    const index_t c = (index_t(blockIdx.y) * shape.columns + shape.column) * V;
    const bool mine = n < segments && c < dim;
    Pack<V> total = filled<V>(T(0));
    if (mine && !covers(row_ptr, segments, rows, all)) {
        total = filled<V>(not_a_number());
    } else if (mine) {
        const index_t begin = row_ptr[n], end = row_ptr[n + 1];
        if (end - begin <= LONG) {
            total = sum_rows<V>(begin + shape.lane, end, shape.lanes, [&](index_t j) {
                return values + (order ? index_t(order[j]) : j) * dim + c;
            });
        } else {
            const index_t first = begin / CHUNK, last = (end - 1) / CHUNK + 1;
            total = sum_rows<V>(first + shape.lane, last, shape.lanes, [&](index_t chunk) {
                const int slot = chunk == first && begin % CHUNK != 0;
                return partial + (2 * chunk + slot) * dim + c;
            });
        }
    }
    total = sum_lanes<V>(total, shape);
    if (mine && shape.lane == 0) store<V>(out + n * dim + c, total);
}

// out[e] = values[index[e]]; a row of NaN where the id is outside [0, segments).
template <int V>
MF_INLINE void segment_gather(
    const T* values, const I* index, T* out, index_t segments, index_t rows, index_t dim, int log_columns) {
    const Shape shape(log_columns, 0);
    const index_t e = index_t(blockIdx.x) * shape.groups + shape.group;
    const index_t c = (index_t(blockIdx.y) * shape.columns + shape.column) * V;
    if (e >= rows || c >= dim) return;
    const index_t n = index[e];
    const bool valid = n >= 0 && n < segments;
    store<V>(out + e * dim + c, valid ? load<V>(values + n * dim + c) : filled<V>(not_a_number()));
}

}  // namespace mf
