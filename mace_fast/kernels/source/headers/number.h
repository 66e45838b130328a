// The number types that every kernel text is written against.
//
// On CUDA a thread holds one channel and `V` is float or double. On the CPU `V` is a vector of 64 bytes over
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

}  // namespace mf
