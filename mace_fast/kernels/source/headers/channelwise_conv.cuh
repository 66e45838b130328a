// Channelwise tensor product fused with the graph convolution, on CUDA.
//
//     z[n, p, k, u] = sum over edges e into n of  w[e, p, u] * sum_i x[sender(e), i, u] * M[e, p, i, k]
//
// A thread holds one channel u; a group of warps works on the receivers [first, last) of a run, one after the other,
// with all outputs of a receiver in registers, so that nothing is added atomically and every sum has a fixed order.
// M does not depend on the channel: once per tile of edges it is computed with one lane per edge and kept in shared
// memory, from where all channels read it as a broadcast.
//
// `Segment` is generated: it lists the blocks of x and z, the paths with their straight-line code, and the sizes.
// With DUAL the operands carry tangents and the results are the tangents of the results, nothing else.
#pragma once
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
    const float* poison;  // 0, or NaN when an index was out of range: every result then is NaN
    index_t receivers;
    index_t run;  // receivers that one group works through
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
    const T* rows;     // [tables * (intervals + 1), NUMEL, ORDER]
    index_t intervals;
    T per_length;  // intervals per unit of length
};

template <class T> struct Pack;
template <> struct Pack<float> { typedef float4 type; static constexpr int size = 4; };
template <> struct Pack<double> { typedef double2 type; static constexpr int size = 2; };

template <class N> struct Make;
template <> struct Make<float> { MF_INLINE static float of(float v, float) { return v; } };
template <> struct Make<double> { MF_INLINE static double of(double v, double) { return v; } };
template <class T> struct Make<Dual<T>> { MF_INLINE static Dual<T> of(T v, T d) { return {v, d}; } };

template <class T> MF_INLINE T result_of(T v) { return v; }
template <class T> MF_INLINE T result_of(Dual<T> v) { return v.d; }

// What one group of warps shares.
template <class S, bool DUAL> struct Shared {
    typedef typename S::T T;
    static constexpr int FORMS = S::TILE * S::STRIDE;
    static constexpr int DY = S::WARPS * S::TILE * S::OUT;
    static constexpr int PLACES = S::ORDER ? S::TILE : 0;
    T *forms, *dforms, *dy, *place;
    int *edge, *sender, *interval;
    MF_INLINE static constexpr int bytes(bool backward) {
        return (FORMS * (DUAL ? 2 : 1) + (backward ? DY : 0) + PLACES) * int(sizeof(T)) + 3 * S::TILE * 4;
    }
    MF_INLINE Shared(char* memory, bool backward) {
        forms = reinterpret_cast<T*>(memory);
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
template <class Path, class N, class S, bool DUAL>
MF_INLINE void read_forms(const Shared<S, DUAL>& shared, int slot, N (&m)[Path::PADDED]) {
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
    for (int q = 0; q < Path::PADDED; ++q) m[q] = Make<N>::of(value[q], DUAL ? tangent[q] : T(0));
}

// x and w of one edge, for one channel; with SLOPE also the derivative of w along its interval.
template <class S, bool DUAL, bool SLOPE> struct EdgeOperands {
    typedef typename S::T T;
    typedef typename NumberOf<DUAL, T>::type N;
    N x[S::NX], w[S::NW];
    T slope[SLOPE ? S::NW : 1];

    MF_INLINE void load(const Operands<T>& in, const Operands<T>& tangent, const Spline<T>& spline,
                        const Shared<S, DUAL>& shared, int slot, int u) {
        const index_t e = shared.edge[slot], s = shared.sender[slot];
        S::X::each([&](auto block) {
            typedef decltype(block) Block;
            const bool active = S::EXACT || u < Block::MUL;
#pragma unroll
            for (int i = 0; i < Block::DIM; ++i) {
                const index_t at = s * in.x_row + Block::OFFSET + i * Block::MUL + u;
                x[Block::BASE + i] = Make<N>::of(active ? __ldg(in.x + at) : T(0),
                                                 DUAL && tangent.x && active ? __ldg(tangent.x + at) : T(0));
            }
        });
        S::Paths::each([&](auto path) {
            typedef decltype(path) Path;
            const bool active = S::EXACT || u < Path::MUL;
            const index_t column = Path::W + index_t(u) * Path::W_STRIDE;
            if constexpr (!Path::WEIGHTED) {
                w[Path::INDEX] = Make<N>::of(T(1), T(0));
                if (SLOPE) slope[Path::INDEX] = T(0);
            } else if constexpr (S::ORDER > 0) {
                T c[S::ORDER];
#pragma unroll
                for (int q = 0; q < S::ORDER; ++q) c[q] = T(0);
                if (active)
                    read_coefficients<S::ORDER>(
                        spline.rows + (shared.interval[slot] * index_t(S::NUMEL) + column) * S::ORDER, c);
                const T t = shared.place[slot];
                w[Path::INDEX] = Make<N>::of(spline_value<S::ORDER>(c, t), T(0));
                if (SLOPE) slope[Path::INDEX] = spline_slope<S::ORDER>(c, t);
            } else {
                const index_t at = e * in.w_row + column;
                w[Path::INDEX] = Make<N>::of(active ? __ldg(in.w + at) : T(0),
                                             DUAL && tangent.w && active ? __ldg(tangent.w + at) : T(0));
            }
        });
    }
};

// Walks the edges of the receivers of this group: start(n), edge(slot, operands) for each edge, finish(n), and
// after each tile flush(count). Operands of the next edge are loaded before the current one is worked on.
template <class S, bool DUAL, bool SLOPE, class Start, class Edge, class Finish, class Flush>
MF_INLINE void walk(const Shared<S, DUAL>& shared, const Graph& graph, const Operands<typename S::T>& in,
                    const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline, int u, Start start,
                    Edge edge, Finish finish, Flush flush) {
    const index_t group = index_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const index_t first = group * graph.run;
    if (first >= graph.receivers) return;
    const index_t last = first + graph.run < graph.receivers ? first + graph.run : graph.receivers;
    index_t position = graph.begin(first), tile_begin = position, tile_end = position;
    const index_t end = graph.begin(last);
    EdgeOperands<S, DUAL, SLOPE> current, next;
    for (index_t n = first; n < last; ++n) {
        const index_t row_end = graph.begin(n + 1);
        start(n);
        while (position < row_end) {
            if (position == tile_end) {
                if (tile_end > tile_begin) flush(int(tile_end - tile_begin));
                tile_begin = position;
                tile_end = position + S::TILE < end ? position + S::TILE : end;
                couple_tile<S, DUAL>(shared, graph, in, tangent.y, spline, position, int(tile_end - tile_begin));
                if (S::PREFETCH) current.load(in, tangent, spline, shared, 0, u);
            }
            const index_t stop = row_end < tile_end ? row_end : tile_end;
            for (; position < stop; ++position) {
                const int slot = int(position - tile_begin);
                if (!S::PREFETCH) current.load(in, tangent, spline, shared, slot, u);
                if (S::PREFETCH && position + 1 < tile_end) next.load(in, tangent, spline, shared, slot + 1, u);
                edge(slot, current);
                if (S::PREFETCH) current = next;
            }
        }
        finish(n);
    }
    if (tile_end > tile_begin) flush(int(tile_end - tile_begin));
}

// z, or with DUAL its tangent.
template <class S, bool DUAL>
MF_INLINE void conv_forward(const Graph& graph, const Operands<typename S::T>& in,
                            const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline,
                            typename S::T* z, index_t z_row) {
    typedef typename S::T T;
    typedef typename NumberOf<DUAL, T>::type N;
    extern __shared__ __align__(16) char memory[];
    const Shared<S, DUAL> shared(memory + threadIdx.y * Shared<S, DUAL>::bytes(false), false);
    const int u = blockIdx.y * (S::WARPS * 32) + threadIdx.x;
    const T zero = graph.poison ? T(*graph.poison) : T(0);
    N sum[S::NZ];
    walk<S, DUAL, false>(
        shared, graph, in, tangent, spline, u,
        [&](index_t) {
#pragma unroll
            for (int k = 0; k < S::NZ; ++k) sum[k] = Make<N>::of(zero, zero);
        },
        [&](int slot, const EdgeOperands<S, DUAL, false>& operands) {
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                N m[Path::PADDED], wx[Path::DX];
                read_forms<Path>(shared, slot, m);
#pragma unroll
                for (int i = 0; i < Path::DX; ++i)
                    wx[i] = Path::WEIGHTED ? operands.w[Path::INDEX] * operands.x[Path::X + i] : operands.x[Path::X + i];
                Path::forward(wx, m, sum + Path::Z);
            });
        },
        [&](index_t n) {
            S::Z::each([&](auto slot) {
                typedef decltype(slot) Slot;
                if (S::EXACT || u < Slot::MUL) {
#pragma unroll
                    for (int k = 0; k < Slot::DIM; ++k)
                        z[n * z_row + Slot::OFFSET + k * Slot::MUL + u] = result_of(sum[Slot::BASE + k]);
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
// With a spline there is no dw; the gradient of the edge length follows those of y, as number NY of an edge.
// Channel blocks write their share of dy one after the other, [block][edge][OUT]; `accumulate` adds to what an earlier
// segment left there.
template <class S, bool DUAL, bool WANT_X, bool WANT_Y, bool WANT_W>
MF_INLINE void conv_backward(const Graph& graph, const Operands<typename S::T>& in,
                             const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline,
                             const typename S::T* g, index_t g_row, typename S::T* dx, typename S::T* dy,
                             typename S::T* dw, index_t edges, bool accumulate) {
    typedef typename S::T T;
    typedef typename NumberOf<DUAL, T>::type N;
    constexpr bool SPLINE = S::ORDER > 0;
    constexpr int CHUNK = 16;  // numbers of an edge reduced at a time
    constexpr int CHUNKS = (S::NY + CHUNK - 1) / CHUNK;
    extern __shared__ __align__(16) char memory[];
    const Shared<S, DUAL> shared(memory + threadIdx.y * Shared<S, DUAL>::bytes(WANT_Y), WANT_Y);
    const int u = blockIdx.y * (S::WARPS * 32) + threadIdx.x;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    T* dy_block = dy + blockIdx.y * edges * S::OUT;
    T grad[S::NZ];
    walk<S, DUAL, SPLINE>(
        shared, graph, in, tangent, spline, u,
        [&](index_t n) {
            S::Z::each([&](auto slot) {
                typedef decltype(slot) Slot;
#pragma unroll
                for (int k = 0; k < Slot::DIM; ++k)
                    grad[Slot::BASE + k] =
                        S::EXACT || u < Slot::MUL ? g[n * g_row + Slot::OFFSET + k * Slot::MUL + u] : T(0);
            });
        },
        [&](int slot, const EdgeOperands<S, DUAL, SPLINE>& operands) {
            const index_t e = shared.edge[slot];
            N x_grad[S::NX], y_grad[CHUNKS * CHUNK];
            T radius_grad = T(0);
#pragma unroll
            for (int i = 0; i < S::NX; ++i) x_grad[i] = Make<N>::of(T(0), T(0));
#pragma unroll
            for (int j = 0; j < CHUNKS * CHUNK; ++j) y_grad[j] = Make<N>::of(T(0), T(0));
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                N m[Path::PADDED], t[Path::DX];
                if (WANT_X || WANT_W || SPLINE) {
                    read_forms<Path>(shared, slot, m);
                    Path::transpose(grad + Path::Z, m, t);
                }
                const N w = operands.w[Path::INDEX];
                if (WANT_X) {
#pragma unroll
                    for (int i = 0; i < Path::DX; ++i) x_grad[Path::X + i] += w * t[i];
                }
                if constexpr ((WANT_W || SPLINE) && Path::WEIGHTED) {
                    N sum = operands.x[Path::X] * t[0];
#pragma unroll
                    for (int i = 1; i < Path::DX; ++i) sum += operands.x[Path::X + i] * t[i];
                    if constexpr (SPLINE) radius_grad += operands.slope[Path::INDEX] * result_of(sum);
                    else if (S::EXACT || u < Path::MUL)
                        dw[e * S::NUMEL + Path::W + index_t(u) * Path::W_STRIDE] = result_of(sum);
                }
                if (WANT_Y) {
                    N wx[Path::DX];
#pragma unroll
                    for (int i = 0; i < Path::DX; ++i) wx[i] = w * operands.x[Path::X + i];
                    Path::couple_gradient(wx, grad + Path::Z, y_grad);
                }
            });
            if (WANT_X) {
                S::X::each([&](auto block) {
                    typedef decltype(block) Block;
                    if (S::EXACT || u < Block::MUL) {
#pragma unroll
                        for (int i = 0; i < Block::DIM; ++i) {
                            T* target = dx + e * in.x_row + Block::OFFSET + i * Block::MUL + u;
                            const T value = result_of(x_grad[Block::BASE + i]);
                            *target = Block::FRESH ? value : *target + value;
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
        [](index_t) {},
        [&](int count) {
            if (!WANT_Y) return;
            group_barrier<S>();
            for (int item = threadIdx.x; item < count * S::OUT; item += S::WARPS * 32) {
                const int slot = item / S::OUT, j = item % S::OUT;
                T sum = T(0);
#pragma unroll
                for (int part = 0; part < S::WARPS; ++part) sum += shared.dy[(part * S::TILE + slot) * S::OUT + j];
                T* target = dy_block + index_t(shared.edge[slot]) * S::OUT + j;
                *target = accumulate ? *target + sum : sum;
            }
        });
}

}  // namespace mf
