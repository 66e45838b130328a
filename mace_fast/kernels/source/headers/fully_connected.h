// Fully connected ('uvw') tensor product, on the CPU. Same formula and same generated paths as fully_connected.cuh; here
// the copies w of the result, along which weights are contiguous, are the lanes of a vector.
//
// Forward, a thread owns a receiver and adds its edges in order. Backward, it owns an edge, or, where all edges share one
// set of weights, a stretch of edges with a sum of their gradients; the stretches do not depend on the number of threads.
#pragma once
#include "number.h"

#include <vector>

namespace mf {

template <class... Items> struct List {
    template <class F> MF_INLINE static void each(F&& f) { (f(Items{}), ...); }
};

// Operands are contiguous; w_row = 0: one set of weights for all edges. Null pointers stand for the identity.
template <class T> struct Edges {
    const int *order, *row, *sender, *receiver;
    const T *x, *y, *w;
    index_t w_row;
    MF_INLINE index_t begin(index_t n) const { return row ? row[n] : n; }
    MF_INLINE index_t edge(index_t position) const { return order ? order[position] : position; }
    MF_INLINE index_t sender_of(index_t e) const { return sender ? sender[e] : e; }
    MF_INLINE index_t receiver_of(index_t e) const { return receiver ? receiver[e] : e; }
};

// COUNT numbers in the first lanes of a vector, zeros in the others.
template <class T, int COUNT> struct Lanes {
    typedef typename VectorOf<T>::type V;
    MF_INLINE static V load(const T* p) {
        V v = {};
        __builtin_memcpy(&v, p, COUNT * sizeof(T));
        return v;
    }
    MF_INLINE static void store(T* p, V v) { __builtin_memcpy(p, &v, COUNT * sizeof(T)); }
};

template <class T, int COUNT, class F> MF_INLINE void each_vector(F&& f) {
    constexpr int WIDTH = VectorOf<T>::width;
    for (int at = 0; at + WIDTH <= COUNT; at += WIDTH) f(at, Lanes<T, WIDTH>());
    if constexpr (COUNT % WIDTH != 0) f(COUNT / WIDTH * WIDTH, Lanes<T, COUNT % WIDTH>());
}

template <class T> MF_INLINE T across_lanes(typename VectorOf<T>::type v) {
    T sum = T(0);
    for (int lane = 0; lane < VectorOf<T>::width; ++lane) sum += v[lane];
    return sum;
}

template <int COUNT, class T> MF_INLINE void gather(const T* from, int stride, T (&to)[COUNT]) {
    for (int i = 0; i < COUNT; ++i) to[i] = from[index_t(i) * stride];
}

// t[u, v, k] of a path.
template <class Path, class T> MF_INLINE void couple(const T* x, const T* y, T* products) {
    for (int u = 0; u < Path::MUL_X; ++u) {
        T xs[Path::DX];
        gather(x + Path::X + u, Path::MUL_X, xs);
        for (int v = 0; v < Path::MUL_Y; ++v) {
            T ys[Path::DY], t[Path::DZ] = {};
            gather(y + Path::Y + v, Path::MUL_Y, ys);
            Path::couple(xs, ys, t);
            for (int k = 0; k < Path::DZ; ++k) products[(u * Path::MUL_Y + v) * index_t(Path::DZ) + k] = t[k];
        }
    }
}

template <class P, class T>
void fully_connected_forward(const Edges<T>& edges, index_t receivers, T* z, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> products(P::PRODUCTS);
#pragma omp for schedule(dynamic, 4)
        for (index_t n = 0; n < receivers; ++n) {
            T* out = z + n * P::NZ;
            for (int k = 0; k < P::NZ; ++k) out[k] = T(0);
            for (index_t position = edges.begin(n); position < edges.begin(n + 1); ++position) {
                const index_t e = edges.edge(position);
                const T* x = edges.x + edges.sender_of(e) * P::NX;
                const T* weights = edges.w + e * edges.w_row;
                P::Paths::each([&](auto path) {
                    typedef decltype(path) Path;
                    couple<Path>(x, edges.y + e * P::NY, products.data());
                    each_vector<T, Path::MUL_Z>([&](int w, auto lanes) {
                        typename VectorOf<T>::type sum[Path::DZ];
                        for (int k = 0; k < Path::DZ; ++k) sum[k] = lanes.load(out + Path::Z + k * Path::MUL_Z + w);
                        const T* t = products.data();
                        const T* from = weights + Path::W + w;
                        for (int row = 0; row < Path::ROWS; ++row, t += Path::DZ, from += Path::MUL_Z) {
                            const auto value = lanes.load(from);
                            for (int k = 0; k < Path::DZ; ++k) sum[k] += value * t[k];
                        }
                        for (int k = 0; k < Path::DZ; ++k) lanes.store(out + Path::Z + k * Path::MUL_Z + w, sum[k]);
                    });
                });
            }
        }
    }
}

// Gradient of the weights of a path, and of its t (instead of t).
template <class Path, bool WANT_T, bool WANT_W, class T>
MF_INLINE void transpose(const T* weights, const T* g, T* products, T* dw, bool add) {
    typedef typename VectorOf<T>::type V;
    for (index_t row = 0; row < Path::ROWS; ++row) {
        T* t = products + row * Path::DZ;
        const index_t first = Path::W + row * Path::MUL_Z;
        V dt[Path::DZ];
        for (int k = 0; k < Path::DZ; ++k) dt[k] = V{};
        each_vector<T, Path::MUL_Z>([&](int w, auto lanes) {
            V value = {}, sum = {};
            if (WANT_T) value = lanes.load(weights + first + w);
            if (WANT_W && add) sum = lanes.load(dw + first + w);
            for (int k = 0; k < Path::DZ; ++k) {
                const V along = lanes.load(g + Path::Z + k * Path::MUL_Z + w);
                if (WANT_T) dt[k] += value * along;
                if (WANT_W) sum += along * t[k];
            }
            if (WANT_W) lanes.store(dw + first + w, sum);
        });
        if (WANT_T)
            for (int k = 0; k < Path::DZ; ++k) t[k] = across_lanes<T>(dt[k]);
    }
}

// Adds to the gradients of x and y of an edge.
template <class Path, bool WANT_X, bool WANT_Y, class T>
MF_INLINE void gradient(const T* x, const T* y, const T* products, T* dx, T* dy) {
    for (int u = 0; u < Path::MUL_X; ++u) {
        T xs[Path::DX], x_sum[Path::DX] = {};
        gather(x + Path::X + u, Path::MUL_X, xs);
        for (int v = 0; v < Path::MUL_Y; ++v) {
            T ys[Path::DY], y_sum[Path::DY] = {};
            gather(y + Path::Y + v, Path::MUL_Y, ys);
            const T* dt = products + (u * Path::MUL_Y + v) * index_t(Path::DZ);
            if (WANT_X) Path::gradient_x(ys, dt, x_sum);
            if (WANT_Y) {
                Path::gradient_y(xs, dt, y_sum);
                for (int j = 0; j < Path::DY; ++j) dy[Path::Y + j * Path::MUL_Y + v] += y_sum[j];
            }
        }
        if (WANT_X)
            for (int i = 0; i < Path::DX; ++i) dx[Path::X + i * Path::MUL_X + u] += x_sum[i];
    }
}

// Gradients of <g, z>: dx and dy of each edge; dw of each edge, or [stretches, NW] where all share one set of weights.
template <class P, bool WANT_X, bool WANT_Y, bool WANT_W, class T>
void fully_connected_backward(const Edges<T>& edges, index_t count, index_t stretches, const T* g, T* dx, T* dy, T* dw,
                              int threads) {
    constexpr bool WANT_T = WANT_X || WANT_Y;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> products(P::PRODUCTS);
#pragma omp for schedule(dynamic, 1)
        for (index_t stretch = 0; stretch < stretches; ++stretch) {
            const index_t first = stretch * count / stretches, last = (stretch + 1) * count / stretches;
            for (index_t e = first; e < last; ++e) {
                const T* x = edges.x + edges.sender_of(e) * P::NX;
                const T* y = edges.y + e * P::NY;
                const T* grad = g + edges.receiver_of(e) * P::NZ;
                const bool own = edges.w_row != 0;
                T* weights = WANT_W ? dw + (own ? e : stretch) * P::NW : nullptr;
                T* x_row = WANT_X ? dx + e * P::NX : nullptr;
                T* y_row = WANT_Y ? dy + e * P::NY : nullptr;
                if (WANT_X)
                    for (int i = 0; i < P::NX; ++i) x_row[i] = T(0);
                if (WANT_Y)
                    for (int j = 0; j < P::NY; ++j) y_row[j] = T(0);
                P::Paths::each([&](auto path) {
                    typedef decltype(path) Path;
                    if (WANT_W) couple<Path>(x, y, products.data());
                    transpose<Path, WANT_T, WANT_W>(edges.w + e * edges.w_row, grad, products.data(), weights,
                                                    !own && e != first);
                    if (WANT_T) gradient<Path, WANT_X, WANT_Y>(x, y, products.data(), x_row, y_row);
                });
            }
        }
    }
}

}  // namespace mf
