// Sums of rows over segments, on the CPU. One pass over the rows; a tile of columns at a time.
//
// The order of additions is fixed and does not depend on the number of threads: rows in list order, in runs
// of RUN rows that are added to each other (so that rounding grows with the run, not with the length of the
// segment).
#pragma once

#include "number.h"

namespace mf {

constexpr index_t RUN = 1024;
constexpr index_t TILE = 512;  // columns, summed in the first-level cache
constexpr index_t AHEAD = 4;   // rows
constexpr index_t LINE = 64;   // bytes of a cache line
constexpr index_t SERIAL = 16384;  // numbers; below this, waking threads costs more than the sum

// 0 when the lists describe `rows` rows in `segments` segments, otherwise what is wrong:
// 1 row_ptr does not begin at 0 and end at `rows`, 2 row_ptr decreases, 3 order has an entry outside [0,
// rows).
template <class I> int check_lists(const I* order, const I* row_ptr, index_t segments, index_t rows) {
    if (row_ptr[0] != 0 || row_ptr[segments] != rows) return 1;
    for (index_t n = 0; n < segments; ++n)
        if (row_ptr[n + 1] < row_ptr[n]) return 2;
    bool outside = false;
    if (order)
        for (index_t j = 0; j < rows; ++j) outside |= order[j] < 0 || order[j] >= rows;
    return outside ? 3 : 0;
}

// Columns [0, width) of one segment.
template <class T, class I>
inline void sum_tile(const T* values, const I* order, index_t first, index_t last, index_t dim, int width, T* out) {
    T total[TILE], partial[TILE];
    for (int c = 0; c < width; ++c) total[c] = 0;
    for (index_t run = first; run < last; run += RUN) {
        const index_t stop = run + RUN < last ? run + RUN : last;
        for (int c = 0; c < width; ++c) partial[c] = 0;
        for (index_t j = run; j < stop; ++j) {
            if (order && j + AHEAD < stop) {  // rows in list order are no stream that hardware would foresee
                const T* later = values + index_t(order[j + AHEAD]) * dim;
                for (int c = 0; c < width; c += int(LINE / sizeof(T))) __builtin_prefetch(later + c);
            }
            const T* row = values + (order ? index_t(order[j]) : j) * dim;
#pragma omp simd
            for (int c = 0; c < width; ++c) partial[c] += row[c];
        }
        for (int c = 0; c < width; ++c) total[c] += partial[c];
    }
    for (int c = 0; c < width; ++c) out[c] = total[c];
}

template <class T, class I>
int segment_sum(
    const T* values, const I* order, const I* row_ptr, index_t segments, index_t rows, index_t dim, T* out, int threads) {
    if (const int wrong = check_lists(order, row_ptr, segments, rows)) return wrong;
    const index_t tiles = (dim + TILE - 1) / TILE;
#pragma omp parallel for collapse(2) schedule(dynamic, 16) num_threads(threads) if (threads > 1 && rows * dim > SERIAL)
    for (index_t n = 0; n < segments; ++n)
        for (index_t t = 0; t < tiles; ++t) {
            const index_t c = t * TILE, first = row_ptr[n], last = row_ptr[n + 1];
            const int width = dim - c < TILE ? int(dim - c) : int(TILE);
            sum_tile(values + c, order, first, last, dim, width, out + n * dim + c);
        }
    return 0;
}

}  // namespace mf
