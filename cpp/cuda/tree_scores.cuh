// The kernel of tiles that scores clusters: which of them a tile reads, and what the centroids of the others give.
#pragma once

#include "tree_passes.cuh"

namespace qexport {
namespace cuda {

// The clusters that a tile whose scores are known reads.
template <class Tile>
__device__ int tile_budget(const ScoreBlock<Tile>& block, int budget) {
  if (!block.tree.shares || !(block.tree.threshold[block.place] > 0.0f)) return budget;
  const uint32_t least = score_key(block.tree.threshold[block.place]);
  int reached = 0;
  for (int c = static_cast<int>(threadIdx.x); c < block.candidates; c += Tile::Flash::kThreads) {
    reached += block.key[c] <= least;
  }
  reached = block_sum(reached, reinterpret_cast<int*>(block.words->parts));
  return max(least_shared(budget), min(reached, most_shared(budget)));
}

// The squared norm of the output of the centroids of a tile.
template <class Tile>
__device__ void put_norm(const ScoreBlock<Tile>& block, typename Tile::State& state, float* norm) {
  float square = 0.0f;
  for_pairs<typename Tile::State>(block, [&](int i, int n, int, int) {
    square += state.pair(i, n)[0] * state.pair(i, n)[0] + state.pair(i, n)[1] * state.pair(i, n)[1];
  });
  square = block_sum(square, block.words->parts);
  if (threadIdx.x == 0) *norm = square;
}

// A tile per block of threads.
template <class Tile>
__global__ void __launch_bounds__(Tile::Flash::kThreads, Tile::Flash::kBlocksPerProcessor)
    tree_scores_kernel(const __grid_constant__ TreeLaunch tree, TreeStep step) {
#ifdef __CUDA_ARCH__
  if (!Tile::State::runs_on(__CUDA_ARCH__)) return;  // spares the compiler what is never started
#endif
  const TreeItem item(tree, step);
  if (!item.runs) return;
  const bool probe = step == TreeStep::probes;
  ScoreBlock<Tile> block(tree, item);
  int32_t* const choice = tree.chosen + blockIdx.x * (1 + tree.most_chosen);
  int budget = min(item.budget, block.candidates);
  if (!probe && budget == block.candidates) {
    if (threadIdx.x == 0) *choice = kAllClusters;
    return;
  }
  load_queries(block);
  typename Tile::State state;
  state.clear();
  const AllClusters any;
  for_summaries<3>(block, block.candidates, any,
                   [&](int i, SummaryScores<Tile>& s, SummaryScores<Tile>& s2, const char* values) {
                     log_weights(block, i, block.candidates, any, s, s2);
                     add_centroids<Tile>(state, s, values, true);
                   });
  float whole[Tile::State::kRows];
  weigh_rows(block, state, whole);
  // The weights of clusters are computed again: kept, they would be queries x clusters.
  float* const scores = probe || tree.draws ? tree.score + blockIdx.x * tree.clusters : nullptr;
  for_summaries<2>(block, block.candidates, any, [&](int i, SummaryScores<Tile>& s, SummaryScores<Tile>& s2, const char*) {
    if (i > 0) put_scores(block, i - 1, scores);
    if (log_weights(block, i, block.candidates, any, s, s2)) {
      lose_clusters<true>(block, i, s, s2, whole);
    } else {
      lose_clusters<false>(block, i, s, s2, whole);
    }
  });
  __syncthreads();
  if (block.candidates > 0) put_scores(block, (block.candidates - 1) / Tile::kKeys, scores);
  if (!probe) {
    __syncthreads();
    budget = min(tile_budget(block, budget), block.candidates);
    if (threadIdx.x == 0) *choice = budget < block.candidates ? budget : kAllClusters;
    if (budget == block.candidates) return;
    choose_clusters(block, budget, choice + 1);
    const ListedClusters chosen{reinterpret_cast<const int32_t*>(block.key)};
    // What was added before and is added here cancels but for rounding: weights are relative to powers of 2, so that both
    // were rounded alike.
    negate(state);
    for_summaries<3>(block, budget, chosen, [&](int i, SummaryScores<Tile>& s, SummaryScores<Tile>& s2, const char* values) {
      log_weights(block, i, budget, chosen, s, s2);
      add_centroids<Tile>(state, s, values, false);
    });
    negate(state);
  }
  close_centroids(block, state, whole);
  if (probe) return put_norm(block, state, tree.probe_norm + blockIdx.x);
  TreeOutput<typename Tile::T>(block, step).put(state);
  float* const weights = tree.centroid_weight + int64_t{blockIdx.x} * kTreeRows;
#pragma unroll
  for (int t = 0; t < Tile::State::kRows; ++t) {
    if (Tile::State::column(0) == 0) weights[Tile::State::row(t)] = state.most[t];
  }
}

}  // namespace cuda
}  // namespace qexport
