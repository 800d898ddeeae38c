// Scores of a tile of query rows, as products of tiles in shared memory, up to and including the mask.
#pragma once

#include "rows.cuh"

namespace qexport {
namespace cuda {

struct ScoreTiles {
  float q[kTileRows * kTilePitch];
  float k[kTileKeys * kTilePitch];
};

__device__ __forceinline__ float dot4(float4 a, float4 b, float c) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, c))));
}

// q . k of the tile's rows and of up to kTileKeys keys from j0 on: acc[r][i] is row 4 * (thread / 128) + r, key
// j0 + thread % 128 + 128 * i. q comes with the scale.
template <class T>
__device__ void score_products(const AttentionJob& job, const RowTile& tile, int64_t j0, int keys, ScoreTiles& shared,
                               float (&acc)[4][4]) {
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(job.params.head_size);
  const int own_dim = thread % kTileDims, own_row = thread / kTileDims;  // of what this thread copies
  const float* k_rows = shared.k + thread % 128 * kTilePitch;
  const float* q_rows = shared.q + thread / 128 * 4 * kTilePitch;
  const T* q = nullptr;
  if (own_row < tile.count) {
    q = row_of<T>(job.tensors.q, tile.batch, tile.head(job, own_row), tile.query(job, own_row));
  }
  for (int r = 0; r < 4; ++r) {
    for (int i = 0; i < 4; ++i) acc[r][i] = 0.0f;
  }
  for (int first = 0; first < size; first += kTileDims) {
    const int dim = first + own_dim;
    __syncthreads();
    if (own_row < kTileRows) {
      shared.q[own_row * kTilePitch + own_dim] = q && dim < size ? to_float(q[dim]) * job.params.scale : 0.0f;
    }
    for (int key = own_row; key < keys; key += kRowThreads / kTileDims) {
      shared.k[key * kTilePitch + own_dim] =
          dim < size ? to_float(key_row<T>(job, false, tile.batch, tile.kv_head, j0 + key)[dim]) : 0.0f;
    }
    __syncthreads();
    for (int x = 0; x < kTileDims; x += 4) {
      float4 k[4];
      for (int i = 0; i < 4; ++i) {
        // What lies behind the last key is read and not used.
        if (128 * i < keys) k[i] = *reinterpret_cast<const float4*>(k_rows + 128 * i * kTilePitch + x);
      }
      for (int r = 0; r < 4; ++r) {
        const float4 own = *reinterpret_cast<const float4*>(q_rows + r * kTilePitch + x);
        for (int i = 0; i < 4; ++i) {
          if (128 * i < keys) acc[r][i] = dot4(own, k[i], acc[r][i]);
        }
      }
    }
  }
}

// rows[r][j - tile.begin] = score of key j in [tile.begin, tile.end), -inf where row r does not attend to it; and
// qk_matmul_output of modes 0 to 2, if it is wanted. All threads of the block.
template <class T>
__device__ void score_rows(const AttentionJob& job, const RowTile& tile, const KeyRange* ranges, bool write, float* rows,
                           int64_t pitch, ScoreTiles& shared) {
  const QuantumAttentionParams& p = job.params;
  const int64_t mode = write ? p.qk_matmul_output_mode : -1;
  for (int64_t j0 = tile.begin; j0 < tile.end; j0 += kTileKeys) {
    const int keys = static_cast<int>(min(static_cast<int64_t>(kTileKeys), tile.end - j0));
    float acc[4][4];
    score_products<T>(job, tile, j0, keys, shared, acc);
    for (int r = 0; r < 4; ++r) {
      const int row = static_cast<int>(threadIdx.x) / 128 * 4 + r;
      if (row >= tile.count) continue;
      const KeyRange range = ranges[row];
      const int64_t head = tile.head(job, row), query = tile.query(job, row);
      T* out = nullptr;
      if (mode >= 0) {
        out = static_cast<T*>(job.tensors.qk_matmul_output) +
              ((tile.batch * p.q_heads + head) * p.q_len + query) * job.total_len;
      }
      for (int i = 0; i < 4; ++i) {
        const int key = static_cast<int>(threadIdx.x) % 128 + 128 * i;
        if (key >= keys) continue;
        const int64_t j = j0 + key;
        float s = acc[r][i];
        if (mode == 0) out[j] = from_float<T>(s);
        if (p.softcap > 0.0f) s = tanhf(s / p.softcap) * p.softcap;
        if (mode == 1) out[j] = from_float<T>(s);
        const bool reached = j >= range.lo && j < range.hi;
        const float bias = reached ? mask_bias(job.tensors.mask, tile.batch, head, query, j) : -kInf;
        s = bias == -kInf ? -kInf : s + bias;  // a NaN under the mask does not leak
        if (mode == 2) out[j] = from_float<T>(s);
        if (rows) rows[row * pitch + (j - tile.begin)] = s;
      }
    }
  }
}

}  // namespace cuda
}  // namespace qexport
