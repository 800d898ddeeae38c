// Eight elements of a row at a time.
#pragma once

#include "common.cuh"

namespace qexport {
namespace cuda {

constexpr int kChunkRow = 8;  // elements

// Both begin on 16 bytes.
template <class T>
__device__ __forceinline__ void copy_whole_chunk(T* to, const T* from) {
  constexpr int kVectors = sizeof(T) * kChunkRow / sizeof(uint4);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

// x[i][e] = row[i][at + e], 0 from `size` on. `aligned`: rows begin on 16 bytes, as x does; `at` is a multiple of kChunkRow.
// All loads are on the way before the first has arrived.
template <int kRows, class T>
__device__ __forceinline__ void copy_chunks(T (&x)[kRows][kChunkRow], const T* const (&row)[kRows], int at, int size,
                                            bool aligned) {
  if (aligned && at + kChunkRow <= size) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) copy_whole_chunk(x[i], row[i] + at);
  } else {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) x[i][e] = at + e < size ? row[i][at + e] : from_float<T>(0.0f);
    }
  }
}

// One row, as float32.
template <class T>
__device__ __forceinline__ void load_chunk(float (&x)[kChunkRow], const T* row, int at, int size, bool aligned) {
  __align__(16) T chunk[1][kChunkRow];
  copy_chunks(chunk, {row}, at, size, aligned);
#pragma unroll
  for (int e = 0; e < kChunkRow; ++e) x[e] = to_float(chunk[0][e]);
}

inline bool starts_on_16_bytes(const HeadRows& rows, int64_t element_size) {
  const auto whole = [&](int64_t stride) { return stride * element_size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && whole(rows.batch_stride) && whole(rows.head_stride) &&
         whole(rows.row_stride);
}

}  // namespace cuda
}  // namespace qexport
