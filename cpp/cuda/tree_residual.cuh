// Half-samples of the clusters that a tile did not read (docs/math.md, "tree", "Residual"): what the kernel that draws them
// hands to the one that reads them.
#pragma once

#include "tree_rows.cuh"

namespace qexport {
namespace cuda {

constexpr int kHalfSample = 4, kMostDrawn = kHalfSample + 1;  // clusters; a systematic sample may round up

struct HalfSample {
  int32_t count;
  int32_t cluster[kMostDrawn];
  float factor[kMostDrawn];    // log2(1 / pi)
  float centroid[kMostDrawn];  // log2(keys / pi)
};

// Fills tree.halves for the tiles of a step; tree_draw.cu.
void draw_half_samples(Status& status, const TreeLaunch& tree, TreeStep step, int64_t blocks, void* stream);

}  // namespace cuda
}  // namespace qexport
