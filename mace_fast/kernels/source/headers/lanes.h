// Who shares one item: the lanes of a warp on CUDA, one thread on the CPU. Sums over lanes have a fixed order.
#pragma once

namespace mf {

#ifdef __CUDACC__
#define MF_UNROLL _Pragma("unroll")
static constexpr int LANES = 32;

template <class S> MF_INLINE S sum_lanes(S value) {
#pragma unroll
    for (int distance = LANES / 2; distance; distance >>= 1) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}
#else
#define MF_UNROLL
static constexpr int LANES = 1;

template <class S> MF_INLINE S sum_lanes(S value) { return value; }
#endif

}  // namespace mf
