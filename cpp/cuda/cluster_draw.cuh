// The clusters that stand for those that are not read (docs/math.md, "Residual").
#pragma once

#include "row_select.cuh"

namespace qexport {
namespace cuda {

// A systematic sample of about `budget` of the clusters 0..n-1 in proportion to size[c], by a warp: which, at most `most` of
// them in order, and 1 over the probability of each. Returns how many. `size` begins on 16 bytes, and where n is no multiple
// of 4 zeros follow up to one.
__device__ __forceinline__ int draw_clusters(float* size, int n, float budget, uint32_t random, int most, int32_t* cluster,
                                             float* factor) {
  n = ceil_div(n, 4) * 4;
  PartSum rest;
  float largest = 0.0f;
  for (int i = 4 * lane_id(); i < n; i += kStep) {
    const KeyQuad x = load_quad(size + i);
    rest.add((x.v[0] + x.v[1]) + (x.v[2] + x.v[3]));
    for (int u = 0; u < 4; ++u) largest = fmaxf(largest, x.v[u]);
  }
  const Row drawn{size, n, nullptr, n, 1.0f, 1.0f, rest.warp(), warp_max(largest)};
  // Sizes that are no numbers, or have no sum, are those of a spoilt state: nothing is drawn.
  if (!(drawn.rest > 0.0f && budget / drawn.rest < kInf && drawn.rest < kInf)) return 0;
  int count = 0;
  const float c = inclusion_factor(drawn, budget, 0);
  systematic(drawn, Others::sampled, c, random >> 8, [&](int i, float w) {
    const unsigned all = __ballot_sync(kFullWarp, w != 0.0f);
    const int at = count + __popc(all & lanes_below());
    if (w != 0.0f && at < most) cluster[at] = i, factor[at] = w / size[i];
    count = min(count + __popc(all), most);
  });
  return count;
}

}  // namespace cuda
}  // namespace qexport
