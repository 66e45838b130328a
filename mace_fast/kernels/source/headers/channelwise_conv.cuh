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
#include "channelwise_gradient.cuh"
#include "channelwise_walk.cuh"

namespace mf {

// Where sums at receivers go: to rows of z, or of the sums that overflow.cuh adds to those.
template <class T> struct Sums {
    T *z, *partial;
    index_t row;
    MF_INLINE T* of(index_t n, int number) const { return number < 0 ? z + n * row : partial + number * row; }
};

template <class S, class N>
MF_INLINE void write_sums(const N (&sum)[S::NZ], typename S::T* row, int u, int image) {
    S::Z::each([&](auto slot) {
        typedef decltype(slot) Slot;
        if (S::EXACT || u < Slot::MUL) {
#pragma unroll
            for (int k = 0; k < Slot::DIM; ++k)
                store(row + Slot::offset(image) + k * Slot::MUL + u, result_of(sum[Slot::BASE + k]));
        }
    });
}

// z, or with DUAL its tangent.
template <class S, bool DUAL>
MF_INLINE void conv_forward(const Graph& graph, const Operands<typename S::T>& in,
                            const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline, int image,
                            const Sums<typename S::T>& sums) {
    typedef typename S::T T;
    typedef typename OperandsOf<S, DUAL, false>::type Edge;
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
        [&](int slot, Edge& operands) {
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                M m[Path::PADDED];
                N wx[Path::DX];
                read_forms<Path>(shared, slot, m);
                const auto& w = operands.template weight<Path>();
#pragma unroll
                for (int i = 0; i < Path::DX; ++i) {
                    if constexpr (Path::WEIGHTED) multiply(wx[i], w, operands.x[Path::X + i]);
                    else wx[i] = operands.x[Path::X + i];
                }
                Path::forward(wx, m, sum + Path::Z);
            });
        },
        [&](index_t n, int partial) { write_sums<S>(sum, sums.of(n, partial), u, image); },
        [](int) {}, [](unsigned) {});
}

// Gradients of <g, z>, or with DUAL their tangents: dx of each edge (summed over senders by another kernel), dw, dy.
// `dx` has rows from edge `first` on.
// With a spline there is no dw; the gradient of the edge length follows those of y, as number NY of an edge.
// Segments and blocks of channels write their shares of dy one after the other, [share][edge][OUT].
// With WANT_Z also z, or its tangent, as conv_forward: operands, which are most of the bytes, are then read once for both.
template <class S, bool DUAL, bool WANT_X, bool WANT_Y, bool WANT_W, bool WANT_Z, class Range>
MF_INLINE void conv_backward(const Graph& graph, const Range& range, int first, const Operands<typename S::T>& in,
                             const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline, int image,
                             const typename S::T* g, index_t g_row, typename S::T* dx, typename S::T* dy,
                             typename S::T* dw, const Sums<typename S::T>& sums, index_t edges, int share) {
    typedef typename S::T T;
    typedef EdgeGradient<S, DUAL, WANT_X, WANT_Y, WANT_W, WANT_Z> Gradient;
    typedef typename Gradient::Edge Edge;
    typedef typename Edge::C C;
    typedef typename Edge::N N;
    extern __shared__ __align__(16) char memory[];
    const Shared<S, DUAL> shared(memory + threadIdx.y * Shared<S, DUAL>::bytes(WANT_Y), WANT_Y);
    const int u = (channel_block<S>() * (S::WARPS * 32) + threadIdx.x) * S::VEC;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    T* dy_part = dy + (share * S::CHANNEL_BLOCKS + channel_block<S>()) * edges * S::OUT;
    const Gradient gradient{shared, spline, image, u, lane, warp, dw};
    const T zero = WANT_Z && graph.poison ? T(*graph.poison) : T(0);
    C grad[S::NZ];
    N sum[S::NZ];
    walk<S, DUAL, Gradient::SPLINE>(
        shared, graph, range, in, tangent, spline, u, image,
        [&](index_t n) {
            const T* row = g + n * g_row + u;
            S::Z::each([&](auto slot) {
                typedef decltype(slot) Slot;
#pragma unroll
                for (int k = 0; k < Slot::DIM; ++k)
                    grad[Slot::BASE + k] =
                        load_if<C>(S::EXACT || u < Slot::MUL, row + Slot::offset(image) + k * Slot::MUL);
            });
            if constexpr (WANT_Z) {
#pragma unroll
                for (int k = 0; k < S::NZ; ++k) fill(sum[k], zero);
            }
        },
        [&](int slot, Edge& operands) {
            typename Gradient::OfX of_x;
            typename Gradient::OfY of_y;
            of_x.clear();
            of_y.clear();
            gradient.add(slot, operands, of_x, of_y, sum,
                         [&](auto path, C*) -> const C* { return grad + decltype(path)::Z; });
            if (WANT_X) gradient.write_x(of_x, dx + (shared.edge[slot] - first) * index_t(S::X_ROW) + u);
            if (WANT_Y) gradient.leave_y(slot, of_y);
        },
        [&](index_t n, int partial) {
            if constexpr (WANT_Z) write_sums<S>(sum, sums.of(n, partial), u, image);
        },
        [&](int count) {
            if (WANT_Y) write_y<S, DUAL>(shared, count, dy_part);
        },
        [&](unsigned slots) {
            if (WANT_Y && slots >> lane & 1) {
                for (int j = 0; j < S::OUT; ++j) shared.dy[(warp * S::TILE + lane) * S::OUT + j] = T(0);
            }
            if (!WANT_X) return;
            for (; slots; slots &= slots - 1) {
                T* row = dx + (shared.edge[__ffs(slots) - 1] - first) * index_t(S::X_ROW) + u;
                S::X::each([&](auto block) {
                    typedef decltype(block) Block;
                    if (Block::FRESH && (S::EXACT || u < Block::MUL)) {
#pragma unroll
                        for (int i = 0; i < Block::DIM; ++i) store(row + Block::offset(image) + i * Block::MUL, C());
                    }
                });
            }
        });
}

}  // namespace mf
