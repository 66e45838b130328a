// Sums over the edges of an atom and over the atoms of a structure, in float64 and in a fixed order.
#pragma once

namespace mf {

// Force: edges that leave minus edges that enter. Virial: of the edges that enter, vector (x) derivative.
template <bool VIRIAL, class T>
MF_INLINE void atom_totals(
    const T* vectors, const T* derivatives, const int* receiver_row, const int* sender_order, const int* sender_row,
    double* forces, double* virials, index_t n, int lane) {
    double force[3] = {0.0, 0.0, 0.0}, virial[9] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    for (index_t j = sender_row[n] + lane, end = sender_row[n + 1]; j < end; j += LANES) {
        const T* g = derivatives + 3 * index_t(sender_order[j]);
        for (int a = 0; a < 3; ++a) force[a] += double(g[a]);
    }
    for (index_t e = receiver_row[n] + lane, end = receiver_row[n + 1]; e < end; e += LANES) {
        const T* g = derivatives + 3 * e;
        for (int a = 0; a < 3; ++a) {
            force[a] -= double(g[a]);
            if constexpr (VIRIAL)
                for (int b = 0; b < 3; ++b) virial[3 * a + b] += double(vectors[3 * e + a]) * double(g[b]);
        }
    }
    for (int a = 0; a < 3; ++a) {
        const double total = sum_lanes(force[a]);
        if (lane == 0) forces[3 * n + a] = total;
    }
    if constexpr (VIRIAL)
        for (int a = 0; a < 9; ++a) {
            const double total = sum_lanes(virial[a]);
            if (lane == 0) virials[9 * n + a] = total;
        }
}

// Sum of `COUNT` columns over the rows of a structure: all threads of a block, or one on the CPU. The result is right
// in the first thread.
template <int COUNT>
MF_INLINE void structure_sum(const double* values, const long long* order, index_t begin, index_t end, double* total) {
    for (int k = 0; k < COUNT; ++k) total[k] = 0.0;
#ifdef __CUDACC__
    __shared__ double partial[32 * COUNT];
    const int thread = threadIdx.x, threads = blockDim.x;
    for (index_t j = begin + thread; j < end; j += threads)
        for (int k = 0; k < COUNT; ++k) total[k] += values[COUNT * order[j] + k];
    for (int k = 0; k < COUNT; ++k) {
        const double sum = sum_lanes(total[k]);
        if (thread % LANES == 0) partial[thread / LANES * COUNT + k] = sum;
    }
    __syncthreads();
    if (thread == 0)
        for (int k = 0; k < COUNT; ++k) {
            total[k] = 0.0;
            for (int warp = 0; warp < threads / LANES; ++warp) total[k] += partial[warp * COUNT + k];
        }
#else
    for (index_t j = begin; j < end; ++j)
        for (int k = 0; k < COUNT; ++k) total[k] += values[COUNT * order[j] + k];
#endif
}

// Virial and stress of a structure from the derivative of its energy with respect to a strain.
MF_INLINE void strain_results(const double* total, const double* cell, double* virial, double* stress) {
    const double* a = cell;
    const double *b = cell + 3, *c = cell + 6;
    double volume = 0.0;
    for (int i = 0; i < 3; ++i) {
        const int j = (i + 1) % 3, k = (i + 2) % 3;
        volume += a[i] * (b[j] * c[k] - b[k] * c[j]);
    }
    volume = volume < 0.0 ? -volume : volume;
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
            const double gradient = (total[3 * i + j] + total[3 * j + i]) / 2.0;
            const double value = gradient / volume;
            virial[3 * i + j] = -gradient;
            // As mace.modules.utils: what is not below is zero, not a number included.
            stress[3 * i + j] = value < 1e10 && value > -1e10 ? value : 0.0;
        }
}

}  // namespace mf
