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
#include "mma.cuh"

namespace qexport {
namespace cuda {

constexpr float kLog2E = 1.44269504088896340736f;

// The shape of a tile. A warp computes 16 * kRowTiles queries and shares what it reads of K and V among them.
template <class T_, int kHead_, int kRowTiles_, int kWarps_, int kKeys_, int kBlocksPerProcessor_, bool kKeep_ = false>
struct FlashTile {
  static constexpr bool kKeep = kKeep_;  // Q stays in registers
  using T = T_;
  static constexpr int kHead = kHead_, kRowTiles = kRowTiles_, kKeys = kKeys_, kThreads = kWarps_ * kWarp;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr int kQueries = 16 * kRowTiles * kWarps_;
  static constexpr int kRowBytes = kHead * 2;
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

// Where 16 bytes of a row of a tile lie in shared memory: permuted so that the same chunk of eight rows that follow each
// other fills all banks.
template <int kHead>
__device__ __forceinline__ int flash_turn(int row) {
  return kHead >= 64 ? row & 7 : row >> 1 & 3;
}
template <int kHead>
__device__ __forceinline__ int flash_offset(int row, int chunk) {
  return row * kHead * 2 + ((chunk ^ flash_turn<kHead>(row)) << 4);
}

// What a lane gives to ldmatrix: chunk 2 k + half of row 16 n + row of a tile, as the sum of what is known to the compiler and
// little that is not.
template <int kHead>
struct FlashLane {
  int first, chunk;
  __device__ __forceinline__ FlashLane(int row, int half)
      : first(row * kHead * 2), chunk((half ^ flash_turn<kHead>(row)) << 4) {}
  __device__ __forceinline__ int at(int n, int k) const {
    constexpr int kChunks = kHead >= 64 ? 8 : 4;  // that are permuted among themselves
    return n * 32 * kHead + 2 * k / kChunks * kChunks * 16 + first + (chunk ^ (2 * k % kChunks << 4));
  }
};

template <class Tile, int kRows, class Row>
__device__ __forceinline__ void flash_copy_rows(char* shared, int columns, const Row& row_of) {
  constexpr int kChunks = Tile::kHead / 8, kStep = Tile::kThreads / kChunks;
  static_assert(Tile::kThreads % kChunks == 0 && kRows % kStep == 0);
  const int first = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int row = i * kStep + first;
    const typename Tile::T* from = row_of(row);
    const bool valid = from && 8 * chunk < columns;
    cp_async_16(shared + flash_offset<Tile::kHead>(row, chunk), valid ? from + 8 * chunk : nullptr, valid);
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

template <class Tile>
__device__ __forceinline__ void flash_load_queries(uint32_t (&a)[Tile::kRowTiles][4], const char* queries, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const FlashLane<Tile::kHead> place(lane % 16, lane / 16);
  const char* const rows = queries + warp * Tile::kRowTiles * 16 * Tile::kRowBytes;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) ldmatrix_x4(a[i], rows + place.at(i, k));
}

// s = Q K' of the warp's rows. `load(a, k)` gives columns 16 k.. of Q.
template <class Tile, class Load>
__device__ __forceinline__ void flash_products(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], const Load& load,
                                               const char* keys) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const FlashLane<Tile::kHead> place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
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

// Turns scores into weights 2^(factor * s - most), moving the maximum where it has to, with sum and o.
template <class Tile>
__device__ __forceinline__ void flash_weights(FlashState<Tile>& state, float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                              float factor) {
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
  if (__any_sync(kFullWarp, moves)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      most[i] = fmaxf(most[i], state.most[i]);
      const float fade = most[i] == -kInf ? 1.0f : fast_exp2(state.most[i] - most[i]);
      state.most[i] = most[i];
      state.sum[i] *= fade;
#pragma unroll
      for (int n = 0; n < FlashState<Tile>::kPairs; ++n) state.pair(i, n)[0] *= fade, state.pair(i, n)[1] *= fade;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
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

// o += P V.
template <class Tile>
__device__ __forceinline__ void flash_values(FlashState<Tile>& state,
                                             const float (&p)[Tile::kRowTiles][Tile::kKeys / 8][4], const char* values) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const FlashLane<Tile::kHead> place(lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float(&c)[4] = p[i][2 * k + e / 2];
        a[i][e] = pack_pair(c[2 * (e % 2)], c[2 * (e % 2) + 1], typename Tile::T{});
      }
    }
#pragma unroll
    for (int n = 0; n < Tile::kHead / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + place.at(k, n));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        mma_16816<typename Tile::T>(state.o[i][2 * n], a[i], left);
        mma_16816<typename Tile::T>(state.o[i][2 * n + 1], a[i], right);
      }
    }
  }
}

// Negates what this thread has copied of Q.
template <class Tile>
__device__ __forceinline__ void flash_negate(char* queries) {
  constexpr int kChunks = Tile::kHead / 8, kStep = Tile::kThreads / kChunks;
#pragma unroll
  for (int i = 0; i < Tile::kQueries / kStep; ++i) {
    const int row = i * kStep + static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    uint32_t* words = reinterpret_cast<uint32_t*>(queries + flash_offset<Tile::kHead>(row, chunk));
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] ^= 0x80008000u;
  }
}

// Joins blocks 0..count-1 to `state`, which the caller has cleared or filled. `shared` has Tile::kSharedBytes. All threads of
// the block call this, and may write to `shared` again behind a barrier.
template <class Tile, class Blocks>
__device__ __forceinline__ void attend(FlashState<Tile>& state, char* shared, int count, Blocks& blocks) {
  if (count == 0) return;
  char* const queries = shared;
  char* const keys = shared + Tile::kQueryBytes;
  char* const values = keys + 2 * Tile::kKeyBytes;
  const auto copy_block = [&](int block) {
    const int at = block % 2 * Tile::kKeyBytes;
    flash_copy_rows<Tile, Tile::kKeys>(keys + at, blocks.head_size, [&](int row) { return blocks.key(block, row); });
    flash_copy_rows<Tile, Tile::kKeys>(values + at, blocks.v_head_size, [&](int row) { return blocks.value(block, row); });
    cp_async_commit();
  };
  flash_copy_rows<Tile, Tile::kQueries>(queries, blocks.head_size, [&](int row) { return blocks.query(row); });
  copy_block(0);
  const float factor = fabsf(blocks.scale);
  if (blocks.scale < 0.0f) {
    // The maximum is taken of products before scaling, so that the scale must not be negative. A thread sees its own copies
    // without a barrier.
    cp_async_wait<0>();
    flash_negate<Tile>(queries);
  }
  uint32_t kept[Tile::kKeep ? Tile::kHead / 16 : 1][Tile::kRowTiles][4];
  if constexpr (Tile::kKeep) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Tile::kHead / 16; ++k) flash_load_queries<Tile>(kept[k], queries, k);
  }
  const auto load = [&](uint32_t(&a)[Tile::kRowTiles][4], int k) {
    if constexpr (Tile::kKeep) {
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = kept[k][i][e];
      }
    } else {
      flash_load_queries<Tile>(a, queries, k);
    }
  };
  for (int block = 0; block < count; ++block) {
    cp_async_wait<0>();
    __syncthreads();  // the block is there, and nobody reads the one before any more
    if (block + 1 < count) copy_block(block + 1);
    const int at = block % 2 * Tile::kKeyBytes;
    float s[Tile::kRowTiles][Tile::kKeys / 8][4];
    flash_products<Tile>(s, load, keys + at);
    const bool plain = blocks.plain(block);
    if (!plain) {
      blocks.prepare(block);
const int first = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
        const auto at = [&](int m) -> float& { return s[i / 2][m / 2][i % 2 * 2 + m % 2]; };
#pragma unroll
        for (int m = 0; m < Tile::kKeys / 4; ++m) at(m) *= factor;
        blocks.template adjust<Tile::kKeys / 4>(block, state.row(i), at, [&](int m) { return 8 * (m / 2) + first + m % 2; });
      }
    }
    flash_weights<Tile>(state, s, plain ? factor : 1.0f);
    flash_values<Tile>(state, s, values + at);
  }
}

}  // namespace cuda
}  // namespace qexport
