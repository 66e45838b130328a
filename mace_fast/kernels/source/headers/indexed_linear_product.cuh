// One block's share of a matrix product: a BM x BN tile of it, TM x TN per thread, summed over steps of BK from shared
// memory. The sizes come from the including text.
#pragma once

#include "pack.cuh"

namespace mf {

constexpr int THREADS = (BM / TM) * (BN / TN);
constexpr int PAD = 16 / sizeof(T);  // keeps rows of a tile 16-byte aligned, and off each other's banks
constexpr int WIDE = 16 / sizeof(T);
MF_INLINE void load_wide(T* to, const T* from) {
    const Pack<WIDE> value = load<WIDE>(from);
#pragma unroll
    for (int i = 0; i < WIDE; ++i) to[i] = value.v[i];
}

struct Product {
    T value[TM][TN];
    int m, n;  // the thread's first row and column in the tile

    MF_INLINE Product() : m((threadIdx.x / (BN / TN)) * TM), n((threadIdx.x % (BN / TN)) * WIDE) {
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
            for (int j = 0; j < TN; ++j) value[i][j] = T(0);
    }
    // A thread's columns come 16 bytes at a time, neighbours' next to each other, so that reads of `b` meet no bank twice.
    MF_INLINE int column_of(int j) const { return n + j / WIDE * (BN / TN * WIDE) + j % WIDE; }
    MF_INLINE void add(const T (*a)[BM + PAD], const T (*b)[BN + PAD]) {
#pragma unroll 8  // more would take registers that a tile of 64 x 64 does not leave
        for (int k = 0; k < BK; ++k) {
            Pack<TM> row;
            Pack<TN> column;
#pragma unroll
            for (int i = 0; i < TM; i += WIDE) load_wide(&row.v[i], &a[k][m + i]);
#pragma unroll
            for (int j = 0; j < TN; j += WIDE) load_wide(&column.v[j], &b[k][column_of(j)]);
#pragma unroll
            for (int i = 0; i < TM; ++i)
#pragma unroll
                for (int j = 0; j < TN; ++j) value[i][j] += row.v[i] * column.v[j];
        }
    }
};

}  // namespace mf
