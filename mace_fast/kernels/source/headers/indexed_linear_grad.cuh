// The gradient of the indexed linear map with respect to its weight, on CUDA, in a fixed order of additions:
//
//     gradient[s][u, w] = coefficient * sum over nodes n of species s and components i of x[n, i, u] grad[n, i, w]
//
// A matrix product whose inner dimension is the nodes of a species. They are cut into chunks; linear_grad_partial makes
// one product per (chunk, path, tile of the weight), linear_grad_sum adds the chunks of a species in order.
// From the including text: as for indexed_linear.cuh; grad is read as z is written there.
#pragma once

#include "indexed_linear_product.cuh"
#include "indexed_linear_tiles.cuh"

namespace mf {

// One operand's rows (node, component) of a step: SIZE channels from `first` on, V at a time.
template <int V, int SIZE> struct RowLoader {
    static constexpr int PER_ROW = SIZE / V, ROWS = THREADS / PER_ROW, COUNT = BK / ROWS;
    int channel, row;
    Pack<V> value[COUNT];

    MF_INLINE RowLoader() : channel((threadIdx.x % PER_ROW) * V), row(threadIdx.x / PER_ROW) {}
    MF_INLINE void fetch(
        const T* rows, index_t width, int component_stride, int channel_stride, int channels, int first,
        const RowTile& tile, int dim, int k0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int k = k0 + row + i * ROWS;
            value[i] = filled<V>(T(0));
            if (k < tile.rows * dim && first + channel < channels) {
                const int member = k / dim, component = k - member * dim;
                value[i] = load<V>(
                    rows + tile.at(tile.first + member) * width + component * component_stride +
                    (first + channel) * channel_stride);
            }
        }
    }
    MF_INLINE void put(T (*tile)[SIZE + PAD]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int j = 0; j < V; ++j) tile[row + i * ROWS][channel + j] = value[i].v[j];
    }
};

// partial [row_tiles(nodes, species, true, 1, chunk)][weight_numel]; only what a path covers is written.
MF_INLINE void linear_grad_partial(
    const T* x, const T* grad, const I* order, const I* row_ptr, T* partial, const Map& map, index_t nodes, int chunk) {
    alignas(16) __shared__ T xs[2][BK][BM + PAD];
    alignas(16) __shared__ T gs[2][BK][BN + PAD];

    int id = blockIdx.x, p = 0, columns = 1;
    for (; p < map.path_count; ++p) {
        columns = (map.blocks[map.paths[p].block].mul + BN - 1) / BN;
        const int count = columns * ((map.paths[p].mul_x + BM - 1) / BM);
        if (id < count) break;
        id -= count;
    }
    if (p == map.path_count) return;
    const Path path = map.paths[p];
    const Block block = map.blocks[path.block];
    const int u0 = id / columns * BM, w0 = id % columns * BN;
    RowTile tile;  // a row is a node here
    if (!tile.find(blockIdx.y, order, row_ptr, nodes, map.species, 1, chunk) || tile.invalid) return;

    Product product;
    RowLoader<VX, BM> xl;
    RowLoader<VZ, BN> gl;
    auto fetch = [&](int k0) {
        xl.fetch(x + path.x, map.x_dim, path.x_component, path.x_channel, path.mul_x, u0, tile, block.dim, k0);
        gl.fetch(grad + block.z, map.z_dim, block.z_component, block.z_channel, block.mul, w0, tile, block.dim, k0);
    };
    fetch(0);
    for (int k0 = 0, buffer = 0;; buffer ^= 1) {
        xl.put(xs[buffer]);
        gl.put(gs[buffer]);
        __syncthreads();
        k0 += BK;
        const bool more = k0 < tile.rows * block.dim;
        if (more) fetch(k0);  // in flight while this step is multiplied
        product.add(xs[buffer], gs[buffer]);
        if (!more) break;
    }

    T* mine = partial + index_t(blockIdx.y) * map.weight_numel + path.w;
    const T coefficient = T(path.coefficient);
#pragma unroll
    for (int i = 0; i < TM; ++i) {
        const int u = u0 + product.m + i;
        if (u >= path.mul_x) break;
#pragma unroll
        for (int j = 0; j < TN; j += VW) {
            const int w = w0 + product.column_of(j);
            if (w >= block.mul) continue;
            Pack<VW> out;
#pragma unroll
            for (int q = 0; q < VW; ++q) out.v[q] = coefficient * product.value[i][j + q];
            store<VW>(mine + u * path.w_x + w * path.w_z, out);
        }
    }
}

// gradient [species][weight_numel]; block y is the species.
MF_INLINE void linear_grad_sum(const T* partial, const I* row_ptr, T* gradient, index_t weight_numel, int chunk) {
    const int lane = threadIdx.x & 31, s = blockIdx.y;
    index_t first = 0;
    for (int other = lane; other < s; other += 32)
        first += (index_t(row_ptr[other + 1]) - index_t(row_ptr[other]) + chunk - 1) / chunk;
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) first += __shfl_xor_sync(0xffffffffu, first, step);
    const index_t last = first + (index_t(row_ptr[s + 1]) - index_t(row_ptr[s]) + chunk - 1) / chunk;
    const index_t w = (index_t(blockIdx.x) * blockDim.x + threadIdx.x) * VW;
    if (w >= weight_numel) return;
    Pack<VW> total = filled<VW>(T(0));
#pragma unroll 4
    for (index_t slot = first; slot < last; ++slot) add(total, load<VW>(partial + slot * weight_numel + w));
    store<VW>(gradient + s * weight_numel + w, total);
}

}  // namespace mf
