// Barriers at which some threads of a block wait for others: those that count arrivals in shared memory ("mbarrier" of the
// PTX manual), and the numbered ones of a block. emulation_units.h has their twins for the CPU. Kernels that call these are
// started from sm_90 on.
#pragma once

#include "mma.cuh"

#ifndef QEXPORT_CUDA_EMULATION

namespace qexport {
namespace cuda {

// One thread prepares a barrier whose phases end with so many arrivals each; a barrier of the block must follow.
__device__ __forceinline__ void phase_init(uint64_t* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}
__device__ __forceinline__ void phase_arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// This thread arrives once all copies have that it started before (cp_async_16); it goes on at once.
__device__ __forceinline__ void phase_arrive_after_copies(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Waits until the phases 0, 2, 4, ... (parity 0) or 1, 3, 5, ... (parity 1) up to the one under way have ended. Who waits is
// never two phases behind.
__device__ __forceinline__ void phase_wait(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Barrier `id` (1 to 15) of `threads` threads, of which some wait and others only say that they were there.
__device__ __forceinline__ void numbered_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void numbered_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace cuda
}  // namespace qexport

#endif
