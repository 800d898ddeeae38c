// The kernel of tiles: what one block of threads computes in each step of `tree`.
#pragma once

#include "tree_chosen.cuh"
#include "tree_passes.cuh"

namespace qexport {
namespace cuda {

// The clusters that a tile whose scores are known reads.
template <class Tile>
__device__ int tile_budget(const TreeRowBlock<Tile>& block, int budget) {
  if (!block.tree.shares || !(block.tree.threshold[block.place] > 0.0f)) return budget;
  const uint32_t least = score_key(block.tree.threshold[block.place]);
  int reached = 0;
  for (int c = static_cast<int>(threadIdx.x); c < block.candidates; c += Tile::Flash::kThreads) {
    reached += block.key[c] <= least;
  }
  reached = block_sum(reached, reinterpret_cast<int*>(block.words->parts));
  return max(least_shared(budget), min(reached, most_shared(budget)));
}

// Calls put(row, column, x, y) for every pair of elements of the tile, divided by the sum of its row where `divide`.
template <class Tile, class Put>
__device__ __forceinline__ void for_pairs(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state,
                                          bool divide, Put put) {
  using State = FlashState<typename Tile::Flash>;
  const int dv = static_cast<int>(block.tree.job.params.v_head_size);
#pragma unroll
  for (int i = 0; i < State::kRows; ++i) {
    if (state.row(i) >= block.rows) continue;
    const float unit = !divide ? 1.0f : state.sum[i] > 0.0f ? 1.0f / state.sum[i] : 0.0f;  // a row without keys is 0
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
      if (state.column(n) < dv) put(state.row(i), state.column(n), state.pair(i, n)[0] * unit, state.pair(i, n)[1] * unit);
    }
  }
}

template <class Tile>
__device__ void put_output(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state) {
  using T = typename Tile::Flash::T;
  for_pairs(block, state, true, [&](int row, int column, float x, float y) {
    T* const to = output_row<T>(block.tree.job, block.b, block.q_head, block.first_row + row) + column;
    if (reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
      *reinterpret_cast<uint32_t*>(to) = pack_pair(x, y, T{});
    } else {
      to[0] = from_float<T>(x), to[1] = from_float<T>(y);
    }
  });
}

// As float32, to rows of v_head_size.
template <class Tile>
__device__ void put_rows(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state, bool divide, float* to) {
  const int dv = static_cast<int>(block.tree.job.params.v_head_size);
  for_pairs(block, state, divide, [&](int row, int column, float x, float y) {
    *reinterpret_cast<float2*>(to + row * dv + column) = make_float2(x, y);
  });
}

// The squared norm of the output of a tile.
template <class Tile>
__device__ void put_norm(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state, float* norm) {
  float square = 0.0f;
  for_pairs(block, state, true, [&](int, int, float x, float y) { square += x * x + y * y; });
  square = block_sum(square, block.words->parts);
  if (threadIdx.x == 0) *norm = square;
}

template <class Tile>
__device__ void put_part(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state, int64_t part) {
  using State = FlashState<typename Tile::Flash>;
  put_rows(block, state, false, block.tree.audit_output + part * kTreeRows * block.tree.job.params.v_head_size);
#pragma unroll
  for (int i = 0; i < State::kRows; ++i) {
    float* const stats = block.tree.audit_stats + 2 * (part * kTreeRows + state.row(i));
    if (state.column(0) == 0) stats[0] = state.most[i], stats[1] = state.sum[i];
  }
}

// A tile, or an audit, per block of threads.
template <class Tile>
__global__ void __launch_bounds__(Tile::Flash::kThreads, Tile::Flash::kBlocksPerProcessor)
    tree_kernel(const __grid_constant__ TreeLaunch tree, TreeStep step) {
  const bool probe = step == TreeStep::probes, trial = step == TreeStep::trials, audit = step == TreeStep::audits;
  const int64_t each = probe ? kProbes : trial ? kTrials * tree.trials : audit ? tree.audit_parts : tree.tiles;
  const int64_t place = blockIdx.x / each;
  const int index = static_cast<int>(blockIdx.x % each);
  int budget = tree.budget && !trial ? tree.budget[place] : tree.bought(place);
  if (trial) {
    const int doubled = index % tree.trials;
    if (doubled + 1 == tree.trials) {
      budget = static_cast<int>(tree.clusters);
    } else if (2 * (int64_t{budget} << doubled) > tree.clusters) {
      return;
    } else {
      budget <<= doubled;
    }
  }
  if (step == TreeStep::again && !tree.again[place]) return;
  if (audit && budget >= tree.clusters) return;
  // Later queries see more keys under a causal mask: the longest work first.
  const int tile = probe   ? tree.probe_tile(index)
                   : trial ? tree.probe_tile(kProbes - 1 - index / tree.trials)
                   : audit ? 0
                           : static_cast<int>(tree.tiles) - 1 - index;
  TreeRowBlock<Tile> block(tree, place, tile, audit);
  budget = min(budget, block.candidates);
  bool all = audit || step == TreeStep::again || (!probe && budget == block.candidates);
  if (!all) {
    load_queries(block);
    RowWeights<Tile> weights;
    weights.clear();
    // A pass computes the weights of clusters again: kept, they would be queries x clusters.
    for (int pass = 0; pass < 2; ++pass) {
      for_summaries(block, false, [&](int i, SummaryScores<Tile>& s, SummaryScores<Tile>& s2, const char*) {
        if (pass == 0) {
          weights.add(s);
        } else {
          score_clusters(block, i, s, s2, weights, probe ? tree.probe_score + blockIdx.x * tree.clusters : nullptr);
        }
      });
      if (pass == 0) weights.finish(block.rows);
    }
    __syncthreads();
    budget = probe ? 0 : min(tile_budget(block, budget), block.candidates);
    all = !probe && budget == block.candidates;
    if (!all) choose_clusters(block, budget);
  }
  FlashState<typename Tile::Flash> state;
  state.clear();
  if (!all) {
    for_summaries(block, true, [&](int i, SummaryScores<Tile>& s, SummaryScores<Tile>&, const char* values) {
      attend_centroids(block, i, s, values, state);
    });
    add_slope(block, state);
  }
  if (!probe) {
    __syncthreads();
    const int32_t* const list = all ? nullptr : reinterpret_cast<const int32_t*>(block.key);
    ChosenBlocks<Tile> blocks(block, list, all ? block.candidates : budget, audit ? index : 0, audit ? tree.audit_parts : 1);
    attend(state, block.queries, blocks.count, blocks);
  }
  state.join_sums();
  if (probe) return put_norm(block, state, tree.probe_norm + blockIdx.x);
  if (audit) return put_part(block, state, blockIdx.x);
  if (trial) return put_rows(block, state, true, tree.trial_output + blockIdx.x * kTreeRows * tree.job.params.v_head_size);
  put_output(block, state);
}

}  // namespace cuda
}  // namespace qexport
