// Where a node of the balanced tree is long: the mean of its rows and three steps of the power method (docs/math.md, "tree",
// "Clusters"). Eight threads share a row and 32 rows are on the way at once.
#pragma once

#include "attention.cuh"
#include "row_chunk.cuh"

namespace qexport {
namespace cuda {

constexpr int kNodeThreads = 256, kNodeWarps = kNodeThreads / kWarp;
constexpr int kRowThreads = 8, kRowsAtOnce = kNodeThreads / kRowThreads;
constexpr int kPass = kRowThreads * kChunkRow;  // elements of a row that its threads load at a time
constexpr int kPowerSteps = 3;
constexpr int kDirectionRows = 256;  // of a larger node, so many evenly spaced ones say where it is long

__host__ __device__ inline int node_width(int64_t size) { return static_cast<int>(ceil_div<int64_t>(size, kPass) * kPass); }

// Shared memory of one node. Rows are `width` elements here, zeros from `size` on.
template <class T>
struct NodeShared {
  const T* rows[kDirectionRows];
  float t[kDirectionRows];
  float parts[kWarp];
  int axis;
};
// (width) each but `partial`: (2, kNodeWarps, width).
struct NodeArrays {
  float *mean, *direction, *partial;
};
constexpr int kNodeArrayRows = 2 + 2 * kNodeWarps;
__device__ __forceinline__ NodeArrays node_arrays(float* memory, int width) {
  return {memory, memory + width, memory + 2 * width};
}

// (row - mean) . direction, the same on the eight threads of a row; all 32 lanes take part.
template <class T>
__device__ __forceinline__ float project(const T* row, const NodeArrays& s, int size, int width, bool aligned, bool valid) {
  float t = 0.0f;
  for (int x = static_cast<int>(threadIdx.x) % kRowThreads * kChunkRow; x < width; x += kPass) {
    if (!valid) break;
    float chunk[kChunkRow];
    load_chunk(chunk, row, x, size, aligned);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) t += (chunk[e] - s.mean[x + e]) * s.direction[x + e];
  }
  for (int step = 1; step < kRowThreads; step *= 2) t += __shfl_xor_sync(kFullWarp, t, step);
  return t;
}

// Sums over the row groups of a warp, to partial[which][warp][x ..].
__device__ __forceinline__ void store_partial(float (&sum)[kChunkRow], float* partial, int width, int which, int x) {
#pragma unroll
  for (int e = 0; e < kChunkRow; ++e) {
    for (int step = kRowThreads; step < kWarp; step *= 2) sum[e] += __shfl_xor_sync(kFullWarp, sum[e], step);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp >= kRowThreads) return;
#pragma unroll
  for (int e = 0; e < kChunkRow; ++e) partial[(which * kNodeWarps + warp) * width + x + e] = sum[e];
}

__device__ __forceinline__ float sum_partial(const float* partial, int width, int which, int x) {
  float sum = 0.0f;
  for (int warp = 0; warp < kNodeWarps; ++warp) sum += partial[(which * kNodeWarps + warp) * width + x];
  return sum;
}

// mean, and in `direction` the sums of squared differences from it.
template <class T>
__device__ inline void row_moments(NodeShared<T>& node, const NodeArrays& s, int count, int size, int width, bool aligned) {
  const int thread = static_cast<int>(threadIdx.x);
  const float share = 1.0f / static_cast<float>(count);
  for (int x = thread % kRowThreads * kChunkRow; x < width; x += kPass) {
    // Differences from the first row, so that the sum of squares cancels nothing.
    float sum[kChunkRow] = {}, square[kChunkRow] = {}, origin[kChunkRow], chunk[kChunkRow];
    load_chunk(origin, node.rows[0], x, size, aligned);
    for (int i = thread / kRowThreads; i < count; i += kRowsAtOnce) {
      load_chunk(chunk, node.rows[i], x, size, aligned);
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) {
        const float rest = chunk[e] - origin[e];
        sum[e] += rest, square[e] += rest * rest;
      }
    }
    __syncwarp();
    store_partial(sum, s.partial, width, 0, x);
    store_partial(square, s.partial, width, 1, x);
  }
  __syncthreads();
  for (int x = thread; x < width; x += kNodeThreads) {
    const float sum = sum_partial(s.partial, width, 0, x);
    const float origin = x < size ? to_float(node.rows[0][x]) : 0.0f;
    s.mean[x] = origin + sum * share;
    s.direction[x] = sum_partial(s.partial, width, 1, x) - sum * sum * share;
  }
  __syncthreads();
}

// The mean of the rows, and for a first direction the axis along which they vary most (the first of them).
template <class T>
__device__ inline void start_direction(NodeShared<T>& node, const NodeArrays& s, int count, int size, int width,
                                       bool aligned) {
  const int thread = static_cast<int>(threadIdx.x);
  row_moments(node, s, count, size, width, aligned);
  if (thread < kWarp) {
    float most = -1.0f;
    int axis = 0;
    for (int x = thread; x < size; x += kWarp) {
      if (s.direction[x] > most) most = s.direction[x], axis = x;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, most, step);
      const int other_axis = __shfl_xor_sync(kFullWarp, axis, step);
      if (other > most || (other == most && other_axis < axis)) most = other, axis = other_axis;
    }
    if (thread == 0) node.axis = axis;
  }
  __syncthreads();
  for (int x = thread; x < width; x += kNodeThreads) s.direction[x] = x == node.axis ? 1.0f : 0.0f;
  __syncthreads();
}

// direction = norm(sum ((row - mean) . direction) (row - mean)), unless that is 0 or not finite.
template <class T>
__device__ inline void power_step(NodeShared<T>& node, const NodeArrays& s, int count, int size, int width, bool aligned) {
  const int thread = static_cast<int>(threadIdx.x), group = thread / kRowThreads;
  for (int first = 0; first < count; first += kRowsAtOnce) {
    const int i = first + group;
    const float t = project(node.rows[i < count ? i : 0], s, size, width, aligned, i < count);
    if (i < count && thread % kRowThreads == 0) node.t[i] = t;
  }
  __syncthreads();
  for (int x = thread % kRowThreads * kChunkRow; x < width; x += kPass) {
    float sum[kChunkRow] = {}, chunk[kChunkRow];
    for (int i = group; i < count; i += kRowsAtOnce) {
      load_chunk(chunk, node.rows[i], x, size, aligned);
      const float t = node.t[i];
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) sum[e] += t * (chunk[e] - s.mean[x + e]);
    }
    __syncwarp();
    store_partial(sum, s.partial, width, 0, x);
  }
  __syncthreads();
  float most = 0.0f, square = 0.0f;
  for (int x = thread; x < size; x += kNodeThreads) {
    const float next = sum_partial(s.partial, width, 0, x);
    s.partial[kNodeWarps * width + x] = next;
    most = fmaxf(most, fabsf(next));
  }
  most = block_max(most, node.parts);
  if (!(most > 0.0f) || most == kInf) return;
  const float inverse = 1.0f / most;  // first, so that no square runs out of float32
  for (int x = thread; x < size; x += kNodeThreads) {
    const float next = s.partial[kNodeWarps * width + x] * inverse;
    square += next * next;
  }
  const float norm = inverse / sqrtf(block_sum(square, node.parts));
  for (int x = thread; x < size; x += kNodeThreads) s.direction[x] = s.partial[kNodeWarps * width + x] * norm;
  __syncthreads();
}

// mean and direction of the node whose rows `row_at(i)`, 0 <= i < count, gives.
template <class T, class RowAt>
__device__ inline void node_direction(NodeShared<T>& node, const NodeArrays& s, int64_t count, int size, bool aligned,
                                      int width, RowAt row_at) {
  const int rows = static_cast<int>(count < kDirectionRows ? count : kDirectionRows);
  for (int i = static_cast<int>(threadIdx.x); i < rows; i += kNodeThreads) {
    node.rows[i] = row_at(rows == count ? i : i * count / kDirectionRows);
  }
  __syncthreads();
  start_direction(node, s, rows, size, width, aligned);
  for (int step = 0; step < kPowerSteps; ++step) power_step(node, s, rows, size, width, aligned);
}

}  // namespace cuda
}  // namespace qexport
