// One tile of `tree`: kTreeRows queries of one head, which share a choice of clusters (docs/math.md, "tree"). Scores and
// weights are logarithms of base 2, as in flash.cuh.
#pragma once

#include "flash.cuh"
#include "partition.cuh"
#include "tree.cuh"

namespace qexport {
namespace cuda {

// Shared memory: the queries, then either what the passes over summaries need or the blocks of `attend`, then the rest.
template <class T, int kHead, int kRowTiles, int kWarps, int kBlocksPerProcessor>
struct TreeTile {
  using Flash = FlashTile<T, kHead, kRowTiles, kWarps, kCluster, kBlocksPerProcessor>;
  using Squares = FlashTile<__nv_bfloat16, kHead, kRowTiles, kWarps, kCluster, kBlocksPerProcessor>;
  static_assert(Flash::kQueries == kTreeRows);
  static constexpr int kStage = 3 * Flash::kKeyBytes;  // mean keys, variances, mean values of kCluster clusters
  static constexpr int kWords = Flash::kQueryBytes * 2 + 2 * kStage;
  static_assert(kWords >= Flash::kSharedBytes && 2 * kStage >= kHead * Flash::kRowBytes);

  struct Words {
    PartitionShared partition;
    float parts[kWarp];
    float columns[kWarps][kCluster];
  };
  // Behind Words: a key for the score of each cluster, in whose place the list of those that are read is made, and a bit of
  // each.
  static size_t shared_bytes(int64_t clusters) {
    const int64_t whole = ceil_div<int64_t>(clusters, kCluster) * kCluster;
    return kWords + sizeof(Words) + static_cast<size_t>(whole * 4 + whole / 8);
  }
};

// The rows that one block of threads answers, and what it knows of them.
template <class Tile>
struct TreeRowBlock {
  using T = typename Tile::Flash::T;
  const TreeLaunch& tree;
  int64_t head, b, q_head, place, first_row;
  int rows;                 // of the tile
  int candidates;           // clusters that may be chosen: all rows see all of their keys
  int full, rest;           // those before `full` have kCluster keys, the one there `rest`
  int64_t open, position;   // causal: keys from `open` on are read as they come; position of the first row
  float factor, s2_factor;  // of products with keys, to base 2, and of those of squares with variances
  char *queries, *squares, *stages;
  typename Tile::Words* words;
  uint32_t* key;   // (candidates up to whole blocks): the larger the score, the smaller
  uint32_t* bits;  // likewise, one bit each

  __device__ __forceinline__ TreeRowBlock(const TreeLaunch& tree_, int64_t place_, int64_t tile) : tree(tree_) {
    const QuantumAttentionParams& p = tree.job.params;
    place = place_, b = place / p.q_heads, q_head = place % p.q_heads;
    head = b * p.kv_heads + q_head / tree.job.group;
    first_row = tile * kTreeRows;
    rows = static_cast<int>(min(p.q_len - first_row, int64_t{kTreeRows}));
    const int64_t* nonpad = tree.job.tensors.nonpad_kv_seqlen;
    position = first_row + (nonpad ? nonpad[b] - p.q_len : p.past_len);
    if (p.is_causal) {
      open = max(position, int64_t{0}) / kTreeChunk * kTreeChunk;
      candidates = full = static_cast<int>(open / kCluster), rest = 0;
    } else {
      const int keys = tree.count[head];
      open = keys, candidates = ceil_div(keys, kCluster), full = keys / kCluster, rest = keys % kCluster;
    }
    factor = p.scale * kLog2E, s2_factor = p.scale * p.scale;
    char* const shared = dynamic_shared<char>();
    queries = shared, squares = shared + Tile::Flash::kQueryBytes, stages = squares + Tile::Flash::kQueryBytes;
    words = reinterpret_cast<typename Tile::Words*>(shared + Tile::kWords);
    key = reinterpret_cast<uint32_t*>(words + 1);
    bits = key + blocks() * kCluster;
  }
  __device__ __forceinline__ int blocks() const { return ceil_div(candidates, kCluster); }  // of summaries
  __device__ __forceinline__ const T* query(int row) const {
    return row < rows ? row_of<T>(tree.job.tensors.q, b, q_head, first_row + row) : nullptr;
  }
  __device__ __forceinline__ float log_count(int cluster) const {
    if (cluster < full) return 6.0f;
    return cluster == full && rest ? log2f(static_cast<float>(rest)) : -kInf;
  }
};

static_assert(kCluster == 64, "log_count");

// The queries, and their squares, into shared memory.
template <class Tile>
__device__ __forceinline__ void load_queries(TreeRowBlock<Tile>& block) {
  using Flash = typename Tile::Flash;
  using T = typename Flash::T;
  flash_copy_rows<Flash, Flash::kQueries>(block.queries, static_cast<int>(block.tree.job.params.head_size),
                                          [&](int row) { return block.query(row); });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const T* const q = reinterpret_cast<const T*>(block.queries);
  __nv_bfloat162* const squares = reinterpret_cast<__nv_bfloat162*>(block.squares);
  for (int i = static_cast<int>(threadIdx.x); i < Flash::kQueryBytes / 4; i += Flash::kThreads) {
    const float x = to_float(q[2 * i]), y = to_float(q[2 * i + 1]);
    squares[i] = __floats2bfloat162_rn(x * x, y * y);
  }
}

// Calls each(block, s, s2) for every block of kCluster summaries, with s = log2 of the weights of its clusters, which its
// mean values lie behind, and s2 the variance of the scores of their keys. All threads of the block of threads call this.
template <class Tile, bool kValues, class Each>
__device__ __forceinline__ void for_summaries(const TreeRowBlock<Tile>& block, Each each) {
  using Flash = typename Tile::Flash;
  using T = typename Flash::T;
  constexpr int kRowTiles = Flash::kRowTiles;
  const QuantumAttentionParams& p = block.tree.job.params;
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size);
  const int64_t first = block.head * block.tree.clusters;
  const auto copy = [&](int i) {
    char* const stage = block.stages + i % 2 * Tile::kStage;
    const auto rows_of = [&](const void* rows, int size) {
      return [&, rows, size](int row) {
        const int c = i * kCluster + row;
        return c < block.candidates ? static_cast<const T*>(rows) + (first + c) * size : nullptr;
      };
    };
    flash_copy_rows<Flash, kCluster>(stage, d, rows_of(block.tree.mean_key, d));
    flash_copy_rows<Flash, kCluster>(stage + Flash::kKeyBytes, d, rows_of(block.tree.variance, d));
    if (kValues) flash_copy_rows<Flash, kCluster>(stage + 2 * Flash::kKeyBytes, dv, rows_of(block.tree.mean_value, dv));
    cp_async_commit();
  };
  __syncthreads();
  copy(0);
  for (int i = 0; i < block.blocks(); ++i) {
    cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < block.blocks()) copy(i + 1);
    const char* const stage = block.stages + i % 2 * Tile::kStage;
    float s[kRowTiles][kCluster / 8][4], s2[kRowTiles][kCluster / 8][4];
    const auto columns_of = [](const char* rows) {
      return [rows](uint32_t (&a)[kRowTiles][4], int k) { flash_load_queries<Flash>(a, rows, k); };
    };
    flash_products<Flash>(s, columns_of(block.queries), stage);
    flash_products<typename Tile::Squares>(s2, columns_of(block.squares), stage + Flash::kKeyBytes);
#pragma unroll
    for (int n = 0; n < kCluster / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float count = block.log_count(i * kCluster + 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e);
#pragma unroll
        for (int t = 0; t < 2 * kRowTiles; ++t) {
          float &x = s[t / 2][n][t % 2 * 2 + e], &y = s2[t / 2][n][t % 2 * 2 + e];
          y *= block.s2_factor;
          // The mean of a log-normal weight, damped where so few keys cannot show its tail.
          const float damped = y > 2.0f ? 6.0f - __fdividef(16.0f, y + 2.0f) : y;
          x = fmaf(x, block.factor, fmaf(damped, 0.5f * kLog2E, count));
        }
      }
    }
    each(i, s, s2, stage + 2 * Flash::kKeyBytes);
  }
}

__device__ __forceinline__ uint32_t score_key(float score) { return ~ordered_bits(score); }

// The score of each cluster: how much is lost, by the model, where only its centroid is taken. To block.key, and to `scores`
// where that is not null.
template <class Tile>
__device__ __forceinline__ void score_clusters(const TreeRowBlock<Tile>& block, float* scores) {
  using Flash = typename Tile::Flash;
  constexpr int kRowTiles = Flash::kRowTiles, kRows = 2 * kRowTiles;
  using Scores = float (&)[kRowTiles][kCluster / 8][4];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  float total[kRows];  // log2 of the weight of all clusters
  {
    float most[kRows], sum[kRows];
#pragma unroll
    for (int t = 0; t < kRows; ++t) most[t] = -kInf, sum[t] = 0.0f;
    for_summaries<Tile, false>(block, [&](int, Scores s, Scores, const char*) {
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        float top = most[t];
#pragma unroll
        for (int n = 0; n < kCluster / 8; ++n) top = fmaxf(top, fmaxf(s[t / 2][n][t % 2 * 2], s[t / 2][n][t % 2 * 2 + 1]));
        const float base = top == -kInf ? 0.0f : top;
        sum[t] *= fast_exp2(most[t] - base);
        most[t] = top;
#pragma unroll
        for (int n = 0; n < kCluster / 8; ++n) {
          sum[t] += fast_exp2(s[t / 2][n][t % 2 * 2] - base) + fast_exp2(s[t / 2][n][t % 2 * 2 + 1] - base);
        }
      }
    });
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      float top = fmaxf(most[t], __shfl_xor_sync(kFullWarp, most[t], 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      float all = top == -kInf ? 0.0f : sum[t] * fast_exp2(most[t] - top);
      all += __shfl_xor_sync(kFullWarp, all, 1);
      all += __shfl_xor_sync(kFullWarp, all, 2);
      // Rows that are not there, and rows without a weight, have no share.
      total[t] = FlashState<Flash>::row(t) < block.rows && all > 0.0f ? top + log2f(all) : kInf;
    }
  }
  for_summaries<Tile, false>(block, [&](int i, Scores s, Scores s2, const char*) {
#pragma unroll
    for (int n = 0; n < kCluster / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float lost = 0.0f;
#pragma unroll
        for (int t = 0; t < kRows; ++t) {
          const float share = fast_exp2(s[t / 2][n][t % 2 * 2 + e] - total[t]);
          const float varied = fast_exp2(fminf(s2[t / 2][n][t % 2 * 2 + e] * kLog2E, 30.0f)) - 1.0f;
          lost = fmaf(share * share, fmaxf(varied, 0.0f), lost);
        }
        for (int step = 4; step < kWarp; step *= 2) lost += __shfl_xor_sync(kFullWarp, lost, step);
        if (lane < 4) block.words->columns[warp][8 * n + 2 * lane + e] = lost;
      }
    }
    __syncthreads();
    const int c = i * kCluster + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kCluster && c < block.candidates) {
      float sum = 0.0f;
      for (int w = 0; w < Flash::kThreads / kWarp; ++w) sum += block.words->columns[w][threadIdx.x];
      const float score = sum * block.tree.spread[block.head * block.tree.clusters + c];
      block.key[c] = score_key(score);
      if (scores) scores[c] = score;
    }
  });
  __syncthreads();
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
    if (thread % kWarp == 0 && c < block.blocks() * kCluster) block.bits[c / kWarp] = bits;
    below += ranks.all[0], equal += ranks.all[1];
    __syncthreads();
  }
}

// The clusters without a bit enter as one key each, with the mean value and with what the slope adds to it. `state` is
// clear.
template <class Tile>
__device__ __forceinline__ void attend_centroids(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state) {
  using Flash = typename Tile::Flash;
  using T = typename Flash::T;
  constexpr int kRowTiles = Flash::kRowTiles, kPairs = FlashState<Flash>::kPairs;
  using Scores = float (&)[kRowTiles][kCluster / 8][4];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for_summaries<Tile, true>(block, [&](int i, Scores s, Scores, const char* values) {
    const uint32_t words[2] = {block.bits[2 * i], block.bits[2 * i + 1]};
#pragma unroll
    for (int n = 0; n < kCluster / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!(words[n / 4] >> (8 * (n % 4) + 2 * (lane % 4) + e) & 1)) continue;
#pragma unroll
        for (int t = 0; t < 2 * kRowTiles; ++t) s[t / 2][n][t % 2 * 2 + e] = -kInf;
      }
    }
    flash_weights<Flash>(state, s, 1.0f);
    flash_values<Flash>(state, s, values);
  });
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
      uint32_t b[4];
      ldmatrix_x4_trans(b, block.stages + flash_offset<Flash::kHead>(k * 16 + lane % 16, 2 * n + lane / 16));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a,
                    block.queries + flash_offset<Flash::kHead>((warp * kRowTiles + i) * 16 + lane % 16, 2 * k + lane / 16));
        mma_16816<T>(shift[i][0], a, left);
        mma_16816<T>(shift[i][1], a, right);
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

// What the loop of flash.cuh reads: the chosen clusters, and under a causal mask the keys from `open` on as they come.
template <class Tile>
struct ChosenBlocks {
  using T = typename Tile::Flash::T;
  const TreeRowBlock<Tile>& block;
  const int32_t* list;  // null: all clusters
  int chosen;
  int64_t key_end;  // of those as they come
  int head_size, v_head_size;
  float scale;
  const T *keys, *values;

  __device__ __forceinline__ ChosenBlocks(const TreeRowBlock<Tile>& block_, const int32_t* list_, int chosen_)
      : block(block_), list(list_), chosen(chosen_) {
    const TreeLaunch& tree = block.tree;
    head_size = static_cast<int>(tree.job.params.head_size), v_head_size = static_cast<int>(tree.job.params.v_head_size);
    scale = block.factor;
    const int64_t first = block.head * tree.clusters * kCluster;
    keys = static_cast<const T*>(tree.keys) + first * head_size;
    values = static_cast<const T*>(tree.values) + first * v_head_size;
    key_end = key_range(tree.job, block.b, block.first_row + block.rows - 1).hi;
  }
  __device__ __forceinline__ int count() const {
    const int64_t dense = block.tree.job.params.is_causal ? max(key_end - block.open, int64_t{0}) : 0;
    return chosen + static_cast<int>(ceil_div(dense, int64_t{kCluster}));
  }
  __device__ __forceinline__ int cluster(int i) const { return list ? list[i] : i; }
  __device__ __forceinline__ int64_t natural(int i, int row) const {
    return block.open + int64_t{i - chosen} * kCluster + row;
  }
  __device__ __forceinline__ const T* row_at(int i, int row, bool of_values, const T* rows, int size) const {
    if (i < chosen) return rows + (int64_t{cluster(i)} * kCluster + row) * size;
    const int64_t j = natural(i, row);
    if (j >= key_end) return nullptr;
    const int64_t kv_head = block.head % block.tree.job.params.kv_heads;
    return key_row<T>(block.tree.job, of_values, block.b, kv_head, j);
  }
  __device__ __forceinline__ const T* query(int row) const { return block.query(row); }
  __device__ __forceinline__ const T* key(int i, int row) const { return row_at(i, row, false, keys, head_size); }
  __device__ __forceinline__ const T* value(int i, int row) const { return row_at(i, row, true, values, v_head_size); }
  __device__ __forceinline__ bool plain(int i) const {
    if (i < chosen) return cluster(i) < block.full;
    return natural(i, kCluster - 1) <= block.position && natural(i, kCluster) <= key_end;
  }
  __device__ __forceinline__ void prepare(int) {}
  __device__ __forceinline__ float score(int i, int row, int key, float x) const {
    const bool sees = i < chosen ? key < block.rest : natural(i, key) <= min(block.position + row, key_end - 1);
    return sees ? x : -kInf;
  }
};

}  // namespace cuda
}  // namespace qexport
