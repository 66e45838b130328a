// Gradients of edges summed at their senders, on the CPU, for one stretch of the edges: those from `first` up to `end`,
// whose rows are in `values`. The order of additions does not depend on the number of threads.
#pragma once

#include <algorithm>

#include "number.h"

namespace mf {

constexpr index_t AHEAD = 4;  // rows
constexpr index_t LINE = 64;  // bytes of a cache line

// `fresh`: out is written, otherwise added to.
template <class T>
void sender_sum(const T* values, const int* order, const int* row, T* out, index_t first, index_t end, index_t senders,
                index_t dim, bool fresh, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (index_t n = 0; n < senders; ++n) {
        const int* begin = std::lower_bound(order + row[n], order + row[n + 1], first);
        const int* stop = std::lower_bound(begin, order + row[n + 1], end);
        T* sum = out + n * dim;
        if (fresh)
            for (index_t c = 0; c < dim; ++c) sum[c] = T(0);
        for (const int* at = begin; at < stop; ++at) {
            if (at + AHEAD < stop) {  // rows in list order are no stream that hardware would foresee
                const T* later = values + (at[AHEAD] - first) * dim;
                for (index_t c = 0; c < dim; c += LINE / index_t(sizeof(T))) __builtin_prefetch(later + c);
            }
            const T* from = values + (*at - first) * dim;
#pragma omp simd
            for (index_t c = 0; c < dim; ++c) sum[c] += from[c];
        }
    }
}

}  // namespace mf
