// Rows that a team of threads goes through, and their moments. Eight threads share a row, and each has kEach rows on the way
// at once, so that none waits for the one before. Rows are a type with
//   Element                                                                 of a row
//   load(Element (&x)[kEach][kChunkRow], const int (&row)[kEach], int at)   elements from `at` on, zeros behind the last
#pragma once

#include "row_chunk.cuh"
#include "team.cuh"

namespace qexport {
namespace cuda {

constexpr int kRowThreads = 8, kWarpRows = kWarp / kRowThreads;
constexpr int kPass = kRowThreads * kChunkRow;  // elements of a row that its threads load at a time

// Rows are so many elements here.
__host__ __device__ inline int node_width(int64_t size) { return static_cast<int>(ceil_div<int64_t>(size, kPass) * kPass); }

// Shared memory of a team: (width) each but `direction`, which is (2, width), and `partial`, (2, warps, width).
struct NodeArrays {
  int width;
  float *mean, *direction, *partial;
};
__host__ __device__ constexpr int node_array_rows(int warps) { return 3 + 2 * warps; }
__device__ __forceinline__ NodeArrays node_arrays(float* memory, int width) {
  return {width, memory, memory + width, memory + 3 * width};
}

template <class T>
struct PointedRows {
  using Element = T;
  const T* const* row;
  int size;
  bool aligned;
  template <int kEach>
  __device__ __forceinline__ void load(T (&x)[kEach][kChunkRow], const int (&index)[kEach], int at) const {
    const T* some[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) some[i] = row[index[i]];
    copy_chunks(x, some, at, size, aligned);
  }
};

__device__ __forceinline__ int first_chunk() { return static_cast<int>(threadIdx.x) % kRowThreads * kChunkRow; }

// Rows of a step in which a thread has so many of them, and number i of its own.
__device__ __forceinline__ int rows_of_step(const Team& team, int each) { return each * team.warps * kWarpRows; }
__device__ __forceinline__ int row_of_step(const Team& team, int i) {
  return rows_of_step(team, i) + team.thread / kRowThreads;
}
// All of its own from `base` on; 0 for those from `count` on.
template <int kEach>
__device__ __forceinline__ void own_rows(int (&row)[kEach], const Team& team, int base, int count) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) row[i] = base + row_of_step(team, i) < count ? base + row_of_step(team, i) : 0;
}

// Sums over the rows of a warp, to its partial[at ..].
__device__ __forceinline__ void store_partial(const Team& team, float (&sum)[kChunkRow], float* partial, int width, int at) {
#pragma unroll
  for (int step = kRowThreads; step < kWarp; step *= 2) {
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) sum[e] += __shfl_xor_sync(kFullWarp, sum[e], step);
  }
  if (team.lane() >= kRowThreads) return;
  float4* to = reinterpret_cast<float4*>(partial + team.warp() * width + at);
  to[0] = float4{sum[0], sum[1], sum[2], sum[3]}, to[1] = float4{sum[4], sum[5], sum[6], sum[7]};
}

__device__ __forceinline__ float sum_partial(const Team& team, const float* partial, int width, int x) {
  float sum = 0.0f;
#pragma unroll 4
  for (int warp = 0; warp < team.warps; ++warp) sum += partial[warp * width + x];
  return sum;
}

// mean, and in `direction` the sums of squared differences from it. Row 0 can be loaded even if count is 0.
template <int kEach, class Rows>
__device__ __forceinline__ void row_moments(const Team& team, const Rows& rows, int count, const NodeArrays& s) {
  const int width = s.width;
  float* squares = s.partial + team.warps * width;
#pragma unroll 1
  for (int at = first_chunk(); at < width; at += kPass) {
    // Differences from the first row, so that the sum of squares cancels nothing. It also stands for rows that are not
    // there.
    __align__(16) typename Rows::Element first[1][kChunkRow];
    float origin[kChunkRow], sum[kChunkRow] = {}, own[kChunkRow] = {};
    rows.load(first, {0}, at);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) origin[e] = to_float(first[0][e]);
#pragma unroll 1
    for (int base = 0; base < count; base += rows_of_step(team, kEach)) {
      __align__(16) typename Rows::Element chunk[kEach][kChunkRow];
      int row[kEach];
      own_rows(row, team, base, count);
      rows.load(chunk, row, at);
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float rest = to_float(chunk[i][e]) - origin[e];
          sum[e] += rest, own[e] += rest * rest;
        }
      }
    }
    store_partial(team, sum, s.partial, width, at);
    store_partial(team, own, squares, width, at);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) {
      if (team.thread < kRowThreads) s.mean[at + e] = origin[e];
    }
  }
  team.sync();
  const float share = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
  for (int x = team.thread; x < width; x += team.threads()) {
    const float sum = sum_partial(team, s.partial, width, x);
    s.mean[x] += sum * share;
    s.direction[x] = sum_partial(team, squares, width, x) - sum * sum * share;
  }
  team.sync();
}

}  // namespace cuda
}  // namespace qexport
