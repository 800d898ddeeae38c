// The half-samples of the tiles of `tree`, from the scores of their clusters (docs/math.md, "tree", "Residual").
#include "cluster_draw.cuh"
#include "tree_residual.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kDrawThreads = 128;

// A tile per block of threads, a half-sample per warp. size = sqrt(score) + a quarter of its mean over the clusters that may
// be drawn, so that none has a vanishing probability.
__global__ void __launch_bounds__(kDrawThreads)
    draw_half_samples_kernel(const __grid_constant__ TreeLaunch tree, TreeStep step) {
  __shared__ float parts[kWarp];
  const TreeItem item(tree, step);
  const int32_t* const choice = tree.chosen + blockIdx.x * (1 + tree.most_chosen);
  if (!item.runs || *choice == kAllClusters) return;
  const TreeRows<float> rows(tree, item.place, item.tile);  // of which no row is read here, whatever its type
  const float* const score = tree.score + blockIdx.x * tree.clusters;
  float* const size = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), half = thread / kWarp, lane = thread % kWarp;
  const int candidates = rows.candidates, chosen = *choice;
  for (int c = thread; c < candidates; c += kDrawThreads) size[c] = sqrtf(fmaxf(score[c], 0.0f));
  __syncthreads();
  constexpr float kChosen = -1.0f;
  for (int i = thread; i < chosen; i += kDrawThreads) size[choice[1 + i]] = kChosen;
  __syncthreads();
  float sum = 0.0f;
  for (int c = thread; c < candidates; c += kDrawThreads) sum += fmaxf(size[c], 0.0f);
  const float least = 0.25f * block_sum(sum, parts) / static_cast<float>(candidates - chosen);
  for (int c = thread; c < ceil_div(candidates, 4) * 4; c += kDrawThreads) {
    size[c] = c < candidates && size[c] != kChosen ? size[c] + least : 0.0f;
  }
  __syncthreads();
  if (half >= 2) return;
  const uint64_t seed = seed_of(tree.job);
  const PhiloxBlock random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                                        {{tree.job.params.layer, static_cast<uint32_t>(item.place),
                                          static_cast<uint32_t>(item.tile), static_cast<uint32_t>(half)}});
  HalfSample& sample = tree.halves[2 * int64_t{blockIdx.x} + half];
  const int count = draw_clusters(size, candidates, kHalfSample, random.word[0], kMostDrawn, sample.cluster, sample.factor);
  __syncwarp();
  if (lane == 0) sample.count = count;
  if (lane >= count) return;
  const int keys = sample.cluster[lane] < rows.full ? kCluster : rows.rest;
  const float factor = sample.factor[lane];
  sample.factor[lane] = log2f(factor), sample.centroid[lane] = log2f(factor * static_cast<float>(keys));
}

}  // namespace

void draw_half_samples(Status& status, const TreeLaunch& tree, TreeStep step, int64_t blocks, void* stream) {
  launch(status, draw_half_samples_kernel, dim3(static_cast<unsigned>(blocks)), kDrawThreads,
         sizeof(float) * static_cast<size_t>(tree.clusters + 3), stream, tree, step);
}

}  // namespace cuda
}  // namespace qexport
