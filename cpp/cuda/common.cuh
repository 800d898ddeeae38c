// What every CUDA kernel here stands on: launches that report errors, shared memory, conversions of elements.
//
// The same sources compile as plain C++ with QEXPORT_CUDA_EMULATION, for tests without a GPU: emulation.h then runs the
// threads of a block one after the other, as fibers. For that, kernels are started by `launch` alone, take dynamic shared
// memory from `dynamic_shared`, and give the warp operations the full mask, with all 32 lanes of the warp arriving.
#pragma once

#ifdef QEXPORT_CUDA_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>

#include "qexport/cuda_kernels.h"
#include "qexport/dtype.h"

namespace qexport {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

// The first error of a call; later steps are skipped. `text` is null as long as all went well.
struct Status {
  const char* text = nullptr;
  bool ok() const { return text == nullptr; }
  void fail(const char* message) {
    if (!text) text = message;
  }
};

// The newest of the `compiled` architectures (10 * compute capability) that has code for a card: what its kernels are,
// whatever the card could do. Those of 9.0 are for it alone (sm_90a).
constexpr int code_for(int capability, std::initializer_list<int> compiled) {
  int found = 0;
  for (const int architecture : compiled) {
    const int own = architecture / 10;
    if (own <= capability && own > found && (own != 90 || capability == 90)) found = own;
  }
  return found;
}

constexpr int kSharedDeclared = 8 * 1024;  // bytes of shared memory that a kernel declares, at most; the rest is dynamic

#ifndef QEXPORT_CUDA_EMULATION

__device__ __forceinline__ char* dynamic_shared_bytes() {
  extern __shared__ __align__(1024) char qexport_dynamic_shared[];
  return qexport_dynamic_shared;
}

// The compute capability, as 10 * major + minor, that the kernels of the current device were compiled for, its number of
// multiprocessors, and the most shared memory that a block of threads may have.
struct Device {
  int capability, multiprocessors, shared_bytes;
};

inline void check(Status& status, cudaError_t code) {
  if (code == cudaSuccess) return;
  status.fail(cudaGetErrorString(code));
  cudaGetLastError();  // which the next launch of this thread would take for its own
}

constexpr size_t kSharedUnasked = 48 * 1024;  // that a block may have: what its kernel declares, and dynamic memory

// Lets a kernel have so many bytes of dynamic shared memory on the current device. What it may have grows and never shrinks:
// another thread may be about to start it with more.
inline void allow_shared(Status& status, const void* kernel, size_t bytes) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes now{};
  check(status, cudaFuncGetAttributes(&now, kernel));
  const size_t has = static_cast<size_t>(now.maxDynamicSharedSizeBytes);
  if (!status.ok() || now.sharedSizeBytes + bytes <= kSharedUnasked || (has > kSharedUnasked && has >= bytes)) return;
  const int most = static_cast<int>(std::max(has, bytes));
  check(status, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Queues kernel<<<grid, block, shared_bytes, stream>>>(args...), with an attribute or none.
template <class... Params, class... Args>
void launch_with(Status& status, cudaLaunchAttribute* attribute, void (*kernel)(Params...), dim3 grid, dim3 block,
                 size_t shared_bytes, void* stream, Args... args) {
  if (!status.ok() || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes + kSharedDeclared > kSharedUnasked)
    allow_shared(status, reinterpret_cast<const void*>(kernel), shared_bytes);
  if (!status.ok()) return;
  const unsigned attributes = attribute ? 1 : 0;
  const cudaLaunchConfig_t config{grid, block, shared_bytes, static_cast<cudaStream_t>(stream), attribute, attributes};
  check(status, cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}
template <class... Params, class... Args>
void launch(Status& status, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Args... args) {
  launch_with(status, nullptr, kernel, grid, block, shared_bytes, stream, args...);
}
// Its blocks of threads begin where those of the kernel before leave room, once all of them have called let_next_begin or
// are done ("Programmatic Dependent Launch" of the CUDA programming guide). They begin with wait_for_kernel_before.
template <class... Params, class... Args>
void launch_overlapping(Status& status, const Device& device, void (*kernel)(Params...), dim3 grid, dim3 block,
                        size_t shared_bytes, void* stream, Args... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch_with(status, device.capability >= 90 ? &attribute : nullptr, kernel, grid, block, shared_bytes, stream, args...);
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline void fill_zero(Status& status, void* data, size_t bytes, void* stream) {
  if (status.ok() && bytes) check(status, cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

inline Device current_device(Status& status) {
  int id = 0, major = 0, minor = 0, count = 1, shared = 0;
  check(status, cudaGetDevice(&id));
  check(status, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
  check(status, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id));
  check(status, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id));
  check(status, cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
  return {code_for(10 * major + minor, {__CUDA_ARCH_LIST__}), count, shared};
}

#endif

template <class T>
__device__ __forceinline__ T* dynamic_shared(size_t offset_bytes = 0) {
  return reinterpret_cast<T*>(dynamic_shared_bytes() + offset_bytes);
}

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__host__ __device__ __forceinline__ T from_float(float x);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__host__ __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T>
__host__ __device__ __forceinline__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Divides by what the host knows, without a division: numbers from 0 to 2^31 - 1 by one from 1 to 2^31 - 1 (Granlund and
// Montgomery, "Division by invariant integers using multiplication", PLDI 1994).
struct Divisor {
  int divisor = 1, shift = 0;
  uint32_t factor = 0;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(static_cast<int>(by)) {
    while ((int64_t{1} << shift) < by) ++shift;
    if (by > 1) factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + by - 1) / by), --shift;
  }
  __device__ __forceinline__ int divide(int x) const {
    return divisor == 1 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), factor) >> shift);
  }
  __device__ __forceinline__ int divide(int x, int* rest) const {
    const int quotient = divide(x);
    *rest = x - quotient * divisor;
    return quotient;
  }
};

// Sums and maxima over a warp, the same on every lane and in the same order on every device.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// What `join` makes of the values of all warps of a block (of a multiple of 32 threads), the same on every thread; `x` is
// that of the thread's warp. `parts` is shared memory of 32 values that nothing else uses until all threads have passed the
// next barrier.
template <class T, class Join>
__device__ __forceinline__ T join_warps(T x, T* parts, const Join& join) {
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  T all = parts[0];
  for (int i = 1; i < warps; ++i) all = join(all, parts[i]);
  return all;
}
template <class T>
__device__ __forceinline__ T block_sum(T x, T* parts) {
  return join_warps(warp_sum(x), parts, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T block_max(T x, T* parts) {
  return join_warps(warp_max(x), parts, [](T a, T b) { return b > a ? b : a; });
}

}  // namespace cuda
}  // namespace qexport
