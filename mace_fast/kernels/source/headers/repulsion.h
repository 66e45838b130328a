// The screened repulsion of nuclei (Ziegler, Biersack and Littmark) with MACE's envelope, summed at receivers.
#pragma once

namespace mf {

template <class T> struct Repulsion {
    const T* species;  // [species, 3]: nuclear charge, its power that the screening length is made of, covalent radius
    T share[4];        // of the four exponentials
    T length;          // A: screening length times the sum of two powers
    int p;             // of the envelope, 1 - (p+1)(p+2)/2 t^p + p(p+2) t^(p+1) - p(p+1)/2 t^(p+2)
};

// Half of the energy, eV, of the pairs that enter atom n; leaves the derivative with respect to each length.
template <class T>
MF_INLINE T atom_repulsion(const Repulsion<T>& r, const T* radius, const long long* species, const int* sender,
                           index_t begin, index_t end, index_t n, int lane, T* slope) {
    const T half_coulomb = T(0.5 * 14.3996);  // eV A
    const T decay[4] = {T(3.2), T(0.9423), T(0.4028), T(0.2016)};
    const T p = T(r.p), a = (p + T(1)) * (p + T(2)) / T(2), b = p * (p + T(2)), c = p * (p + T(1)) / T(2);
    const T* mine = r.species + 3 * species[n];
    T sum = T(0);
    for (index_t e = begin + lane; e < end; e += LANES) {
        const T x = radius[e];
        const T* other = r.species + 3 * species[sender[e]];
        const T reach = mine[2] + other[2];
        T derivative = T(0);
        if (!(x >= reach)) {  // what is not a number stays so
            const T inverse = (mine[1] + other[1]) / r.length;
            T phi = T(0), dphi = T(0);
MF_UNROLL
            for (int k = 0; k < 4; ++k) {
                const T rate = decay[k] * inverse, term = r.share[k] * exp(-rate * x);
                phi += term;
                dphi -= rate * term;
            }
            const T t = x / reach;
            T power = T(1);
            for (int i = 1; i < r.p; ++i) power *= t;
            const T envelope = T(1) - power * t * (a - t * (b - t * c));
            const T denvelope = -power * (p * a - t * ((p + T(1)) * b - t * (p + T(2)) * c)) / reach;
            const T coulomb = half_coulomb * mine[0] * other[0] / x;
            sum += coulomb * phi * envelope;
            derivative = coulomb * ((dphi - phi / x) * envelope + phi * denvelope);
        }
        slope[e] = derivative;
    }
    return sum_lanes(sum);
}

}  // namespace mf
