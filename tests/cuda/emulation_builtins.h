// What CUDA's C++ has without an include: qualifiers, the places of a thread, barriers, warp operations and intrinsics.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation_threads.h"

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __align__
#define __align__(n) alignas(n)
#undef __noinline__
#define __noinline__
#undef __restrict__
#define __restrict__ __restrict

#define threadIdx (emulation::block->now->index)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->size)
#define gridDim (emulation::block->grid)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::check_mask(mask);
  emulation::warp_meet("__syncwarp", emulation::Order::kMemory);
}
inline int __syncthreads_or(int predicate) { return emulation::barrier_or(predicate); }
namespace emulation {
template <class T>
T shuffle(const char* operation, unsigned mask, const T& value, int lane, int width) {
  check_mask(mask);
  const auto* slots = exchange(operation, value);
  return from_slot<T>(slots[block->now->lane / width * width + (lane & (width - 1))]);
}
inline unsigned vote(const char* operation, unsigned mask, int predicate) {
  check_mask(mask);
  const auto* slots = exchange(operation, predicate ? 1 : 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= from_slot<int>(slots[i]) ? 1u << i : 0u;
  return bits;
}
}  // namespace emulation
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulation::shuffle("__shfl_sync", mask, value, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::block->now->lane % width ^ other, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = emulation::block->now->lane % width, at = own - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value, at < 0 ? own : at, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::vote("__ballot_sync", mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return emulation::vote("__any_sync", mask, predicate) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) {
  volatile float y = a * b;
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
template <class T>
T atomicAdd(T* p, T x) {
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;
