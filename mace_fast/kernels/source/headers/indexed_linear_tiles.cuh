// Tables of an equivariant linear map, and nodes listed by species cut into tiles that hold one species each, without
// the host knowing how many nodes each species has. T and I come from the including text.
#pragma once

#include "pack.cuh"

namespace mf {

// An output block of a row of z: element (component, channel) at z + component * z_component + channel * z_channel.
// Its paths are paths[path .. path_end); bias < 0: none. source/linear.py writes these structs.
struct Block {
    double bias_coefficient;
    int z, z_component, z_channel, mul, dim, path, path_end, bias;
};

// A weighted connection; W[u, w] = weight[w + u * w_x + w * w_z].
struct Path {
    double coefficient;
    int block, x, x_component, x_channel, mul_x, w, w_x, w_z;
};

// At least the number of tiles that any distribution of the nodes over species (and of invalid nodes) can need;
// source/linear.py has the same formula. Without lists by species there is one, and the number is exact.
MF_INLINE index_t row_tiles(index_t nodes, int species, bool listed, int dim, int size) {
    if (!listed) return (nodes * dim + size - 1) / size;
    const index_t groups = species + 1 < nodes ? species + 1 : nodes;
    return nodes * dim / size + groups;
}

// The sum of the values of this lane and those before it.
MF_INLINE index_t sum_up_to_lane(index_t value) {
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const index_t other = __shfl_up_sync(0xffffffffu, value, step);
        if (int(threadIdx.x & 31) >= step) value += other;
    }
    return value;
}

// A map over `species` weight vectors of `weight_numel` numbers each.
struct Map {
    const Block* blocks;
    const Path* paths;
    int block_count, path_count, x_dim, z_dim, weight_numel, species;

    // The output block of tile number `id` of all (tiles of `rows` x `columns`), and its number among the block's; each
    // lane looks at one block, so that there is one wait for the table. block_count: there is no such tile.
    MF_INLINE int find_block(index_t& id, index_t nodes, bool listed, int rows, int columns) const {
        for (int base = 0; base < block_count; base += 32) {
            const int b = base + int(threadIdx.x & 31);
            index_t mine = 0;
            if (b < block_count)
                mine = row_tiles(nodes, species, listed, blocks[b].dim, rows) * ((blocks[b].mul + columns - 1) / columns);
            const index_t inclusive = sum_up_to_lane(mine);
            const unsigned found = __ballot_sync(0xffffffffu, inclusive > id);
            if (found) {
                const int owner = __ffs(found) - 1;
                id -= __shfl_sync(0xffffffffu, inclusive - mine, owner);
                return base + owner;
            }
            id -= __shfl_sync(0xffffffffu, inclusive, 31);
        }
        return block_count;
    }
};

// `rows` rows (node, component) of one species, `first` rows into the species' list of nodes.
struct RowTile {
    const I* order;  // null: nodes in their own order
    index_t list, first, lead;  // lead: the list's member that the first row belongs to
    int head;                   // and its component
    int rows, species, dim;
    bool invalid;        // nodes whose species is outside the table
    index_t wrap, jump;  // those are listed first and last: positions from `wrap` on are `jump` further

    // Find tile number `number`; every warp does the same work. False if there is no such tile.
    MF_INLINE bool find(
        index_t number, const I* order_, const I* row_ptr, index_t nodes, int count, int dim_, int size) {
        order = order_;
        dim = dim_;
        invalid = false;
        species = 0;
        list = 0;
        wrap = nodes;
        jump = 0;
        if (!row_ptr) return within(number, nodes, size);
        const int lane = threadIdx.x & 31;
        index_t before = 0;
        for (int base = 0; base < count; base += 32) {
            const int s = base + lane;
            const index_t begin = s < count ? index_t(row_ptr[s]) : 0;
            const index_t mine = s < count ? index_t(row_ptr[s + 1]) - begin : 0;
            const index_t tiles = (mine * dim + size - 1) / size;
            const index_t inclusive = sum_up_to_lane(tiles);
            const unsigned found = __ballot_sync(0xffffffffu, before + inclusive > number);
            if (found) {
                const int owner = __ffs(found) - 1;
                species = base + owner;
                list = __shfl_sync(0xffffffffu, begin, owner);
                const index_t members = __shfl_sync(0xffffffffu, mine, owner);
                const index_t skipped = before + __shfl_sync(0xffffffffu, inclusive - tiles, owner);
                return within(number - skipped, members, size);
            }
            before += __shfl_sync(0xffffffffu, inclusive, 31);
        }
        const index_t low = row_ptr[0], high = row_ptr[count];
        invalid = true;
        wrap = low;
        jump = high - low;
        return within(number - before, nodes - jump, size);
    }
    MF_INLINE bool within(index_t number, index_t members, int size) {
        first = number * size;
        lead = first / dim;
        head = int(first - lead * dim);
        const index_t left = members * dim - first;
        rows = left < size ? int(left) : size;
        return left > 0;
    }
    // The node of a row of the tile, and which of its components the row is.
    MF_INLINE index_t node(int row, int& component) const {
        const unsigned r = unsigned(head + row), members = r / unsigned(dim);  // 64-bit divisions are long, and many
        component = int(r - members * unsigned(dim));
        return at(lead + members);
    }
    MF_INLINE index_t at(index_t member) const {
        if (!order) return member;
        const index_t position = list + member;
        return order[position + (position >= wrap ? jump : 0)];
    }
};

}  // namespace mf
