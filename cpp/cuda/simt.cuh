// The loop of flash.cuh without tensor cores: any type, any alignment, products and sums in float32.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

namespace qexport {
namespace cuda {

// 128 threads as 16 x 8; thread (y, x) computes rows y + 16 i, scores of keys x + 8 j and chunks x + 8 n of four columns.
template <class T_, int kHead_, int kRows_, int kKeys_, int kBlocksPerProcessor_>
struct SimtTile {
  using T = T_;
  static constexpr bool kPipeline = false;
  static constexpr int kHead = kHead_, kRows = kRows_, kKeys = kKeys_, kThreads = 128;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;
  static constexpr int kPartsPerProcessor = kBlocksPerProcessor, kMostJoined = 64;  // slower products, more to gain
  static constexpr int kQueries = 16 * kRows;
  static constexpr bool kWeightsOverKeys = kHead >= kQueries;  // in shared memory
  static constexpr int kSharedBytes = 4 * (kQueries * kHead + 2 * kKeys * kHead + (kWeightsOverKeys ? 0 : kQueries * kKeys));
};

// As FlashState.
template <class Tile>
struct SimtState {
  static constexpr int kRows = Tile::kRows, kPairs = Tile::kHead / 16;
  static constexpr bool kWholeUnits = false;
  __host__ __device__ static constexpr bool runs_on(int) { return true; }
  float o[kRows][kPairs / 2][4];
  float most[kRows];  // the same on the eight threads of a row
  float sum[kRows];   // in parts on them, until join_sums

  __device__ __forceinline__ static int row(int i) { return static_cast<int>(threadIdx.x) / 8 + 16 * i; }
  __device__ __forceinline__ static int column(int n) {
    return 4 * (static_cast<int>(threadIdx.x) % 8 + 8 * (n / 2)) + n % 2 * 2;
  }
  __device__ __forceinline__ float* pair(int i, int n) { return o[i][n / 2] + n % 2 * 2; }

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
#pragma unroll
      for (int step = 1; step < 8; step *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], step);
    }
  }
};

// Place of chunk `chunk` of four floats of a row: permuted so that the same chunk of eight rows fills all banks.
template <int kRowFloats>
__device__ __forceinline__ int simt_offset(int row, int chunk) {
  return row * kRowFloats + ((chunk ^ (row & 7 & (kRowFloats / 4 - 1))) << 2);
}

// Four elements of a row from `first` on as float32, zeros where it has none.
template <class T>
__device__ __forceinline__ float4 simt_load(const T* row, int first, int columns) {
  if (!row || first >= columns) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  row += first;
  const int left = columns - first;
  if constexpr (sizeof(T) == 4) {
    if (left >= 4 && reinterpret_cast<uintptr_t>(row) % 16 == 0) return *reinterpret_cast<const float4*>(row);
  }
  return make_float4(to_float(row[0]), left > 1 ? to_float(row[1]) : 0.0f, left > 2 ? to_float(row[2]) : 0.0f,
                     left > 3 ? to_float(row[3]) : 0.0f);
}

template <class Tile, int kRows, class Row>
__device__ __forceinline__ void simt_copy_rows(float* shared, int columns, const Row& row_of) {
  constexpr int kChunks = Tile::kHead / 4;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += Tile::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    *reinterpret_cast<float4*>(shared + simt_offset<Tile::kHead>(row, chunk)) = simt_load(row_of(row), 4 * chunk, columns);
  }
}

// Joins blocks 0..count-1 to `state`, as that of FlashState does.
template <class Tile, class Blocks>
__device__ __forceinline__ bool attend(SimtState<Tile>& state, char* shared, int count, Blocks& blocks) {
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kHead = Tile::kHead;
  float* const queries = reinterpret_cast<float*>(shared);
  float* const keys = queries + Tile::kQueries * kHead;
  float* const values = keys + kKeys * kHead;
  float* const weights = Tile::kWeightsOverKeys ? keys : values + kKeys * kHead;
  const int x = static_cast<int>(threadIdx.x) % 8, y = static_cast<int>(threadIdx.x) / 8;
  simt_copy_rows<Tile, Tile::kQueries>(queries, blocks.head_size, [&](int row) { return blocks.query(row); });
  for (int block = 0; block < count; ++block) {
    __syncthreads();  // nobody reads the block before any more
    simt_copy_rows<Tile, kKeys>(keys, blocks.head_size, [&](int row) { return blocks.key(block, row); });
    simt_copy_rows<Tile, kKeys>(values, blocks.v_head_size, [&](int row) { return blocks.value(block, row); });
    __syncthreads();
    float s[kRows][kKeys / 8];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) s[i][j] = 0.0f;
    }
#pragma unroll 1
    for (int c = 0; c < kHead / 4; ++c) {
      float4 k[kKeys / 8];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        k[j] = *reinterpret_cast<const float4*>(keys + simt_offset<kHead>(x + 8 * j, c));
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 q = *reinterpret_cast<const float4*>(queries + simt_offset<kHead>(y + 16 * i, c));
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          s[i][j] = fmaf(q.x, k[j].x, s[i][j]);
          s[i][j] = fmaf(q.y, k[j].y, s[i][j]);
          s[i][j] = fmaf(q.z, k[j].z, s[i][j]);
          s[i][j] = fmaf(q.w, k[j].w, s[i][j]);
        }
      }
    }
    const bool plain = blocks.plain(block);
    if (!plain) {
      blocks.prepare(block);
      if (blocks.hides()) {
        for (int i = static_cast<int>(threadIdx.x); i < kKeys * kHead; i += Tile::kThreads) {
          if (blocks.hidden(block, i / kHead)) values[i] = 0.0f;  // the columns of a row lie in its own kHead floats
        }
        __syncthreads();
      }
    }
    if (Tile::kWeightsOverKeys) __syncthreads();  // all keys have been read
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = y + 16 * i;
      float most = -kInf;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        s[i][j] *= blocks.scale;
      }
      if (!plain) {
        blocks.template adjust<kKeys / 8>(
            block, row, [&](int j) -> float& { return s[i][j]; }, [&](int j) { return x + 8 * j; });
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) most = fmaxf(most, s[i][j]);
#pragma unroll
      for (int step = 1; step < 8; step *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, step));
      most = fmaxf(most, state.most[i]);
      const float base = most == -kInf ? 0.0f : most;  // -inf - -inf would be NaN
      const float fade = fast_exp2(state.most[i] - base);
      state.most[i] = most;
      state.sum[i] *= fade;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const float p = fast_exp2(s[i][j] - base);
        state.sum[i] += p;
        weights[simt_offset<kKeys>(row, 2 * j + x / 4) + x % 4] = p;
      }
#pragma unroll
      for (int n = 0; n < kHead / 32; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state.o[i][n][e] *= fade;
      }
    }
    __syncwarp();  // a warp reads the weights of its own rows alone
#pragma unroll 1
    for (int j = 0; j < kKeys / 4; ++j) {
      float4 p[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) p[i] = *reinterpret_cast<const float4*>(weights + simt_offset<kKeys>(y + 16 * i, j));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int n = 0; n < kHead / 32; ++n) {
          const float4 v = *reinterpret_cast<const float4*>(values + simt_offset<kHead>(4 * j + e, x + 8 * n));
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const float weight = e == 0 ? p[i].x : e == 1 ? p[i].y : e == 2 ? p[i].z : p[i].w;
            state.o[i][n][0] = fmaf(weight, v.x, state.o[i][n][0]);
            state.o[i][n][1] = fmaf(weight, v.y, state.o[i][n][1]);
            state.o[i][n][2] = fmaf(weight, v.z, state.o[i][n][2]);
            state.o[i][n][3] = fmaf(weight, v.w, state.o[i][n][3]);
          }
        }
      }
    }
    __syncwarp();
  }
  return true;
}

}  // namespace cuda
}  // namespace qexport
