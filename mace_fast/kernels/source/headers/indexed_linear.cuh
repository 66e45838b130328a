// An equivariant linear map on CUDA: z[n] = x[n] W[species(n)] + bias + addend[n], all irreps blocks of all nodes in one launch.
//
// A matrix product in tiles through shared memory. A tile is BM rows of one output block, all of one species, times BN
// output channels; a row is (node, component), so the 2l+1 components are simply more rows of the same product. Rows
// are gathered: nodes are listed by species (order, row_ptr). Each block finds its species from row_ptr, so that the
// host never has to know the counts; the grid is an upper bound and the surplus leaves. Null lists: one species.
//
// From the including text: T, I, the tile sizes, the vector widths VX, VW, VZ of accesses to x, weight and z (1, or 16 bytes where all
// blocks are aligned and contiguous), and W_ALONG_X (the weight is contiguous along the input channel: transposed).
#pragma once

#include "indexed_linear_product.cuh"
#include "indexed_linear_tiles.cuh"

namespace mf {

// Loads of one step's operands into registers, and from there into shared memory.
struct XLoader {
    static constexpr int PER_ROW = BK / VX, ROWS = THREADS / PER_ROW, COUNT = BM / ROWS;
    int k, row;
    int node[COUNT], component[COUNT];  // node -1: beyond the tile's last row
    Pack<VX> value[COUNT];

    MF_INLINE XLoader(const RowTile& tile) {
        k = (threadIdx.x % PER_ROW) * VX;
        row = threadIdx.x / PER_ROW;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int r = row + i * ROWS;
            node[i] = r < tile.rows ? int(tile.node(r, component[i])) : -1;
        }
    }
    MF_INLINE void fetch(const T* x, index_t x_dim, const Path& path, int k0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            value[i] = filled<VX>(T(0));
            if (node[i] >= 0 && k0 + k < path.mul_x)
                value[i] = load<VX>(
                    x + node[i] * x_dim + path.x + component[i] * path.x_component + (k0 + k) * path.x_channel);
        }
    }
    MF_INLINE void put(T (*tile)[BM + PAD]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int j = 0; j < VX; ++j) tile[k + j][row + i * ROWS] = value[i].v[j];
    }
};

struct WLoader {
    static constexpr int FAST = (W_ALONG_X ? BK : BN) / VW, SLOW = THREADS / FAST, COUNT = (W_ALONG_X ? BN : BK) / SLOW;
    int fast, slow;
    Pack<VW> value[COUNT];
    T coefficient;

    MF_INLINE WLoader() {
        fast = (threadIdx.x % FAST) * VW;
        slow = threadIdx.x / FAST;
    }
    MF_INLINE void fetch(const T* weight, const Path& path, int k0, int n0, int mul_z) {
        coefficient = T(path.coefficient);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int other = slow + i * SLOW;
            const int k = k0 + (W_ALONG_X ? fast : other), n = n0 + (W_ALONG_X ? other : fast);
            const T* p = weight + path.w + k * path.w_x + n * path.w_z;
            value[i] = k < path.mul_x && n < mul_z ? load<VW>(p) : filled<VW>(T(0));
        }
    }
    MF_INLINE void put(T (*tile)[BN + PAD]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int other = slow + i * SLOW;
#pragma unroll
            for (int j = 0; j < VW; ++j) {
                const T scaled = coefficient * value[i].v[j];
                if (W_ALONG_X)
                    tile[fast + j][other] = scaled;
                else
                    tile[other][fast + j] = scaled;
            }
        }
    }
};

// Shared memory: operands of two steps while the product is made, the product itself while it is written.
union Stage {
    struct {
        T x[2][BK][BM + PAD], w[2][BK][BN + PAD];
    } operands;
    T product[BM][BN + 1];
};

// Channels of a row are neighbours in z: straight from the registers.
MF_INLINE void write_rows(
    const Product& product, const RowTile& tile, const Block& block, int n0, const T* addend, T* z, index_t z_dim) {
#pragma unroll
    for (int i = 0; i < TM; ++i) {
        const int r = product.m + i;
        if (r >= tile.rows) break;
        int component;
        const index_t node = tile.node(r, component);
        const index_t begin = node * z_dim + block.z + component * block.z_component + n0;
#pragma unroll
        for (int j = 0; j < TN; j += VZ) {
            const int n = product.column_of(j);
            if (n0 + n >= block.mul) continue;
            Pack<VZ> out;
#pragma unroll
            for (int q = 0; q < VZ; ++q) out.v[q] = product.value[i][j + q];
            if (addend) add<VZ>(out, load<VZ>(addend + begin + n));
            store<VZ>(z + begin + n, out);
        }
    }
}

// Components of a channel are neighbours in z (mul_ir): by way of shared memory, so that a warp writes what lies together.
MF_INLINE void write_nodes(
    const Product& product, const RowTile& tile, const Block& block, int n0, const T* addend, T* z, index_t z_dim,
    Stage& stage) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) stage.product[product.m + i][product.column_of(j)] = product.value[i][j];
    __syncthreads();
    const int width = min(BN, block.mul - n0) * block.dim;
    const int members = (tile.head + tile.rows - 1) / block.dim + 1;
    constexpr int BATCH = 4;  // addends of as many outputs are loaded together: to wait for each would take longer than the product
    for (int base = threadIdx.x; base < members * width; base += BATCH * THREADS) {
        index_t place[BATCH];
        T value[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int e = base + i * THREADS, member = e / width, q = e - member * width;
            const int n = q / block.dim, component = q - n * block.dim;
            const int r = member * block.dim - tile.head + component;
            place[i] = -1;
            if (member >= members || r < 0 || r >= tile.rows) continue;
            place[i] = tile.at(tile.lead + member) * z_dim + block.z + (n0 + n) * block.z_channel +
                       component * block.z_component;
            value[i] = addend ? stage.product[r][n] + addend[place[i]] : stage.product[r][n];
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (place[i] >= 0) z[place[i]] = value[i];
    }
}

MF_INLINE void linear_forward(
    const T* x, const T* weight, const T* bias, const I* order, const I* row_ptr, const T* addend, T* z, const Map& map,
    index_t nodes) {
    alignas(16) __shared__ Stage stage;

    index_t id = blockIdx.x;
    const int b = map.find_block(id, nodes, row_ptr, BM, BN);
    if (b == map.block_count) return;
    const Block block = map.blocks[b];
    const int columns = (block.mul + BN - 1) / BN;
    const int n0 = int(id % columns) * BN;
    RowTile tile;
    if (!tile.find(id / columns, order, row_ptr, nodes, map.species, block.dim, BM)) return;

    Product product;
    if (!tile.invalid && block.path < block.path_end) {
        XLoader xl(tile);
        WLoader wl;
        const T* mine = weight + tile.species * index_t(map.weight_numel);
        int p = block.path, k0 = 0, buffer = 0;
        Path path = map.paths[p];
        xl.fetch(x, map.x_dim, path, k0);
        wl.fetch(mine, path, k0, n0, block.mul);
        while (true) {
            xl.put(stage.operands.x[buffer]);
            wl.put(stage.operands.w[buffer]);
            __syncthreads();
            k0 += BK;
            if (k0 >= path.mul_x) {
                k0 = 0;
                ++p;
                if (p < block.path_end) path = map.paths[p];
            }
            const bool more = p < block.path_end;
            if (more) {  // in flight while this step is multiplied
                xl.fetch(x, map.x_dim, path, k0);
                wl.fetch(mine, path, k0, n0, block.mul);
            }
            product.add(stage.operands.x[buffer], stage.operands.w[buffer]);
            if (!more) break;
            buffer ^= 1;
        }
    }

    if (block.bias >= 0) {
#pragma unroll
        for (int j = 0; j < TN; ++j) {
            const int n = n0 + product.column_of(j);
            const T constant = n < block.mul ? T(block.bias_coefficient) * bias[block.bias + n] : T(0);
#pragma unroll
            for (int i = 0; i < TM; ++i) product.value[i][j] += constant;
        }
    }
    if (tile.invalid) {
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
            for (int j = 0; j < TN; ++j) product.value[i][j] = not_a_number();
    }
    if (block.z_channel == 1)
        write_rows(product, tile, block, n0, addend, z, map.z_dim);
    else
        write_nodes(product, tile, block, n0, addend, z, map.z_dim, stage);
}

}  // namespace mf
