// The energy of one node from its features, and the gradient of the total energy with respect to them.
#pragma once

namespace mf {

template <class T> struct Readout {
    const T* features;   // [nodes, dim]
    index_t dim;
    const T* first;      // [heads or hidden, width], the first `width` features alone count
    index_t width;
    const T* second;     // [hidden]; null for a linear readout
    T* gradient;         // [nodes, dim], or null
};

// HIDDEN == 0: the row of `first` of the node's head. Else silu between two linear maps.
template <int HIDDEN, class T>
MF_INLINE T read_out(const Readout<T>& r, index_t n, int lane, index_t head, T scale) {
    constexpr int AHEAD = HIDDEN > 16 ? 1 : 4;  // features whose loads are in flight together, as far as registers go
    const T* x = r.features + n * r.dim;
    if constexpr (HIDDEN == 0) {
        const T* weights = r.first + head * r.width;
        T sum = T(0);
MF_UNROLL_BY(AHEAD)
        for (index_t c = lane; c < r.width; c += LANES) sum += x[c] * weights[c];
        return sum_lanes(sum);
    } else {
        T hidden[HIDDEN];
MF_UNROLL
        for (int j = 0; j < HIDDEN; ++j) hidden[j] = T(0);
MF_UNROLL_BY(AHEAD)
        for (index_t c = lane; c < r.width; c += LANES) {
            const T value = x[c];
MF_UNROLL
            for (int j = 0; j < HIDDEN; ++j) hidden[j] += value * r.first[j * r.width + c];
        }
        T energy = T(0);
MF_UNROLL
        for (int j = 0; j < HIDDEN; ++j) hidden[j] = sum_lanes(hidden[j]);
MF_UNROLL
        for (int first = 0; first < HIDDEN; first += LANES) {
            // A lane for each value: one after the other, exponentials and divisions would be most of the time.
            T h = T(0);
MF_UNROLL
            for (int j = first; j < HIDDEN && j < first + LANES; ++j)
                if (j - first == lane) h = hidden[j];
            const T weight = first + lane < HIDDEN ? r.second[first + lane] : T(0);
            const T sigmoid = T(1) / (T(1) + exp(-h));
            energy += weight * (h * sigmoid);
            const T slope = scale * weight * (sigmoid + h * sigmoid * (T(1) - sigmoid));
MF_UNROLL
            for (int j = first; j < HIDDEN && j < first + LANES; ++j) hidden[j] = of_lane(slope, j - first);
        }
        energy = sum_lanes(energy);
        if (r.gradient) {
            for (index_t c = lane; c < r.dim; c += LANES) {
                T sum = T(0);
                if (c < r.width) {
MF_UNROLL
                    for (int j = 0; j < HIDDEN; ++j) sum += hidden[j] * r.first[j * r.width + c];
                }
                r.gradient[n * r.dim + c] = sum;
            }
        }
        return energy;
    }
}

}  // namespace mf
