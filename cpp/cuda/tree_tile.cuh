// One tile of `tree`: kTreeRows queries of one head, which share a choice of clusters (docs/math.md, "tree"). Scores and
// weights are logarithms of base 2, as in flash.cuh.
#pragma once

#include "flash.cuh"
#include "partition.cuh"
#include "tree.cuh"

namespace qexport {
namespace cuda {

// The tile of the loop, and shared memory: the queries, then either what the passes over summaries need, as many at a time
// as the loop takes keys, or the blocks of `attend`, then the rest.
template <class T, int kHead, int kRowTiles, int kWarps, int kKeys_, int kBlocksPerProcessor, bool kWarpgroups>
struct TreeTile {
  static constexpr int kKeys = kKeys_;
  using Flash = FlashTile<T, kHead, kRowTiles, kWarps, kKeys, kBlocksPerProcessor, kWarpgroups>;
  using Squares = FlashTile<__nv_bfloat16, kHead, kRowTiles, kWarps, kKeys, kBlocksPerProcessor, kWarpgroups>;
  static_assert(Flash::kQueries == kTreeRows && kKeys % kCluster == 0 && Flash::kThreads >= kKeys);
  static constexpr int kStage = 3 * Flash::kKeyBytes;  // mean keys, variances, mean values of kKeys clusters
  static constexpr int kWords = Flash::kQueryBytes * 2 + 2 * kStage;
  static_assert(kWords >= Flash::kSharedBytes && 2 * kStage >= kHead * Flash::kRowBytes);

  struct Words {
    PartitionShared partition;
    float parts[kWarp];
    float columns[kWarps][kKeys];
    int32_t audited[kTreeRows];  // rows
  };
  // Behind Words: a key for the score of each cluster, in whose place the list of those that are read is made, and a bit of
  // each.
  static size_t shared_bytes(int64_t clusters) {
    const int64_t whole = ceil_div<int64_t>(clusters, kKeys) * kKeys;
    return kWords + sizeof(Words) + static_cast<size_t>(whole * 4 + whole / 8);
  }
};

// The rows that one block of threads answers, and what it knows of them.
template <class Tile>
struct TreeRowBlock {
  using T = typename Tile::Flash::T;
  const TreeLaunch& tree;
  int64_t head, b, q_head, place;
  int first_row, rows;      // of the tile
  bool audit;               // these are rows that are audited, in words->audited
  int candidates;           // clusters that may be chosen: all rows see all of their keys
  int full, rest;           // those before `full` have kCluster keys, the one there `rest`
  int open, offset;         // causal: keys from `open` on are read as they come; position of query 0
  float factor, s2_factor;  // of products with keys, to base 2, and of those of squares with variances
  char *queries, *squares, *stages;
  typename Tile::Words* words;
  uint32_t* key;   // (candidates up to whole blocks): the larger the score, the smaller
  uint32_t* bits;  // likewise, one bit each

  __device__ __forceinline__ TreeRowBlock(const TreeLaunch& tree_, int64_t place_, int tile, bool audit_)
      : tree(tree_), audit(audit_) {
    const QuantumAttentionParams& p = tree.job.params;
    place = place_, b = place / p.q_heads, q_head = place % p.q_heads;
    head = b * p.kv_heads + q_head / tree.job.group;
    first_row = tile * kTreeRows;
    rows = static_cast<int>(min(p.q_len - first_row, int64_t{kTreeRows}));
    char* const shared = dynamic_shared<char>();
    queries = shared, squares = shared + Tile::Flash::kQueryBytes, stages = squares + Tile::Flash::kQueryBytes;
    words = reinterpret_cast<typename Tile::Words*>(shared + Tile::kWords);
    if (audit) {
      if (static_cast<int>(threadIdx.x) < rows)
        words->audited[threadIdx.x] = tree.audit_row(place, static_cast<int>(threadIdx.x));
      __syncthreads();
    }
    const int64_t* nonpad = tree.job.tensors.nonpad_kv_seqlen;
    // There may be more queries than keys, and whoever says how many keys there are may be wrong.
    const int64_t most = tree.job.total_len + p.q_len;
    offset = static_cast<int>(nonpad ? min(max(nonpad[b], int64_t{0}), most) - p.q_len : p.past_len);
    if (p.is_causal) {
      open = min(max(position(0), 0), static_cast<int>(tree.job.total_len) - 1) / kTreeChunk * kTreeChunk;
      candidates = full = open / kCluster, rest = 0;
    } else {
      const int keys = tree.count[head];
      open = keys, candidates = ceil_div(keys, kCluster), full = keys / kCluster, rest = keys % kCluster;
    }
    factor = p.scale * kLog2E, s2_factor = p.scale * p.scale;
    key = reinterpret_cast<uint32_t*>(words + 1);
    bits = key + blocks() * Tile::kKeys;
  }
  __device__ __forceinline__ int row_index(int row) const { return audit ? words->audited[row] : first_row + row; }
  // Of the last key that a row may see, but for padding; rows are in order.
  __device__ __forceinline__ int position(int row) const { return offset + row_index(row); }
  __device__ __forceinline__ int blocks() const { return ceil_div(candidates, Tile::kKeys); }  // of summaries
  __device__ __forceinline__ const T* query(int row) const {
    return row < rows ? row_of<T>(tree.job.tensors.q, b, q_head, row_index(row)) : nullptr;
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

// Calls each(i, s, s2, values) for every block i of Tile::kKeys summaries, with s = log2 of the weights of its clusters, s2
// the variance of the scores of their keys, and, where they are asked for, their mean values in shared memory. All threads
// of the block of threads call this.
template <class Tile, class Each>
__device__ __forceinline__ void for_summaries(const TreeRowBlock<Tile>& block, bool with_values, Each each) {
  using Flash = typename Tile::Flash;
  using T = typename Flash::T;
  constexpr int kRowTiles = Flash::kRowTiles, kKeys = Tile::kKeys;
  const QuantumAttentionParams& p = block.tree.job.params;
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size);
  const int64_t first = block.head * block.tree.clusters;
  const auto copy = [&](int i) {
    char* const stage = block.stages + i % 2 * Tile::kStage;
    const auto rows_of = [&](const void* rows, int size) {
      return [&, rows, size](int row) {
        const int c = i * kKeys + row;
        return c < block.candidates ? static_cast<const T*>(rows) + (first + c) * size : nullptr;
      };
    };
    flash_copy_rows<Flash, kKeys>(stage, d, rows_of(block.tree.mean_key, d));
    flash_copy_rows<Flash, kKeys>(stage + Flash::kKeyBytes, d, rows_of(block.tree.variance, d));
    if (with_values) flash_copy_rows<Flash, kKeys>(stage + 2 * Flash::kKeyBytes, dv, rows_of(block.tree.mean_value, dv));
    cp_async_commit();
  };
  const auto columns_of = [](const char* rows) {
    return [rows](uint32_t (&a)[kRowTiles][4], int k) { flash_load_queries<Flash>(a, rows, k); };
  };
  __syncthreads();
  copy(0);
  for (int i = 0; i < block.blocks(); ++i) {
    cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < block.blocks()) copy(i + 1);
    const char* const stage = block.stages + i % 2 * Tile::kStage;
    float s[kRowTiles][kKeys / 8][4], s2[kRowTiles][kKeys / 8][4];
    flash_products<Flash>(s, columns_of(block.queries), stage);
    flash_products<typename Tile::Squares>(s2, columns_of(block.squares), stage + Flash::kKeyBytes);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float count = block.log_count(i * kKeys + 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e);
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

}  // namespace cuda
}  // namespace qexport
