// Backward for edges whose receivers are neighbours in the list of nodes: a cluster of RECEIVERS of them.
//
// Neighbours receive from mostly the same senders. A block holds the output gradients of all receivers of a cluster in shared
// memory and goes through their edges in the order of the senders: x is read once for all edges between a sender and the
// cluster, a run, and they add up to one row of dx. It stands at the place of the run's first edge; the rows of other places
// are not written, and nobody reads them. `graph.order` and `graph.row` list edges by cluster and sender.
//
// A block works on the first `graph.limit` edges of one of `graph.groups` clusters. For the others every stretch of `limit`
// positions in the list, a window, has a block: it holds such edges of one cluster at most. Each warp of a block takes a
// share of its edges, where runs end too; ops/clusters.py finds the same runs.
#pragma once
#include "channelwise_gradient.cuh"

namespace mf {

// Output gradients of a cluster in shared memory, [RECEIVERS][NZ][channels of a warp].
template <class S, int RECEIVERS> struct ClusterGradients {
    typedef typename S::T T;
    typedef typename ChannelsOf<T, S::VEC>::type C;
    static constexpr int WIDTH = 32 * S::VEC, RECEIVER = S::NZ * WIDTH;
    MF_INLINE static constexpr int bytes() { return RECEIVERS * RECEIVER * int(sizeof(T)); }

    // By all threads of a block.
    MF_INLINE static void read(T* into, const T* g, index_t g_row, index_t first, index_t receivers, int u, int image) {
        const int lane = threadIdx.x;
        for (int item = threadIdx.y; item < 2 * RECEIVERS; item += blockDim.y) {
            const index_t n = first + item / 2;
            if (n >= receivers) continue;
            const T* row = g + n * g_row + u;
            T* target = into + item / 2 * RECEIVER + lane * S::VEC;
            S::Z::each([&](auto slot) {
                typedef decltype(slot) Slot;
#pragma unroll
                for (int k = 0; k < Slot::DIM; ++k)
                    if ((Slot::BASE + k) % 2 == item % 2)
                        store(target + (Slot::BASE + k) * WIDTH,
                              load_if<C>(S::EXACT || u < Slot::MUL, row + Slot::offset(image) + k * Slot::MUL));
            });
        }
        __syncthreads();
    }
};

// The positions [begin, end) that a block works on, and the cluster that they are of.
struct ClusterWork {
    index_t cluster, begin, end;
    MF_INLINE ClusterWork(const Graph& graph, index_t block) {
        const index_t window = (block - graph.groups) * graph.limit;
        cluster = block;
        if (block >= graph.groups) {  // the last cluster that begins at the window or before
            index_t low = 0, high = graph.groups;
            while (high - low > 1) {
                const index_t middle = (low + high) >> 1;
                if (graph.row[middle] <= window) low = middle;
                else high = middle;
            }
            cluster = low;
        }
        begin = graph.row[cluster];
        end = graph.row[cluster + 1];
        if (block < graph.groups) {
            end = begin + graph.limit < end ? begin + graph.limit : end;
        } else {
            begin = begin + graph.limit > window ? begin + graph.limit : window;
            end = window + graph.limit < end ? window + graph.limit : end;
        }
    }
};

template <class S, bool DUAL, bool WANT_X, bool WANT_Y, bool WANT_W, int RECEIVERS>
MF_INLINE void conv_backward_clusters(const Graph& graph, const Operands<typename S::T>& in,
                                      const Operands<typename S::T>& tangent, const Spline<typename S::T>& spline,
                                      int image, const typename S::T* g, index_t g_row, typename S::T* dx,
                                      typename S::T* dy, typename S::T* dw, index_t edges, int share) {
    static_assert(S::WARPS == 1 && S::ORDER == 0 && S::RING == 0, "one warp, weights read");
    typedef typename S::T T;
    typedef EdgeGradient<S, DUAL, WANT_X, WANT_Y, WANT_W> Gradient;
    typedef typename Gradient::Edge Edge;
    typedef typename Edge::C C;
    typedef ClusterGradients<S, RECEIVERS> Gradients;
    extern __shared__ __align__(16) char memory[];
    T* gradients = reinterpret_cast<T*>(memory);
    const Shared<S, DUAL> shared(memory + Gradients::bytes() + threadIdx.y * Shared<S, DUAL>::bytes(WANT_Y), WANT_Y);
    const int lane = threadIdx.x, u = (channel_block<S>() * 32 + lane) * S::VEC;
    const ClusterWork work(graph, blockIdx.x);
    if (work.begin >= work.end) return;  // the same for all threads of the block
    const index_t first = work.cluster * RECEIVERS;
    Gradients::read(gradients, g, g_row, first, graph.receivers, u, image);

    const index_t size = (work.end - work.begin + blockDim.y - 1) / blockDim.y;
    index_t position = work.begin + threadIdx.y * size;
    const index_t end = position + size < work.end ? position + size : work.end;
    T* dy_part = dy + (share * S::CHANNEL_BLOCKS + channel_block<S>()) * edges * S::OUT;
    const Gradient gradient{shared, spline, image, u, lane, 0, dw};
    typename Gradient::OfX of_x;
    Edge current, next;
    // The row of the run's sum. As a number of a row, NVVM (CUDA 12.4 to 13.5) wrote later components to wrong columns.
    T* run_row = nullptr;
    int run_sender = -1;
    for (; position < end; position += S::TILE) {
        const int count = end - position < S::TILE ? int(end - position) : S::TILE;
        couple_tile<S, DUAL>(shared, graph, in, tangent.y, spline, position, count);
        if (lane < count) shared.interval[lane] = int(graph.receiver[shared.edge[lane]] - first);
        __syncwarp();
        if (S::PREFETCH) {
            if (shared.sender[0] != run_sender) current.load_x(in, tangent, shared, 0, u, image);
            current.load_w(in, tangent, spline, shared, 0, u, image);
        }
        for (int slot = 0; slot < count; ++slot) {
            const int sender = shared.sender[slot];
            if (!S::PREFETCH) {
                if (sender != run_sender) current.load_x(in, tangent, shared, slot, u, image);
                current.load_w(in, tangent, spline, shared, slot, u, image);
            } else if (slot + 1 < count) {
                if (shared.sender[slot + 1] != sender) next.load_x(in, tangent, shared, slot + 1, u, image);
                else next.copy_x(current);
                next.load_w(in, tangent, spline, shared, slot + 1, u, image);
            }
            if (sender != run_sender) {
                if (WANT_X && run_row) gradient.write_x(of_x, run_row);
                of_x.clear();
                run_row = dx + (position + slot) * S::X_ROW + u;
                run_sender = sender;
            }
            const T* of_receiver = gradients + shared.interval[slot] * Gradients::RECEIVER + lane * S::VEC;
            typename Gradient::OfY of_y;
            of_y.clear();
            gradient.add(slot, current, of_x, of_y, nullptr, [&](auto path, C* room) -> const C* {
                typedef decltype(path) Path;
#pragma unroll
                for (int k = 0; k < Path::DZ; ++k)
                    room[k] = shared_load(of_receiver + (Path::Z + k) * Gradients::WIDTH, C());
                return room;
            });
            if (WANT_Y) gradient.leave_y(slot, of_y);
            if (S::PREFETCH && slot + 1 < count) current = next;
        }
        if (WANT_Y) write_y<S, DUAL>(shared, count, dy_part);
    }
    if (WANT_X && run_row) gradient.write_x(of_x, run_row);
}

}  // namespace mf
