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

template <class T, int C> MF_INLINE Vec<T, C> operator+(Vec<T, C> a, Vec<T, C> b) {
    Vec<T, C> r;
#pragma unroll
    for (int i = 0; i < C; ++i) r.v[i] = a.v[i] + b.v[i];
    return r;
}
template <class T, int C> MF_INLINE Vec<T, C> operator-(Vec<T, C> a, Vec<T, C> b) {
    Vec<T, C> r;
#pragma unroll
    for (int i = 0; i < C; ++i) r.v[i] = a.v[i] - b.v[i];
    return r;
}
template <class T, int C> MF_INLINE Vec<T, C> operator-(Vec<T, C> a) {
    Vec<T, C> r;
#pragma unroll
    for (int i = 0; i < C; ++i) r.v[i] = -a.v[i];
    return r;
}
template <class T, int C> MF_INLINE Vec<T, C> operator*(Vec<T, C> a, Vec<T, C> b) {
    Vec<T, C> r;
#pragma unroll
    for (int i = 0; i < C; ++i) r.v[i] = a.v[i] * b.v[i];
    return r;
}
template <class T, int C> MF_INLINE Vec<T, C> operator*(Vec<T, C> a, T b) {
    Vec<T, C> r;
#pragma unroll
    for (int i = 0; i < C; ++i) r.v[i] = a.v[i] * b;
    return r;
}
template <class T, int C> MF_INLINE Vec<T, C>& operator+=(Vec<T, C>& a, Vec<T, C> b) {
#pragma unroll
    for (int i = 0; i < C; ++i) a.v[i] += b.v[i];
    return a;
}
template <class T, int C> MF_INLINE Vec<T, C>& operator-=(Vec<T, C>& a, Vec<T, C> b) {
#pragma unroll
    for (int i = 0; i < C; ++i) a.v[i] -= b.v[i];
    return a;
}
template <class T, int C> MF_INLINE Dual<Vec<T, C>> operator*(Vec<T, C> a, Dual<T> b) { return {a * b.v, a * b.d}; }
template <class T, int C> MF_INLINE Dual<Vec<T, C>> operator*(Dual<Vec<T, C>> a, Dual<T> b) {
    return {a.v * b.v, a.v * b.d + a.d * b.v};
}
#endif

// A product, summed over the channels that one number holds on CUDA.
template <class A, class B> MF_INLINE auto across(A a, B b) { return a * b; }
#ifdef __CUDACC__
template <class T, int C> MF_INLINE T across(Vec<T, C> a, Vec<T, C> b) {
    T sum = a.v[0] * b.v[0];
#pragma unroll
    for (int i = 1; i < C; ++i) sum += a.v[i] * b.v[i];
    return sum;
}
template <class T, int C> MF_INLINE Dual<T> across(Dual<Vec<T, C>> a, Vec<T, C> b) {
    return {across(a.v, b), across(a.d, b)};
}
#endif

}  // namespace mf
