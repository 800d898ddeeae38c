// Where a node of the balanced tree is long: the mean of its rows and three steps of the power method (docs/math.md, "tree",
// "Clusters").
#pragma once

#include "attention.cuh"
#include "partition.cuh"
#include "row_moments.cuh"

namespace qexport {
namespace cuda {

constexpr int kPowerSteps = 3;
constexpr int kDirectionRows = 256;  // of a larger node, so many evenly spaced ones say where it is long

// Shared memory of a block that works on one node.
template <class T>
struct NodeShared {
  const T* rows[kDirectionRows];
  float t[kDirectionRows];
  float parts[kWarp];
};

// Through s.mean, along row `which` of s.direction times `scale`, which makes it as long as 1.
struct Axis {
  int which;
  float scale;
};

// t[i] += (row i - mean) . direction over every eighth chunk of a row, from element `at` on.
template <int kEach, class Rows>
__device__ __forceinline__ void add_projection(float (&t)[kEach], const Rows& rows, const int (&row)[kEach],
                                               const NodeArrays& s, const Axis& axis, int at) {
#pragma unroll 1
  for (; at < s.width; at += kPass) {
    __align__(16) typename Rows::Element chunk[kEach][kChunkRow];
    __align__(16) float mean[kChunkRow], direction[kChunkRow];
    rows.load(chunk, row, at);
    copy_whole_chunk(mean, s.mean + at);
    copy_whole_chunk(direction, s.direction + axis.which * s.width + at);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) {
      const float along = direction[e] * axis.scale;
#pragma unroll
      for (int i = 0; i < kEach; ++i) t[i] += (to_float(chunk[i][e]) - mean[e]) * along;
    }
  }
}

template <int kEach>
__device__ __forceinline__ void sum_over_row(float (&t)[kEach]) {
#pragma unroll
  for (int step = 1; step < kRowThreads; step *= 2) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) t[i] += __shfl_xor_sync(kFullWarp, t[i], step);
  }
}

// The largest of some numbers, the first of those.
__device__ __forceinline__ int largest_of(const float* x, int size) {
  float most = -1.0f;
  int best = 0;
#pragma unroll 1
  for (int at = first_chunk(); at < size; at += kPass) {
    __align__(16) float chunk[kChunkRow];
    copy_whole_chunk(chunk, x + at);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) {
      if (at + e < size && chunk[e] > most) most = chunk[e], best = at + e;
    }
  }
#pragma unroll
  for (int step = 1; step < kRowThreads; step *= 2) {
    const float other = __shfl_xor_sync(kFullWarp, most, step);
    const int other_at = __shfl_xor_sync(kFullWarp, best, step);
    if (other > most || (other == most && other_at < best)) most = other, best = other_at;
  }
  return best;
}

// What makes a vector as long as 1, on every thread; 0 if it is 0 or not finite.
__device__ __forceinline__ float inverse_length(const float* x, int width) {
  __align__(16) float chunk[kChunkRow];
  float most = 0.0f, square = 0.0f;
#pragma unroll 1
  for (int at = first_chunk(); at < width; at += kPass) {
    copy_whole_chunk(chunk, x + at);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) most = fmaxf(most, fabsf(chunk[e]));
  }
#pragma unroll
  for (int step = 1; step < kRowThreads; step *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, step));
  if (!(most > 0.0f) || most == kInf) return 0.0f;
  const float inverse = 1.0f / most;  // first, so that no square runs out of float32
#pragma unroll 1
  for (int at = first_chunk(); at < width; at += kPass) {
    copy_whole_chunk(chunk, x + at);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) square += chunk[e] * inverse * (chunk[e] * inverse);
  }
#pragma unroll
  for (int step = 1; step < kRowThreads; step *= 2) square += __shfl_xor_sync(kFullWarp, square, step);
  return inverse / sqrtf(square);
}

// norm(sum ((row - mean) . direction) (row - mean)), unless that is 0 or not finite. The mean is taken off
// the sums of a thread, not off every element. t_of: (count), scratch.
template <int kEach, class Rows>
__device__ __forceinline__ Axis power_step(const Team& team, const Rows& rows, int count, const NodeArrays& s,
                                           const Axis& axis, float* t_of) {
  const int width = s.width;
  float* next = s.direction + (1 - axis.which) * width;
#pragma unroll 1
  for (int at = first_chunk(); at < width; at += kPass) {
    const bool first_pass = at < kPass;
    const bool more = width > kPass;
    __align__(16) float mean[kChunkRow], direction[kChunkRow];
    float sum[kChunkRow] = {}, middle = 0.0f, all = 0.0f;
    copy_whole_chunk(mean, s.mean + at);
    copy_whole_chunk(direction, s.direction + axis.which * width + at);
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) direction[e] *= axis.scale, middle += mean[e] * direction[e];
    __syncwarp();  // later passes read what the first has left in t_of
#pragma unroll 1
    for (int base = 0; base < count; base += rows_of_step(team, kEach)) {
      __align__(16) typename Rows::Element chunk[kEach][kChunkRow];
      int row[kEach];
      float t[kEach], x[kEach][kChunkRow];
      own_rows(row, team, base, count);
      rows.load(chunk, row, at);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        t[i] = -middle;
#pragma unroll
        for (int e = 0; e < kChunkRow; ++e) x[i][e] = to_float(chunk[i][e]), t[i] += x[i][e] * direction[e];
      }
      if (first_pass) {
        if (more) add_projection(t, rows, row, s, axis, at + kPass);
        sum_over_row(t);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool valid = base + row_of_step(team, i) < count;
        if (more && first_pass && valid && at == 0) t_of[row[i]] = t[i];
        if (!first_pass && valid) t[i] = t_of[row[i]];  // another team may write what is not a row of this one
        if (!valid) t[i] = 0.0f;
        all += t[i];
#pragma unroll
        for (int e = 0; e < kChunkRow; ++e) sum[e] += t[i] * x[i][e];
      }
    }
#pragma unroll
    for (int e = 0; e < kChunkRow; ++e) sum[e] -= all * mean[e];
    store_partial(team, sum, s.partial, width, at);
  }
  team.sync();
  for (int x = team.thread; x < width; x += team.threads()) next[x] = sum_partial(team, s.partial, width, x);
  team.sync();
  const float scale = inverse_length(next, width);
  return scale > 0.0f ? Axis{1 - axis.which, scale} : axis;
}

// Where rows 0 .. count - 1 are long. t: (count), scratch. Steps that have sums to keep take half as many rows at once.
template <int kEach, class Rows>
__device__ inline Axis node_direction(const Team& team, const Rows& rows, int count, int size, const NodeArrays& s,
                                      float* t) {
  row_moments<kEach>(team, rows, count, s);
  const int best = largest_of(s.direction, size);
  for (int x = team.thread; x < s.width; x += team.threads()) s.direction[s.width + x] = x == best ? 1.0f : 0.0f;
  team.sync();
  Axis axis{1, 1.0f};
#pragma unroll 1
  for (int step = 0; step < kPowerSteps; ++step) {
    axis = power_step<kEach / 2>(team, rows, count, s, axis, t);
  }
  return axis;
}

// key[i] = the projection of row i, 0 <= i < count, in an order of integers.
template <int kEach, class Rows>
__device__ __forceinline__ void project_rows(const Team& team, const Rows& rows, int count, const NodeArrays& s,
                                             const Axis& axis, uint32_t* key) {
#pragma unroll 1
  for (int base = 0; base < count; base += rows_of_step(team, kEach)) {
    int row[kEach];
    float t[kEach] = {};
    own_rows(row, team, base, count);
    add_projection(t, rows, row, s, axis, first_chunk());
    sum_over_row(t);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (base + row_of_step(team, i) < count && first_chunk() == 0) key[row[i]] = ordered_bits(t[i]);
    }
  }
}

}  // namespace cuda
}  // namespace qexport
