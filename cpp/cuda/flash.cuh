// Attention of one tile of queries over a list of blocks of keys, by online softmax (Milakov and Gimelshein, arXiv
// 1805.02867; Dao, arXiv 2307.08691) on the tensor cores: fp16 and bf16, float32 sums. Scores are logarithms of base 2.
//
// `attend` walks over the blocks 0..count-1 of a `Blocks`, which says where rows lie and what a score becomes:
//   const T* query(int row)              row of the tile, aligned to 16 bytes; null: zeros
//   const T* key(int block, int row)     row of K of a block, likewise
//   const T* value(int block, int row)   row of V; null for every row that no query may see, since 0 * NaN is NaN
//   int head_size, v_head_size           elements of a row, multiples of 8 up to Tile::kHead; the rest counts as 0
//   float scale                          of the products q . k, times log2(e)
//   bool plain(int block)                scale * (q . k) is the score of all pairs of the block; same on all threads
//   void prepare(int block)              called by all threads before the scores of a block that is not plain
//   void adjust<kCount>(int block, int row, at, key)    turns at(0)..at(kCount - 1), which are scale * (q . k) of a row with
//                                        the keys key(0).. of such a block, into scores; -inf: the query does not see the key
#pragma once

#include <cstring>

#include "attention.cuh"
#include "wgmma.cuh"

namespace qexport {
namespace cuda {

constexpr float kLog2E = 1.44269504088896340736f;

// The shape of a tile. A warp computes 16 * kRowTiles queries and shares what it reads of K and V among them.
template <class T_, int kHead_, int kRowTiles_, int kWarps_, int kKeys_, int kBlocksPerProcessor_, bool kWarpgroups_ = false>
struct FlashTile {
  static constexpr bool kWarpgroups = kWarpgroups_;  // the products are those of warpgroups where they exist
  using T = T_;
  static constexpr int kHead = kHead_, kRowTiles = kRowTiles_, kKeys = kKeys_, kThreads = kWarps_ * kWarp;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr int kQueries = 16 * kRowTiles * kWarps_;
  static constexpr int kRowBytes = kHead * 2;
  static constexpr int kQueryPanel = kWarpgroups ? kQueries : 0, kKeyPanel = kWarpgroups ? kKeys : 0;
  static constexpr int kQueryBytes = kQueries * kRowBytes, kKeyBytes = kKeys * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + 4 * kKeyBytes;  // Q, and two blocks of K and of V
};

// What a thread holds of a tile: pairs of columns of some rows, not yet divided by the sum of their row.
template <class Tile>
struct FlashState {
  static constexpr int kRows = 2 * Tile::kRowTiles, kPairs = Tile::kHead / 8;
  float o[Tile::kRowTiles][kPairs][4];
  float most[kRows];  // of the scores so far; the same on the four lanes of a row
  float sum[kRows];   // of 2^(score - most); a part of it on each of the four lanes, until join_sums

  __device__ __forceinline__ static int row(int i) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    return (warp * kRows + i) * 8 + lane / 4;
  }
  __device__ __forceinline__ static int column(int n) { return 8 * n + 2 * static_cast<int>(threadIdx.x % 4); }
  __device__ __forceinline__ float* pair(int i, int n) { return o[i / 2][n] + i % 2 * 2; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      most[i] = -kInf, sum[i] = 0.0f;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) pair(i, n)[0] = pair(i, n)[1] = 0.0f;
    }
  }
  __device__ __forceinline__ void join_sums() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 1);
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 2);
    }
  }
};

// Rows of Q, K and V lie in shared memory one behind the other, permuted so that the same 16 bytes of eight rows that follow
// each other fill all banks. With kPanelRows they lie in panels of 64 columns of so many rows, as warpgroups want them.
template <int kHead>
__device__ __forceinline__ int flash_turn(int row) {
  return kHead >= 64 ? row & 7 : row >> 1 & 3;
}
template <int kHead, int kPanelRows = 0>
__device__ __forceinline__ int flash_offset(int row, int chunk) {
  constexpr int kChunks = kHead >= 64 ? 8 : 4;  // that are permuted among themselves
  const int lane = (chunk % kChunks ^ flash_turn<kHead>(row)) << 4;
  if (kPanelRows) return (chunk / kChunks * kPanelRows + row) * kChunks * 16 + lane;
  return row * kHead * 2 + chunk / kChunks * kChunks * 16 + lane;
}

// What a lane gives to ldmatrix: chunk 2 k + half of row 16 n + row, as the sum of what is known to the compiler and little
// that is not.
template <int kHead, int kPanelRows>
struct FlashLane {
  static constexpr int kRowBytes = kPanelRows && kHead > 64 ? 128 : 2 * kHead;
  int first, chunk;
  __device__ __forceinline__ FlashLane(int row, int half)
      : first(row * kRowBytes), chunk((half ^ flash_turn<kHead>(row)) << 4) {}
  __device__ __forceinline__ int at(int n, int k) const {
    constexpr int kChunks = kHead >= 64 ? 8 : 4;
    return flash_offset<kHead, kPanelRows>(16 * n, 2 * k / kChunks * kChunks) + first + (chunk ^ (2 * k % kChunks << 4));
  }
};

template <class Tile, int kRows, class Row, int kPanelRows = Tile::kWarpgroups ? kRows : 0>
__device__ __forceinline__ void flash_copy_rows(char* shared, int columns, const Row& row_of) {
  constexpr int kChunks = Tile::kHead / 8, kStep = Tile::kThreads / kChunks;
  static_assert(Tile::kThreads % kChunks == 0);
  const int first = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll
  for (int i = 0; i < ceil_div(kRows, kStep); ++i) {
    const int row = i * kStep + first;
    if (kRows % kStep && row >= kRows) break;
    const typename Tile::T* from = row_of(row);
    const bool valid = from && 8 * chunk < columns;
    cp_async_16(shared + flash_offset<Tile::kHead, kPanelRows>(row, chunk), valid ? from + 8 * chunk : nullptr, valid);
  }
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Columns 16 k.. of the warp's rows of Q.
template <class Tile>
__device__ __forceinline__ void flash_load_queries(uint32_t (&a)[Tile::kRowTiles][4], const char* queries, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const FlashLane<Tile::kHead, Tile::kQueryPanel> place(lane % 16 + warp * Tile::kRowTiles * 16, lane / 16);
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) ldmatrix_x4(a[i], queries + place.at(i, k));
}

// s = Q K' of the warp's rows. `load(a, k)` gives columns 16 k.. of Q.
template <class Tile, class Load>
__device__ __forceinline__ void flash_products(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], const Load& load,
                                               const char* keys) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const FlashLane<Tile::kHead, Tile::kKeyPanel> place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < Tile::kHead / 16; ++k) {
    uint32_t a[Tile::kRowTiles][4];
    load(a, k);
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + place.at(n, k));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        mma_16816<typename Tile::T>(s[i][2 * n], a[i], left);
        mma_16816<typename Tile::T>(s[i][2 * n + 1], a[i], right);
      }
    }
  }
}

// The maximum that weights are relative to may lag behind by this, so that o is rarely multiplied; 2^8 is no matter in fp16.
constexpr float kSlack = 8.0f;

// Moves the maximum of the rows where it has to, and the sum with it. True: o is to be multiplied by `fade`.
template <class Tile>
__device__ __forceinline__ bool flash_move(FlashState<Tile>& state, const float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                           float factor, float (&fade)[FlashState<Tile>::kRows]) {
  constexpr int kRows = FlashState<Tile>::kRows;
  float most[kRows];
  bool moves = false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    most[i] = s[i / 2][0][i % 2 * 2];
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
      most[i] = fmaxf(most[i], fmaxf(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
    }
    most[i] = fmaxf(most[i], __shfl_xor_sync(kFullWarp, most[i], 1));
    most[i] = fmaxf(most[i], __shfl_xor_sync(kFullWarp, most[i], 2)) * factor;
    moves = moves || most[i] > state.most[i] + kSlack;
  }
  if (!__any_sync(kFullWarp, moves)) return false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    most[i] = fmaxf(most[i], state.most[i]);
    fade[i] = most[i] == -kInf ? 1.0f : fast_exp2(state.most[i] - most[i]);
    state.most[i] = most[i];
    state.sum[i] *= fade[i];
  }
  return true;
}
template <class Tile>
__device__ __forceinline__ void flash_fade(FlashState<Tile>& state, const float (&fade)[FlashState<Tile>::kRows]) {
#pragma unroll
  for (int i = 0; i < FlashState<Tile>::kRows; ++i) {
#pragma unroll
    for (int n = 0; n < FlashState<Tile>::kPairs; ++n) state.pair(i, n)[0] *= fade[i], state.pair(i, n)[1] *= fade[i];
  }
}

// Turns scores into 2^(factor * s - most), and adds them to the sum.
template <class Tile>
__device__ __forceinline__ void flash_exp2(FlashState<Tile>& state, float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                              float factor) {
#pragma unroll
  for (int i = 0; i < FlashState<Tile>::kRows; ++i) {
    const float base = state.most[i] == -kInf ? 0.0f : state.most[i];  // -inf - -inf would be NaN
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][n][e] = fast_exp2(fmaf(s[i / 2][n][e], factor, -base));
        sum += s[i / 2][n][e];
      }
    }
    state.sum[i] += sum;
  }
}

// All of that: scores into weights.
template <class Tile>
__device__ __forceinline__ void flash_weights(FlashState<Tile>& state, float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                              float factor) {
  float fade[FlashState<Tile>::kRows];
  if (flash_move(state, s, factor, fade)) flash_fade(state, fade);
  flash_exp2(state, s, factor);
}

// Weights as the left operands of products: their accumulators lie as these do.
template <class Tile>
__device__ __forceinline__ void flash_pack(uint32_t (&p)[Tile::kKeys / 16][Tile::kRowTiles][4],
                                           const float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4]) {
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float(&c)[4] = s[i][2 * k + e / 2];
        p[k][i][e] = pack_pair(c[2 * (e % 2)], c[2 * (e % 2) + 1], typename Tile::T{});
      }
    }
  }
}

// o += P V.
template <class Tile>
__device__ __forceinline__ void flash_values(FlashState<Tile>& state,
                                             const uint32_t (&p)[Tile::kKeys / 16][Tile::kRowTiles][4], const char* values) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const FlashLane<Tile::kHead, Tile::kKeyPanel> place(lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
#pragma unroll
    for (int n = 0; n < Tile::kHead / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + place.at(k, n));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        mma_16816<typename Tile::T>(state.o[i][2 * n], p[k][i], left);
        mma_16816<typename Tile::T>(state.o[i][2 * n + 1], p[k][i], right);
      }
    }
  }
}

template <class Tile>
__device__ __forceinline__ void flash_values(FlashState<Tile>& state,
                                             const float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], const char* values) {
  uint32_t p[Tile::kKeys / 16][Tile::kRowTiles][4];
  flash_pack<Tile>(p, s);
  flash_values<Tile>(state, p, values);
}

// Negates what this thread has copied of Q.
template <class Tile>
__device__ __forceinline__ void flash_negate(char* queries) {
  constexpr int kChunks = Tile::kHead / 8, kStep = Tile::kThreads / kChunks;
#pragma unroll
  for (int i = 0; i < ceil_div(Tile::kQueries, kStep); ++i) {
    const int row = i * kStep + static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    if (Tile::kQueries % kStep && row >= Tile::kQueries) break;
    uint32_t* words = reinterpret_cast<uint32_t*>(queries + flash_offset<Tile::kHead, Tile::kQueryPanel>(row, chunk));
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] ^= 0x80008000u;
  }
}

// Products into scores; returns what they are still to be multiplied by.
template <class Tile, class Blocks>
__device__ __forceinline__ float flash_scores(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], float factor, int block,
                                              Blocks& blocks) {
  if (blocks.plain(block)) return factor;
  blocks.prepare(block);
  const int first = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
    const auto at = [&](int m) -> float& { return s[i / 2][m / 2][i % 2 * 2 + m % 2]; };
#pragma unroll
    for (int m = 0; m < Tile::kKeys / 4; ++m) at(m) *= factor;
    blocks.template adjust<Tile::kKeys / 4>(block, FlashState<Tile>::row(i), at,
                                            [&](int m) { return 8 * (m / 2) + first + m % 2; });
  }
  return 1.0f;
}

// The two halves of shared memory for blocks of K, or of V, that are taken in turn.
template <class Tile, class Row>
__device__ __forceinline__ void flash_copy_block(char* pair, int block, int columns, const Row& row_of) {
  flash_copy_rows<Tile, Tile::kKeys>(pair + block % 2 * Tile::kKeyBytes, columns, [&](int row) { return row_of(block, row); });
}

// The loop of attend on warpgroups: the products of a block with V run beside the softmax of the next. Below sm_90a, where a
// warp has its own products, nothing runs beside anything and the result is the same. A block of K comes one turn before the
// same block of V.
template <class Tile>
__device__ __forceinline__ void flash_start_products(float (&s)[1][Tile::kKeys / 8][4], const char* queries, const char* keys) {
#if QEXPORT_WGMMA
  const char* const rows = queries + threadIdx.x / 128 * (64 * 128);
  wgmma_hold(s[0]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Tile::kHead / 16; ++k) {
    wgmma_keys(s[0], wgmma_matrix(rows + k / 4 * (Tile::kQueries * 128) + k % 4 * 32, 16),
               wgmma_matrix(keys + k / 4 * (Tile::kKeys * 128) + k % 4 * 32, 16), k > 0, typename Tile::T{});
  }
  wgmma_commit();
#else
  flash_products<Tile>(s, [&](uint32_t(&a)[1][4], int k) { flash_load_queries<Tile>(a, queries, k); }, keys);
#endif
}
template <class Tile>
__device__ __forceinline__ void flash_start_values(FlashState<Tile>& state, const uint32_t (&p)[Tile::kKeys / 16][1][4],
                                                   const char* values) {
#if QEXPORT_WGMMA
  wgmma_hold(state.o[0]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
    wgmma_values(state.o[0], p[k][0], wgmma_matrix(values + k * (16 * 128), Tile::kKeys * 128), typename Tile::T{});
  }
  wgmma_commit();
#else
  flash_values<Tile>(state, p, values);
#endif
}
// Waits for what was started, but for the last kPending.
template <int kPending, int kCount>
__device__ __forceinline__ void flash_finish(float (&d)[kCount][4]) {
#if QEXPORT_WGMMA
  wgmma_wait<kPending>();
  wgmma_hold(d);
#else
  (void)d;
#endif
}
// Own copies have come and others may read them.
__device__ __forceinline__ void flash_exchange() {
  cp_async_wait<0>();
#if QEXPORT_WGMMA
  wgmma_shared_fence();
#endif
  __syncthreads();
}

template <class Tile, class Blocks>
__device__ __forceinline__ void flash_attend_warpgroups(FlashState<Tile>& state, const char* queries, char* keys, char* values,
                                                        int count, float factor, Blocks& blocks) {
  static_assert(Tile::kRowTiles == 1 && Tile::kThreads % 128 == 0 && Tile::kHead % 64 == 0);
  const auto copy_key = [&](int block) {
    if (block >= count) return;
    flash_copy_block<Tile>(keys, block, blocks.head_size, [&](int b, int row) { return blocks.key(b, row); });
  };
  const auto copy_value = [&](int block) {
    if (block >= count) return;
    flash_copy_block<Tile>(values, block, blocks.v_head_size, [&](int b, int row) { return blocks.value(b, row); });
  };
  float s[1][Tile::kKeys / 8][4], fade[2];
  uint32_t p[Tile::kKeys / 16][1][4];
  cp_async_commit();
  flash_exchange();
  copy_key(1);
  copy_value(0);
  cp_async_commit();
  flash_start_products<Tile>(s, queries, keys);
  flash_finish<0>(s[0]);
  float left = flash_scores<Tile>(s, factor, 0, blocks);
  flash_weights<Tile>(state, s, left);
  flash_pack<Tile>(p, s);
  for (int block = 1; block < count; ++block) {
    flash_exchange();  // K of this block and V of the one before are there, nobody reads those before any more
    copy_key(block + 1);
    copy_value(block);
    cp_async_commit();
    flash_start_products<Tile>(s, queries, keys + block % 2 * Tile::kKeyBytes);
    flash_start_values(state, p, values + (block - 1) % 2 * Tile::kKeyBytes);
    flash_finish<1>(s[0]);
    left = flash_scores<Tile>(s, factor, block, blocks);
    const bool moved = flash_move(state, s, left, fade);
    flash_exp2(state, s, left);
    flash_finish<0>(state.o[0]);
    if (moved) flash_fade(state, fade);
    flash_pack<Tile>(p, s);
  }
  flash_exchange();
  flash_start_values(state, p, values + (count - 1) % 2 * Tile::kKeyBytes);
  flash_finish<0>(state.o[0]);
}

// Joins blocks 0..count-1 to `state`, which the caller has cleared or filled. `shared` has Tile::kSharedBytes. All threads of
// the block call this, and may write to `shared` again behind a barrier.
template <class Tile, class Blocks>
__device__ __forceinline__ void attend(FlashState<Tile>& state, char* shared, int count, Blocks& blocks) {
  if (count == 0) return;
  char* const queries = shared;
  char* const keys = shared + Tile::kQueryBytes;
  char* const values = keys + 2 * Tile::kKeyBytes;
  const auto key = [&](int block, int row) { return blocks.key(block, row); };
  const auto value = [&](int block, int row) { return blocks.value(block, row); };
  flash_copy_rows<Tile, Tile::kQueries>(queries, blocks.head_size, [&](int row) { return blocks.query(row); });
  flash_copy_block<Tile>(keys, 0, blocks.head_size, key);
  if (blocks.scale < 0.0f) {
    // The maximum is taken of products before scaling, so that the scale must not be negative. A thread sees its own copies
    // without a barrier.
    cp_async_commit();
    cp_async_wait<0>();
    flash_negate<Tile>(queries);
  }
  const float factor = fabsf(blocks.scale);
  if constexpr (Tile::kWarpgroups) {
    flash_attend_warpgroups(state, queries, keys, values, count, factor, blocks);
  } else {
    flash_copy_block<Tile>(values, 0, blocks.v_head_size, value);
    cp_async_commit();
    const auto load = [&](uint32_t(&a)[Tile::kRowTiles][4], int k) { flash_load_queries<Tile>(a, queries, k); };
    for (int block = 0; block < count; ++block) {
      cp_async_wait<0>();
      __syncthreads();  // the block is there, and nobody reads the one before any more
      if (block + 1 < count) {
        flash_copy_block<Tile>(keys, block + 1, blocks.head_size, key);
        flash_copy_block<Tile>(values, block + 1, blocks.v_head_size, value);
        cp_async_commit();
      }
      const int at = block % 2 * Tile::kKeyBytes;
      float s[Tile::kRowTiles][Tile::kKeys / 8][4];
      flash_products<Tile>(s, load, keys + at);
      const float left = flash_scores<Tile>(s, factor, block, blocks);
      flash_weights<Tile>(state, s, left);
      flash_values<Tile>(state, s, values + at);
    }
  }
}

}  // namespace cuda
}  // namespace qexport
