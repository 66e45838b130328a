// What backward kernels do with an edge, in whatever order they go through edges.
#pragma once
#include "channelwise_stream.cuh"

namespace mf {

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

// Gradients of edges for the channels of a thread. With WANT_Z also what edges add to the sums at their receivers.
template <class S, bool DUAL, bool WANT_X, bool WANT_Y, bool WANT_W, bool WANT_Z = false> struct EdgeGradient {
    typedef typename S::T T;
    static constexpr bool SPLINE = S::ORDER > 0;
    typedef typename OperandsOf<S, DUAL, SPLINE>::type Edge;
    typedef typename Edge::C C;
    typedef typename Edge::N N;
    typedef typename NumberOf<DUAL, T>::type M;
    static constexpr int CHUNK = 16;  // numbers of an edge reduced at a time
    static constexpr int CHUNKS = (S::NY + CHUNK - 1) / CHUNK;

    // Of x, for as many edges as wanted.
    struct OfX {
        N x[S::NX];
        MF_INLINE void clear() {
#pragma unroll
            for (int i = 0; i < S::NX; ++i) fill(x[i], T(0));
        }
    };
    // Of y and the length, for one edge.
    struct OfY {
        M y[CHUNKS * CHUNK];
        T radius;
        MF_INLINE void clear() {
#pragma unroll
            for (int j = 0; j < CHUNKS * CHUNK; ++j) fill(y[j], T(0));
            radius = T(0);
        }
    };

    const Shared<S, DUAL>& shared;
    const Spline<T>& spline;
    const int image, u, lane, warp;
    T* const dw;

    // Adds to those of x and y and to the sums z, and writes those of w. `gradient_of(path, room)` says where the gradients of
    // the path's outputs are, or puts them into `room`.
    template <class Gradient>
    MF_INLINE void add(int slot, Edge& operands, OfX& x, OfY& y, N* z, Gradient gradient_of) const {
        T* dw_row = WANT_W ? dw + index_t(shared.edge[slot]) * S::NUMEL : nullptr;
        S::Paths::each([&](auto path) {
            typedef decltype(path) Path;
            C room[Path::DZ];
            const C* g = gradient_of(path, room);
            M m[Path::PADDED];
            N t[Path::DX];
            if (WANT_X || WANT_W || WANT_Z || SPLINE) read_forms<Path>(shared, slot, m);
            if (WANT_X || WANT_W || SPLINE) Path::transpose(g, m, t);
            const auto& w = operands.template weight<Path>();
            if (WANT_X) multiply_add_each<Path::DX>(x.x + Path::X, w, t);
            if constexpr ((WANT_W || SPLINE) && Path::WEIGHTED) {
                N sum;
                multiply(sum, operands.x[Path::X], t[0]);
                multiply_add_sum<Path::DX - 1>(sum, operands.x + Path::X + 1, t + 1);
                if constexpr (SPLINE) add_across(y.radius, operands.template slope<Path>(), result_of(sum));
                else if (S::EXACT || u < Path::MUL)
                    store(dw_row + Path::column(image) + index_t(u) * Path::W_STRIDE, result_of(sum));
            }
            if constexpr (WANT_Y || WANT_Z) {
                N wx[Path::DX];
                multiply_each<Path::DX>(wx, w, operands.x + Path::X);
                if constexpr (WANT_Y) Path::couple_gradient(wx, g, y.y);
                if constexpr (WANT_Z) Path::forward(wx, m, z + Path::Z);
            }
        });
    }

    // Leaves those of y in shared memory.
    MF_INLINE void leave_y(int slot, const OfY& of_edge) const {
        T* share = shared.dy + (warp * S::TILE + slot) * S::OUT;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            T value[CHUNK];
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) value[j] = result_of(of_edge.y[c * CHUNK + j]);
            sum_over_lanes<CHUNK>(value, lane);
            const int j = c * CHUNK + lane / (32 / CHUNK);
            if (lane % (32 / CHUNK) == 0 && j < S::NY) share[j] = value[0];
        }
        if (SPLINE) {
            T radius = of_edge.radius;
            sum_over_lanes<1>(&radius, lane);
            if (lane == 0) share[S::NY] = radius * spline.per_length;
        }
    }

    // Writes those of x to a row, or adds them to what an earlier segment left there.
    MF_INLINE void write_x(const OfX& of_edges, T* row) const {
        S::X::each([&](auto block) {
            typedef decltype(block) Block;
            if (S::EXACT || u < Block::MUL) {
#pragma unroll
                for (int i = 0; i < Block::DIM; ++i) {
                    T* target = row + Block::offset(image) + i * Block::MUL;
                    C value = result_of(of_edges.x[Block::BASE + i]);
                    if constexpr (!Block::FRESH) mf::add(value, *reinterpret_cast<const C*>(target));
                    store(target, value);
                }
            }
        });
    }
};

// Sums the gradients of y that the warps of a group left for the first `count` edges of a tile, and writes them.
template <class S, bool DUAL>
MF_INLINE void write_y(const Shared<S, DUAL>& shared, int count, typename S::T* dy) {
    typedef typename S::T T;
    group_barrier<S>();
    for (int item = threadIdx.x; item < count * S::OUT; item += S::WARPS * 32) {
        const int slot = item / S::OUT, j = item % S::OUT;
        T sum = T(0);
#pragma unroll
        for (int other = 0; other < S::WARPS; ++other) sum += shared.dy[(other * S::TILE + slot) * S::OUT + j];
        dy[index_t(shared.edge[slot]) * S::OUT + j] = sum;
    }
}

}  // namespace mf
