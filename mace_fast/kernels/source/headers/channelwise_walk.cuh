// In which order a group of warps goes through edges, whatever it does with them.
#pragma once
#include "channelwise_stream.cuh"

namespace mf {

// An edge and its sender for each lane; a negative edge: there is none.
struct Ids {
    int edge, sender;
    MF_INLINE int edge_of(int lane) const { return __shfl_sync(0xffffffffu, edge, lane); }
    MF_INLINE int sender_of(int lane) const { return __shfl_sync(0xffffffffu, sender, lane); }
};

// Of the tile that begins at a position.
template <class S> MF_INLINE Ids read_ids(const Graph& graph, index_t position, index_t end) {
    const int lane = threadIdx.x & 31;
    if (lane >= S::TILE || position + lane >= end) return {-1, 0};
    const index_t e = graph.edge(position + lane);
    return {int(e), int(graph.sender_of(e))};
}

template <class S, bool DUAL> MF_INLINE auto make_ring(const Shared<S, DUAL>& shared, int u, int image) {
    if constexpr (S::RING > 0) return Ring<S, DUAL>(shared.rings, u - (threadIdx.x & 31) * S::VEC, image);
    else return 0;
}

// Which positions in the sorted list of edges are worked on: all, or a stretch of them, which has nothing to do with
// receivers that have no edges there. `opened`: where the edges of receiver n begin, if those before are done.
struct AllEdges {
    static constexpr bool OF_ALL_RECEIVERS = true;
    MF_INLINE index_t from(index_t position) const { return position; }
    MF_INLINE index_t upto(index_t position) const { return position; }
    MF_INLINE index_t opened(const Graph&, index_t, index_t position) const { return position; }
};
struct Stretch {
    static constexpr bool OF_ALL_RECEIVERS = false;
    int first, end;
    MF_INLINE index_t from(index_t position) const { return position > first ? position : first; }
    MF_INLINE index_t upto(index_t position) const { return position < end ? position : end; }
    MF_INLINE index_t opened(const Graph& graph, index_t n, index_t) const { return graph.begin(n); }
};

// Blocks of all channels follow one another for each part.
template <class S> MF_INLINE int part_of() { return int(blockIdx.y) / S::CHANNEL_BLOCKS; }

// Positions in the sorted list of edges, and receivers, as walk() counts them: a 32-bit list has no more. Streams need the
// registers that saves. Other kernels measured with it were as often slower (up to 14 %) as faster (up to 4 %).
template <class S, bool STREAMED = S::STREAMED> struct PositionOf {
    typedef index_t type;
    MF_INLINE static type after(type position, index_t count, type) { return position + count; }
};
template <class S> struct PositionOf<S, true> {
    typedef int type;
    // Or the end, if that comes first: what lies beyond may be no int.
    MF_INLINE static type after(type position, index_t count, type end) {
        return count < end - position ? position + int(count) : end;
    }
};

// One bit for each of the first `count` slots of a tile.
MF_INLINE unsigned first_slots(int count) { return count < 32 ? (1u << count) - 1 : 0xffffffffu; }

// Walks the edges of this group that are in `range`: start(n), edge(slot, operands) for each edge, finish(n, partial), and
// after each tile flush(count). Edges beyond the splines, of which the list of a moving structure has many, go to
// beyond(slots), a bit each, when their tile begins, and nowhere else. `partial` is negative where this is the first part of
// n's first edges, and numbers all other groups, of which those without edges do nothing: overflow.cuh counts in the same
// way. Operands of the next edge are loaded before the current one is worked on.
template <class S, bool DUAL, bool SLOPE, class Range, class Start, class Edge, class Finish, class Flush,
          class Beyond>
MF_INLINE void walk(const Shared<S, DUAL>& shared, const Graph& graph, const Range& range,
                    const Operands<typename S::T>& in, const Operands<typename S::T>& tangent,
                    const Spline<typename S::T>& spline, int u, int image, Start start, Edge edge, Finish finish,
                    Flush flush, Beyond beyond) {
    const int item = int(blockIdx.x * blockDim.y + threadIdx.y), part = part_of<S>();
    const int partial = part * int(gridDim.x * blockDim.y) + item - int(graph.groups);
    const bool stretch = partial >= 0 || graph.parts > 1;  // of one receiver's edges, rather than a run of receivers
    typedef typename PositionOf<S>::type P;
    P first, last, position, end;
    if (!stretch) {
        first = item * graph.run;
        last = first + graph.run < graph.receivers ? first + graph.run : graph.receivers;
        position = graph.begin(first);
        end = graph.begin(last);
    } else {
        const bool window = item >= graph.groups;
        const index_t opens = (item - graph.groups) * graph.limit;
        first = item;
        if (window) {
            if (!graph.receiver || opens >= graph.begin(graph.receivers)) return;  // fills the last block
            first = graph.receiver[graph.edge(opens)];
        }
        last = first + 1;
        position = graph.begin(first);
        end = graph.begin(last);
        if (window) {
            position = PositionOf<S>::after(position, graph.limit, end);
            if (opens > position) position = opens;
        }
        const index_t stop = (window ? opens : position) + graph.limit;
        if (stop < end) end = stop;
        const int edges = int(end - position), share = edges > 0 ? (edges + graph.parts - 1) / graph.parts : 0;
        position += part * share;
        if (position + share < end) end = position + share;
    }
    position = range.from(position);
    end = range.upto(end);
    if ((partial >= 0 || !Range::OF_ALL_RECEIVERS) && position >= end) return;
    P tile_begin = position, tile_end = position;
    auto current = OperandsOf<S, DUAL, SLOPE>::make(in, spline, shared, u, image);
    EdgeOperands<S, DUAL, SLOPE> next;
    Ids ids, next_ids;  // of the tile's edges and of the next tile's, one edge a lane
    bool flowing = false;
    auto ring = make_ring<S, DUAL>(shared, u, image);
    for (P n = first; n < last; ++n) {
        const P row_stop = graph.begin(n + 1), row_end = row_stop < end ? row_stop : end;
        const P row_begin = stretch ? position : range.opened(graph, n, position);
        const P stop = row_end - row_begin > graph.limit ? row_begin + graph.limit : row_end;
        start(n);
        while (position < stop) {
            if (position == tile_end) {
                if (tile_end > tile_begin) flush(int(tile_end - tile_begin));
                tile_begin = position;
                tile_end = position + S::TILE < end ? position + S::TILE : end;
                if constexpr (S::RING > 0) {
                    if (flowing) {
                        ids = next_ids;
                    } else {
                        ids = read_ids<S>(graph, position, end);
                        await_copies<0>();
                        __syncwarp();
                        ring.slot = 0;
#pragma unroll
                        for (int ahead = 0; ahead < S::RING - 1; ++ahead)
                            ring.fetch(in, tangent, ids.edge_of(ahead), ids.sender_of(ahead), ahead);
                        flowing = true;
                    }
                    next_ids = read_ids<S>(graph, tile_end, end);
                }
                const int count = int(tile_end - tile_begin);
                couple_tile<S, DUAL>(shared, graph, in, tangent.y, spline, position, count);
                if constexpr (S::ORDER > 0) {
                    const unsigned weighted = *shared.weighted;
                    beyond(first_slots(count) & ~weighted);
                    if constexpr (S::STREAMED) {
                        if (weighted) current.start(__ffs(weighted) - 1);
                    }
                } else if (S::PREFETCH) {
                    current.load_all(in, tangent, spline, shared, 0, u, image);
                }
            }
            const P tile_stop = stop < tile_end ? stop : tile_end;
            for (; position < tile_stop; ++position) {
                const int slot = int(position - tile_begin);
                if (S::ORDER > 0 && !(*shared.weighted >> slot & 1)) continue;
                if constexpr (S::RING > 0) {
                    await_copies<S::RING - 2>();
                    __syncwarp();  // all lanes' copies are there, and all lanes are done with the slot before this one
                    const int ahead = slot + S::RING - 1;
                    const bool here = ahead < S::TILE;
                    const int lane = here ? ahead : ahead - S::TILE;
                    ring.fetch(in, tangent, here ? ids.edge_of(lane) : next_ids.edge_of(lane),
                               here ? ids.sender_of(lane) : next_ids.sender_of(lane), ring.last_slot());
                    current.load_from(ring, DUAL && tangent.x, DUAL && tangent.w);
                    ring.advance();
                } else if constexpr (S::STREAMED) {
                    current.enter(slot, slot + __ffs(*shared.weighted >> slot >> 1));
                } else if (!S::PREFETCH) {
                    current.load_all(in, tangent, spline, shared, slot, u, image);
                } else if (position + 1 < tile_end) {
                    next.load_all(in, tangent, spline, shared, slot + 1, u, image);
                }
                edge(slot, current);
                if constexpr (S::PREFETCH && !S::STREAMED) current = next;
            }
        }
        finish(n, partial);
        if (position < row_end) {  // the rest is left to windows
            if (position > tile_begin) flush(int(position - tile_begin));
            position = tile_begin = tile_end = row_end;
            flowing = false;
        }
    }
    if (position > tile_begin) flush(int(position - tile_begin));
}

}  // namespace mf
