// Fully connected ('uvw') tensor product of every edge, on CUDA.
//
//     t[p, u, v, k] = sum over i, j of  C[p, i, j, k] * x[sender(e), i, u] * y[e, j, v]
//     z[e, k, w]    = sum over p, u, v of  W[e, p, u, v, w] * t[p, u, v, k]
//
// The weights of an edge are thousands of numbers, and each is used once. A block works on one edge; t lies in shared
// memory, made by one thread for each (p, u, v), a `row` of weights. Forward, thread (r, w) walks the rows r, r + ABREAST,
// ... of a path at column w, so that neighbouring threads read neighbouring weights, and the ABREAST sums for each w meet
// in shared memory, in a fixed order. Backward, LANES lanes of a warp share a row: they read W and write its gradient
// t x g along w, and sum W x g over w, which is the gradient of t; it takes the place of t, and gradients of x and y are
// made from it.
//
// `Product` is generated: its batches list what is in shared memory at a time.
#pragma once
#include "number.h"

namespace mf {

template <class... Items> struct List {
    template <class F> MF_INLINE static void each(F&& f) { (f(Items{}), ...); }
};

// Operands are contiguous; w_row = 0: one set of weights for all edges. A null sender or receiver: no graph.
template <class T> struct Edges {
    const int *sender, *receiver;
    const T *x, *y, *w;
    index_t w_row, count;
    MF_INLINE index_t sender_of(index_t e) const { return sender ? sender[e] : e; }
    MF_INLINE index_t receiver_of(index_t e) const { return receiver ? receiver[e] : e; }
};

template <int COUNT, class T> MF_INLINE void gather(const T* from, int stride, T (&to)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = __ldg(from + index_t(i) * stride);
}

// This thread's place among those that begin with thread SHIFT.
template <class P, int SHIFT> MF_INLINE int place() {
    const int at = int(threadIdx.x) - SHIFT;
    return at < 0 ? at + P::THREADS : at;
}

// t of one batch of rows, coupled into shared memory.
template <class P, class Batch, class T> MF_INLINE void couple(const T* x, const T* y, T* products) {
    Batch::Pieces::each([&](auto piece) {
        typedef decltype(piece) Piece;
        typedef typename Piece::Path Path;
        for (int row = place<P, Piece::SHIFT>(); row < Piece::ROWS; row += P::THREADS) {
            const int u = (Piece::FIRST + row) / Path::MUL_Y, v = (Piece::FIRST + row) % Path::MUL_Y;
            T xs[Path::DX], ys[Path::DY], t[Path::DZ];
            gather(x + Path::X + u, Path::MUL_X, xs);
            gather(y + Path::Y + v, Path::MUL_Y, ys);
#pragma unroll
            for (int k = 0; k < Path::DZ; ++k) t[k] = T(0);
            Path::couple(xs, ys, t);
#pragma unroll
            for (int k = 0; k < Path::DZ; ++k) products[Piece::AT + row * Path::DZ + k] = t[k];
        }
    });
}

// Adds rows `row`, `row` + step, ... of a piece at column `column` of its weights to the sums.
template <class Piece, int STEP, class T>
MF_INLINE void add_rows(const T* w, const T* products, int row, int column, T (&sum)[Piece::Path::DZ]) {
    typedef typename Piece::Path Path;
    constexpr int AHEAD = 8;  // weights on their way at a time
    const T* from = w + Path::W + column;
    for (; row < Piece::ROWS; row += AHEAD * STEP) {
        T value[AHEAD];
#pragma unroll
        for (int q = 0; q < AHEAD; ++q) {
            const int at = row + q * STEP;
            value[q] = at < Piece::ROWS ? __ldg(from + index_t(Piece::FIRST + at) * Path::MUL_Z) : T(0);
        }
#pragma unroll
        for (int q = 0; q < AHEAD; ++q) {
            const int at = row + q * STEP;
            if (at < Piece::ROWS) {
#pragma unroll
                for (int k = 0; k < Path::DZ; ++k) sum[k] += value[q] * products[Piece::AT + at * Path::DZ + k];
            }
        }
    }
}

template <class Group, class T> MF_INLINE void put(T* z, int k, int w, T value) {
    T* at = z + Group::Z + k * Group::MUL + w;
    *at = Group::FRESH ? value : *at + value;
}

template <class P, class T> MF_INLINE void fully_connected_forward(const Edges<T>& edges, T* z) {
    extern __shared__ __align__(16) char memory[];
    T* products = reinterpret_cast<T*>(memory);
    T* partials = products + P::PRODUCTS;
    const int thread = threadIdx.x;
    for (index_t e = blockIdx.x; e < edges.count; e += gridDim.x) {
        const T* x = edges.x + edges.sender_of(e) * P::NX;
        const T* y = edges.y + e * P::NY;
        const T* w = edges.w + e * edges.w_row;
        T* out = z + e * P::NZ;
        P::Batches::each([&](auto batch) {
            typedef decltype(batch) Batch;
            __syncthreads();
            couple<P, Batch>(x, y, products);
            __syncthreads();
            Batch::Groups::each([&](auto group) {
                typedef decltype(group) Group;
                T sum[Group::DIM];
                if constexpr (Group::ABREAST > 1) {
                    const int row = thread / Group::MUL, column = thread % Group::MUL;
                    if (row < Group::ABREAST) {
#pragma unroll
                        for (int k = 0; k < Group::DIM; ++k) sum[k] = T(0);
                        Group::Pieces::each([&](auto piece) {
                            add_rows<decltype(piece), Group::ABREAST>(w, products, row, column, sum);
                        });
#pragma unroll
                        for (int k = 0; k < Group::DIM; ++k)
                            partials[Group::PARTIAL + (row * Group::DIM + k) * Group::MUL + column] = sum[k];
                    }
                } else {
                    for (int column = thread; column < Group::MUL; column += P::THREADS) {
#pragma unroll
                        for (int k = 0; k < Group::DIM; ++k) sum[k] = T(0);
                        Group::Pieces::each(
                            [&](auto piece) { add_rows<decltype(piece), 1>(w, products, 0, column, sum); });
#pragma unroll
                        for (int k = 0; k < Group::DIM; ++k) put<Group>(out, k, column, sum[k]);
                    }
                }
            });
            __syncthreads();
            Batch::Groups::each([&](auto group) {
                typedef decltype(group) Group;
                if constexpr (Group::ABREAST > 1) {
                    constexpr int OUT = Group::DIM * Group::MUL;
                    for (int at = place<P, Group::SHIFT>(); at < OUT; at += P::THREADS) {
                        T sum = partials[Group::PARTIAL + at];
#pragma unroll 4
                        for (int row = 1; row < Group::ABREAST; ++row) sum += partials[Group::PARTIAL + row * OUT + at];
                        put<Group>(out, 0, at, sum);
                    }
                }
            });
        });
    }
}

// Gradient of the weights of a piece, and of its t (instead of t). With `add`, that of the weights is added to what is
// there: of one set of weights for all edges every block keeps a sum.
template <class P, class Piece, bool WANT_T, bool WANT_W, class T>
MF_INLINE void transpose(const T* w, const T* g, T* products, T* dw, bool add) {
    typedef typename Piece::Path Path;
    constexpr int ABREAST = P::THREADS / Path::LANES, AHEAD = Path::DZ > 7 ? 2 : 4;
    const int lane = threadIdx.x % Path::LANES, first = threadIdx.x / Path::LANES;
    const T* grad = g + Path::Z;
    // The bounds are the same for all threads, since all lanes of a warp take part in its sums.
#pragma unroll 1
    for (int base = 0; base < Piece::ROWS; base += ABREAST * AHEAD) {
        T dt[AHEAD][Path::DZ], t[AHEAD][Path::DZ];
#pragma unroll
        for (int q = 0; q < AHEAD; ++q) {
            const int row = base + first + q * ABREAST;
#pragma unroll
            for (int k = 0; k < Path::DZ; ++k) {
                dt[q][k] = T(0);
                t[q][k] = WANT_W && row < Piece::ROWS ? products[Piece::AT + row * Path::DZ + k] : T(0);
            }
        }
        for (int column = lane; column < Path::MUL_Z; column += Path::LANES) {
            T value[AHEAD], along[Path::DZ];
#pragma unroll
            for (int q = 0; q < AHEAD; ++q) {
                const int row = base + first + q * ABREAST;
                const index_t at = Path::W + index_t(Piece::FIRST + row) * Path::MUL_Z + column;
                value[q] = WANT_T && row < Piece::ROWS ? __ldg(w + at) : T(0);
            }
            gather(grad + column, Path::MUL_Z, along);
#pragma unroll
            for (int q = 0; q < AHEAD; ++q) {
                const int row = base + first + q * ABREAST;
                T sum = T(0);
#pragma unroll
                for (int k = 0; k < Path::DZ; ++k) {
                    if (WANT_T) dt[q][k] += value[q] * along[k];
                    if (WANT_W) sum += t[q][k] * along[k];
                }
                if (WANT_W && row < Piece::ROWS) {
                    T* at = dw + Path::W + index_t(Piece::FIRST + row) * Path::MUL_Z + column;
                    *at = add ? *at + sum : sum;
                }
            }
        }
        if constexpr (WANT_T) {
#pragma unroll
            for (int q = 0; q < AHEAD; ++q) {
                const int row = base + first + q * ABREAST;
#pragma unroll
                for (int k = 0; k < Path::DZ; ++k) {
#pragma unroll
                    for (int step = Path::LANES / 2; step > 0; step /= 2)
                        dt[q][k] += __shfl_xor_sync(0xffffffffu, dt[q][k], step);
                }
                __syncwarp();  // all lanes have read t
                if (lane == 0 && row < Piece::ROWS) {
#pragma unroll
                    for (int k = 0; k < Path::DZ; ++k) products[Piece::AT + row * Path::DZ + k] = dt[q][k];
                }
            }
        }
    }
}

// The gradient of t of copies u and v; false where they are not among the rows of the piece.
template <class Piece, class T> MF_INLINE bool read_row(const T* products, int u, int v, T (&dt)[Piece::Path::DZ]) {
    typedef typename Piece::Path Path;
    const index_t row = index_t(u) * Path::MUL_Y + v - Piece::FIRST;
    if (row < 0 || row >= Piece::ROWS) return false;
#pragma unroll
    for (int k = 0; k < Path::DZ; ++k) dt[k] = products[Piece::AT + row * Path::DZ + k];
    return true;
}

template <class P, class Batch, class T> MF_INLINE void gradient_x(const T* y, const T* products, T* dx) {
    Batch::X::each([&](auto use) {
        typedef decltype(use) Block;
        for (int u = place<P, Block::SHIFT>(); u < Block::MUL; u += P::THREADS) {
            T sum[Block::DIM];
#pragma unroll
            for (int i = 0; i < Block::DIM; ++i) sum[i] = T(0);
            Block::Pieces::each([&](auto piece) {
                typedef decltype(piece) Piece;
                typedef typename Piece::Path Path;
                for (int v = 0; v < Path::MUL_Y; ++v) {
                    T dt[Path::DZ], ys[Path::DY];
                    if (!read_row<Piece>(products, u, v, dt)) continue;
                    gather(y + Path::Y + v, Path::MUL_Y, ys);
                    Path::gradient_x(ys, dt, sum);
                }
            });
#pragma unroll
            for (int i = 0; i < Block::DIM; ++i) {
                T* at = dx + Block::OFFSET + i * Block::MUL + u;
                *at = Block::FRESH ? sum[i] : *at + sum[i];
            }
        }
    });
}

// Each warp adds its share to a row of `shares` [warps, NY].
template <class P, class Batch, class T> MF_INLINE void gradient_y(const T* x, const T* products, T* shares) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Batch::Y::each([&](auto use) {
        typedef decltype(use) Block;
        for (int v = 0; v < Block::MUL; ++v) {
            T sum[Block::DIM];
#pragma unroll
            for (int j = 0; j < Block::DIM; ++j) sum[j] = T(0);
            Block::Pieces::each([&](auto piece) {
                typedef decltype(piece) Piece;
                typedef typename Piece::Path Path;
                for (int u = place<P, Piece::SHIFT>(); u < Path::MUL_X; u += P::THREADS) {
                    T dt[Path::DZ], xs[Path::DX];
                    if (!read_row<Piece>(products, u, v, dt)) continue;
                    gather(x + Path::X + u, Path::MUL_X, xs);
                    Path::gradient_y(xs, dt, sum);
                }
            });
#pragma unroll
            for (int j = 0; j < Block::DIM; ++j) {
#pragma unroll
                for (int step = 16; step > 0; step /= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
                if (lane == 0) shares[warp * P::NY + Block::OFFSET + j * Block::MUL + v] += sum[j];
            }
        }
    });
}

// Gradients of <g, z>: dx and dy of each edge; dw of each edge, or [gridDim.x, NW] where all share one set of weights.
template <class P, bool WANT_X, bool WANT_Y, bool WANT_W, class T>
MF_INLINE void fully_connected_backward(const Edges<T>& edges, const T* g, T* dx, T* dy, T* dw) {
    extern __shared__ __align__(16) char memory[];
    constexpr bool WANT_T = WANT_X || WANT_Y;
    T* products = reinterpret_cast<T*>(memory);
    T* shares = products + P::PRODUCTS;
    for (index_t e = blockIdx.x; e < edges.count; e += gridDim.x) {
        const T* x = edges.x + edges.sender_of(e) * P::NX;
        const T* y = edges.y + e * P::NY;
        const T* w = edges.w + e * edges.w_row;
        const T* grad = g + edges.receiver_of(e) * P::NZ;
        const bool own = edges.w_row != 0;
        T* weights = WANT_W ? dw + (own ? e : index_t(blockIdx.x)) * P::NW : nullptr;
        const bool add = !own && e != blockIdx.x;
        if (WANT_Y)
            for (int j = threadIdx.x; j < P::THREADS / 32 * P::NY; j += P::THREADS) shares[j] = T(0);
        P::Batches::each([&](auto batch) {
            typedef decltype(batch) Batch;
            __syncthreads();
            if constexpr (WANT_W) {
                couple<P, Batch>(x, y, products);
                __syncthreads();
            }
            Batch::Pieces::each([&](auto piece) {
                transpose<P, decltype(piece), WANT_T, WANT_W>(w, grad, products, weights, add);
            });
            if constexpr (WANT_T) __syncthreads();
            if constexpr (WANT_X) gradient_x<P, Batch>(y, products, dx + e * P::NX);
            if constexpr (WANT_Y) gradient_y<P, Batch>(x, products, shares);
        });
        if constexpr (WANT_Y) {
            __syncthreads();
            for (int j = threadIdx.x; j < P::NY; j += P::THREADS) {
                T sum = shares[j];
                for (int warp = 1; warp < P::THREADS / 32; ++warp) sum += shares[warp * P::NY + j];
                dy[e * P::NY + j] = sum;
            }
            __syncthreads();
        }
    }
}

}  // namespace mf
