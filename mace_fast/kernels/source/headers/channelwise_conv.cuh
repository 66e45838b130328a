// Channelwise tensor product fused with the graph convolution, on CUDA.
//
//     z[n, p, k, u] = sum over edges e into n of  w[e, p, u] * sum_i x[sender(e), i, u] * M[e, p, i, k]
//
// A thread holds one channel u or a few neighbouring ones; a group of warps works on the receivers [first, last) of a
// run, one after the other, with all outputs of a receiver in registers, so that nothing is added atomically and every
// sum has a fixed order. M does not depend on the channel: once per tile of edges it is computed with one lane per edge
// and kept in shared memory, from where all channels read it as a broadcast.
//
// A receiver with more than `limit` edges would keep one group busy while others idle. Its first `limit` edges are worked
// on as above; for the others every stretch of `limit` positions in the sorted list of edges, a window, has a group of its
// own. A window holds such edges of one receiver at most, since a second one would have to begin, and have `limit` edges
// more, inside it. The sums of windows are added in order by overflow.cuh.
//
// Where there are few receivers, `parts` groups share those edges of each, or of a window, a stretch of the list for each
// group; their sums too are added by overflow.cuh. Groups of the same part of different receivers are neighbours: edges of a
// receiver that are sorted by length then read the same coefficients of splines at the same time.
//
// `Segment` is generated: it lists the blocks of x and z, the paths with their straight-line code, and the sizes. Of segments
// that differ only in where blocks and weights are there is one, with several images, and places are looked up by image.
// With DUAL the operands carry tangents and the results are the tangents of the results, nothing else.
#pragma once
#include "async_copy.cuh"
#include "number.h"
#include "spline.h"

namespace mf {

template <class... Items> struct List {
    template <class F> MF_INLINE static void each(F&& f) { (f(Items{}), ...); }
};

template <bool DUAL, class T> struct NumberOf { typedef T type; };
template <class T> struct NumberOf<true, T> { typedef Dual<T> type; };

// Device pointers of a graph sorted by receiver, without copying it: position -> edge through `order`.
// A null `order`, `row` or `sender` stands for the identity (no graph: sample e is its own sender and receiver).
struct Graph {
    const int* order;
    const int* row;
    const int* sender;
    const int* receiver;
    const float* poison;  // 0, or NaN when an index was out of range: every result then is NaN
    index_t receivers;
    index_t run;     // receivers that one group works through
    index_t groups;  // that work through receivers; those after them have windows
    index_t limit;   // edges of a receiver beyond which they are left to windows
    int parts;       // groups that share a receiver or window; run is 1 where there are several
    MF_INLINE index_t begin(index_t n) const { return row ? row[n] : n; }
    MF_INLINE index_t edge(index_t position) const { return order ? order[position] : position; }
    MF_INLINE index_t sender_of(index_t e) const { return sender ? sender[e] : e; }
};

template <class T> struct Operands {
    const T *x, *y, *w;
    index_t x_row, y_row, w_row;  // elements from one node or edge to the next; w_row = 0: one set of weights for all
};

// Weights as functions of the edge length instead of numbers per edge: see spline.h. A null radius: no spline.
template <class T> struct Spline {
    const T* radius;   // [edges]
    const int* table;  // [edges], which of several tables; null when there is one
    const T* rows;     // [tables * (intervals + 1), ORDER, NUMEL]
    index_t intervals;
    T per_length;  // intervals per unit of length
};

template <class T> struct Pack;
template <> struct Pack<float> { typedef float4 type; static constexpr int size = 4; };
template <> struct Pack<double> { typedef double2 type; static constexpr int size = 2; };

// What a thread holds of a row: one channel, or neighbouring ones that are loaded and stored together.
template <class T, int COUNT> struct ChannelsOf { typedef Vec<T, COUNT> type; };
template <class T> struct ChannelsOf<T, 1> { typedef T type; };

template <class T> MF_INLINE T load(const T* at, T) { return __ldg(at); }
template <class T> MF_INLINE void store(T* at, T v) { *at = v; }
MF_INLINE Vec<float, 2> load(const float* at, Vec<float, 2>) {
    const float2 p = __ldg(reinterpret_cast<const float2*>(at));
    return {p.x, p.y};
}
MF_INLINE Vec<float, 4> load(const float* at, Vec<float, 4>) {
    const float4 p = __ldg(reinterpret_cast<const float4*>(at));
    return {p.x, p.y, p.z, p.w};
}
MF_INLINE Vec<double, 2> load(const double* at, Vec<double, 2>) {
    const double2 p = __ldg(reinterpret_cast<const double2*>(at));
    return {p.x, p.y};
}
MF_INLINE void store(float* at, Vec<float, 2> v) { *reinterpret_cast<float2*>(at) = make_float2(v.v[0], v.v[1]); }
MF_INLINE void store(float* at, Vec<float, 4> v) {
    *reinterpret_cast<float4*>(at) = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
}
MF_INLINE void store(double* at, Vec<double, 2> v) { *reinterpret_cast<double2*>(at) = make_double2(v.v[0], v.v[1]); }

template <class T> MF_INLINE T shared_load(const T* at, T) { return *at; }
MF_INLINE Vec<float, 2> shared_load(const float* at, Vec<float, 2>) {
    const float2 p = *reinterpret_cast<const float2*>(at);
    return {p.x, p.y};
}
MF_INLINE Vec<float, 4> shared_load(const float* at, Vec<float, 4>) {
    const float4 p = *reinterpret_cast<const float4*>(at);
    return {p.x, p.y, p.z, p.w};
}
MF_INLINE Vec<double, 2> shared_load(const double* at, Vec<double, 2>) {
    const double2 p = *reinterpret_cast<const double2*>(at);
    return {p.x, p.y};
}

template <class T> MF_INLINE void fill(T& v, T value) { v = value; }
template <class T, int C> MF_INLINE void fill(Vec<T, C>& v, T value) {
#pragma unroll
    for (int i = 0; i < C; ++i) v.v[i] = value;
}
template <class V, class T> MF_INLINE void fill(Dual<V>& v, T value) {
    fill(v.v, value);
    fill(v.d, value);
}

template <class N> struct Make {
    template <class V> MF_INLINE static N of(V v, V) { return v; }
};
template <class V> struct Make<Dual<V>> {
    MF_INLINE static Dual<V> of(V v, V d) { return {v, d}; }
};

template <class T> MF_INLINE T result_of(T v) { return v; }
template <class T> MF_INLINE T result_of(Dual<T> v) { return v.d; }

// Operands of the next edges on their way through shared memory: RING edges deep, each warp's own channels in its own
// ring, so that no barrier but the warp's is needed. Holds, for each edge, the weights of the segment's paths and then the
// components of x, 32 * VEC channels of each (a piece); with DUAL the same of the tangents follows.
template <class S, bool DUAL> struct Ring {
    typedef typename S::T T;
    static constexpr int PACK = 16 / int(sizeof(T));   // numbers of a copy
    static constexpr int PIECE = 32 * S::VEC;          // numbers of a piece
    static constexpr int LANES = PIECE / PACK;         // that copy a piece
    static constexpr int ABREAST = 32 / LANES;         // pieces that a warp copies at a time
    static constexpr int W_COPIES = (S::PIECES + ABREAST - 1) / ABREAST;
    static constexpr int X_COPIES = (S::NX + ABREAST - 1) / ABREAST;
    static constexpr int STAGE = (W_COPIES + X_COPIES) * ABREAST * PIECE;  // numbers of an edge, without tangents
    static constexpr int NUMBERS = S::RING * STAGE * (DUAL ? 2 : 1);

    T* memory;
    int w_offset[W_COPIES > 0 ? W_COPIES : 1];  // of this lane's numbers in a row; negative: nothing to copy
    int x_offset[X_COPIES];
    int slot;  // of the edge that is worked on next

    MF_INLINE Ring(T* rings, int first_channel, int image) {
        const int lane = threadIdx.x & 31, mine = lane / LANES, channel = first_channel + lane % LANES * PACK;
        memory = rings + (threadIdx.x >> 5) * NUMBERS;
#pragma unroll
        for (int c = 0; c < W_COPIES; ++c) {
            w_offset[c] = -1;
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                if (Path::WEIGHTED && Path::PIECE == c * ABREAST + mine) w_offset[c] = Path::column(image) + channel;
            });
        }
#pragma unroll
        for (int c = 0; c < X_COPIES; ++c) {
            x_offset[c] = -1;
            S::X::each([&](auto block) {
                typedef decltype(block) Block;
#pragma unroll
                for (int i = 0; i < Block::DIM; ++i)
                    if (Block::BASE + i == c * ABREAST + mine)
                        x_offset[c] = Block::offset(image) + i * Block::MUL + channel;
            });
        }
    }

    // Starts the copies of an edge into a slot; of none where the edge is negative.
    MF_INLINE void fetch(const Operands<T>& in, const Operands<T>& tangent, int edge, int sender, int into) {
        if (edge >= 0) {
            copy_rows(in, edge, sender, memory + into * STAGE);
            if (DUAL) copy_rows(tangent, edge, sender, memory + (S::RING + into) * STAGE);
        }
        close_copies();
    }

    MF_INLINE void copy_rows(const Operands<T>& from, int edge, int sender, T* to) {
        const int lane = threadIdx.x & 31;
        const T* w = from.w + edge * from.w_row;
        const T* x = from.x + sender * index_t(S::X_ROW);
        if (from.w) {
#pragma unroll
            for (int c = 0; c < W_COPIES; ++c)
                if (w_offset[c] >= 0) copy_async(to + (c * 32 + lane) * PACK, w + w_offset[c]);
        }
        if (from.x) {
#pragma unroll
            for (int c = 0; c < X_COPIES; ++c)
                if (x_offset[c] >= 0) copy_async(to + ((W_COPIES + c) * 32 + lane) * PACK, x + x_offset[c]);
        }
    }

    // A piece of the edge that is worked on, or its tangent: this thread's channels.
    MF_INLINE typename ChannelsOf<T, S::VEC>::type piece(int number, bool of_tangent) const {
        const T* stage = memory + ((of_tangent ? S::RING : 0) + slot) * STAGE;
        return shared_load(stage + number * PIECE + (threadIdx.x & 31) * S::VEC,
                           typename ChannelsOf<T, S::VEC>::type());
    }
    MF_INLINE static constexpr int x_piece(int component) { return W_COPIES * ABREAST + component; }

    MF_INLINE int last_slot() const { return slot == 0 ? S::RING - 1 : slot - 1; }
    MF_INLINE void advance() { slot = slot + 1 == S::RING ? 0 : slot + 1; }
};

// What one group of warps shares.
template <class S, bool DUAL> struct Shared {
    typedef typename S::T T;
    static constexpr int FORMS = S::TILE * S::STRIDE;
    static constexpr int DY = S::WARPS * S::TILE * S::OUT;
    static constexpr int PLACES = S::ORDER ? S::TILE : 0;
    static constexpr int RINGS = S::WARPS * Ring<S, DUAL>::NUMBERS;
    T *rings, *forms, *dforms, *dy, *place;
    int *edge, *sender, *interval;
    MF_INLINE static constexpr int bytes(bool backward) {
        return (RINGS + FORMS * (DUAL ? 2 : 1) + (backward ? DY : 0) + PLACES) * int(sizeof(T)) + 3 * S::TILE * 4;
    }
    MF_INLINE Shared(char* memory, bool backward) {
        rings = reinterpret_cast<T*>(memory);
        forms = rings + RINGS;
        dforms = forms + FORMS;
        dy = forms + FORMS * (DUAL ? 2 : 1);
        place = dy + (backward ? DY : 0);
        edge = reinterpret_cast<int*>(place + PLACES);
        sender = edge + S::TILE;
        interval = sender + S::TILE;
    }
};

template <class S> MF_INLINE void group_barrier() {
    if (S::WARPS == 1) __syncwarp();
    else __syncthreads();
}

// The forms of `count` edges from `position` on: one lane per edge, the paths shared out among the warps.
template <class S, bool DUAL>
MF_INLINE void couple_tile(const Shared<S, DUAL>& shared, const Graph& graph, const Operands<typename S::T>& in,
                           const typename S::T* y_tangent, const Spline<typename S::T>& spline, index_t position,
                           int count) {
    typedef typename S::T T;
    typedef typename Pack<T>::type P;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    group_barrier<S>();
    if (lane < count) {
        const index_t e = graph.edge(position + lane);
        if (warp == 0) {
            shared.edge[lane] = int(e);
            shared.sender[lane] = int(graph.sender_of(e));
            if constexpr (S::ORDER > 0) {
                const index_t first = spline.table ? spline.table[e] * (spline.intervals + 1) : 0;
                const T position = spline.radius[e] * spline.per_length;
                shared.interval[lane] = int(first + find_interval(position, spline.intervals, shared.place[lane]));
            }
        }
#pragma unroll
        for (int part = 0; part < (DUAL ? 2 : 1); ++part) {
            const T* source = part ? y_tangent : in.y;
            T* target = (part ? shared.dforms : shared.forms) + lane * S::STRIDE;
            T y[S::NY];
#pragma unroll
            for (int j = 0; j < S::NY; ++j) y[j] = source ? source[e * in.y_row + j] : T(0);
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                if (warp == Path::WARP) {
                    T m[Path::PADDED];
#pragma unroll
                    for (int q = Path::FORMS; q < Path::PADDED; ++q) m[q] = T(0);
                    Path::couple(y, m);
#pragma unroll
                    for (int q = 0; q < Path::PADDED; q += Pack<T>::size)
                        *reinterpret_cast<P*>(target + Path::M + q) = *reinterpret_cast<const P*>(m + q);
                }
            });
        }
    }
    group_barrier<S>();
}

// Broadcast read of the forms of one path and edge.
template <class Path, class M, class S, bool DUAL>
MF_INLINE void read_forms(const Shared<S, DUAL>& shared, int slot, M (&m)[Path::PADDED]) {
    typedef typename S::T T;
    typedef typename Pack<T>::type P;
    T value[Path::PADDED], tangent[Path::PADDED];
#pragma unroll
    for (int q = 0; q < Path::PADDED; q += Pack<T>::size) {
        *reinterpret_cast<P*>(value + q) =
            *reinterpret_cast<const P*>(shared.forms + slot * S::STRIDE + Path::M + q);
        if (DUAL)
            *reinterpret_cast<P*>(tangent + q) =
                *reinterpret_cast<const P*>(shared.dforms + slot * S::STRIDE + Path::M + q);
    }
#pragma unroll
    for (int q = 0; q < Path::PADDED; ++q) m[q] = Make<M>::of(value[q], DUAL ? tangent[q] : T(0));
}

// x and w of one edge, for the channels from u on; with SLOPE also the derivative of w along its interval.
template <class S, bool DUAL, bool SLOPE> struct EdgeOperands {
    typedef typename S::T T;
    typedef typename ChannelsOf<T, S::VEC>::type C;
    typedef typename NumberOf<DUAL, C>::type N;
    N x[S::NX], w[S::NW];
    C slope[SLOPE ? S::NW : 1];

    MF_INLINE void load_from(const Ring<S, DUAL>& ring, bool x_tangent, bool w_tangent) {
        S::X::each([&](auto block) {
            typedef decltype(block) Block;
#pragma unroll
            for (int i = 0; i < Block::DIM; ++i) {
                const int piece = ring.x_piece(Block::BASE + i);
                x[Block::BASE + i] =
                    Make<N>::of(ring.piece(piece, false), DUAL && x_tangent ? ring.piece(piece, true) : C());
            }
        });
        S::Paths::each([&](auto path) {
            typedef decltype(path) Path;
            if constexpr (Path::WEIGHTED) {
                w[Path::INDEX] = Make<N>::of(ring.piece(Path::PIECE, false),
                                             DUAL && w_tangent ? ring.piece(Path::PIECE, true) : C());
            } else {
                C one;
                fill(one, T(1));
                w[Path::INDEX] = Make<N>::of(one, C());
            }
        });
    }

    MF_INLINE static C read(const T* at, bool active) { return active ? load(at, C()) : C(); }

    MF_INLINE void load_all(const Operands<T>& in, const Operands<T>& tangent, const Spline<T>& spline,
                            const Shared<S, DUAL>& shared, int slot, int u, int image) {
        const index_t s = shared.sender[slot] * index_t(S::X_ROW) + u;
        const index_t e = shared.edge[slot] * in.w_row;
        S::X::each([&](auto block) {
            typedef decltype(block) Block;
            const bool active = S::EXACT || u < Block::MUL;
#pragma unroll
            for (int i = 0; i < Block::DIM; ++i) {
                const index_t at = s + Block::offset(image) + i * Block::MUL;
                x[Block::BASE + i] =
                    Make<N>::of(read(in.x + at, active), read(tangent.x + at, DUAL && tangent.x && active));
            }
        });
        const T* row = nullptr;
        T t = T(0);
        if constexpr (S::ORDER > 0) {
            row = spline.rows + shared.interval[slot] * index_t(S::ORDER * S::NUMEL) + u;
            t = shared.place[slot];
        }
        S::Paths::each([&](auto path) {
            typedef decltype(path) Path;
            const bool active = S::EXACT || u < Path::MUL;
            const index_t column = Path::column(image) + index_t(u) * Path::W_STRIDE;
            if constexpr (!Path::WEIGHTED) {
                C one;
                fill(one, T(1));
                w[Path::INDEX] = Make<N>::of(one, C());
                if (SLOPE) slope[Path::INDEX] = C();
            } else if constexpr (S::ORDER > 0) {
                C c[S::ORDER];
#pragma unroll
                for (int q = 0; q < S::ORDER; ++q) c[q] = read(row + q * S::NUMEL + (column - u), active);
                w[Path::INDEX] = Make<N>::of(spline_value<S::ORDER>(c, t), C());
                if (SLOPE) slope[Path::INDEX] = spline_slope<S::ORDER>(c, t);
            } else {
                w[Path::INDEX] = Make<N>::of(read(in.w + e + column, active),
                                             read(tangent.w + e + column, DUAL && tangent.w && active));
            }
        });
    }
};

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

// Which positions in the sorted list of edges are worked on: all, or a stretch of them. `opened`: where the edges of
// receiver n begin, if those before are done.
struct AllEdges {
    MF_INLINE index_t from(index_t position) const { return position; }
    MF_INLINE index_t upto(index_t position) const { return position; }
    MF_INLINE index_t opened(const Graph&, index_t, index_t position) const { return position; }
};
struct Stretch {
    int first, end;
    MF_INLINE index_t from(index_t position) const { return position > first ? position : first; }
    MF_INLINE index_t upto(index_t position) const { return position < end ? position : end; }
    MF_INLINE index_t opened(const Graph& graph, index_t n, index_t) const { return graph.begin(n); }
};

// Blocks of all channels follow one another for each part.
template <class S> MF_INLINE int part_of() { return int(blockIdx.y) / S::CHANNEL_BLOCKS; }
template <class S> MF_INLINE int channel_block() {
    return S::CHANNEL_BLOCKS == 1 ? 0 : int(blockIdx.y) % S::CHANNEL_BLOCKS;
}

// Walks the edges of this group that are in `range`: start(n), edge(slot, operands) for each edge, finish(n, partial), and
// after each tile flush(count). `partial` is negative where this is the first part of n's first edges, and numbers all other
// groups, of which those without edges do nothing: overflow.cuh counts in the same way. Operands of the next edge are
// loaded before the current one is worked on.
template <class S, bool DUAL, bool SLOPE, class Range, class Start, class Edge, class Finish, class Flush>
MF_INLINE void walk(const Shared<S, DUAL>& shared, const Graph& graph, const Range& range,
                    const Operands<typename S::T>& in, const Operands<typename S::T>& tangent,
                    const Spline<typename S::T>& spline, int u, int image, Start start, Edge edge, Finish finish,
                    Flush flush) {
    const int item = int(blockIdx.x * blockDim.y + threadIdx.y), part = part_of<S>();
    const int partial = part * int(gridDim.x * blockDim.y) + item - int(graph.groups);
    const bool stretch = partial >= 0 || graph.parts > 1;  // of one receiver's edges, rather than a run of receivers
    index_t first, last, position, end;
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
            position += graph.limit;
            if (opens > position) position = opens;
        }
        const index_t stop = (window ? opens : position) + graph.limit;
        if (stop < end) end = stop;
        const int edges = int(end - position), share = edges > 0 ? (edges + graph.parts - 1) / graph.parts : 0;
        position += part * share;
        if (position + share < end) end = position + share;
        if (partial >= 0 && range.from(position) >= range.upto(end)) return;
    }
    position = range.from(position);
    end = range.upto(end);
    index_t tile_begin = position, tile_end = position;
    EdgeOperands<S, DUAL, SLOPE> current, next;
    Ids ids, next_ids;  // of the tile's edges and of the next tile's, one edge a lane
    bool flowing = false;
    auto ring = make_ring<S, DUAL>(shared, u, image);
    for (index_t n = first; n < last; ++n) {
        const index_t row_stop = graph.begin(n + 1), row_end = row_stop < end ? row_stop : end;
        const index_t row_begin = stretch ? position : range.opened(graph, n, position);
        const index_t stop = row_end - row_begin > graph.limit ? row_begin + graph.limit : row_end;
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
                couple_tile<S, DUAL>(shared, graph, in, tangent.y, spline, position, int(tile_end - tile_begin));
                if (S::PREFETCH) current.load_all(in, tangent, spline, shared, 0, u, image);
            }
            const index_t tile_stop = stop < tile_end ? stop : tile_end;
            for (; position < tile_stop; ++position) {
                const int slot = int(position - tile_begin);
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
                } else if (!S::PREFETCH) {
                    current.load_all(in, tangent, spline, shared, slot, u, image);
                }
                if (S::PREFETCH && position + 1 < tile_end) next.load_all(in, tangent, spline, shared, slot + 1, u, image);
                edge(slot, current);
                if (S::PREFETCH) current = next;
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

// z, or with DUAL its tangent; sums that are to be added go to their rows of `partial_sums`.
template <class S, bool DUAL>
MF_INLINE void conv_forward(const Graph& graph, const Operands<typename S::T>& in,
                            const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline, int image,
                            typename S::T* z, typename S::T* partial_sums, index_t z_row) {
    typedef typename S::T T;
    typedef EdgeOperands<S, DUAL, false> Edge;
    typedef typename Edge::N N;
    typedef typename NumberOf<DUAL, T>::type M;
    extern __shared__ __align__(16) char memory[];
    const Shared<S, DUAL> shared(memory + threadIdx.y * Shared<S, DUAL>::bytes(false), false);
    const int u = (channel_block<S>() * (S::WARPS * 32) + threadIdx.x) * S::VEC;
    const T zero = graph.poison ? T(*graph.poison) : T(0);
    N sum[S::NZ];
    walk<S, DUAL, false>(
        shared, graph, AllEdges(), in, tangent, spline, u, image,
        [&](index_t) {
#pragma unroll
            for (int k = 0; k < S::NZ; ++k) fill(sum[k], zero);
        },
        [&](int slot, const Edge& operands) {
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                M m[Path::PADDED];
                N wx[Path::DX];
                read_forms<Path>(shared, slot, m);
#pragma unroll
                for (int i = 0; i < Path::DX; ++i) {
                    if constexpr (Path::WEIGHTED) multiply(wx[i], operands.w[Path::INDEX], operands.x[Path::X + i]);
                    else wx[i] = operands.x[Path::X + i];
                }
                Path::forward(wx, m, sum + Path::Z);
            });
        },
        [&](index_t n, int partial) {
            T* row = partial < 0 ? z + (n * z_row + u) : partial_sums + (partial * z_row + u);
            S::Z::each([&](auto slot) {
                typedef decltype(slot) Slot;
                if (S::EXACT || u < Slot::MUL) {
#pragma unroll
                    for (int k = 0; k < Slot::DIM; ++k)
                        store(row + Slot::offset(image) + k * Slot::MUL, result_of(sum[Slot::BASE + k]));
                }
            });
        },
        [](int) {});
}

// Sums COUNT values (a power of two) over the lanes of a warp by halving: each step exchanges half of what is left.
// On return value[0] of lane l holds the sum of number l / (32 / COUNT); lanes that share a number hold the same sum.
template <int COUNT, int BIT = 16, class T> MF_INLINE void sum_over_lanes(T* value, int lane) {
    if constexpr (COUNT > 1) {
        const bool high = lane & BIT;
#pragma unroll
        for (int j = 0; j < COUNT / 2; ++j) {
            const T keep = high ? value[j + COUNT / 2] : value[j];
            const T give = high ? value[j] : value[j + COUNT / 2];
            value[j] = keep + __shfl_xor_sync(0xffffffffu, give, BIT);
        }
        sum_over_lanes<COUNT / 2, BIT / 2>(value, lane);
    } else if constexpr (BIT > 0) {
        value[0] += __shfl_xor_sync(0xffffffffu, value[0], BIT);
        sum_over_lanes<1, BIT / 2>(value, lane);
    }
}

// Gradients of <g, z>, or with DUAL their tangents: dx of each edge (summed over senders by another kernel), dw, dy.
// `dx` has rows from edge `first` on.
// With a spline there is no dw; the gradient of the edge length follows those of y, as number NY of an edge.
// Segments and blocks of channels write their shares of dy one after the other, [share][edge][OUT].
template <class S, bool DUAL, bool WANT_X, bool WANT_Y, bool WANT_W, class Range>
MF_INLINE void conv_backward(const Graph& graph, const Range& range, int first, const Operands<typename S::T>& in,
                             const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline, int image,
                             const typename S::T* g, index_t g_row, typename S::T* dx, typename S::T* dy,
                             typename S::T* dw, index_t edges, int share) {
    typedef typename S::T T;
    typedef EdgeOperands<S, DUAL, (S::ORDER > 0)> Edge;
    typedef typename Edge::C C;
    typedef typename Edge::N N;
    typedef typename NumberOf<DUAL, T>::type M;
    constexpr bool SPLINE = S::ORDER > 0;
    constexpr int CHUNK = 16;  // numbers of an edge reduced at a time
    constexpr int CHUNKS = (S::NY + CHUNK - 1) / CHUNK;
    extern __shared__ __align__(16) char memory[];
    const Shared<S, DUAL> shared(memory + threadIdx.y * Shared<S, DUAL>::bytes(WANT_Y), WANT_Y);
    const int u = (channel_block<S>() * (S::WARPS * 32) + threadIdx.x) * S::VEC;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    T* dy_part = dy + (share * S::CHANNEL_BLOCKS + channel_block<S>()) * edges * S::OUT;
    C grad[S::NZ];
    walk<S, DUAL, SPLINE>(
        shared, graph, range, in, tangent, spline, u, image,
        [&](index_t n) {
            const T* row = g + n * g_row + u;
            S::Z::each([&](auto slot) {
                typedef decltype(slot) Slot;
#pragma unroll
                for (int k = 0; k < Slot::DIM; ++k)
                    grad[Slot::BASE + k] =
                        Edge::read(row + Slot::offset(image) + k * Slot::MUL, S::EXACT || u < Slot::MUL);
            });
        },
        [&](int slot, const Edge& operands) {
            const index_t e = shared.edge[slot];
            N x_grad[S::NX];
            M y_grad[CHUNKS * CHUNK];
            T radius_grad = T(0);
#pragma unroll
            for (int i = 0; i < S::NX; ++i) fill(x_grad[i], T(0));
#pragma unroll
            for (int j = 0; j < CHUNKS * CHUNK; ++j) fill(y_grad[j], T(0));
            T* dw_row = WANT_W ? dw + e * S::NUMEL : nullptr;
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                M m[Path::PADDED];
                N t[Path::DX];
                if (WANT_X || WANT_W || SPLINE) {
                    read_forms<Path>(shared, slot, m);
                    Path::transpose(grad + Path::Z, m, t);
                }
                const N& w = operands.w[Path::INDEX];
                if (WANT_X) {
#pragma unroll
                    for (int i = 0; i < Path::DX; ++i) multiply_add(x_grad[Path::X + i], w, t[i]);
                }
                if constexpr ((WANT_W || SPLINE) && Path::WEIGHTED) {
                    N sum;
                    multiply(sum, operands.x[Path::X], t[0]);
#pragma unroll
                    for (int i = 1; i < Path::DX; ++i) multiply_add(sum, operands.x[Path::X + i], t[i]);
                    if constexpr (SPLINE) add_across(radius_grad, operands.slope[Path::INDEX], result_of(sum));
                    else if (S::EXACT || u < Path::MUL)
                        store(dw_row + Path::column(image) + index_t(u) * Path::W_STRIDE, result_of(sum));
                }
                if (WANT_Y) {
                    N wx[Path::DX];
#pragma unroll
                    for (int i = 0; i < Path::DX; ++i) multiply(wx[i], w, operands.x[Path::X + i]);
                    Path::couple_gradient(wx, grad + Path::Z, y_grad);
                }
            });
            if (WANT_X) {
                T* row = dx + (shared.edge[slot] - first) * index_t(S::X_ROW) + u;
                S::X::each([&](auto block) {
                    typedef decltype(block) Block;
                    if (S::EXACT || u < Block::MUL) {
#pragma unroll
                        for (int i = 0; i < Block::DIM; ++i) {
                            T* target = row + Block::offset(image) + i * Block::MUL;
                            C value = result_of(x_grad[Block::BASE + i]);
                            if constexpr (!Block::FRESH) add(value, *reinterpret_cast<const C*>(target));
                            store(target, value);
                        }
                    }
                });
            }
            if (WANT_Y) {
                T* share = shared.dy + (warp * S::TILE + slot) * S::OUT;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    T value[CHUNK];
#pragma unroll
                    for (int j = 0; j < CHUNK; ++j) value[j] = result_of(y_grad[c * CHUNK + j]);
                    sum_over_lanes<CHUNK>(value, lane);
                    const int j = c * CHUNK + lane / (32 / CHUNK);
                    if (lane % (32 / CHUNK) == 0 && j < S::NY) share[j] = value[0];
                }
                if (SPLINE) {
                    sum_over_lanes<1>(&radius_grad, lane);
                    if (lane == 0) share[S::NY] = radius_grad * spline.per_length;
                }
            }
        },
        [](index_t, int) {},
        [&](int count) {
            if (!WANT_Y) return;
            group_barrier<S>();
            for (int item = threadIdx.x; item < count * S::OUT; item += S::WARPS * 32) {
                const int slot = item / S::OUT, j = item % S::OUT;
                T sum = T(0);
#pragma unroll
                for (int other = 0; other < S::WARPS; ++other)
                    sum += shared.dy[(other * S::TILE + slot) * S::OUT + j];
                dy_part[index_t(shared.edge[slot]) * S::OUT + j] = sum;
            }
        });
}

}  // namespace mf
