// Attention of one tile of queries over a list of blocks of keys, by online softmax (Milakov and Gimelshein, arXiv
// 1805.02867; Dao, arXiv 2307.08691) on the tensor cores: fp16, bf16, and float32 in two parts (flash_tf32.cuh); float32
// sums. Scores are logarithms of base 2.
//
// `attend` walks over the blocks 0..count-1 of a `Blocks`, which says where rows lie and what a score becomes:
//   Run<T> query_run(int part)           rows kRun * part.. of the tile, each aligned to 16 bytes
//   Run<T> key_run(int block, int part)  rows of K of a block, likewise; of a block of fewer than kRun rows, all
//   Run<T> value_run(int block, int part)    rows of V; none that no query may see, since 0 * NaN is NaN
//   const T* query(int row), key(int block, int row), value(int block, int row)    where a run is kUneven; null: zeros
//   int head_size, v_head_size           elements of a row, 16 bytes each time, up to Tile::kHead; the rest counts as 0
//   float scale                          of the products q . k, times log2(e)
//   bool plain(int block)                scale * (q . k) is the score of all pairs of the block; same on all threads
//   void prepare(int block)              called by all threads before the scores of a block that is not plain
//   bool hides()                         some rows of V may be hidden, if block is not plain; same on all threads
//   bool hidden(int block, int row)      after prepare: no query sees the row, so that V counts as 0 there, whatever it is
//   void adjust<kCount>(int block, int row, at, key)    turns at(0)..at(kCount - 1), which are scale * (q . k) of a row with
//                                        the keys key(0).. of such a block, into scores; -inf: the query does not see the
//                                        key
#pragma once

#include "flash_pipeline.cuh"

namespace qexport {
namespace cuda {

// `attend` by warps, or warpgroups, that copy and compute alike.
template <class Tile, class Blocks>
__device__ __forceinline__ void flash_attend(FlashState<Tile>& state, char* shared, int count, Blocks& blocks) {
  if (count == 0) return;
  char* const queries = shared;
  char* const keys = shared + Tile::kQueryBytes;
  char* const values = keys + 2 * Tile::kKeyBytes;
  const auto copy_block = [&](int block) {
    flash_copy_keys<Tile>(keys + block % 2 * Tile::kKeyBytes, block, blocks);
    if (!Tile::kWarpgroups) flash_copy_values<Tile>(values + block % 2 * Tile::kKeyBytes, block, blocks);
    cp_async_commit();
  };
  flash_copy_queries<Tile>(queries, blocks);
#pragma unroll 1
  for (int block = 0; block < min(count, Tile::kWarpgroups ? 1 : 2); ++block) copy_block(block);
  if (blocks.scale < 0.0f) {
    // The maximum is taken of products before scaling, so that the scale must not be negative. A thread sees its own copies
    // without a barrier.
    cp_async_wait<0>();
    flash_negate<Tile>(queries);
  }
  const float factor = fabsf(blocks.scale);
  if constexpr (Tile::kWarpgroups) {
    flash_attend_warpgroups(state, queries, keys, values, count, factor, blocks);
  } else {
    const auto load = [&](uint32_t (&a)[Tile::kRowTiles][4], int k) { flash_load_queries<Tile>(a, queries, k); };
    for (int block = 0; block < count; ++block) {
      if (block == 0 && count > 1) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();  // the block is there, and nobody reads the one before any more
      if (block > 0 && block + 1 < count) copy_block(block + 1);
      const int at = block % 2 * Tile::kKeyBytes;
      float s[Tile::kRowTiles][Tile::kKeys / 8][4];
      flash_products<Tile>(s, load, keys + at);
      if (!blocks.plain(block)) {
        blocks.prepare(block);
        if (blocks.hides()) {
          flash_clear_values<Tile>(values + at, [&](int row) { return blocks.hidden(block, row); });
          __syncthreads();
        }
      }
      const float left = flash_scores<Tile>(s, factor, block, blocks);
      flash_weights<Tile>(state, s, left);
      flash_values<Tile>(state, s, values + at);
    }
  }
}

// Joins blocks 0..count-1 to `state`, which the caller has cleared or filled. `shared` has Tile::kSharedBytes. All threads
// of the block call this, and may write to `shared` again behind a barrier. False: this thread has no rows and is done.
template <class Tile, class Blocks>
__device__ __forceinline__ bool attend(FlashState<Tile>& state, char* shared, int count, Blocks& blocks) {
  if constexpr (Tile::kPipeline) {
    return flash_attend_pipeline(state, shared, count, blocks);
  } else {
    flash_attend(state, shared, count, blocks);
    return true;
  }
}

}  // namespace cuda
}  // namespace qexport
