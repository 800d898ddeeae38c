// What the three passes of a tile over the summaries do: the weight of all clusters, the score of each, and the centroids of
// those that are not read.
#pragma once

#include "tree_tile.cuh"

namespace qexport {
namespace cuda {

template <class Tile>
using SummaryScores = float[Tile::Flash::kRowTiles][Tile::kKeys / 8][4];

// The weight of all clusters of each row of a thread: most + log2(sum), block by block.
template <class Tile>
struct RowWeights {
  static constexpr int kRows = 2 * Tile::Flash::kRowTiles;
  float most[kRows], sum[kRows];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kRows; ++t) most[t] = -kInf, sum[t] = 0.0f;
  }
  __device__ __forceinline__ void add(const SummaryScores<Tile>& s) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      float top = most[t];
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[t / 2][n][t % 2 * 2], s[t / 2][n][t % 2 * 2 + 1]));
      const float base = top == -kInf ? 0.0f : top;
      sum[t] *= fast_exp2(most[t] - base);
      most[t] = top;
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; ++n) {
        sum[t] += fast_exp2(s[t / 2][n][t % 2 * 2] - base) + fast_exp2(s[t / 2][n][t % 2 * 2 + 1] - base);
      }
    }
  }
  // Joins the four lanes of a row. `most` becomes log2 of its whole weight; +inf in rows without one or beyond the tile, of
  // which no cluster has a share.
  __device__ __forceinline__ void finish(int rows) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      float top = fmaxf(most[t], __shfl_xor_sync(kFullWarp, most[t], 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      float all = top == -kInf ? 0.0f : sum[t] * fast_exp2(most[t] - top);
      all += __shfl_xor_sync(kFullWarp, all, 1);
      all += __shfl_xor_sync(kFullWarp, all, 2);
      most[t] = FlashState<typename Tile::Flash>::row(t) < rows && all > 0.0f ? top + log2f(all) : kInf;
    }
  }
};

__device__ __forceinline__ uint32_t score_key(float score) { return ~ordered_bits(score); }

// The scores of a block of clusters: how much is lost, by the model, where only their centroids are taken. To block.key, and
// to `scores` where that is not null.
template <class Tile>
__device__ __forceinline__ void score_clusters(const TreeRowBlock<Tile>& block, int i, const SummaryScores<Tile>& s,
                                               const SummaryScores<Tile>& s2, const RowWeights<Tile>& weights,
                                               float* scores) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float lost = 0.0f;
#pragma unroll
      for (int t = 0; t < RowWeights<Tile>::kRows; ++t) {
        const float share = fast_exp2(s[t / 2][n][t % 2 * 2 + e] - weights.most[t]);
        const float varied = fast_exp2(fminf(s2[t / 2][n][t % 2 * 2 + e] * kLog2E, 30.0f)) - 1.0f;
        lost = fmaf(share * share, fmaxf(varied, 0.0f), lost);
      }
      for (int step = 4; step < kWarp; step *= 2) lost += __shfl_xor_sync(kFullWarp, lost, step);
      if (lane < 4) block.words->columns[warp][8 * n + 2 * lane + e] = lost;
    }
  }
  __syncthreads();
  const int c = i * Tile::kKeys + static_cast<int>(threadIdx.x);
  if (threadIdx.x < Tile::kKeys && c < block.candidates) {
    float sum = 0.0f;
    for (int w = 0; w < Tile::Flash::kThreads / kWarp; ++w) sum += block.words->columns[w][threadIdx.x];
    const float score = sum * block.tree.spread[block.head * block.tree.clusters + c];
    block.key[c] = score_key(score);
    if (scores) scores[c] = score;
  }
}

// Chooses `budget` of the candidates, those with the largest score (ties: the first): sets their bits, and puts the list of
// them where the scores were.
template <class Tile>
__device__ __forceinline__ void choose_clusters(const TreeRowBlock<Tile>& block, int budget) {
  int32_t* const list = reinterpret_cast<int32_t*>(block.key);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), n = block.candidates;
  const Cut cut = find_cut(block.key, n, budget, block.words->partition);
  int below = 0, equal = 0;
  for (int base = 0; base < n; base += threads) {
    const int c = base + thread;
    const uint32_t mine = c < n ? block.key[c] : 0;
    const Ranks ranks = rank_in_block(c < n && mine < cut.key, c < n && mine == cut.key, block.words->partition.warp);
    const int equals_before = equal + ranks.before[1];
    const bool first = c < n && first_by(cut, mine, equals_before);
    if (first) list[below + ranks.before[0] + min(equals_before, cut.equal)] = c;
    const unsigned bits = __ballot_sync(kFullWarp, first);
    if (thread % kWarp == 0 && c < block.blocks() * Tile::kKeys) block.bits[c / kWarp] = bits;
    below += ranks.all[0], equal += ranks.all[1];
    __syncthreads();
  }
}

// The clusters of a block without a bit enter as one key each, with their mean value.
template <class Tile>
__device__ __forceinline__ void attend_centroids(const TreeRowBlock<Tile>& block, int i, SummaryScores<Tile>& s,
                                                 const char* values, FlashState<typename Tile::Flash>& state) {
  const uint32_t* const words = block.bits + i * (Tile::kKeys / 32);
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool chosen = words[n / 4] >> (8 * (n % 4) + 2 * (threadIdx.x % 4) + e) & 1;
#pragma unroll
      for (int t = 0; t < RowWeights<Tile>::kRows; ++t) {
        if (chosen) s[t / 2][n][t % 2 * 2 + e] = -kInf;
      }
    }
  }
  flash_weights<typename Tile::Flash>(state, s, 1.0f);
  flash_values<typename Tile::Flash>(state, s, values);
}

// Adds what the slope does to the values of the centroids, which are all that `state` holds.
template <class Tile>
__device__ __forceinline__ void add_slope(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state) {
  using Flash = typename Tile::Flash;
  using T = typename Flash::T;
  constexpr int kRowTiles = Flash::kRowTiles, kPairs = FlashState<Flash>::kPairs;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const QuantumAttentionParams& p = block.tree.job.params;
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size);
  const int64_t slope = p.is_causal ? block.head * block.tree.chunks + block.open / kTreeChunk : block.head;
  const T* const rows = static_cast<const T*>(block.tree.slopes) + slope * d * dv;
  __syncthreads();
  flash_copy_rows<Flash, Flash::kHead>(block.stages, dv, [&](int x) { return x < d ? rows + x * dv : nullptr; });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  state.join_sums();
#pragma unroll
  for (int n = 0; n < kPairs / 2; ++n) {
    float shift[kRowTiles][2][4] = {};
#pragma unroll
    for (int k = 0; k < Flash::kHead / 16; ++k) {
      uint32_t a[kRowTiles][4], b[4];
      flash_load_queries<Flash>(a, block.queries, k);
      ldmatrix_x4_trans(b, block.stages + flash_offset<Flash::kHead, Flash::kWarpgroups ? Flash::kHead : 0>(
                                              k * 16 + lane % 16, 2 * n + lane / 16));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_16816<T>(shift[i][0], a[i], left);
        mma_16816<T>(shift[i][1], a[i], right);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float weight = state.sum[2 * i + e % 4 / 2] * p.scale;
        state.o[i][2 * n + e / 4][e % 4] = fmaf(weight, shift[i][e / 4][e % 4], state.o[i][2 * n + e / 4][e % 4]);
      }
    }
  }
  // Again a part on each of the four lanes of a row.
#pragma unroll
  for (int t = 0; t < 2 * kRowTiles; ++t) state.sum[t] = lane % 4 == 0 ? state.sum[t] : 0.0f;
}

}  // namespace cuda
}  // namespace qexport
