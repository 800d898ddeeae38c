// Eight elements of a row at a time, as float32.
#pragma once

#include "common.cuh"

namespace qexport {
namespace cuda {

constexpr int kChunkRow = 8;  // elements

// x[e] = row[at + e], 0 from `size` on. `aligned`: the row begins on 16 bytes; `at` is a multiple of kChunkRow.
template <class T>
__device__ __forceinline__ void load_chunk(float (&x)[kChunkRow], const T* row, int at, int size, bool aligned) {
  if (aligned && at + kChunkRow <= size) {
    constexpr int kVectors = sizeof(T) * kChunkRow / sizeof(uint4);
    __align__(16) T chunk[kChunkRow];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(chunk)[i] = reinterpret_cast<const uint4*>(row + at)[i];
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) x[e] = to_float(chunk[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) x[e] = at + e < size ? to_float(row[at + e]) : 0.0f;
  }
}

inline bool starts_on_16_bytes(const HeadRows& rows, int64_t element_size) {
  const auto whole = [&](int64_t stride) { return stride * element_size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && whole(rows.batch_stride) && whole(rows.head_stride) &&
         whole(rows.row_stride);
}

}  // namespace cuda
}  // namespace qexport
