// The output of a row whose keys were shared out over several blocks of threads.
#pragma once

#include "attention.cuh"
#include "mma.cuh"
#include "team.cuh"

namespace qexport {
namespace cuda {

constexpr int kJoinThreads = 256, kJoinWarps = kJoinThreads / kWarp, kJoinColumns = 128;
constexpr int kWarpParts = 16;  // up to so many a warp joins a row alone, without a barrier; a guess

// What the blocks left.
struct RowParts {
  const float* stats;    // (parts, 2): maximum of the scores, to base 2, and sum of the weights in units of it
  const float* outputs;  // (parts, size), not divided by the sum; a part without keys has the sum 0 and no output
  int parts;
};

struct JoinedSum {
  float most, sum;
};

// By a team whose warps share out the parts, one warp or all of a block of kJoinThreads: put(column, x) is called for each
// element of the output. A row without keys is 0.
template <class Put>
__device__ __forceinline__ JoinedSum join_parts(const RowParts& row, int size, const Team& team, const Put& put) {
  __shared__ float sums[kJoinWarps][kJoinColumns];
  const int lane = team.lane();
  // Each warp looks at all parts, which lie together: that is sooner than to meet.
  float most = -kInf, sum = 0.0f;
  for (int i = lane; i < row.parts; i += kWarp) most = fmaxf(most, row.stats[2 * i]);
  most = warp_max(most);
  const float base = most == -kInf ? 0.0f : most;
  const auto weight_of = [&](int i) { return row.stats[2 * i + 1] == 0.0f ? 0.0f : fast_exp2(row.stats[2 * i] - base); };
  for (int i = lane; i < row.parts; i += kWarp) sum = fmaf(weight_of(i), row.stats[2 * i + 1], sum);
  sum = warp_sum(sum);
  const float unit = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int first = 0; first < size; first += kJoinColumns) {
    const float* const outputs = row.outputs + first;
    const int columns = min(size - first, kJoinColumns);
    float x[kJoinColumns / kWarp] = {};
#pragma unroll 4
    for (int i = team.warp(); i < row.parts; i += team.warps) {
      const float weight = weight_of(i);
#pragma unroll
      for (int e = 0; e < kJoinColumns / kWarp; ++e) {
        // The output of a part without keys is not there; NaN as its weight stays NaN.
        const bool there = weight != 0.0f && lane + e * kWarp < columns;
        x[e] = fmaf(weight, there ? outputs[int64_t{i} * size + lane + e * kWarp] : 0.0f, x[e]);
      }
    }
    if (team.warps == 1) {
#pragma unroll
      for (int e = 0; e < kJoinColumns / kWarp; ++e) {
        if (lane + e * kWarp < columns) put(first + lane + e * kWarp, x[e] * unit);
      }
      continue;
    }
    team.sync();  // the sums of before have been read
#pragma unroll
    for (int e = 0; e < kJoinColumns / kWarp; ++e) sums[team.warp()][lane + e * kWarp] = x[e];
    team.sync();
    for (int c = team.thread; c < columns; c += team.threads()) {
      float all = 0.0f;
      for (int w = 0; w < team.warps; ++w) all += sums[w][c];
      put(first + c, all * unit);
    }
  }
  return {base, sum};
}

}  // namespace cuda
}  // namespace qexport
