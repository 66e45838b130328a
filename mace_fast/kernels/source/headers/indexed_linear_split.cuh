// The map of indexed_linear.cuh for few nodes, where a launch lasts as long as the chain of its waits and not as long as its
// arithmetic: z[n] = x[n] W[species(n)] + bias + addend[n].
//
// A thread block has a tile of BM rows times BN output channels as there, but takes BK input channels at a time, so that a
// whole path is one or a few steps; all loads of a step are in flight together. Every warp multiplies all of the tile over
// its share of the step's channels, and at the end the warps' sums are added in order: the same bits every time, though
// not those of a tiling that does not share.
//
// From the including text: as for indexed_linear.cuh, and SPLIT, the warps of a block. A warp's lanes are BM / TM rows of
// BN / TN. Dynamic shared memory: the tables of the map.
#pragma once

#include "indexed_linear_tiles.cuh"

namespace mf {

constexpr int THREADS = 32 * SPLIT;
constexpr int WIDE = 16 / sizeof(T);
constexpr int LINE = BK + WIDE;  // keeps lines of channels 16-byte aligned, and neighbouring ones off each other's banks
static_assert(BM / TM * (BN / TN) == 32, "a warp has all of a tile");

extern __shared__ __align__(16) int memory[];

// The node and component of each row of a tile; node -1: beyond the last one.
struct Rows {
    int node[BM], component[BM];

    MF_INLINE void list(const RowTile& tile) {
        const int r = threadIdx.x;
        if (r < BM) node[r] = r < tile.rows ? int(tile.node(r, component[r])) : -1;
    }
};

// Channels [k0, k0 + BK) of a path for the rows of a tile: into registers, and from there into shared memory.
struct XLoader {
    static constexpr int PER_ROW = BK / VX, ROWS = THREADS / PER_ROW, COUNT = BM / ROWS;
    Pack<VX> value[COUNT];

    MF_INLINE void fetch(const T* x, index_t x_dim, const Rows& rows, const Path& path, int k0) {
        const int k = k0 + threadIdx.x % PER_ROW * VX, first = threadIdx.x / PER_ROW;
        const T* from = x + path.x + k * path.x_channel;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int r = first + i * ROWS;
            value[i] = filled<VX>(T(0));
            if (rows.node[r] >= 0 && k < path.mul_x)
                value[i] = load<VX>(from + rows.node[r] * x_dim + rows.component[r] * path.x_component);
        }
    }
    MF_INLINE void put(T (*tile)[LINE]) const {
        const int k = threadIdx.x % PER_ROW * VX, first = threadIdx.x / PER_ROW;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) store<VX>(&tile[first + i * ROWS][k], value[i]);
    }
};

// The weight's part, in lines along whichever of its channels is contiguous.
constexpr int W_LINES = W_ALONG_X ? BN : BK, W_LINE = W_ALONG_X ? LINE : BN;
struct WLoader {
    static constexpr int PER_LINE = (W_ALONG_X ? BK : BN) / VW, LINES = THREADS / PER_LINE, COUNT = W_LINES / LINES;
    Pack<VW> value[COUNT];
    T coefficient;

    MF_INLINE void fetch(const T* weight, const Path& path, int k0, int n0, int mul_z) {
        const int along = threadIdx.x % PER_LINE * VW, first = threadIdx.x / PER_LINE;
        coefficient = T(path.coefficient);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int across = first + i * LINES;
            const int k = k0 + (W_ALONG_X ? along : across), n = n0 + (W_ALONG_X ? across : along);
            const T* from = weight + path.w + k * path.w_x + n * path.w_z;
            value[i] = k < path.mul_x && n < mul_z ? load<VW>(from) : filled<VW>(T(0));
        }
    }
    MF_INLINE void put(T (*tile)[W_LINE]) const {
        const int along = threadIdx.x % PER_LINE * VW, first = threadIdx.x / PER_LINE;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            Pack<VW> scaled;
#pragma unroll
            for (int j = 0; j < VW; ++j) scaled.v[j] = coefficient * value[i].v[j];
            store<VW>(&tile[first + i * LINES][along], scaled);
        }
    }
};

// Shared memory: operands of a step, then the sums of the warps.
union Stage {
    struct {
        T x[BM][LINE], w[W_LINES][W_LINE];
    } operands;
    T sums[SPLIT][BM][BN + WIDE];
};

// A lane's part of a warp's sum. Its rows lie BM / TM apart, since lines next to each other are on different banks; so do
// its columns where they are lines, and else they come 16 bytes at a time.
struct Share {
    static constexpr int ROWS = BM / TM, COLUMNS = BN / TN;
    static constexpr int UNROLL = TM > 4 ? 1 : 2;  // more would take registers that loads in flight need
    T value[TM][TN];
    int row, column;

    MF_INLINE Share() : row(threadIdx.x % 32 / COLUMNS), column(threadIdx.x % COLUMNS * (W_ALONG_X ? 1 : WIDE)) {
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
            for (int j = 0; j < TN; ++j) value[i][j] = T(0);
    }
    MF_INLINE int row_of(int i) const { return row + i * ROWS; }
    MF_INLINE int column_of(int j) const {
        return column + (W_ALONG_X ? j * COLUMNS : j / WIDE * (COLUMNS * WIDE) + j % WIDE);
    }
    // Over input channels [k, end) of the step.
    MF_INLINE void add(const T (*x)[LINE], const T (*w)[W_LINE], int k, int end) {
#pragma unroll UNROLL
        for (; k < end; k += WIDE) {
            T b[WIDE][TN];
#pragma unroll
            for (int j = 0; j < TN; j += W_ALONG_X ? 1 : WIDE)
#pragma unroll
                for (int q = 0; q < WIDE; q += W_ALONG_X ? WIDE : 1) {
                    const Pack<WIDE> piece = load<WIDE>(W_ALONG_X ? &w[column_of(j)][k] : &w[k + q][column_of(j)]);
#pragma unroll
                    for (int c = 0; c < WIDE; ++c) (W_ALONG_X ? b[c][j] : b[q][j + c]) = piece.v[c];
                }
#pragma unroll
            for (int i = 0; i < TM; ++i) {
                const Pack<WIDE> a = load<WIDE>(&x[row_of(i)][k]);
#pragma unroll
                for (int q = 0; q < WIDE; ++q)
#pragma unroll
                    for (int j = 0; j < TN; ++j) value[i][j] += a.v[q] * b[q][j];
            }
        }
    }
    MF_INLINE void put(T (*sum)[BN + WIDE]) const {
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
            for (int j = 0; j < TN; ++j) sum[row_of(i)][column_of(j)] = value[i][j];
    }
};

// The outputs that a thread writes. Neighbouring threads have neighbours in memory: channels of a row or, where
// components are contiguous (mul_ir), rows of a channel.
struct Outputs {
    static constexpr int COUNT = BM * BN / (THREADS * VZ);
    const Rows& rows;
    const Block& block;
    int n0;
    index_t z_dim;
    Pack<VZ> addend[COUNT];

    MF_INLINE int row(int i) const { return by_channel() ? element(i) / BN : element(i) % BM; }
    MF_INLINE int column(int i) const { return by_channel() ? element(i) % BN : element(i) / BM; }
    MF_INLINE bool by_channel() const { return VZ > 1 || block.z_channel == 1; }
    MF_INLINE int element(int i) const { return (threadIdx.x + i * THREADS) * VZ; }
    MF_INLINE bool has(int i) const { return rows.node[row(i)] >= 0 && n0 + column(i) < block.mul; }
    MF_INLINE index_t place(int i) const {
        const int r = row(i);
        return rows.node[r] * z_dim + block.z + rows.component[r] * block.z_component +
               (n0 + column(i)) * block.z_channel;
    }

    MF_INLINE void fetch(const T* more) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) addend[i] = more && has(i) ? load<VZ>(more + place(i)) : filled<VZ>(T(0));
    }
    MF_INLINE void write(const T (*sums)[BM][BN + WIDE], const T* bias, bool invalid, T* z) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (!has(i)) continue;
            Pack<VZ> total = filled<VZ>(T(0));
#pragma unroll
            for (int s = 0; s < SPLIT; ++s) add<VZ>(total, load<VZ>(&sums[s][row(i)][column(i)]));
            if (block.bias >= 0)
#pragma unroll
                for (int q = 0; q < VZ; ++q)
                    total.v[q] += T(block.bias_coefficient) * bias[block.bias + n0 + column(i) + q];
            add<VZ>(total, addend[i]);
            store<VZ>(z + place(i), invalid ? filled<VZ>(not_a_number()) : total);
        }
    }
};

// The map's tables in shared memory, since each path would be one more wait for global memory.
MF_INLINE Map near_map(const Map& map) {
    constexpr int BLOCK = sizeof(Block) / sizeof(int), PATH = sizeof(Path) / sizeof(int);
    const int words = map.block_count * BLOCK;
    const int* blocks = reinterpret_cast<const int*>(map.blocks);
    const int* paths = reinterpret_cast<const int*>(map.paths);
    for (int i = threadIdx.x; i < words; i += THREADS) memory[i] = blocks[i];
    for (int i = threadIdx.x; i < map.path_count * PATH; i += THREADS) memory[words + i] = paths[i];
    Map near = map;
    near.blocks = reinterpret_cast<const Block*>(memory);
    near.paths = reinterpret_cast<const Path*>(memory + words);
    return near;
}

MF_INLINE void linear_forward(
    const T* x, const T* weight, const T* bias, const I* order, const I* row_ptr, const T* addend, T* z, const Map& far,
    index_t nodes) {
    alignas(16) __shared__ Stage stage;
    __shared__ Rows rows;

    const Map map = near_map(far);
    __syncthreads();
    index_t id = blockIdx.x;
    const int b = map.find_block(id, nodes, row_ptr, BM, BN);
    if (b == map.block_count) return;
    const Block& block = map.blocks[b];
    const int columns = (block.mul + BN - 1) / BN;
    const int n0 = int(id % columns) * BN;
    RowTile tile;
    if (!tile.find(id / columns, order, row_ptr, nodes, map.species, block.dim, BM)) return;

    const T* mine = weight + tile.species * index_t(map.weight_numel);
    const int path_end = tile.invalid ? block.path : block.path_end;
    rows.list(tile);
    Outputs outputs{rows, block, n0, map.z_dim};
    XLoader xl;
    WLoader wl;
    Share share;
    const int warp = threadIdx.x / 32;
    int slice = 0;  // channels that each warp multiplies of the step in shared memory; none is there yet
    for (int p = block.path, k0 = 0;;) {
        const bool more = p < path_end;
        if (more) wl.fetch(mine, map.paths[p], k0, n0, block.mul);
        if (slice == 0) {
            __syncthreads();  // for the rows, which the weight need not wait for
            outputs.fetch(addend);
        }
        if (more) xl.fetch(x, map.x_dim, rows, map.paths[p], k0);
        // These loads are in flight while the step before is multiplied.
        share.add(stage.operands.x, stage.operands.w, warp * slice, (warp + 1) * slice);
        __syncthreads();
        if (!more) break;
        xl.put(stage.operands.x);
        wl.put(stage.operands.w);
        __syncthreads();
        const int left = map.paths[p].mul_x - k0;
        slice = (min(left, BK) + SPLIT * WIDE - 1) / (SPLIT * WIDE) * WIDE;
        k0 += BK;
        if (left <= BK) {
            k0 = 0;
            ++p;
        }
    }
    share.put(stage.sums[warp]);
    __syncthreads();
    outputs.write(stage.sums, bias, tile.invalid, z);
}

}  // namespace mf
