// Loops over nodes and channels on the CPU. T is float or double, I the type of the species.
//
// x, tangent [nodes, M, channels], weights [species, R, channels], grad and out [nodes, O, channels], all
// contiguous; every species is in range. Each result is computed by one thread in one order: it does not depend on
// the number of threads.
#pragma once

#include "symmetric_node.h"

namespace mf {

// The channels of one vector: `count` of them from `first` on, the last vector of a row having less than a full one.
template <class T> struct Block {
    static constexpr int width = Lane<T>::width;
    index_t channels, first;
    int count;
    MF_INLINE Block(index_t channels, index_t number)
        : channels(channels), first(number * width), count(channels - first < width ? int(channels - first) : width) {}

    // Components of row `row` of an array [rows, components, channels]; less than a full vector is copied to `space`.
    MF_INLINE Column<T> column(const T* base, index_t row, int components, T* space) const {
        const T* from = base + row * components * channels + first;
        if (count == width) return {from, channels};
        for (int m = 0; m < components; ++m)
            for (int i = 0; i < width; ++i) space[m * width + i] = i < count ? from[m * channels + i] : T(0);
        return {space, width};
    }
    MF_INLINE void store(T* base, index_t row, int components, const typename Lane<T>::type* values) const {
        T* to = base + row * components * channels + first;
        if (count == width) {
            for (int m = 0; m < components; ++m) Lane<T>::store(to + m * channels, values[m]);
        } else {
            for (int m = 0; m < components; ++m)
                for (int i = 0; i < count; ++i) to[m * channels + i] = values[m][i];
        }
    }
};
template <class T> MF_INLINE index_t blocks_of(index_t channels) { return (channels + Lane<T>::width - 1) / Lane<T>::width; }

// Where the columns of one node are copied to.
template <class Poly, class T> struct Space {
    T x[Poly::inputs * Lane<T>::width], tangent[Poly::inputs * Lane<T>::width];
    T weights[Poly::weights * Lane<T>::width], grad[Poly::outputs * Lane<T>::width];
};

template <class Poly, bool TANGENT, class T, class I>
void symmetric_evaluate(const T* x, const T* tangent, const T* weights, const I* species, T* out, index_t nodes,
                        index_t channels, int threads) {
    const index_t blocks = blocks_of<T>(channels);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (index_t n = 0; n < nodes; ++n)
        for (index_t b = 0; b < blocks; ++b) {
            const Block<T> block(channels, b);
            Space<Poly, T> space;
            const Column<T> value = block.column(x, n, Poly::inputs, space.x);
            typename Lane<T>::type result[Poly::outputs];
            evaluate_node<Poly, TANGENT, T>(value, TANGENT ? block.column(tangent, n, Poly::inputs, space.tangent) : value,
                                            block.column(weights, species[n], Poly::weights, space.weights), result);
            block.store(out, n, Poly::outputs, result);
        }
}

template <class Poly, bool TANGENT, class T, class I>
void symmetric_gradient(const T* x, const T* tangent, const T* weights, const I* species, const T* grad, T* dx,
                        index_t nodes, index_t channels, int threads) {
    const index_t blocks = blocks_of<T>(channels);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (index_t n = 0; n < nodes; ++n)
        for (index_t b = 0; b < blocks; ++b) {
            const Block<T> block(channels, b);
            Space<Poly, T> space;
            const Column<T> value = block.column(x, n, Poly::inputs, space.x);
            typename Lane<T>::type result[Poly::inputs];
            gradient_node<Poly, TANGENT, T>(value, TANGENT ? block.column(tangent, n, Poly::inputs, space.tangent) : value,
                                            block.column(weights, species[n], Poly::weights, space.weights),
                                            block.column(grad, n, Poly::outputs, space.grad), result);
            block.store(dx, n, Poly::inputs, result);
        }
}

// dw [species, R, channels] = sums over the nodes of each species, through partial [chunks, R, channels]
template <class Poly, bool TANGENT, class T>
void symmetric_weights(const T* x, const T* tangent, const T* grad, const index_t* order, const index_t* row_ptr,
                       T* partial, T* dw, index_t num_species, index_t channels, index_t length, int threads) {
    const index_t blocks = blocks_of<T>(channels), chunks = first_chunk(row_ptr, length, num_species);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (index_t number = 0; number < chunks; ++number)
        for (index_t b = 0; b < blocks; ++b) {
            const Chunk chunk = find_chunk(row_ptr, num_species, length, number);
            const Block<T> block(channels, b);
            Space<Poly, T> space;
            typename Lane<T>::type sums[Poly::weights] = {};
            for (index_t i = chunk.first; i < chunk.last; ++i) {
                const index_t n = order[i];
                const Column<T> value = block.column(x, n, Poly::inputs, space.x);
                weights_node<Poly, TANGENT, T>(
                    value, TANGENT ? block.column(tangent, n, Poly::inputs, space.tangent) : value,
                    block.column(grad, n, Poly::outputs, space.grad), sums, 1);
            }
            block.store(partial, number, Poly::weights, sums);
        }
    const index_t row = Poly::weights * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (index_t z = 0; z < num_species; ++z) {
        T* to = dw + z * row;
        for (index_t i = 0; i < row; ++i) to[i] = 0;
        const index_t last = first_chunk(row_ptr, length, z + 1);
        for (index_t number = first_chunk(row_ptr, length, z); number < last; ++number)
            for (index_t i = 0; i < row; ++i) to[i] += partial[number * row + i];
    }
}

}  // namespace mf
