// Asynchronous matrix products of warpgroups, four warps each: sm_90a alone. QEXPORT_WGMMA is 1 where they exist. Lane l of
// warp w of a warpgroup holds of rows 16 w.. what mma.cuh says of an accumulator and of A. emulation_wgmma.h has the twins.
#pragma once

#include "mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(QEXPORT_CUDA_EMULATION)
#define QEXPORT_WGMMA 1
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "code for sm_90 lacks the products that a Hopper is given: set CMAKE_CUDA_ARCHITECTURES to 90a"
#else
#define QEXPORT_WGMMA 0
#endif

namespace qexport {
namespace cuda {

// Gives registers of this warpgroup back, or takes what others gave back.
template <int kRegisters, bool kTakes>
__device__ __forceinline__ void set_registers() {
#if QEXPORT_WGMMA && !defined(QEXPORT_CUDA_EMULATION)
  if constexpr (kTakes) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
#endif
}

#if QEXPORT_WGMMA

// A matrix in shared memory, in panels of 64 columns of 16 bits with rows of 128 bytes, whose 16-byte chunk c of row r lies
// at c ^ (r % 8); "Matrix descriptor" of the PTX manual, 128-byte swizzle. Eight rows are 1024 bytes; `panel` is from one
// panel to the next where the columns are not those that the product sums over.
__device__ __forceinline__ uint64_t wgmma_matrix(const char* start, int panel_bytes) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | static_cast<uint64_t>(panel_bytes / 16) << 16 |
         (shared_address(start) & 0x3ffff) >> 4;
}

// The matrix that lies so many bytes behind it, in the same shared memory.
__device__ __forceinline__ uint64_t wgmma_further(uint64_t matrix, int bytes) {
  return matrix >> 32 << 32 | (static_cast<uint32_t>(matrix) + static_cast<uint32_t>(bytes / 16));
}

#ifndef QEXPORT_CUDA_EMULATION

// Orders registers and, with wgmma_shared_fence, earlier writes to shared memory before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from reading or moving accumulators while products are under way.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
}

#define QEXPORT_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define QEXPORT_D32(n)                                                                                          \
  QEXPORT_D4(n), QEXPORT_D4(n + 1), QEXPORT_D4(n + 2), QEXPORT_D4(n + 3), QEXPORT_D4(n + 4), QEXPORT_D4(n + 5), \
      QEXPORT_D4(n + 6), QEXPORT_D4(n + 7)
#define QEXPORT_TEXT32                                                                                             \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define QEXPORT_TEXT64                                                                                            \
  QEXPORT_TEXT32                                                                                                  \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"

// d = A B' (+ d), 64 rows of A, 16 columns of both, N = 8 * kCount rows of B.
#define QEXPORT_WGMMA_KEYS(kCount, T, TYPE, N, TEXT, D, A, B, P)                                                         \
  __device__ __forceinline__ void wgmma_keys(float (&d)[kCount][4], uint64_t a, uint64_t b, int accumulate, T) {         \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" P ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
                 " {" TEXT "}, %" A ", %" B ", p, 1, 1, 0, 0;}"                                                          \
                 : D                                                                                                     \
                 : "l"(a), "l"(b), "r"(accumulate)                                                                       \
                 : "memory");                                                                                            \
  }
// d += A B, A in registers, 16 rows of B and N = 8 * kCount columns.
#define QEXPORT_WGMMA_VALUES(kCount, T, TYPE, N, TEXT, D, A0, A1, A2, A3, B)                                        \
  __device__ __forceinline__ void wgmma_values(float (&d)[kCount][4], const uint32_t (&a)[4], uint64_t b, T) {      \
    asm volatile("{.reg .pred p; setp.eq.u32 p, 1, 1; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
                 " {" TEXT "}, {%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" B ", p, 1, 1, 1;}"                             \
                 : D                                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                               \
                 : "memory");                                                                                       \
  }
#define QEXPORT_WGMMA_TYPE(T, TYPE)                                                                                       \
  QEXPORT_WGMMA_KEYS(8, T, TYPE, "64", QEXPORT_TEXT32, QEXPORT_D32(0), "32", "33", "34")                                  \
  QEXPORT_WGMMA_KEYS(16, T, TYPE, "128", QEXPORT_TEXT64, QEXPORT_D32(0) QEXPORT_COMMA QEXPORT_D32(8), "64", "65", "66")   \
  QEXPORT_WGMMA_VALUES(8, T, TYPE, "64", QEXPORT_TEXT32, QEXPORT_D32(0), "32", "33", "34", "35", "36")                    \
  QEXPORT_WGMMA_VALUES(16, T, TYPE, "128", QEXPORT_TEXT64, QEXPORT_D32(0) QEXPORT_COMMA QEXPORT_D32(8), "64", "65", "66", \
                       "67", "68")
#define QEXPORT_COMMA ,
QEXPORT_WGMMA_TYPE(__half, "f16")
QEXPORT_WGMMA_TYPE(__nv_bfloat16, "bf16")

#endif
#endif

}  // namespace cuda
}  // namespace qexport
