// A GPU, slowly: enough of CUDA C++ for the texts of our kernels to be compiled by a C++ compiler and run on the CPU.
//
// The blocks of a grid run one after the other. Each thread of a block is a fiber with a stack of its own, and they take
// turns: one runs until it waits for its warp or its block. So everything that threads say to one another happens as on
// a GPU, and what would hang there, threads of one warp waiting in different places, is an error here. Shared memory
// is filled with NaN before every block. Nothing is said about races between one barrier and the next.
#pragma once
#define __CUDACC__ 1

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

using std::fabs;
using std::max;
using std::min;
using std::sqrt;

namespace simt {

struct Index { unsigned x, y, z; };

enum State { RUNNING, WAITING_WARP, WAITING_BLOCK, DONE };

struct Copy {
    void* to;
    const void* from;
};

struct Thread {
    jmp_buf where;
    ucontext_t start;
    State state;
    unsigned mask;  // of the warp barrier that it waits at
    int site;       // which barrier that is, in the order of its own calls
    Index index;
    char exchange[16];  // what it offers to the other lanes
    std::vector<std::vector<Copy>> copies{1};  // started and not there yet, by group; the last group is open
};

constexpr size_t STACK = 256 * 1024;

struct Machine {
    std::vector<Thread> threads;
    char* stacks = nullptr;
    jmp_buf scheduler;
    ucontext_t origin;
    int current = 0;
    Index block_index, block_size, grid_size;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
    const char* fault = nullptr;
};
inline Machine machine;

inline Thread& self() { return machine.threads[machine.current]; }

[[noreturn]] inline void give_up(const char* why) {
    machine.fault = why;
    _longjmp(machine.scheduler, 2);
}

inline void wait(State state, unsigned mask) {
    Thread& me = self();
    me.state = state;
    me.mask = mask;
    if (!_setjmp(me.where)) _longjmp(machine.scheduler, 1);
}

inline void enter() {
    machine.body(machine.arguments);
    self().state = DONE;
    _longjmp(machine.scheduler, 1);
}

inline void wait_for_warp(unsigned mask) {
    if (!(mask >> (machine.current % 32) & 1)) give_up("a lane waits for a warp barrier whose mask leaves it out");
    wait(WAITING_WARP, mask);
}

// Runs threads until all are done. A barrier opens when all that it waits for have come to it.
inline const char* run_block() {
    const int count = int(machine.threads.size());
    for (int t = 0; t < count; ++t) {
        Thread& thread = machine.threads[t];
        thread.state = RUNNING;
        thread.copies.assign(1, {});
        const unsigned x = machine.block_size.x, y = machine.block_size.y;
        thread.index = {t % x, t / x % y, t / (x * y)};
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = machine.stacks + t * STACK;
        thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, enter, 0);
    }
    std::vector<bool> started(count, false);
    for (;;) {
        bool progress = false;
        for (int t = 0; t < count; ++t) {
            Thread& thread = machine.threads[t];
            if (thread.state != RUNNING) continue;
            progress = true;
            machine.current = t;
            const int how = _setjmp(machine.scheduler);
            if (how == 2) return machine.fault;
            if (how == 0) {
                if (started[t]) _longjmp(thread.where, 1);
                started[t] = true;
                setcontext(&thread.start);
            }
        }
        int waiting_for_block = 0, done = 0;
        for (const Thread& thread : machine.threads) {
            waiting_for_block += thread.state == WAITING_BLOCK;
            done += thread.state == DONE;
        }
        if (done == count) return nullptr;
        if (waiting_for_block + done == count) {
            for (Thread& thread : machine.threads)
                if (thread.state == WAITING_BLOCK) thread.state = RUNNING;
            continue;
        }
        for (int first = 0; first < count; first += 32) {
            const int lanes = std::min(32, count - first);
            for (int lane = 0; lane < lanes; ++lane) {
                const Thread& leader = machine.threads[first + lane];
                if (leader.state != WAITING_WARP) continue;
                const unsigned mask = leader.mask;
                bool all = true;
                for (int other = 0; other < 32; ++other) {
                    if (!(mask >> other & 1)) continue;
                    if (other >= lanes || machine.threads[first + other].state == DONE)
                        return "a warp barrier waits for a lane that has left the kernel";
                    const Thread& peer = machine.threads[first + other];
                    all = all && peer.state == WAITING_WARP && peer.mask == mask;
                }
                if (!all) continue;
                for (int other = 0; other < lanes; ++other)
                    if (mask >> other & 1) machine.threads[first + other].state = RUNNING;
                progress = true;
            }
        }
        if (!progress) return "threads wait for one another in different places";
    }
}

template <class T> inline T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes here");
    const int warp = machine.current / 32 * 32;
    std::memcpy(self().exchange, &value, sizeof(T));
    wait_for_warp(mask);
    T result = value;
    if (source >= 0 && source < 32) {
        if (!(mask >> source & 1)) give_up("a shuffle reads from a lane that its mask leaves out");
        std::memcpy(&result, machine.threads[warp + source].exchange, sizeof(T));
    }
    wait_for_warp(mask);
    return result;
}

// Copies arrive as late as they may: when their thread waits for them.
inline void start_copy(void* to, const void* from) {
    if (reinterpret_cast<size_t>(to) % 16 || reinterpret_cast<size_t>(from) % 16)
        give_up("an asynchronous copy of 16 bytes is not aligned");
    self().copies.back().push_back({to, from});
}

inline void await_copies(int left) {
    auto& groups = self().copies;
    while (int(groups.size()) - 1 > left) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void* const* values, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(values[I])...);
}

struct Launch {
    void* kernel;
    void* const* values;
};

template <class... A> inline const char* launch(void (*kernel)(A...), const int* grid, const int* block,
                                                void* const* values, const int* sizes, int count, char* shared,
                                                size_t shared_bytes) {
    const int expected[] = {int(sizeof(A))...};
    if (count != int(sizeof...(A))) return "the number of arguments differs from that of parameters";
    for (int i = 0; i < count; ++i)
        if (expected[i] != sizes[i]) return "an argument is not of the size of its parameter";
    const size_t threads = size_t(block[0]) * block[1] * block[2];
    if (threads == 0 || threads > 1024) return "a block has 1 to 1024 threads";
    machine.threads.assign(threads, Thread());
    machine.stacks = static_cast<char*>(
        mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (machine.stacks == MAP_FAILED) return "no memory for the stacks of the threads";
    machine.block_size = {unsigned(block[0]), unsigned(block[1]), unsigned(block[2])};
    machine.grid_size = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])};
    Launch job{reinterpret_cast<void*>(kernel), values};
    machine.arguments = &job;
    machine.body = [](void* argument) {
        const Launch* launch = static_cast<const Launch*>(argument);
        call(reinterpret_cast<void (*)(A...)>(launch->kernel), launch->values, std::index_sequence_for<A...>());
    };
    const char* fault = nullptr;
    for (int z = 0; z < grid[2] && !fault; ++z)
        for (int y = 0; y < grid[1] && !fault; ++y)
            for (int x = 0; x < grid[0] && !fault; ++x) {
                machine.block_index = {unsigned(x), unsigned(y), unsigned(z)};
                if (shared) std::memset(shared, 0xff, shared_bytes);
                fault = run_block();
            }
    munmap(machine.stacks, threads * STACK);
    return fault;
}

}  // namespace simt

#define threadIdx (simt::self().index)
#define blockIdx (simt::machine.block_index)
#define blockDim (simt::machine.block_size)
#define gridDim (simt::machine.grid_size)

inline void __syncthreads() { simt::wait(simt::WAITING_BLOCK, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::wait_for_warp(mask); }
template <class T> inline T __ldg(const T* at) { return *at; }
template <class T> inline T __shfl_sync(unsigned mask, T value, int source) { return simt::exchange(mask, value, source & 31); }
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return simt::exchange(mask, value, (simt::machine.current % 32) ^ bits);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, int delta) {
    return simt::exchange(mask, value, simt::machine.current % 32 - delta);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, int delta) {
    return simt::exchange(mask, value, simt::machine.current % 32 + delta);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) result |= unsigned(simt::exchange(mask, int(vote), lane)) << lane;
    return result;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }
inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
