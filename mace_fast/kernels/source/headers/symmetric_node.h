// A weighted polynomial at one node and one lane of channels: value, gradient, gradient with respect to weights.
//
//     out[o] = sum over terms of coefficient * w[weight] * product of x[m]
//
// `Poly` is generated (straight-line text) or a table walked by symmetric_table.h. It has
//
//     inputs, outputs, weights                  M, O, R
//     evaluate(x, sum)      calls sum.add(weight, output, p) with p the polynomial that multiplies w[weight]
//                           in out[output]; several calls for the same pair add up
//     gradient(x, dx, pull) adds the gradient of sum over (weight, output) of pull(weight, output) * p
//
// x has one component more than the polynomial, the constant one, which tables use to pad monomials. A lane is
// one channel on CUDA and a vector of channels on the CPU. With TANGENT, x is a dual number and the result is the
// derivative of the result along x's tangent.
#pragma once

#include "number.h"

namespace mf {

template <class V> MF_INLINE Dual<V> operator+(Dual<V> a, V b) { return {a.v + b, a.d}; }
template <class V> MF_INLINE Dual<V>& operator+=(Dual<V>& a, V b) {
    a.v += b;
    return a;
}

// Loops over components, whose arrays are to become registers
#ifdef __CUDACC__
#define MF_UNROLL _Pragma("unroll")
#else
#define MF_UNROLL _Pragma("GCC unroll 32")
#endif

template <class T> struct Lane {
#ifdef __CUDACC__
    typedef T type;
    static constexpr int width = 1;
#else
    typedef typename VectorOf<T>::type type;
    static constexpr int width = VectorOf<T>::width;
#endif
    static MF_INLINE type load(const T* from) { return *reinterpret_cast<const type*>(from); }
    static MF_INLINE void store(T* to, type value) { *reinterpret_cast<type*>(to) = value; }
};

// Components of a node at one lane: component m lies at m * stride.
template <class T> struct Column {
    const T* base;
    index_t stride;
    MF_INLINE typename Lane<T>::type load(int m) const { return Lane<T>::load(base + m * stride); }
};

// The numbers that the polynomial is evaluated with, and the part of a result that is asked for.
template <class V, bool TANGENT> struct Argument {
    typedef V type;
    template <class C> static MF_INLINE V load(C value, C, int m) { return value.load(m); }
    static MF_INLINE V one() { return V{} + 1; }
    static MF_INLINE V part(V a) { return a; }
};
template <class V> struct Argument<V, true> {
    typedef Dual<V> type;
    template <class C> static MF_INLINE Dual<V> load(C value, C tangent, int m) { return {value.load(m), tangent.load(m)}; }
    static MF_INLINE Dual<V> one() { return {V{} + 1, V{}}; }
    static MF_INLINE V part(Dual<V> a) { return a.d; }
};

template <class T, class X, int OUTPUTS> struct WeightedSum {
    Column<T> weights;
    X out[OUTPUTS];
    MF_INLINE void add(int weight, int output, X p) { out[output] += weights.load(weight) * p; }
};

template <class T, int OUTPUTS> struct Pull {
    Column<T> weights;
    typename Lane<T>::type grad[OUTPUTS];
    MF_INLINE typename Lane<T>::type operator()(int weight, int output) const { return weights.load(weight) * grad[output]; }
};

template <class A, class V, int OUTPUTS> struct GradientSum {
    V grad[OUTPUTS];
    V* sums;
    int stride;
    MF_INLINE void add(int weight, int output, typename A::type p) { sums[weight * stride] += grad[output] * A::part(p); }
};

template <class Poly, class A, class T>
MF_INLINE void load_argument(typename A::type (&x)[Poly::inputs + 1], Column<T> value, Column<T> tangent) {
MF_UNROLL
    for (int m = 0; m < Poly::inputs; ++m) x[m] = A::load(value, tangent, m);
    x[Poly::inputs] = A::one();
}

// out[o], or its derivative along the tangent of x
template <class Poly, bool TANGENT, class T>
MF_INLINE void evaluate_node(Column<T> value, Column<T> tangent, Column<T> weights,
                             typename Lane<T>::type (&out)[Poly::outputs]) {
    typedef Argument<typename Lane<T>::type, TANGENT> A;
    typename A::type x[Poly::inputs + 1];
    load_argument<Poly, A>(x, value, tangent);
    WeightedSum<T, typename A::type, Poly::outputs> sum{weights, {}};
    Poly::evaluate(x, sum);
MF_UNROLL
    for (int o = 0; o < Poly::outputs; ++o) out[o] = A::part(sum.out[o]);
}

// the gradient of sum_o grad[o] out[o] with respect to x, or its derivative along the tangent of x
template <class Poly, bool TANGENT, class T>
MF_INLINE void gradient_node(Column<T> value, Column<T> tangent, Column<T> weights, Column<T> grad,
                             typename Lane<T>::type (&result)[Poly::inputs]) {
    typedef Argument<typename Lane<T>::type, TANGENT> A;
    typename A::type x[Poly::inputs + 1], dx[Poly::inputs + 1] = {};
    load_argument<Poly, A>(x, value, tangent);
    Pull<T, Poly::outputs> pull{weights, {}};
MF_UNROLL
    for (int o = 0; o < Poly::outputs; ++o) pull.grad[o] = grad.load(o);
    Poly::gradient(x, dx, pull);
MF_UNROLL
    for (int m = 0; m < Poly::inputs; ++m) result[m] = A::part(dx[m]);
}

// Adds the gradient of sum_o grad[o] out[o] with respect to w[r] to sums[r * stride], or its derivative.
template <class Poly, bool TANGENT, class T>
MF_INLINE void weights_node(Column<T> value, Column<T> tangent, Column<T> grad,
                            typename Lane<T>::type* sums, int stride) {
    typedef typename Lane<T>::type V;
    typedef Argument<V, TANGENT> A;
    typename A::type x[Poly::inputs + 1];
    load_argument<Poly, A>(x, value, tangent);
    GradientSum<A, V, Poly::outputs> sum{{}, sums, stride};
MF_UNROLL
    for (int o = 0; o < Poly::outputs; ++o) sum.grad[o] = grad.load(o);
    Poly::evaluate(x, sum);
}

// Nodes are listed by species (order, row_ptr) and each species' list is cut into chunks of `length` nodes. Which
// chunk a number means, over all species: found by walking row_ptr, a few dozen numbers. species is -1 past the last.
struct Chunk {
    index_t species, first, last;
};
MF_INLINE Chunk find_chunk(const index_t* row_ptr, index_t num_species, index_t length, index_t number) {
    for (index_t z = 0; z < num_species; ++z) {
        const index_t chunks = (row_ptr[z + 1] - row_ptr[z] + length - 1) / length;
        if (number < chunks) {
            const index_t first = row_ptr[z] + number * length;
            return {z, first, first + length < row_ptr[z + 1] ? first + length : row_ptr[z + 1]};
        }
        number -= chunks;
    }
    return {-1, 0, 0};
}
// Number of the first chunk of a species; of num_species: the number of chunks.
MF_INLINE index_t first_chunk(const index_t* row_ptr, index_t length, index_t species) {
    index_t number = 0;
    for (index_t z = 0; z < species; ++z) number += (row_ptr[z + 1] - row_ptr[z] + length - 1) / length;
    return number;
}

}  // namespace mf
