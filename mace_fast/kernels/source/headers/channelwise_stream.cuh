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
    C x[S::NX], next_x[S::NX];
    C c[S::NW][S::ORDER];
    C last_slope;
    T place;

    // Before the first edge of a tile.
    MF_INLINE void start(int slot) {
        row = row_of(slot);
        load_x(slot);
        S::Paths::each([&](auto path) {
            typedef decltype(path) Path;
            if constexpr ((Path::INDEX < AHEAD)) load_coefficients<Path>();
        });
    }

    // Begins an edge. `next`: the slot of the edge after it; where there is none any edge of the tile stands for it.
    MF_INLINE void enter(int slot, int next) {
        place = shared.place[slot];
        following = next;
#pragma unroll
        for (int i = 0; i < S::NX; ++i) x[i] = next_x[i];
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
        if constexpr (Path::INDEX == S::NW - AHEAD) row = row_of(following);
        load_coefficients<typename S::Paths::template At<(Path::INDEX + AHEAD) % S::NW>::type>();
        if constexpr (Path::INDEX == S::NW - 1) load_x(following);
        return value;
    }
    // Along the interval, of the weight that was made last.
    template <class Path> MF_INLINE const C& slope() const { return last_slope; }

private:
    MF_INLINE void load_x(int slot) {
        const T* from = in.x + shared.sender[slot] * index_t(S::X_ROW) + u;
        S::X::each([&](auto block) {
            typedef decltype(block) Block;
#pragma unroll
            for (int i = 0; i < Block::DIM; ++i)
                next_x[Block::BASE + i] =
                    load_if<C>(S::EXACT || u < Block::MUL, from + Block::offset(image) + i * Block::MUL);
        });
    }
    MF_INLINE const T* row_of(int slot) const {
        return spline.rows + shared.interval[slot] * index_t(S::ORDER * S::NUMEL) + u;
    }

    template <class Path> MF_INLINE void load_coefficients() {
        if constexpr (Path::WEIGHTED) {
            const index_t column = Path::column(image) + index_t(u) * (Path::W_STRIDE - 1);
#pragma unroll
            for (int q = 0; q < S::ORDER; ++q)
                c[Path::INDEX][q] = load_if<C>(S::EXACT || u < Path::MUL, row + q * S::NUMEL + column);
        }
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
