// The summaries of clusters as a tile of `tree` sees them: kTreeRows queries of one head, which share a choice of clusters
// (docs/math.md, "tree").
#pragma once

#include "partition.cuh"
#include "tree_rows.cuh"

namespace qexport {
namespace cuda {

// The tile of the products, and shared memory: the queries and their squares, then what the passes over summaries need, two
// blocks of kKeys clusters in turn, then the rest.
template <class T_, int kHead, int kRowTiles, int kWarps_, int kBlocksPerProcessor, bool kWarpgroups>
struct ScoreTile {
  using T = T_;
  static constexpr int kKeys = 64, kWarps = kWarps_;
  using Flash = FlashTile<T, kHead, kRowTiles, kWarps, kKeys, kBlocksPerProcessor, kWarpgroups>;
  using Squares = FlashTile<__nv_bfloat16, kHead, kRowTiles, kWarps, kKeys, kBlocksPerProcessor, kWarpgroups>;
  using State = FlashState<Flash>;
  static_assert(Flash::kQueries == kTreeRows);
  static constexpr int kStage = 3 * Flash::kKeyBytes;  // mean keys, variances, mean values
  static constexpr int kWords = Flash::kQueryBytes * 2 + 2 * kStage;
  static_assert(2 * kStage >= kHead * Flash::kRowBytes);

  struct Words {
    PartitionShared partition;
    float parts[kWarp];
    float columns[2][kWarps][kKeys];  // what a block of clusters loses to the rows of each warp, two blocks in turn
  };
  // Behind Words: a key for the score of each cluster, in whose place the list of those that are read is made.
  static size_t shared_bytes(int64_t clusters) { return kWords + sizeof(Words) + static_cast<size_t>(clusters) * 4; }
};

template <class Tile>
struct ScoreBlock : TreeRows<typename Tile::T> {
  float scale, scale_of_squares;  // of products with mean keys, and of those of squares with variances
  char *queries, *squares, *stages;
  typename Tile::Words* words;
  uint32_t* key;  // (candidates): the larger the score, the smaller

  __device__ __forceinline__ ScoreBlock(const TreeLaunch& tree, const TreeItem& item)
      : TreeRows<typename Tile::T>(tree, item.place, item.tile), scale(tree.job.params.scale) {
    scale_of_squares = scale * scale;
    queries = dynamic_shared<char>(), squares = queries + Tile::Flash::kQueryBytes;
    stages = squares + Tile::Flash::kQueryBytes;
    words = reinterpret_cast<typename Tile::Words*>(queries + Tile::kWords);
    key = reinterpret_cast<uint32_t*>(words + 1);
  }
};

// The queries and their squares, of q * scale, into shared memory.
template <class Tile>
__device__ __forceinline__ void load_queries(const ScoreBlock<Tile>& block) {
  using Flash = typename Tile::Flash;
  flash_copy_rows<Flash, Flash::kQueries>(block.queries, static_cast<int>(block.tree.job.params.head_size),
                                          [&](int row) { return block.query(row); });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const typename Tile::T* const q = reinterpret_cast<const typename Tile::T*>(block.queries);
  __nv_bfloat162* const squares = reinterpret_cast<__nv_bfloat162*>(block.squares);
  for (int i = static_cast<int>(threadIdx.x); i < Flash::kQueryBytes / 4; i += Flash::kThreads) {
    const float x = to_float(q[2 * i]), y = to_float(q[2 * i + 1]);
    squares[i] = __floats2bfloat162_rn(x * x * block.scale_of_squares, y * y * block.scale_of_squares);
  }
}

template <class Tile>
using SummaryScores = float[Tile::Flash::kRowTiles][Tile::kKeys / 8][4];

// Products of the tile's rows in shared memory with those of a block; summed up when finish_products returns.
template <class Tile>
__device__ __forceinline__ void start_products(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], const char* queries,
                                               const char* keys) {
  if constexpr (Tile::kWarpgroups) {
    flash_start_products<Tile>(s, queries, keys);
  } else {
    flash_products<Tile>(
        s, [&](uint32_t (&a)[Tile::kRowTiles][4], int k) { flash_load_queries<Tile>(a, queries, k); }, keys);
  }
}
template <class Tile>
__device__ __forceinline__ void finish_products(SummaryScores<Tile>& s) {
  if constexpr (Tile::Flash::kWarpgroups) flash_finish<0>(s[0]);
}

// Calls each(i, s, s2, values) for every block i of Tile::kKeys of `count` clusters, with s = the products of the rows with
// the mean keys, s2 = the variance of the scores of their keys, and, where they are asked for, their mean values in shared
// memory. cluster(j) is number j of the clusters. All threads of the block of threads call this.
template <class Tile, class Cluster, class Each>
__device__ __forceinline__ void for_summaries(const ScoreBlock<Tile>& block, int count, bool with_values, Cluster cluster,
                                              Each each) {
  using Flash = typename Tile::Flash;
  using T = typename Tile::T;
  const QuantumAttentionParams& p = block.tree.job.params;
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size);
  const int64_t first = block.head * block.tree.clusters;
  const T* const mean_key = static_cast<const T*>(block.tree.mean_key) + first * d;
  const T* const variance = reinterpret_cast<const T*>(block.tree.variance + first * d);  // as 16 bits each
  const T* const mean_value = static_cast<const T*>(block.tree.mean_value) + first * dv;
  const int blocks = ceil_div(count, Tile::kKeys);
  const auto copy = [&](int i) {
    if (i >= blocks) return;
    char* const stage = block.stages + i % 2 * Tile::kStage;
    const auto rows_of = [&](const T* rows, int size) {
      return [&, rows, size](int row) {
        const int j = i * Tile::kKeys + row;
        return j < count ? rows + cluster(j) * size : nullptr;
      };
    };
    flash_copy_rows<Flash, Tile::kKeys>(stage, d, rows_of(mean_key, d));
    flash_copy_rows<Flash, Tile::kKeys>(stage + Flash::kKeyBytes, d, rows_of(variance, d));
    if (with_values) flash_copy_rows<Flash, Tile::kKeys>(stage + 2 * Flash::kKeyBytes, dv, rows_of(mean_value, dv));
    cp_async_commit();
  };
  __syncthreads();
  copy(0);
  for (int i = 0; i < blocks; ++i) {
    flash_exchange();  // the block is there, and nobody reads the one before any more
    const char* const stage = block.stages + i % 2 * Tile::kStage;
    SummaryScores<Tile> s, s2;
    start_products<Flash>(s, block.queries, stage);
    start_products<typename Tile::Squares>(s2, block.squares, stage + Flash::kKeyBytes);
    copy(i + 1);
    finish_products<Tile>(s);
    finish_products<Tile>(s2);
    each(i, s, s2, stage + 2 * Flash::kKeyBytes);
  }
}

}  // namespace cuda
}  // namespace qexport
