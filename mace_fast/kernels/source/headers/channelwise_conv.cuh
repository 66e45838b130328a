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
#include "channelwise_walk.cuh"

namespace mf {

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
        [](int) {}, [](unsigned) {});
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
