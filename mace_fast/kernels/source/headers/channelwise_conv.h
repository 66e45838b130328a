// Channelwise tensor product fused with the graph convolution, on the CPU. Same formula and same generated paths as
// channelwise_conv.cuh; here V is a vector of channels.
//
// A thread owns a receiver, so no sum is shared. The forms M of a tile of edges are computed with one SIMD lane per
// edge. Then each path runs over the tile with the outputs of one vector of channels in registers: a path needs at
// most 2 l + 1 of them, which no product of degree <= 6 spills.
#pragma once
#include "number.h"
#include "spline.h"

#include <cstdint>
#include <vector>

namespace mf {

template <class... Items> struct List {
    template <class F> MF_INLINE static void each(F&& f) { (f(Items{}), ...); }
};

template <bool DUAL, class T> struct NumberOf { typedef T type; };
template <class T> struct NumberOf<true, T> { typedef Dual<T> type; };

template <class V> struct Make { static MF_INLINE V of(V v, V) { return v; } };
template <class V> struct Make<Dual<V>> { static MF_INLINE Dual<V> of(V v, V d) { return {v, d}; } };

template <class V> MF_INLINE V result_of(V v) { return v; }
template <class V> MF_INLINE V result_of(Dual<V> v) { return v.d; }

struct Graph {
    const int *order, *row, *sender;  // null: the identity
    float poison;
    index_t receivers;
    MF_INLINE index_t begin(index_t n) const { return row ? row[n] : n; }
    MF_INLINE index_t edge(index_t position) const { return order ? order[position] : position; }
    MF_INLINE index_t sender_of(index_t e) const { return sender ? sender[e] : e; }
};

template <class T> struct Operands {
    const T *x, *y, *w;
    index_t x_row, y_row, w_row;
};

// Weights as functions of the edge length instead of numbers per edge: see spline.h.
template <class T> struct Spline {
    const T* radius;
    const int* table;  // null: one table
    const T* rows;     // [tables * (intervals + 1), ORDER, NUMEL]
    index_t intervals;
    T per_length;
};

// `count` consecutive channels in a vector; FULL when all lanes are in use.
template <class T, bool FULL> struct Lanes {
    typedef typename VectorOf<T>::type V;
    static constexpr int WIDTH = VectorOf<T>::width;
    int count;
    MF_INLINE V load(const T* p, index_t stride = 1) const {
        if (FULL && stride == 1) return *reinterpret_cast<const V*>(p);
        V v = {};
        for (int lane = 0; lane < (FULL ? WIDTH : count); ++lane) v[lane] = p[lane * stride];
        return v;
    }
    MF_INLINE V load_or_zero(const T* p, index_t at, index_t stride = 1) const { return p ? load(p + at, stride) : V{}; }
    MF_INLINE void store(T* p, V v, index_t stride = 1) const {
        if (FULL && stride == 1) {
            *reinterpret_cast<V*>(p) = v;
            return;
        }
        for (int lane = 0; lane < (FULL ? WIDTH : count); ++lane) p[lane * stride] = v[lane];
    }
};

template <class T, class F> MF_INLINE void each_vector(int channels, F&& f) {
    constexpr int WIDTH = VectorOf<T>::width;
    int u = 0;
    for (; u + WIDTH <= channels; u += WIDTH) f(u, Lanes<T, true>{WIDTH});
    if (u < channels) f(u, Lanes<T, false>{channels - u});
}

template <class S, bool DUAL> struct Tile {
    typedef typename S::T T;
    typedef typename VectorOf<T>::type V;
    typedef typename NumberOf<DUAL, V>::type N;
    static constexpr int WIDTH = VectorOf<T>::width;
    // An odd number of lines of a cache: rows at the same column do not compete for one place.
    static constexpr index_t ROW = ((S::NUMEL + WIDTH - 1) / WIDTH | 1) * WIDTH;
    alignas(64) T forms[DUAL ? 2 : 1][S::FORMS][S::TILE];
    index_t edge[S::TILE], sender[S::TILE], interval[S::TILE];
    T place[S::TILE];
    std::vector<T> room;
    T *weights, *slopes;  // with splines, of the tile's edges; slopes for each unit of length
    int count;

    explicit Tile(bool with_slopes) {
        if constexpr (S::ORDER > 0) {
            room.resize(S::TILE * ROW * (with_slopes ? 2 : 1) + WIDTH);
            weights = reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(room.data()) + 63) / 64 * 64);
            slopes = with_slopes ? weights + S::TILE * ROW : nullptr;
        }
    }

    // Where those of a path's channels from u on are.
    template <class Path> MF_INLINE static index_t place_of(int t, int u) {
        return t * ROW + Path::column(0) + index_t(u) * Path::W_STRIDE;
    }

    // Edge by edge, so that coefficients are read in the order in which they lie: memory is ahead of that.
    void interpolate(const Spline<T>& spline) {
        for (int t = 0; t < count; ++t) {
            const T* row = spline.rows + interval[t] * S::ORDER * S::NUMEL;
            each_vector<T>(S::NUMEL, [&](int u, auto lanes) {
                V c[S::ORDER];
                for (int q = 0; q < S::ORDER; ++q) c[q] = lanes.load(row + q * index_t(S::NUMEL) + u);
                lanes.store(weights + t * ROW + u, spline_value<S::ORDER>(c, place[t]));
                if (slopes)
                    lanes.store(slopes + t * ROW + u, spline_slope<S::ORDER>(c, place[t]) * spline.per_length);
            });
        }
    }

    // Takes edges from `position` up to `end`, as many as there is room for, and returns where it stopped. Those whose length
    // is where all splines are zero are not taken, but go to beyond(e).
    template <class Beyond>
    index_t couple(const Graph& graph, const Operands<T>& in, const T* y_tangent, const Spline<T>& spline,
                   index_t position, index_t end, Beyond&& beyond) {
        count = 0;
        for (; position < end && count < S::TILE; ++position) {
            const index_t e = graph.edge(position);
            if constexpr (S::ORDER > 0) {
                const index_t within =
                    find_interval(spline.radius[e] * spline.per_length, spline.intervals, place[count]);
                if (within == spline.intervals) {
                    beyond(e);
                    continue;
                }
                interval[count] = (spline.table ? spline.table[e] * (spline.intervals + 1) : 0) + within;
            }
            edge[count] = e;
            sender[count] = graph.sender_of(e);
            ++count;
        }
        for (int part = 0; part < (DUAL ? 2 : 1); ++part) {
            const T* source = part ? y_tangent : in.y;
            for (int base = 0; base < count; base += WIDTH) {
                V y[S::NY] = {};
                if (source)
                    for (int lane = 0; lane < WIDTH && base + lane < count; ++lane)
                        for (int j = 0; j < S::NY; ++j) y[j][lane] = source[edge[base + lane] * in.y_row + j];
                S::Paths::each([&](auto path) {
                    typedef decltype(path) Path;
                    V m[Path::FORMS];
                    Path::couple(y, m);
                    for (int q = 0; q < Path::FORMS; ++q)
                        *reinterpret_cast<V*>(&forms[part][Path::M + q][base]) = m[q];
                });
            }
        }
        if constexpr (S::ORDER > 0) interpolate(spline);
        return position;
    }
    // One number for all channels. Subtracting zero is nothing to a compiler; adding it is not, to a negative zero.
    template <class Path> MF_INLINE void read(int t, N (&m)[Path::FORMS]) const {
        for (int q = 0; q < Path::FORMS; ++q)
            m[q] = Make<N>::of(forms[0][Path::M + q][t] - V{}, forms[DUAL ? 1 : 0][Path::M + q][t] - V{});
    }
};

template <class S, bool DUAL, class Body>
MF_INLINE void each_receiver(const Graph& graph, int threads, bool with_slopes, Body&& body) {
#pragma omp parallel num_threads(threads)
    {
        Tile<S, DUAL> tile(with_slopes);
#pragma omp for schedule(dynamic, 4)
        for (index_t n = 0; n < graph.receivers; ++n) body(n, tile);
    }
}

// x and w of one edge and path for a vector of channels.
template <class S, class Path, bool DUAL, class T, class TileT, class L>
MF_INLINE void load_operands(const Operands<T>& in, const Operands<T>& tangent, const TileT& tile, const L& lanes,
                             int t, int u,
                             typename NumberOf<DUAL, typename L::V>::type (&x)[Path::DX],
                             typename NumberOf<DUAL, typename L::V>::type& w) {
    typedef typename L::V V;
    typedef typename NumberOf<DUAL, V>::type N;
    for (int i = 0; i < Path::DX; ++i) {
        const index_t at = tile.sender[t] * in.x_row + Path::x_offset(0) + i * Path::MUL + u;
        x[i] = Make<N>::of(lanes.load(in.x + at), DUAL ? lanes.load_or_zero(tangent.x, at) : V{});
    }
    if constexpr (!Path::WEIGHTED) {
        w = Make<N>::of(V{} + T(1), V{});
    } else if constexpr (S::ORDER > 0) {
        w = Make<N>::of(lanes.load(tile.weights + TileT::template place_of<Path>(t, u), Path::W_STRIDE), V{});
    } else {
        const index_t at = tile.edge[t] * in.w_row + Path::column(0) + index_t(u) * Path::W_STRIDE;
        w = Make<N>::of(lanes.load(in.w + at, Path::W_STRIDE),
                        DUAL ? lanes.load_or_zero(tangent.w, at, Path::W_STRIDE) : V{});
    }
}

template <class S, bool DUAL>
void conv_forward(const Graph& graph, const Operands<typename S::T>& in, const Operands<typename S::T>& tangent,
                  const Spline<typename S::T>& spline, typename S::T* z, index_t z_row, int threads) {
    typedef typename S::T T;
    typedef typename VectorOf<T>::type V;
    typedef typename NumberOf<DUAL, V>::type N;
    each_receiver<S, DUAL>(graph, threads, false, [&](index_t n, Tile<S, DUAL>& tile) {
        T* row = z + n * z_row;
        for (index_t k = 0; k < z_row; ++k) row[k] = T(graph.poison);
        const index_t end = graph.begin(n + 1);
        for (index_t position = graph.begin(n); position < end;) {
            position = tile.couple(graph, in, tangent.y, spline, position, end, [](index_t) {});
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                each_vector<T>(Path::MUL, [&](int u, auto lanes) {
                    N sum[Path::DZ];
                    for (int k = 0; k < Path::DZ; ++k) {
                        const V old = lanes.load(row + Path::z_offset(0) + k * Path::MUL + u);
                        sum[k] = Make<N>::of(old, old);
                    }
                    for (int t = 0; t < tile.count; ++t) {
                        N x[Path::DX], w, m[Path::FORMS];
                        load_operands<S, Path, DUAL>(in, tangent, tile, lanes, t, u, x, w);
                        if (Path::WEIGHTED)
                            for (int i = 0; i < Path::DX; ++i) x[i] = w * x[i];
                        tile.template read<Path>(t, m);
                        Path::forward(x, m, sum);
                    }
                    for (int k = 0; k < Path::DZ; ++k)
                        lanes.store(row + Path::z_offset(0) + k * Path::MUL + u, result_of(sum[k]));
                });
            });
        }
    });
}

// Gradients of <g, z>, or with DUAL their tangents: dx of each edge, dw, dy, of the edges at positions from `first` up
// to `last` in the sorted list; `dx` has rows from edge `first` on. With a spline there is no dw; the gradient of the edge
// length follows those of y, as number NY of an edge.
template <class S, bool DUAL, bool WANT_X, bool WANT_Y, bool WANT_W>
void conv_backward(const Graph& graph, const Operands<typename S::T>& in, const Operands<typename S::T>& tangent,
                   const Spline<typename S::T>& spline, const typename S::T* g, index_t g_row, typename S::T* dx, typename S::T* dy, typename S::T* dw,
                   index_t first, index_t last, int threads) {
    typedef typename S::T T;
    typedef typename VectorOf<T>::type V;
    typedef typename NumberOf<DUAL, V>::type N;
    each_receiver<S, DUAL>(graph, threads, true, [&](index_t n, Tile<S, DUAL>& tile) {
        const T* grad_row = g + n * g_row;
        const index_t begin = graph.begin(n) > first ? graph.begin(n) : first;
        const index_t end = graph.begin(n + 1) < last ? graph.begin(n + 1) : last;
        constexpr bool SPLINE = S::ORDER > 0;
        V y_sum[WANT_Y ? S::TILE : 1][S::OUT];
        const auto clear_x = [&](index_t e) {
            if (WANT_X)
                for (index_t i = 0; i < in.x_row; ++i) dx[(e - first) * in.x_row + i] = T(0);
        };
        for (index_t position = begin; position < end;) {
            position = tile.couple(graph, in, tangent.y, spline, position, end, [&](index_t e) {
                clear_x(e);
                if (WANT_Y)
                    for (int j = 0; j < S::OUT; ++j) dy[e * S::OUT + j] = T(0);
            });
            for (int t = 0; t < tile.count; ++t) {
                clear_x(tile.edge[t]);
                if (WANT_Y)
                    for (int j = 0; j < S::OUT; ++j) y_sum[t][j] = V{};
            }
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                each_vector<T>(Path::MUL, [&](int u, auto lanes) {
                    V grad[Path::DZ];
                    for (int k = 0; k < Path::DZ; ++k) grad[k] = lanes.load(grad_row + Path::z_offset(0) + k * Path::MUL + u);
                    for (int t = 0; t < tile.count; ++t) {
                        const index_t e = tile.edge[t];
                        N x[Path::DX], w, m[Path::FORMS], form_grad[Path::DX];
                        load_operands<S, Path, DUAL>(in, tangent, tile, lanes, t, u, x, w);
                        if (WANT_X || WANT_W || SPLINE) {
                            tile.template read<Path>(t, m);
                            Path::transpose(grad, m, form_grad);
                        }
                        if (WANT_X) {
                            for (int i = 0; i < Path::DX; ++i) {
                                T* target = dx + (e - first) * in.x_row + Path::x_offset(0) + i * Path::MUL + u;
                                lanes.store(target, lanes.load(target) + result_of(w * form_grad[i]));
                            }
                        }
                        if constexpr ((WANT_W || SPLINE) && Path::WEIGHTED) {
                            N sum = x[0] * form_grad[0];
                            for (int i = 1; i < Path::DX; ++i) sum += x[i] * form_grad[i];
                            if constexpr (SPLINE) {
                                const T* slope = tile.slopes + tile.template place_of<Path>(t, u);
                                y_sum[WANT_Y ? t : 0][S::NY] += result_of(sum) * lanes.load(slope, Path::W_STRIDE);
                            } else lanes.store(dw + e * S::NUMEL + Path::column(0) + index_t(u) * Path::W_STRIDE, result_of(sum),
                                        Path::W_STRIDE);
                        }
                        if (WANT_Y) {
                            for (int i = 0; i < Path::DX; ++i) x[i] = w * x[i];
                            N y_grad[S::NY];
                            for (int j = 0; j < Path::DY; ++j)
                                y_grad[Path::Y + j * Path::Y_STRIDE] = Make<N>::of(V{}, V{});
                            Path::couple_gradient(x, grad, y_grad);
                            for (int j = 0; j < Path::DY; ++j)
                                y_sum[t][Path::Y + j * Path::Y_STRIDE] +=
                                    result_of(y_grad[Path::Y + j * Path::Y_STRIDE]);
                        }
                    }
                });
            });
            if (WANT_Y)
                for (int t = 0; t < tile.count; ++t)
                    for (int j = 0; j < S::OUT; ++j) {
                        T sum = T(0);
                        for (int lane = 0; lane < VectorOf<T>::width; ++lane) sum += y_sum[t][j][lane];
                        dy[tile.edge[t] * S::OUT + j] = sum;
                    }
        }
    });
}

}  // namespace mf
