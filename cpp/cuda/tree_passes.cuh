// What the passes of a tile over the summaries do: the centroids of all clusters, the score of each, and the centroids of
// those that are read taken out again. Logarithms of weights are natural and doubled, as one product of each element then
// makes them powers of 2; the 64 keys that every cluster but a last one has are counted at the end.
#pragma once

#include <type_traits>

#include "tree_tile.cuh"

namespace qexport {
namespace cuda {

constexpr float kHalfLog2E = 0.5f * kLog2E;  // from a doubled natural logarithm to one of base 2
constexpr float kLogCluster = 6.0f;
static_assert(kCluster == 64, "kLogCluster");

// Of the variance of the scores of a cluster: what it adds to the doubled logarithm of its weight, damped where so few keys
// cannot show their tail.
__device__ __forceinline__ float damped_variance(float y) {
  return y > 2.0f ? fmaf(-16.0f, fast_reciprocal(y + 2.0f), 6.0f) : y;
}

// Turns products of a block into logarithms of the weights of clusters: of means of log-normal weights. True where some
// variance of the warp is large enough for that.
template <class Tile, class Clusters>
__device__ __forceinline__ bool log_weights(const ScoreBlock<Tile>& block, int i, int count, Clusters clusters,
                                            SummaryScores<Tile>& s, const SummaryScores<Tile>& s2) {
  constexpr int kRowTiles = Tile::Flash::kRowTiles, kTiles = Tile::kKeys / 8;
  uint32_t bits = 0;  // variances are not negative: bit 30 is set from 2 on
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      bits |= __float_as_uint(s2[t][n][0]) | __float_as_uint(s2[t][n][1]);
      bits |= __float_as_uint(s2[t][n][2]) | __float_as_uint(s2[t][n][3]);
    }
  }
  const bool damps = __any_sync(kFullWarp, bits >> 30 & 1);
  const float factor = 2.0f * block.scale;
  if (damps) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[t][n][e] = fmaf(s[t][n][e], factor, damped_variance(s2[t][n][e]));
        }
      }
    }
  } else {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[t][n][e] = fmaf(s[t][n][e], factor, s2[t][n][e]);
      }
    }
  }
  if ((i + 1) * Tile::kKeys < count) return damps;
  // The last block: the cluster with fewer keys, and what lies behind it.
  const float fewer = 2.0f * logf(static_cast<float>(block.rest) / kCluster);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int j = i * Tile::kKeys + 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e;
      const float less = j >= count ? -kInf : clusters(j) == block.full ? fewer : 0.0f;
#pragma unroll
      for (int t = 0; t < 2 * kRowTiles; ++t) s[t / 2][n][t % 2 * 2 + e] += less;
    }
  }
  return damps;
}

// Adds clusters to the state, each as one key with its mean value. Where `moves` is false the maxima are large enough.
template <class Tile>
__device__ __forceinline__ void add_centroids(typename Tile::State& state, SummaryScores<Tile>& s, const char* values,
                                              bool moves) {
  using Flash = typename Tile::Flash;
  if (moves) {
    flash_weights<Flash>(state, s, kHalfLog2E);
  } else {
    flash_exp2<Flash>(state, s, kHalfLog2E);
  }
  if constexpr (Flash::kWarpgroups) {
    uint32_t p[Tile::kKeys / 16][1][4];
    flash_pack<Flash>(p, s);
    flash_start_values<Flash>(state, p, values);
    flash_finish<0>(state.o[0]);
  } else {
    flash_values<Flash>(state, s, values);
  }
}

// log2 of the weight of all clusters, of each row of a thread; +inf in rows without one or beyond the tile, of which no
// cluster has a share.
template <class Tile>
__device__ __forceinline__ void weigh_rows(const ScoreBlock<Tile>& block, const typename Tile::State& state,
                                           float (&whole)[Tile::State::kRows]) {
#pragma unroll
  for (int t = 0; t < Tile::State::kRows; ++t) {
    float sum = state.sum[t];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    whole[t] = Tile::State::row(t) < block.rows && sum > 0.0f ? state.most[t] + log2f(sum) : kInf;
  }
}

// (e^x - 1) / x to 1.2e-4 of it for x in [0, 2]: the special function unit has no time for another power.
__device__ __forceinline__ float expm1_ratio(float x) {
  return fmaf(fmaf(fmaf(fmaf(0.01923414f, x, 0.02104842f), x, 0.18115446f), x, 0.49664288f), x, 1.000117f);
}

// Sums a thread's columns over the eight lanes that hold the same ones. Each ends with an eighth of them in x[0]..: those
// from kCount / 8 * (lane / 4) on.
template <int kLeft, int kLanes = 16, int kCount>
__device__ __forceinline__ void sum_columns(float (&x)[kCount]) {
  const bool upper = threadIdx.x & kLanes;
#pragma unroll
  for (int m = 0; m < kLeft / 2; ++m) {
    const float given = upper ? x[m] : x[m + kLeft / 2], kept = upper ? x[m + kLeft / 2] : x[m];
    x[m] = kept + __shfl_xor_sync(kFullWarp, given, kLanes);
  }
  if constexpr (kLanes > 4) sum_columns<kLeft / 2, kLanes / 2>(x);
}

// What is lost, by the model, to the rows of a warp where only the centroids of a block of clusters are taken; to
// words->columns. kDamps is what log_weights said.
template <bool kDamps, class Tile>
__device__ __forceinline__ void lose_clusters(const ScoreBlock<Tile>& block, int i, const SummaryScores<Tile>& s,
                                              const SummaryScores<Tile>& s2, const float (&whole)[Tile::State::kRows]) {
  constexpr int kRows = Tile::State::kRows, kColumns = Tile::kKeys / 4;
  float lost[kColumns];
#pragma unroll
  for (int m = 0; m < kColumns; ++m) {
    lost[m] = 0.0f;
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      const float x = s[t / 2][m / 2][t % 2 * 2 + m % 2], y = s2[t / 2][m / 2][t % 2 * 2 + m % 2];
      const float share2 = fast_exp2(fmaf(x, 2.0f * kHalfLog2E, -2.0f * whole[t]));
      lost[m] = kDamps ? fmaf(share2, fast_exp2(fminf(y * kLog2E, 30.0f)) - 1.0f, lost[m])
                       : fmaf(share2 * y, expm1_ratio(y), lost[m]);
    }
  }
  sum_columns<kColumns>(lost);
  constexpr int kLeft = kColumns / 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int m = kLeft * (lane / 4);
  float* const to = &block.words->columns[i % 2][warp][m / 2 * 8 + lane % 4 * 2 + m % 2];
  if constexpr (kLeft == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(lost[0], lost[1]);
  } else {
    static_assert(kLeft == 1);
    *to = lost[0];
  }
}

__device__ __forceinline__ uint32_t score_key(float score) { return ~ordered_bits(score); }

// The scores of a block of clusters from what its warps lose, behind a barrier. To block.key, and to `scores` where that is
// not null.
template <class Tile>
__device__ __forceinline__ void put_scores(const ScoreBlock<Tile>& block, int i, float* scores) {
  const int thread = static_cast<int>(threadIdx.x), c = i * Tile::kKeys + thread;
  if (thread >= Tile::kKeys || c >= block.candidates) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < Tile::kWarps; ++w) sum += block.words->columns[i % 2][w][thread];
  const float score = sum * block.tree.spread[block.head * block.tree.clusters + c];
  block.key[c] = score_key(score);
  if (scores) scores[c] = score;
}

// Chooses `budget` of the candidates, those with the largest score (ties: the first), and makes the list of them where the
// scores were, and in `chosen`.
template <class Tile>
__device__ __forceinline__ void choose_clusters(const ScoreBlock<Tile>& block, int budget, int32_t* chosen) {
  int32_t* const list = reinterpret_cast<int32_t*>(block.key);
  take_smallest(block.key, block.candidates, budget, block.words->partition,
                [&](int at, int c) { list[at] = chosen[at] = c; });
}

template <class State>
__device__ __forceinline__ void negate(State& state) {
#pragma unroll
  for (int t = 0; t < State::kRows; ++t) {
    state.sum[t] = -state.sum[t];
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
      state.pair(t, n)[0] = -state.pair(t, n)[0], state.pair(t, n)[1] = -state.pair(t, n)[1];
    }
  }
}

// shift = q B of the warp's rows, of 16 columns of a slope from 16 n on.
template <class Flash>
__device__ __forceinline__ void slope_products(float (&shift)[Flash::kRowTiles][2][4], const char* queries,
                                               const char* slopes, int n) {
  using T = typename Flash::T;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // Unrolled, the parts of all queries would be kept from one n to the next, in more registers than there are.
  constexpr int kSteps = Flash::kRowBytes / 32, kUnrolled = kTf32<Flash> ? 1 : kSteps;
#pragma unroll kUnrolled
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[Flash::kRowTiles][4];
    flash_load_queries<Flash>(a, queries, k);
    if constexpr (kTf32<Flash>) {
      Tf32Pair<2> b[2];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 16 * n + e / 2 * 8 + lane / 4, row = 8 * k + e % 2 * 4 + lane % 4;
        const char* const at = slopes + flash_offset<Flash::kRowBytes>(row, column / 4) + column % 4 * 4;
        b[e / 2].set(e % 2, *reinterpret_cast<const uint32_t*>(at));
      }
#pragma unroll
      for (int i = 0; i < Flash::kRowTiles; ++i) {
        Tf32Pair<4> left;
#pragma unroll
        for (int e = 0; e < 4; ++e) left.set(e, a[i][e]);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          mma_1688(shift[i][t], left.low, b[t].high[0], b[t].high[1]);
          mma_1688(shift[i][t], left.high, b[t].low[0], b[t].low[1]);
          mma_1688(shift[i][t], left.high, b[t].high[0], b[t].high[1]);
        }
      }
    } else {
      uint32_t b[4];
      ldmatrix_x4_trans(b, slopes + flash_offset<Flash::kRowBytes, Flash::kWarpgroups ? Flash::kHead : 0>(
                                        k * 16 + lane % 16, 2 * n + lane / 16));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Flash::kRowTiles; ++i) {
        mma_16816<T>(shift[i][0], a[i], left);
        mma_16816<T>(shift[i][1], a[i], right);
      }
    }
  }
}

// Turns the state into the output of its centroids, moved by the slope, and log2 of their weight in `most`. What is left of
// less than kLeast of the whole is rounding, and counts as nothing.
template <class Tile>
__device__ __forceinline__ void close_centroids(const ScoreBlock<Tile>& block, typename Tile::State& state,
                                                const float (&whole)[Tile::State::kRows]) {
  using Flash = typename Tile::Flash;
  using T = typename Tile::T;
  constexpr int kRowTiles = Flash::kRowTiles, kRows = Tile::State::kRows;
  constexpr float kLeast = 0x1p-17f;
  const QuantumAttentionParams& p = block.tree.job.params;
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size);
  const int64_t slope = p.is_causal ? block.head * block.tree.chunks + block.open / kTreeChunk : block.head;
  const T* const slopes = static_cast<const T*>(block.tree.slopes) + slope * d * dv;
  __syncthreads();
  flash_copy_rows<Flash, Flash::kHead>(block.stages, dv, [&](int x) { return x < d ? slopes + x * dv : nullptr; });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  state.join_sums();
  float unit[kRows], scale[kRows];
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    const bool left = state.sum[t] > kLeast * fast_exp2(whole[t] - state.most[t]);
    unit[t] = left ? 1.0f / state.sum[t] : 0.0f, scale[t] = left ? block.scale : 0.0f;
    state.most[t] = left ? state.most[t] + log2f(state.sum[t]) + kLogCluster : -kInf;
  }
#pragma unroll
  for (int n = 0; n < Tile::State::kPairs / 2; ++n) {
    float shift[kRowTiles][2][4] = {};
    slope_products<Flash>(shift, block.queries, block.stages, n);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int t = 2 * i + e % 4 / 2;
        float& o = state.o[i][2 * n + e / 4][e % 4];
        o = fmaf(scale[t], shift[i][e / 4][e % 4], o * unit[t]);
        if (std::is_same<T, __half>::value && fabsf(o) > kMostHalf) o = copysignf(kMostHalf, o);  // it may weigh next to 0
      }
    }
  }
}

}  // namespace cuda
}  // namespace qexport
