// Copies of 16 bytes from global to shared memory that a thread starts and does not wait for (sm_80 and later). Those that
// it started since the last `close_copies` are a group; `await_copies<N>` waits until all but its last N groups are there.
// What other threads copied is there for this one after both waited and met at a barrier.
#pragma once

#include "number.h"

namespace mf {

MF_INLINE void copy_async(void* shared, const void* global) {
    const unsigned at = unsigned(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(global) : "memory");
}
MF_INLINE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> MF_INLINE void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

}  // namespace mf
