// Operands of one edge whose weights are splines, for the channels of a thread. Coefficients are many and come from caches:
// they are a stream. While a path is worked on, those of the AHEAD paths after it are on their way, across the end of an
// edge too; a weight is made when its path asks for it, so that neither weights nor coefficients of a whole edge are held.
#pragma once
#include "channelwise_tile.cuh"
#include "spline.h"

namespace mf {

template <class S, bool SLOPE> struct StreamedOperands {
    typedef typename S::T T;
    typedef typename ChannelsOf<T, S::VEC>::type C;
    typedef C N;
    static constexpr int AHEAD = S::NW < 2 ? S::NW : 2;

    const Operands<T>& in;
    const Spline<T>& spline;
    const Shared<S, false>& shared;
    const int u, image;
    const T* row;   // of the coefficients that are loaded next
    int following;  // slot of the edge after this one
    C x[S::NX];
    EdgeOperands<S, false, SLOPE> next;  // x alone of that edge
    C c[S::NW][S::ORDER];
    C last_slope;
    T place;

    // Before the first edge of a tile.
    MF_INLINE void start(int slot) {
        row = coefficients_of(spline, shared, slot, u);
        next.load_x(in, in, shared, slot, u, image);
        S::Paths::each([&](auto path) {
            typedef decltype(path) Path;
            if constexpr ((Path::INDEX < AHEAD)) load<Path>();
        });
    }

    // Begins an edge. `after`: the slot of the edge after it; where there is none any edge of the tile stands for it.
    MF_INLINE void enter(int slot, int after) {
        place = shared.place[slot];
        following = after;
#pragma unroll
        for (int i = 0; i < S::NX; ++i) x[i] = next.x[i];
    }

    // Every path asks once for each edge, in the order of the list.
    template <class Path> MF_INLINE N weight() {
        N value;
        if constexpr (Path::WEIGHTED) {
            value = spline_value<S::ORDER>(c[Path::INDEX], place);
            if (SLOPE) last_slope = spline_slope<S::ORDER>(c[Path::INDEX], place);
        } else {
            fill(value, T(1));
        }
        if constexpr (Path::INDEX == S::NW - AHEAD) row = coefficients_of(spline, shared, following, u);
        load<typename S::Paths::template At<(Path::INDEX + AHEAD) % S::NW>::type>();
        if constexpr (Path::INDEX == S::NW - 1) next.load_x(in, in, shared, following, u, image);
        return value;
    }
    // Along the interval, of the weight that was made last.
    template <class Path> MF_INLINE const C& slope() const { return last_slope; }

private:
    template <class Path> MF_INLINE void load() {
        if constexpr (Path::WEIGHTED) load_coefficients<S, Path>(row, u, image, c[Path::INDEX]);
    }
};

// What edges are gone through with, whatever their weights are.
template <class S, bool DUAL, bool SLOPE, bool STREAMED = S::STREAMED> struct OperandsOf {
    typedef EdgeOperands<S, DUAL, SLOPE> type;
    MF_INLINE static type make(const Operands<typename S::T>&, const Spline<typename S::T>&, const Shared<S, DUAL>&, int,
                               int) {
        type unset;
        return unset;
    }
};
template <class S, bool DUAL, bool SLOPE> struct OperandsOf<S, DUAL, SLOPE, true> {
    static_assert(!DUAL, "splines have no tangents");
    typedef StreamedOperands<S, SLOPE> type;
    MF_INLINE static type make(const Operands<typename S::T>& in, const Spline<typename S::T>& spline,
                               const Shared<S, false>& shared, int u, int image) {
        return {in, spline, shared, u, image};
    }
};

}  // namespace mf
