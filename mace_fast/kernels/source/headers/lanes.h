// Who shares one item: the lanes of a warp on CUDA, one thread on the CPU. Sums over lanes have a fixed order.
#pragma once

namespace mf {

#ifdef __CUDACC__
#define MF_UNROLL _Pragma("unroll")
#define MF_PRAGMA(text) _Pragma(#text)
#define MF_UNROLL_BY(count) MF_PRAGMA(unroll count)
static constexpr int LANES = 32;

template <class S> MF_INLINE S sum_lanes(S value) {
#pragma unroll
    for (int distance = LANES / 2; distance; distance >>= 1) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}
template <class S> MF_INLINE S of_lane(S value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
#else
#define MF_UNROLL
#define MF_UNROLL_BY(count)
static constexpr int LANES = 1;

template <class S> MF_INLINE S sum_lanes(S value) { return value; }
template <class S> MF_INLINE S of_lane(S value, int) { return value; }
#endif

}  // namespace mf
