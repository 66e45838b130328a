// The neighbouring channels that a thread holds: how they are loaded, stored and filled, and how values and tangents pair.
#pragma once
#include "number.h"

namespace mf {

template <bool DUAL, class T> struct NumberOf { typedef T type; };
template <class T> struct NumberOf<true, T> { typedef Dual<T> type; };

template <class T> struct Pack;
template <> struct Pack<float> { typedef float4 type; static constexpr int size = 4; };
template <> struct Pack<double> { typedef double2 type; static constexpr int size = 2; };

// What a thread holds of a row: one channel, or neighbouring ones that are loaded and stored together.
template <class T, int COUNT> struct ChannelsOf { typedef Vec<T, COUNT> type; };
template <class T> struct ChannelsOf<T, 1> { typedef T type; };

template <class T> MF_INLINE T load(const T* at, T) { return __ldg(at); }
template <class T> MF_INLINE void store(T* at, T v) { *at = v; }
MF_INLINE Vec<float, 2> load(const float* at, Vec<float, 2>) {
    const float2 p = __ldg(reinterpret_cast<const float2*>(at));
    return {p.x, p.y};
}
MF_INLINE Vec<float, 4> load(const float* at, Vec<float, 4>) {
    const float4 p = __ldg(reinterpret_cast<const float4*>(at));
    return {p.x, p.y, p.z, p.w};
}
MF_INLINE Vec<double, 2> load(const double* at, Vec<double, 2>) {
    const double2 p = __ldg(reinterpret_cast<const double2*>(at));
    return {p.x, p.y};
}
MF_INLINE void store(float* at, Vec<float, 2> v) { *reinterpret_cast<float2*>(at) = make_float2(v.v[0], v.v[1]); }
MF_INLINE void store(float* at, Vec<float, 4> v) {
    *reinterpret_cast<float4*>(at) = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
}
MF_INLINE void store(double* at, Vec<double, 2> v) { *reinterpret_cast<double2*>(at) = make_double2(v.v[0], v.v[1]); }

// What lies there, or zeros.
template <class C, class T> MF_INLINE C load_if(bool active, const T* at) { return active ? load(at, C()) : C(); }

template <class T> MF_INLINE T shared_load(const T* at, T) { return *at; }
MF_INLINE Vec<float, 2> shared_load(const float* at, Vec<float, 2>) {
    const float2 p = *reinterpret_cast<const float2*>(at);
    return {p.x, p.y};
}
MF_INLINE Vec<float, 4> shared_load(const float* at, Vec<float, 4>) {
    const float4 p = *reinterpret_cast<const float4*>(at);
    return {p.x, p.y, p.z, p.w};
}
MF_INLINE Vec<double, 2> shared_load(const double* at, Vec<double, 2>) {
    const double2 p = *reinterpret_cast<const double2*>(at);
    return {p.x, p.y};
}

template <class T> MF_INLINE void fill(T& v, T value) { v = value; }
template <class T, int C> MF_INLINE void fill(Vec<T, C>& v, T value) {
#pragma unroll
    for (int i = 0; i < C; ++i) v.v[i] = value;
}
template <class V, class T> MF_INLINE void fill(Dual<V>& v, T value) {
    fill(v.v, value);
    fill(v.d, value);
}

template <class N> struct Make {
    template <class V> MF_INLINE static N of(V v, V) { return v; }
};
template <class V> struct Make<Dual<V>> {
    MF_INLINE static Dual<V> of(V v, V d) { return {v, d}; }
};

// The loops of a path over what a thread holds, written out here: gradients of large products have thousands, and unrolling
// them took 10 to 20 % of the compiler's time.
template <int COUNT, class Z, class A, class B> MF_INLINE void multiply_each(Z* z, const A& a, const B* b) {
    if constexpr (COUNT > 0) {
        multiply(*z, a, *b);
        multiply_each<COUNT - 1>(z + 1, a, b + 1);
    }
}
template <int COUNT, class Z, class A, class B> MF_INLINE void multiply_add_each(Z* z, const A& a, const B* b) {
    if constexpr (COUNT > 0) {
        multiply_add(*z, a, *b);
        multiply_add_each<COUNT - 1>(z + 1, a, b + 1);
    }
}
template <int COUNT, class Z, class A, class B> MF_INLINE void multiply_add_sum(Z& sum, const A* a, const B* b) {
    if constexpr (COUNT > 0) {
        multiply_add(sum, *a, *b);
        multiply_add_sum<COUNT - 1>(sum, a + 1, b + 1);
    }
}

template <class T> MF_INLINE T result_of(T v) { return v; }
template <class T> MF_INLINE T result_of(Dual<T> v) { return v.d; }

}  // namespace mf
