// Kernels over nodes and channels on CUDA: a thread is one channel of one node. T is float or double, I the type of
// the species.
//
// x, tangent [nodes, M, channels], weights [species, R, channels], grad and out [nodes, O, channels], all
// contiguous. The host does not look at the species: a node whose species is out of range gets not-a-number.
#pragma once

#include "symmetric_node.h"

namespace mf {

// The thread's node and channel from its place in the flat [nodes, channels]; false past the end.
MF_INLINE bool find_place(index_t nodes, index_t channels, index_t& node, index_t& channel) {
    const index_t place = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (place >= nodes * channels) return false;
    if (nodes * channels <= 0x7fffffff) {  // 32-bit division is several times faster
        node = unsigned(place) / unsigned(channels);
        channel = unsigned(place) % unsigned(channels);
    } else {
        node = place / channels;
        channel = place % channels;
    }
    return true;
}

template <class T> MF_INLINE Column<T> column(const T* base, index_t row, int components, index_t channels, index_t channel) {
    return {base + row * components * channels + channel, channels};
}
template <class T> MF_INLINE T not_a_number() { return T(__int_as_float(0x7fc00000)); }

template <class Poly, bool TANGENT, class T, class I>
MF_INLINE void symmetric_evaluate(const T* __restrict__ x, const T* __restrict__ tangent, const T* __restrict__ weights,
                                  const I* __restrict__ species, T* __restrict__ out, index_t nodes, index_t num_species,
                                  index_t channels) {
    index_t n, c;
    if (!find_place(nodes, channels, n, c)) return;
    const index_t z = species[n];
    const bool known = z >= 0 && z < num_species;
    T result[Poly::outputs];
    evaluate_node<Poly, TANGENT, T>(column(x, n, Poly::inputs, channels, c),
                                    column(TANGENT ? tangent : x, n, Poly::inputs, channels, c),
                                    column(weights, known ? z : 0, Poly::weights, channels, c), result);
    T* to = out + n * Poly::outputs * channels + c;
    for (int o = 0; o < Poly::outputs; ++o) to[o * channels] = known ? result[o] : not_a_number<T>();
}

template <class Poly, bool TANGENT, class T, class I>
MF_INLINE void symmetric_gradient(const T* __restrict__ x, const T* __restrict__ tangent, const T* __restrict__ weights,
                                  const I* __restrict__ species, const T* __restrict__ grad, T* __restrict__ dx,
                                  index_t nodes, index_t num_species, index_t channels) {
    index_t n, c;
    if (!find_place(nodes, channels, n, c)) return;
    const index_t z = species[n];
    const bool known = z >= 0 && z < num_species;
    T result[Poly::inputs];
    gradient_node<Poly, TANGENT, T>(column(x, n, Poly::inputs, channels, c),
                                    column(TANGENT ? tangent : x, n, Poly::inputs, channels, c),
                                    column(weights, known ? z : 0, Poly::weights, channels, c),
                                    column(grad, n, Poly::outputs, channels, c), result);
    T* to = dx + n * Poly::inputs * channels + c;
    for (int m = 0; m < Poly::inputs; ++m) to[m * channels] = known ? result[m] : not_a_number<T>();
}

// One block for a chunk of nodes of one species (blockIdx.x) and a tile of channels (blockIdx.y): partial [chunks, R,
// channels]. A thread sums in a column of its own, in shared memory or, where that is too small, in `partial` itself.
template <class Poly, bool TANGENT, bool SHARED, class T>
MF_INLINE void symmetric_weights(const T* __restrict__ x, const T* __restrict__ tangent, const T* __restrict__ grad,
                                 const index_t* __restrict__ order, const index_t* __restrict__ row_ptr,
                                 T* __restrict__ partial, index_t num_species, index_t channels, index_t length) {
    extern __shared__ __align__(16) unsigned char memory[];
    const index_t c = index_t(blockIdx.y) * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    const Chunk chunk = find_chunk(row_ptr, num_species, length, blockIdx.x);
    if (chunk.species < 0) return;
    T* to = partial + blockIdx.x * Poly::weights * channels + c;
    T* sums = SHARED ? reinterpret_cast<T*>(memory) + threadIdx.x : to;
    const int stride = SHARED ? blockDim.x : int(channels);
    for (int r = 0; r < Poly::weights; ++r) sums[r * stride] = 0;
    for (index_t i = chunk.first; i < chunk.last; ++i) {
        const index_t n = order[i];
        weights_node<Poly, TANGENT, T>(column(x, n, Poly::inputs, channels, c),
                                       column(TANGENT ? tangent : x, n, Poly::inputs, channels, c),
                                       column(grad, n, Poly::outputs, channels, c), sums, stride);
    }
    if (SHARED)
        for (int r = 0; r < Poly::weights; ++r) to[r * channels] = sums[r * stride];
}

// dw [species, row] = sum of the chunks of each species in their order; row = R * channels. blockIdx.y is the species.
template <class T>
MF_INLINE void symmetric_weights_sum(const T* __restrict__ partial, const index_t* __restrict__ row_ptr,
                                     T* __restrict__ dw, index_t row, index_t length) {
    const index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x, z = blockIdx.y;
    if (i >= row) return;
    const index_t first = first_chunk(row_ptr, length, z);
    const index_t count = (row_ptr[z + 1] - row_ptr[z] + length - 1) / length;
    T sum = 0;
    for (index_t number = first; number < first + count; ++number) sum += partial[number * row + i];
    dw[z * row + i] = sum;
}

}  // namespace mf
