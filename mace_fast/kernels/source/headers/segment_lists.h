// The rows of each segment as lists (order, row_ptr), on the CPU: a stable counting sort.
#pragma once

#include "number.h"

namespace mf {

// False, with the lists unfinished, if an id is outside [0, segments). row_ptr has segments + 1 entries.
template <class I>
bool segment_lists(const I* ids, index_t segments, index_t rows, long long* order, long long* row_ptr) {
    for (index_t n = 0; n <= segments; ++n) row_ptr[n] = 0;
    for (index_t e = 0; e < rows; ++e) {
        if (ids[e] < 0 || ids[e] >= segments) return false;
        ++row_ptr[ids[e] + 1];
    }
    for (index_t n = 0; n < segments; ++n) row_ptr[n + 1] += row_ptr[n];
    // row_ptr[n] advances to the end of segment n while its rows are listed; then it is moved back by one segment.
    for (index_t e = 0; e < rows; ++e) order[row_ptr[ids[e]]++] = e;
    for (index_t n = segments; n > 0; --n) row_ptr[n] = row_ptr[n - 1];
    row_ptr[0] = 0;
    return true;
}

}  // namespace mf
