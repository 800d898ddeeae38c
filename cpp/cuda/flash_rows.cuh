// How the rows that a tile has found go to global memory.
#pragma once

#include <cstring>

#include "flash_tile.cuh"
#include "mma.cuh"

namespace qexport {
namespace cuda {

__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Lane l of four neighbours has word l of four chunks and gets the four words of chunk l.
__device__ __forceinline__ void quad_transpose(uint32_t (&x)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = threadIdx.x & static_cast<unsigned>(step);
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & step) continue;
      const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? x[low] : x[low + step], step);
      x[low] = upper ? got : x[low];
      x[low + step] = upper ? x[low + step] : got;
    }
  }
}

// Whether rows can be written by put_row, which asks for units of 16 bytes in half types.
template <class T>
__host__ __device__ bool takes_whole_units(const T* y, int64_t stride) {
  constexpr uintptr_t kUnit = sizeof(T) == 2 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(y) % kUnit == 0 && static_cast<uintptr_t>(stride) * sizeof(T) % kUnit == 0;
}

// Writes row i of the state, times `unit`, where it is `there`; by all lanes of a warp. A half type has 4 bytes of 16 that
// lie together on a lane: written as they are, each instruction would fill half a sector of 32 bytes.
template <class T, class State>
__device__ __forceinline__ void put_row(State& state, int i, float unit, bool there, T* to, int columns) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
      const int column = State::column(n);
      const float2 pair{state.pair(i, n)[0] * unit, state.pair(i, n)[1] * unit};
      if (there && column < columns) *reinterpret_cast<float2*>(to + column) = pair;
    }
  } else {
    static_assert(State::kPairs % 4 == 0);
#pragma unroll
    for (int n = 0; n < State::kPairs; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        words[e] = pack_pair(state.pair(i, n + e)[0] * unit, state.pair(i, n + e)[1] * unit, T{});
      }
      quad_transpose(words);
      const int column = 8 * (n + static_cast<int>(threadIdx.x % 4));
      if (there && column < columns) {
        *reinterpret_cast<uint4*>(to + column) = uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
}

}  // namespace cuda
}  // namespace qexport
