// A tile of edges: their couplings, shared by all channels, and the operands of one edge for the channels of a thread.
#pragma once
#include "channels.cuh"
#include "channelwise_operands.cuh"
#include "channelwise_ring.cuh"
#include "spline.h"

namespace mf {

// What one group of warps shares.
template <class S, bool DUAL> struct Shared {
    typedef typename S::T T;
    static constexpr int FORMS = S::TILE * S::STRIDE;
    static constexpr int DY = S::WARPS * S::TILE * S::OUT;
    static constexpr int PLACES = S::ORDER ? S::TILE : 0;
    static constexpr int RINGS = S::WARPS * Ring<S, DUAL>::NUMBERS;
    T *rings, *forms, *dforms, *dy, *place;
    int *edge, *sender, *interval;
    unsigned* weighted;  // with splines: a bit for each edge of the tile that is not beyond them
    MF_INLINE static constexpr int bytes(bool backward) {
        return (RINGS + FORMS * (DUAL ? 2 : 1) + (backward ? DY : 0) + PLACES) * int(sizeof(T)) + 3 * S::TILE * 4 +
               (S::ORDER ? 16 : 0);
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
        weighted = reinterpret_cast<unsigned*>(interval + S::TILE);
    }
};

// Blocks of all channels follow one another.
template <class S> MF_INLINE int channel_block() {
    return S::CHANNEL_BLOCKS == 1 ? 0 : int(blockIdx.y) % S::CHANNEL_BLOCKS;
}

template <class S> MF_INLINE void group_barrier() {
    if (S::WARPS == 1) __syncwarp();
    else __syncthreads();
}

// The forms of `count` edges from `position` on: one lane per edge, the paths shared out among the warps. Edges whose length
// is where all splines are zero have none.
template <class S, bool DUAL>
MF_INLINE void couple_tile(const Shared<S, DUAL>& shared, const Graph& graph, const Operands<typename S::T>& in,
                           const typename S::T* y_tangent, const Spline<typename S::T>& spline, index_t position,
                           int count) {
    typedef typename S::T T;
    typedef typename Pack<T>::type P;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    group_barrier<S>();
    bool weighted = lane < count;
    index_t e = 0;
    if (lane < count) {
        e = graph.edge(position + lane);
        if (warp == 0) {
            shared.edge[lane] = int(e);
            shared.sender[lane] = int(graph.sender_of(e));
        }
        if constexpr (S::ORDER > 0) {
            T place;
            const index_t interval = find_interval(spline.radius[e] * spline.per_length, spline.intervals, place);
            weighted = interval < spline.intervals;
            if (warp == 0) {
                const index_t first = spline.table ? spline.table[e] * (spline.intervals + 1) : 0;
                shared.interval[lane] = int(first + interval);
                shared.place[lane] = place;
            }
        }
    }
    if (weighted) {
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
    if constexpr (S::ORDER > 0) {
        const unsigned all = __ballot_sync(0xffffffffu, weighted);
        if (threadIdx.x == 0) *shared.weighted = all;
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

// The coefficients of an edge's interval, from where those of channel u and of weights in column 0 are.
template <class S, bool DUAL>
MF_INLINE const typename S::T* coefficients_of(const Spline<typename S::T>& spline, const Shared<S, DUAL>& shared,
                                               int slot, int u) {
    return spline.rows + shared.interval[slot] * index_t(S::ORDER * S::NUMEL) + u;
}

// Those of a path among them.
template <class S, class Path, class C>
MF_INLINE void load_coefficients(const typename S::T* of_edge, int u, int image, C* c) {
    const index_t column = Path::column(image) + index_t(u) * (Path::W_STRIDE - 1);
#pragma unroll
    for (int q = 0; q < S::ORDER; ++q)
        c[q] = load_if<C>(S::EXACT || u < Path::MUL, of_edge + q * S::NUMEL + column);
}

// x and w of one edge, for the channels from u on; with SLOPE also the derivative of w along its interval.
template <class S, bool DUAL, bool SLOPE> struct EdgeOperands {
    typedef typename S::T T;
    typedef typename ChannelsOf<T, S::VEC>::type C;
    typedef typename NumberOf<DUAL, C>::type N;
    N x[S::NX], w[S::NW];
    C slopes[SLOPE ? S::NW : 1];

    template <class Path> MF_INLINE const N& weight() const { return w[Path::INDEX]; }
    template <class Path> MF_INLINE const C& slope() const { return slopes[Path::INDEX]; }

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

    MF_INLINE void load_all(const Operands<T>& in, const Operands<T>& tangent, const Spline<T>& spline,
                            const Shared<S, DUAL>& shared, int slot, int u, int image) {
        load_x(in, tangent, shared, slot, u, image);
        load_w(in, tangent, spline, shared, slot, u, image);
    }

    MF_INLINE void copy_x(const EdgeOperands& other) {
#pragma unroll
        for (int i = 0; i < S::NX; ++i) x[i] = other.x[i];
    }

    MF_INLINE void load_x(const Operands<T>& in, const Operands<T>& tangent, const Shared<S, DUAL>& shared, int slot,
                          int u, int image) {
        const index_t s = shared.sender[slot] * index_t(S::X_ROW) + u;
        S::X::each([&](auto block) {
            typedef decltype(block) Block;
            const bool active = S::EXACT || u < Block::MUL;
#pragma unroll
            for (int i = 0; i < Block::DIM; ++i) {
                const index_t at = s + Block::offset(image) + i * Block::MUL;
                x[Block::BASE + i] =
                    Make<N>::of(load_if<C>(active, in.x + at), load_if<C>(DUAL && tangent.x && active, tangent.x + at));
            }
        });
    }

    MF_INLINE void load_w(const Operands<T>& in, const Operands<T>& tangent, const Spline<T>& spline,
                          const Shared<S, DUAL>& shared, int slot, int u, int image) {
        const index_t e = shared.edge[slot] * in.w_row;
        const T* row = nullptr;
        T t = T(0);
        if constexpr (S::ORDER > 0) {
            row = coefficients_of<S, DUAL>(spline, shared, slot, u);
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
                if (SLOPE) slopes[Path::INDEX] = C();
            } else if constexpr (S::ORDER > 0) {
                C c[S::ORDER];
                load_coefficients<S, Path>(row, u, image, c);
                if (SLOPE) slopes[Path::INDEX] = spline_slope<S::ORDER>(c, t);
                w[Path::INDEX] = Make<N>::of(spline_value<S::ORDER>(c, t), C());
            } else {
                w[Path::INDEX] = Make<N>::of(load_if<C>(active, in.w + e + column),
                                             load_if<C>(DUAL && tangent.w && active, tangent.w + e + column));
            }
        });
    }
};

}  // namespace mf
