// The summaries of clusters as a tile of `tree` sees them: kTreeRows queries of one head, which share a choice of clusters
// (docs/math.md, "tree").
#pragma once

#include "partition.cuh"
#include "tree_rows.cuh"

namespace qexport {
namespace cuda {

// Where the squares of the queries are: with them in shared memory, in the registers of the threads that multiply them, or
// made as they are read.
enum class SquaresIn { shared, registers, queries };

// The tile of the products, and shared memory: the queries and their squares, then what the passes over summaries need, two
// blocks of kKeys clusters in turn, then the rest.
template <class T_, int kHead, int kRowTiles, int kWarps_, int kKeys_, int kBlocksPerProcessor, SquaresIn kSquaresIn_,
          bool kWarpgroups = false>
struct ScoreTile {
  using T = T_;
  static constexpr int kKeys = kKeys_, kWarps = kWarps_;
  static constexpr SquaresIn kSquaresIn = kSquaresIn_;
  using Flash = FlashTile<T, kHead, kRowTiles, kWarps, kKeys, kBlocksPerProcessor, kWarpgroups>;
  using Squares = FlashTile<Variance<T>, kHead, kRowTiles, kWarps, kKeys, kBlocksPerProcessor, kWarpgroups>;
  using State = FlashState<Flash>;
  static_assert(Flash::kQueries == kTreeRows);
  static constexpr int kStage = kSummaryMatrices * Flash::kKeyBytes;
  static constexpr int kSquareBytes = kSquaresIn == SquaresIn::shared ? Flash::kQueryBytes : 0;
  static constexpr int kSquareSteps = kSquaresIn == SquaresIn::registers ? Flash::kRowBytes / 32 : 1;
  static constexpr int kWords = Flash::kQueryBytes + kSquareBytes + 2 * kStage;
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
  uint32_t* key;                                                   // (candidates): the larger the score, the smaller
  uint32_t square[Tile::Flash::kRowTiles][Tile::kSquareSteps][4];  // with SquaresIn::registers

  __device__ __forceinline__ ScoreBlock(const TreeLaunch& tree, const TreeItem& item)
      : TreeRows<typename Tile::T>(tree, item.place, item.tile), scale(tree.job.params.scale) {
    scale_of_squares = scale * scale;
    queries = dynamic_shared<char>(), squares = queries + Tile::Flash::kQueryBytes;
    stages = squares + Tile::kSquareBytes;
    words = reinterpret_cast<typename Tile::Words*>(queries + Tile::kWords);
    key = reinterpret_cast<uint32_t*>(words + 1);
  }
};

// Two squares of elements of a half type, times `factor`.
template <class T>
__device__ __forceinline__ __nv_bfloat162 square_pair(const T* q, float factor) {
  const float x = to_float(q[0]), y = to_float(q[1]);
  return __floats2bfloat162_rn(x * x * factor, y * y * factor);
}

// Squares of what flash_load_queries gives, times `factor`, in the type of variances.
template <class T, int kRowTiles>
__device__ __forceinline__ void square_queries(uint32_t (&a)[kRowTiles][4], float factor) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (sizeof(T) == 4) {
        const float x = __uint_as_float(a[i][e]);
        a[i][e] = __float_as_uint(x * x * factor);
      } else {
        T q[2];
        memcpy(static_cast<void*>(q), &a[i][e], sizeof(q));
        const __nv_bfloat162 pair = square_pair(q, factor);
        memcpy(&a[i][e], &pair, sizeof(pair));
      }
    }
  }
}

// The queries into shared memory, and their squares to where they are kept.
template <class Tile>
__device__ __forceinline__ void load_queries(ScoreBlock<Tile>& block) {
  using Flash = typename Tile::Flash;
  using T = typename Tile::T;
  flash_copy_runs<Flash, Flash::kQueries>(
      block.queries, static_cast<int>(block.tree.job.params.head_size), [&](int part) { return block.query_run(part); },
      [&](int row) { return block.query(row); }, KeepAll{});
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if constexpr (Tile::kSquaresIn == SquaresIn::shared) {
    const T* const q = reinterpret_cast<const T*>(block.queries);
    __nv_bfloat162* const squares = reinterpret_cast<__nv_bfloat162*>(block.squares);
    for (int i = static_cast<int>(threadIdx.x); i < Flash::kQueryBytes / 4; i += Flash::kThreads) {
      squares[i] = square_pair(q + 2 * i, block.scale_of_squares);
    }
  }
  if constexpr (Tile::kSquaresIn == SquaresIn::registers) {
#pragma unroll
    for (int k = 0; k < Tile::kSquareSteps; ++k) {
      uint32_t a[Flash::kRowTiles][4];
      flash_load_queries<Flash>(a, block.queries, k);
      square_queries<T>(a, block.scale_of_squares);
#pragma unroll
      for (int i = 0; i < Flash::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) block.square[i][k][e] = a[i][e];
      }
    }
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
__device__ __forceinline__ void start_products_of_squares(const ScoreBlock<Tile>& block, SummaryScores<Tile>& s,
                                                          const char* variances) {
  using Fragment = uint32_t[Tile::Flash::kRowTiles][4];
  if constexpr (Tile::kSquaresIn == SquaresIn::shared) {
    start_products<typename Tile::Squares>(s, block.squares, variances);
  } else {
    const auto load = [&](Fragment& a, int k) {
      if constexpr (Tile::kSquaresIn == SquaresIn::queries) {
        flash_load_queries<typename Tile::Flash>(a, block.queries, k);
        square_queries<typename Tile::T>(a, block.scale_of_squares);
      } else {
#pragma unroll
        for (int i = 0; i < Tile::Flash::kRowTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i][e] = block.square[i][k][e];
        }
      }
    };
    flash_products<typename Tile::Squares>(s, load, variances);
  }
}
template <class Tile>
__device__ __forceinline__ void finish_products(SummaryScores<Tile>& s) {
  if constexpr (Tile::Flash::kWarpgroups) flash_finish<0>(s[0]);
}

// Which clusters a pass looks at: number j of them.
struct AllClusters {
  static constexpr bool kInOrder = true;
  __device__ __forceinline__ int operator()(int j) const { return j; }
};
struct ListedClusters {
  static constexpr bool kInOrder = false;
  const int32_t* list;
  __device__ __forceinline__ int operator()(int j) const { return list[j]; }
};

// Starts to copy kMatrices summaries of block i of `count` clusters.
template <int kMatrices, class Tile, class Clusters>
__device__ __forceinline__ void copy_summaries(const ScoreBlock<Tile>& block, int i, int count, Clusters clusters) {
  using Flash = typename Tile::Flash;
  const auto offset = [](int row, int chunk) { return flash_offset<Flash::kRowBytes, Flash::kKeyPanel>(row, chunk); };
  const char* const summaries = block.tree.summaries + block.head * block.tree.summary_blocks * Tile::kStage;
  char* const stage = block.stages + i % 2 * Tile::kStage;
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (Clusters::kInOrder) {  // as they lie
    constexpr int kRowStride = Flash::kKeyPanel && Flash::kRowBytes > 128 ? 128 : Flash::kRowBytes;
    static_assert(Tile::kKeys * kRowStride % (16 * Flash::kThreads) == 0);
    const char* const from = summaries + i * Tile::kStage + 16 * thread;
    const int row = 16 * thread / kRowStride, left = count - i * Tile::kKeys;
#pragma unroll
    for (int at = 0; at < kMatrices * Flash::kKeyBytes; at += 16 * Flash::kThreads) {
      cp_async_16(stage + 16 * thread + at, from + at, row < left - at / kRowStride % Tile::kKeys);
    }
  } else {
    constexpr int kChunks = Flash::kRowBytes / kChunkBytes;
#pragma unroll
    for (int first = 0; first < Tile::kKeys * kChunks; first += Flash::kThreads) {
      const int row = (first + thread) / kChunks, chunk = thread % kChunks, j = i * Tile::kKeys + row;
      const int c = j < count ? clusters(j) : 0;
      const char* const from = summaries + c / Tile::kKeys * Tile::kStage + offset(c % Tile::kKeys, chunk);
      char* const to = stage + offset(row, chunk);
#pragma unroll
      for (int at = 0; at < kMatrices * Flash::kKeyBytes; at += Flash::kKeyBytes) cp_async_16(to + at, from + at, j < count);
    }
  }
  cp_async_commit();
}

// Calls each(i, s, s2, values) for every block i of Tile::kKeys of `count` clusters, with s = the products of the rows with
// the mean keys, s2 = the variance of the scores of their keys, and, as the third of kMatrices, their mean values in shared
// memory. All threads of the block of threads call this.
template <int kMatrices, class Tile, class Clusters, class Each>
__device__ __forceinline__ void for_summaries(const ScoreBlock<Tile>& block, int count, Clusters clusters, Each each) {
  using Flash = typename Tile::Flash;
  const int blocks = ceil_div(count, Tile::kKeys);
  if (blocks == 0) return;  // nobody would wait for the first
  __syncthreads();
  copy_summaries<kMatrices>(block, 0, count, clusters);
  for (int i = 0; i < blocks; ++i) {
    flash_exchange();  // the block is there, and nobody reads the one before any more
    const char* const stage = block.stages + i % 2 * Tile::kStage;
    SummaryScores<Tile> s, s2;
    start_products<Flash>(s, block.queries, stage + kMeanKey * Flash::kKeyBytes);
    start_products_of_squares(block, s2, stage + kVariance * Flash::kKeyBytes);
    if (i + 1 < blocks) copy_summaries<kMatrices>(block, i + 1, count, clusters);
    finish_products<Tile>(s);
    finish_products<Tile>(s2);
    each(i, s, s2, stage + kMeanValue * Flash::kKeyBytes);
  }
}

}  // namespace cuda
}  // namespace qexport
