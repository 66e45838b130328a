// Piecewise polynomials of the edge length on uniform intervals, a row of coefficients for each interval:
// w(t) = c[0] + c[1] t + ... with t from 0 to 1 inside the interval. Coefficients, rather than values at knots, because
// the slope would be a difference of nearly equal knots: in float32 that costs as many digits as there are intervals.
#pragma once
#include "number.h"

namespace mf {

// The row of a position (in units of the spacing) and its place t inside. The row after the last interval holds zeros and
// serves all that lies beyond. A position that is not a number gives a t that is not.
template <class T> MF_INLINE index_t find_interval(T position, index_t intervals, T& t) {
    if (position >= T(intervals)) {
        t = T(0);
        return intervals;
    }
    const index_t interval = position > T(0) ? index_t(position) : 0;
    t = position - T(interval);
    return interval;
}

template <int ORDER, class V, class T> MF_INLINE V spline_value(const V* c, T t) {
    V value = c[ORDER - 1];
#pragma unroll
    for (int q = ORDER - 2; q >= 0; --q) {
        V next = c[q];
        multiply_add(next, value, t);
        value = next;
    }
    return value;
}

// Derivative with respect to t.
template <int ORDER, class V, class T> MF_INLINE V spline_slope(const V* c, T t) {
    V slope;
    multiply(slope, c[ORDER - 1], T(ORDER - 1));
#pragma unroll
    for (int q = ORDER - 2; q >= 1; --q) {
        V next;
        multiply(next, c[q], T(q));
        multiply_add(next, slope, t);
        slope = next;
    }
    return slope;
}

}  // namespace mf
