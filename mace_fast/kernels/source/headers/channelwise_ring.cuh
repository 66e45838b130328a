// See channelwise_conv.cuh for what a `Segment` is.
#pragma once
#include "async_copy.cuh"
#include "channels.cuh"
#include "channelwise_operands.cuh"

namespace mf {

// Operands of the next edges on their way through shared memory: RING edges deep, each warp's own channels in its own
// ring, so that no barrier but the warp's is needed. Holds, for each edge, the weights of the segment's paths and then the
// components of x, 32 * VEC channels of each (a piece); with DUAL the same of the tangents follows.
template <class S, bool DUAL> struct Ring {
    typedef typename S::T T;
    static constexpr int PACK = 16 / int(sizeof(T));   // numbers of a copy
    static constexpr int PIECE = 32 * S::VEC;          // numbers of a piece
    static constexpr int LANES = PIECE / PACK;         // that copy a piece
    static constexpr int ABREAST = 32 / LANES;         // pieces that a warp copies at a time
    static constexpr int W_COPIES = (S::PIECES + ABREAST - 1) / ABREAST;
    static constexpr int X_COPIES = (S::NX + ABREAST - 1) / ABREAST;
    static constexpr int STAGE = (W_COPIES + X_COPIES) * ABREAST * PIECE;  // numbers of an edge, without tangents
    static constexpr int NUMBERS = S::RING * STAGE * (DUAL ? 2 : 1);

    T* memory;
    int w_offset[W_COPIES > 0 ? W_COPIES : 1];  // of this lane's numbers in a row; negative: nothing to copy
    int x_offset[X_COPIES];
    int slot;  // of the edge that is worked on next

    MF_INLINE Ring(T* rings, int first_channel, int image) {
        const int lane = threadIdx.x & 31, mine = lane / LANES, channel = first_channel + lane % LANES * PACK;
        memory = rings + (threadIdx.x >> 5) * NUMBERS;
#pragma unroll
        for (int c = 0; c < W_COPIES; ++c) {
            w_offset[c] = -1;
            S::Paths::each([&](auto path) {
                typedef decltype(path) Path;
                if (Path::WEIGHTED && Path::PIECE == c * ABREAST + mine) w_offset[c] = Path::column(image) + channel;
            });
        }
#pragma unroll
        for (int c = 0; c < X_COPIES; ++c) {
            x_offset[c] = -1;
            S::X::each([&](auto block) {
                typedef decltype(block) Block;
#pragma unroll
                for (int i = 0; i < Block::DIM; ++i)
                    if (Block::BASE + i == c * ABREAST + mine)
                        x_offset[c] = Block::offset(image) + i * Block::MUL + channel;
            });
        }
    }

    // Starts the copies of an edge into a slot; of none where the edge is negative.
    MF_INLINE void fetch(const Operands<T>& in, const Operands<T>& tangent, int edge, int sender, int into) {
        if (edge >= 0) {
            copy_rows(in, edge, sender, memory + into * STAGE);
            if (DUAL) copy_rows(tangent, edge, sender, memory + (S::RING + into) * STAGE);
        }
        close_copies();
    }

    MF_INLINE void copy_rows(const Operands<T>& from, int edge, int sender, T* to) {
        const int lane = threadIdx.x & 31;
        const T* w = from.w + edge * from.w_row;
        const T* x = from.x + sender * index_t(S::X_ROW);
        if (from.w) {
#pragma unroll
            for (int c = 0; c < W_COPIES; ++c)
                if (w_offset[c] >= 0) copy_async(to + (c * 32 + lane) * PACK, w + w_offset[c]);
        }
        if (from.x) {
#pragma unroll
            for (int c = 0; c < X_COPIES; ++c)
                if (x_offset[c] >= 0) copy_async(to + ((W_COPIES + c) * 32 + lane) * PACK, x + x_offset[c]);
        }
    }

    // A piece of the edge that is worked on, or its tangent: this thread's channels.
    MF_INLINE typename ChannelsOf<T, S::VEC>::type piece(int number, bool of_tangent) const {
        const T* stage = memory + ((of_tangent ? S::RING : 0) + slot) * STAGE;
        return shared_load(stage + number * PIECE + (threadIdx.x & 31) * S::VEC,
                           typename ChannelsOf<T, S::VEC>::type());
    }
    MF_INLINE static constexpr int x_piece(int component) { return W_COPIES * ABREAST + component; }

    MF_INLINE int last_slot() const { return slot == 0 ? S::RING - 1 : slot - 1; }
    MF_INLINE void advance() { slot = slot + 1 == S::RING ? 0 : slot + 1; }
};

}  // namespace mf
