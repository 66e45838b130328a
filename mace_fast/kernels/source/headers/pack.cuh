// Numbers that are loaded and stored together. T (float or double) comes from the including text.
#pragma once

#include "number.h"

namespace mf {

template <int V> struct alignas(V * sizeof(T)) Pack {
    T v[V];
};

template <int V> MF_INLINE Pack<V> load(const T* p) { return *reinterpret_cast<const Pack<V>*>(p); }
template <int V> MF_INLINE void store(T* p, Pack<V> value) { *reinterpret_cast<Pack<V>*>(p) = value; }
template <int V> MF_INLINE Pack<V> filled(T value) {
    Pack<V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.v[i] = value;
    return pack;
}
template <int V> MF_INLINE void add(Pack<V>& a, Pack<V> b) {
#pragma unroll
    for (int i = 0; i < V; ++i) a.v[i] += b.v[i];
}

MF_INLINE T not_a_number() { return T(__int_as_float(0x7fc00000)); }

}  // namespace mf
