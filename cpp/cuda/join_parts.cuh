// The output of a row whose keys were shared out over several blocks of threads.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

namespace qexport {
namespace cuda {

constexpr int kJoinThreads = 256, kJoinColumns = 128;

// What the blocks left, each part `step` rows behind the one before. A part without keys has the sum 0 and no output.
struct RowParts {
  const float* stats;    // (parts, step, 2): maximum of the scores, to base 2, and sum of the weights in units of it
  const float* outputs;  // (parts, step, size), not divided by the sum
  int parts;
  int64_t step;
};

struct JoinedSum {
  float most, sum;
};

inline size_t join_shared_bytes(int64_t parts) {
  return sizeof(float) * static_cast<size_t>(parts + kJoinThreads / kWarp * kJoinColumns);
}

// By kJoinThreads threads, which share out the parts: put(column, x) is called for each element of the output. A row without
// keys is 0. `shared`: join_shared_bytes(parts).
template <class Put>
__device__ __forceinline__ JoinedSum join_parts(const RowParts& row, int size, float* shared, const Put& put) {
  float* const fade = shared;              // (parts,)
  float* const sums = shared + row.parts;  // (warps, kJoinColumns), the scratch of reductions before
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  float most = -kInf, sum = 0.0f;
  for (int i = thread; i < row.parts; i += kJoinThreads) most = fmaxf(most, row.stats[2 * i * row.step]);
  most = block_max(most, sums);
  const float base = most == -kInf ? 0.0f : most;
  for (int i = thread; i < row.parts; i += kJoinThreads) {
    const float part_sum = row.stats[2 * i * row.step + 1];
    fade[i] = part_sum == 0.0f ? 0.0f : fast_exp2(row.stats[2 * i * row.step] - base);
    sum += part_sum == 0.0f ? 0.0f : fade[i] * part_sum;
  }
  sum = block_sum(sum, sums);
  const float unit = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int first = 0; first < size; first += kJoinColumns) {
    const float* const outputs = row.outputs + first;
    const int columns = min(size - first, kJoinColumns);
    float x[kJoinColumns / kWarp] = {};
#pragma unroll 4
    for (int i = warp; i < row.parts; i += kJoinThreads / kWarp) {
      const float weight = fade[i];
#pragma unroll
      for (int e = 0; e < kJoinColumns / kWarp; ++e) {
        // The output of a part without keys is not there; NaN as its weight stays NaN.
        const bool there = weight != 0.0f && lane + e * kWarp < columns;
        x[e] = fmaf(weight, there ? outputs[i * row.step * size + lane + e * kWarp] : 0.0f, x[e]);
      }
    }
    __syncthreads();  // the sums of before have been read
#pragma unroll
    for (int e = 0; e < kJoinColumns / kWarp; ++e) sums[warp * kJoinColumns + lane + e * kWarp] = x[e];
    __syncthreads();
    for (int c = thread; c < columns; c += kJoinThreads) {
      float all = 0.0f;
      for (int w = 0; w < kJoinThreads / kWarp; ++w) all += sums[w * kJoinColumns + c];
      put(first + c, all * unit);
    }
  }
  return {base, sum};
}

}  // namespace cuda
}  // namespace qexport
