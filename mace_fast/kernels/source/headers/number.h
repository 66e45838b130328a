// The number types that every kernel text is written against.
//
// On CUDA a thread holds one channel, or a `Vec` of neighbouring ones, and `V` is float or double. On the CPU `V` is a vector of 64 bytes over
// channels (GCC and clang vector extensions), so that the same text is SIMD code. `Dual<V>` carries a value and
// its derivative along one direction: a kernel instantiated with it computes a Jacobian-vector product, which is
// how second derivatives are made from the text of the first.
#pragma once

#ifdef __CUDACC__
#define MF_INLINE __device__ __forceinline__
#else
#define MF_INLINE inline __attribute__((always_inline))
#endif

namespace mf {

typedef long long index_t;

#ifndef __CUDACC__
template <class T> struct VectorOf;
template <> struct VectorOf<float> {
    typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
    static constexpr int width = 16;
};
template <> struct VectorOf<double> {
    typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
    static constexpr int width = 8;
};
#endif

// value + epsilon * derivative, epsilon^2 = 0
template <class V> struct Dual {
    V v, d;
};

template <class V> MF_INLINE Dual<V> operator+(Dual<V> a, Dual<V> b) { return {a.v + b.v, a.d + b.d}; }
template <class V> MF_INLINE Dual<V> operator-(Dual<V> a, Dual<V> b) { return {a.v - b.v, a.d - b.d}; }
template <class V> MF_INLINE Dual<V> operator-(Dual<V> a) { return {-a.v, -a.d}; }
template <class V> MF_INLINE Dual<V> operator*(Dual<V> a, Dual<V> b) { return {a.v * b.v, a.v * b.d + a.d * b.v}; }
// S: a number without a tangent, V itself or a literal
template <class V, class S> MF_INLINE Dual<V> operator*(Dual<V> a, S b) { return {a.v * b, a.d * b}; }
template <class V, class S> MF_INLINE Dual<V> operator*(S a, Dual<V> b) { return {a * b.v, a * b.d}; }
template <class V> MF_INLINE Dual<V>& operator+=(Dual<V>& a, Dual<V> b) {
    a.v += b.v;
    a.d += b.d;
    return a;
}
template <class V> MF_INLINE Dual<V>& operator-=(Dual<V>& a, Dual<V> b) {
    a.v -= b.v;
    a.d -= b.d;
    return a;
}

#ifdef __CUDACC__
// Neighbouring channels of one thread: what is read for all channels alike, and every index, serves all of them, and one
// wide load takes the place of several.
template <class T, int COUNT> struct Vec {
    T v[COUNT];
};
#endif

// z = a * b, z += a * b and z -= a * b. In place and by reference: a compiler takes apart every structure that is passed or
// returned by value, and in kernels of thousands of operations it spent most of its time on that.
template <class Z, class A, class B> MF_INLINE void multiply(Z& z, const A& a, const B& b) { z = a * b; }
template <class Z, class A, class B> MF_INLINE void multiply_add(Z& z, const A& a, const B& b) { z += a * b; }
template <class Z, class A, class B> MF_INLINE void multiply_subtract(Z& z, const A& a, const B& b) { z -= a * b; }
template <class Z, class A> MF_INLINE void add(Z& z, const A& a) { z += a; }

// sum = a * b and sum += a * b, summed over the channels that one number holds on CUDA.
template <class Z, class A, class B> MF_INLINE void across(Z& sum, const A& a, const B& b) { sum = a * b; }
template <class Z, class A, class B> MF_INLINE void add_across(Z& sum, const A& a, const B& b) { sum += a * b; }

#ifdef __CUDACC__
template <class T, int C> MF_INLINE void add(Vec<T, C>& z, const Vec<T, C>& a) {
    z.v[0] += a.v[0];
    if constexpr (C > 1) z.v[1] += a.v[1];
    if constexpr (C > 2) z.v[2] += a.v[2];
    if constexpr (C > 3) z.v[3] += a.v[3];
}
template <class T, int C> MF_INLINE void multiply(Vec<T, C>& z, const Vec<T, C>& a, const T& b) {
    z.v[0] = a.v[0] * b;
    if constexpr (C > 1) z.v[1] = a.v[1] * b;
    if constexpr (C > 2) z.v[2] = a.v[2] * b;
    if constexpr (C > 3) z.v[3] = a.v[3] * b;
}
template <class T, int C> MF_INLINE void multiply(Vec<T, C>& z, const Vec<T, C>& a, const Vec<T, C>& b) {
    z.v[0] = a.v[0] * b.v[0];
    if constexpr (C > 1) z.v[1] = a.v[1] * b.v[1];
    if constexpr (C > 2) z.v[2] = a.v[2] * b.v[2];
    if constexpr (C > 3) z.v[3] = a.v[3] * b.v[3];
}
template <class T, int C> MF_INLINE void multiply_add(Vec<T, C>& z, const Vec<T, C>& a, const T& b) {
    z.v[0] += a.v[0] * b;
    if constexpr (C > 1) z.v[1] += a.v[1] * b;
    if constexpr (C > 2) z.v[2] += a.v[2] * b;
    if constexpr (C > 3) z.v[3] += a.v[3] * b;
}
template <class T, int C> MF_INLINE void multiply_add(Vec<T, C>& z, const Vec<T, C>& a, const Vec<T, C>& b) {
    z.v[0] += a.v[0] * b.v[0];
    if constexpr (C > 1) z.v[1] += a.v[1] * b.v[1];
    if constexpr (C > 2) z.v[2] += a.v[2] * b.v[2];
    if constexpr (C > 3) z.v[3] += a.v[3] * b.v[3];
}
template <class T, int C> MF_INLINE void multiply_subtract(Vec<T, C>& z, const Vec<T, C>& a, const T& b) {
    z.v[0] -= a.v[0] * b;
    if constexpr (C > 1) z.v[1] -= a.v[1] * b;
    if constexpr (C > 2) z.v[2] -= a.v[2] * b;
    if constexpr (C > 3) z.v[3] -= a.v[3] * b;
}
template <class T, int C> MF_INLINE void across(T& sum, const Vec<T, C>& a, const Vec<T, C>& b) {
    sum = a.v[0] * b.v[0];
    if constexpr (C > 1) sum += a.v[1] * b.v[1];
    if constexpr (C > 2) sum += a.v[2] * b.v[2];
    if constexpr (C > 3) sum += a.v[3] * b.v[3];
}
template <class T, int C> MF_INLINE void add_across(T& sum, const Vec<T, C>& a, const Vec<T, C>& b) {
    sum += a.v[0] * b.v[0];
    if constexpr (C > 1) sum += a.v[1] * b.v[1];
    if constexpr (C > 2) sum += a.v[2] * b.v[2];
    if constexpr (C > 3) sum += a.v[3] * b.v[3];
}
#endif

template <class Z, class A, class B> MF_INLINE void multiply(Dual<Z>& z, const Dual<A>& a, const B& b) {
    multiply(z.v, a.v, b);
    multiply(z.d, a.d, b);
}
template <class Z, class A, class B> MF_INLINE void multiply(Dual<Z>& z, const A& a, const Dual<B>& b) {
    multiply(z.v, a, b.v);
    multiply(z.d, a, b.d);
}
template <class Z, class A, class B> MF_INLINE void multiply(Dual<Z>& z, const Dual<A>& a, const Dual<B>& b) {
    multiply(z.v, a.v, b.v);
    multiply(z.d, a.v, b.d);
    multiply_add(z.d, a.d, b.v);
}
template <class Z, class A, class B> MF_INLINE void multiply_add(Dual<Z>& z, const Dual<A>& a, const B& b) {
    multiply_add(z.v, a.v, b);
    multiply_add(z.d, a.d, b);
}
template <class Z, class A, class B> MF_INLINE void multiply_add(Dual<Z>& z, const A& a, const Dual<B>& b) {
    multiply_add(z.v, a, b.v);
    multiply_add(z.d, a, b.d);
}
template <class Z, class A, class B> MF_INLINE void multiply_add(Dual<Z>& z, const Dual<A>& a, const Dual<B>& b) {
    multiply_add(z.v, a.v, b.v);
    multiply_add(z.d, a.v, b.d);
    multiply_add(z.d, a.d, b.v);
}
template <class Z, class A, class B> MF_INLINE void multiply_subtract(Dual<Z>& z, const Dual<A>& a, const B& b) {
    multiply_subtract(z.v, a.v, b);
    multiply_subtract(z.d, a.d, b);
}
template <class Z, class A, class B> MF_INLINE void multiply_subtract(Dual<Z>& z, const A& a, const Dual<B>& b) {
    multiply_subtract(z.v, a, b.v);
    multiply_subtract(z.d, a, b.d);
}
template <class Z, class A, class B> MF_INLINE void multiply_subtract(Dual<Z>& z, const Dual<A>& a, const Dual<B>& b) {
    multiply_subtract(z.v, a.v, b.v);
    multiply_subtract(z.d, a.v, b.d);
    multiply_subtract(z.d, a.d, b.v);
}
template <class Z, class A, class B> MF_INLINE void across(Dual<Z>& sum, const Dual<A>& a, const B& b) {
    across(sum.v, a.v, b);
    across(sum.d, a.d, b);
}

}  // namespace mf
