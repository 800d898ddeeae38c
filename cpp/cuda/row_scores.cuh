// Scores of a tile of query rows against all keys of their ranges, up to and including the mask.
#pragma once

#include "mma.cuh"
#include "row_chunk.cuh"
#include "rows.cuh"

namespace qexport {
namespace cuda {

// Where the scores of a tile go: rows[r * pitch + j - tile.begin], if rows is not null, and qk_matmul_output of modes 0 to
// 2, if `mode` is one of them.
template <class T>
struct ScoreSink {
  const AttentionJob& job;
  const RowTile& tile;
  float* rows;
  int32_t pitch;
  int mode;

  // The score of row r < tile.count and key j < tile.end that follows from their product; -inf where r does not attend to j.
  __device__ __forceinline__ float score(int r, int32_t j, float s) const {
    const QuantumAttentionParams& p = job.params;
    const TileRow row = tile.rows[r];
    const float raw = s;
    if (p.softcap > 0.0f) s = tanhf(s / p.softcap) * p.softcap;
    const float capped = s;
    if (j < row.lo || j >= row.hi) {
      s = -kInf;
    } else if (job.tensors.mask.data) {
      const float bias = mask_bias(job.tensors.mask, tile.batch, row.head, row.query, j);
      s = bias == -kInf ? -kInf : s + bias;  // a NaN under the mask does not leak
    }
    if (mode >= 0 && j < job.total_len) {
      const int64_t at = ((tile.batch * p.q_heads + row.head) * p.q_len + row.query) * job.total_len + j;
      static_cast<T*>(job.tensors.qk_matmul_output)[at] = from_float<T>(mode == 0 ? raw : mode == 1 ? capped : s);
    }
    return s;
  }
};

template <class T>
__device__ __forceinline__ const T* query_row(const AttentionJob& job, const RowTile& tile, int r) {
  return row_of<T>(job.tensors.q, tile.batch, tile.rows[r].head, tile.rows[r].query);
}

// --- In float32, or where the matrix units cannot be used: products of tiles in shared memory.

constexpr int kTileKeys = 512;             // keys whose scores are computed at a time, 4 per thread and row
constexpr int kTileDims = 16;              // elements of their rows that are in shared memory at a time
constexpr int kTilePitch = kTileDims + 4;  // floats: eight rows, 16 bytes of each, lie in 32 different banks

struct ScoreTiles {
  float q[kTileRows * kTilePitch];
  float k[kTileKeys * kTilePitch];
};

__device__ __forceinline__ float dot4(float4 a, float4 b, float c) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, c))));
}
__device__ __forceinline__ void store_chunk(float* to, const float (&x)[kChunkRow], float factor) {
  for (int e = 0; e < kChunkRow; e += 4) {
    const float4 part = make_float4(x[e] * factor, x[e + 1] * factor, x[e + 2] * factor, x[e + 3] * factor);
    *reinterpret_cast<float4*>(to + e) = part;
  }
}

// acc[r][i] is scale q . k of row 4 * (thread / 128) + r and key j0 + thread % 128 + 128 * i, of `keys` keys from j0 on.
// `wide`: rows of Q and K begin on 16 bytes.
template <class T>
__device__ __forceinline__ void tiled_products(const AttentionJob& job, const RowTile& tile, const JoinedRows<T>& all_keys,
                                               int32_t j0, int keys, bool wide, ScoreTiles& shared, float (&acc)[4][4]) {
  static_assert(kTileDims == 2 * kChunkRow && kTileKeys == kTileRowThreads, "every thread copies two chunks of keys");
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(job.params.head_size);
  const int own_dim = thread % 2 * kChunkRow, own_row = thread / 2;  // of what this thread copies, and half a tile on
  const float* k_rows = shared.k + thread % 128 * kTilePitch;
  const float* q_rows = shared.q + thread / 128 * 4 * kTilePitch;
  const T* q = own_row < tile.count ? query_row<T>(job, tile, own_row) : nullptr;
  const T* k[2];
  for (int i = 0; i < 2; ++i) k[i] = all_keys.row(j0 + min(own_row + i * kTileKeys / 2, keys - 1));
  for (int r = 0; r < 4; ++r) {
    for (int i = 0; i < 4; ++i) acc[r][i] = 0.0f;
  }
  float next[2][kChunkRow], next_q[kChunkRow] = {};
  const auto load = [&](int dim) {
    for (int i = 0; i < 2; ++i) load_chunk(next[i], k[i], dim + own_dim, size, wide);
    if (q) load_chunk(next_q, q, dim + own_dim, size, wide);
  };
  load(0);
  for (int first = 0; first < size; first += kTileDims) {
    __syncthreads();
    for (int i = 0; i < 2; ++i) {
      store_chunk(shared.k + (own_row + i * kTileKeys / 2) * kTilePitch + own_dim, next[i], 1.0f);
    }
    if (own_row < kTileRows) store_chunk(shared.q + own_row * kTilePitch + own_dim, next_q, job.params.scale);
    __syncthreads();
    if (first + kTileDims < size) load(first + kTileDims);  // arrives during the products
    for (int x = 0; x < kTileDims; x += 4) {
      float4 own[4];
      for (int i = 0; i < 4; ++i) {
        if (128 * i < keys) own[i] = *reinterpret_cast<const float4*>(k_rows + 128 * i * kTilePitch + x);
      }
      for (int r = 0; r < 4; ++r) {
        const float4 query = *reinterpret_cast<const float4*>(q_rows + r * kTilePitch + x);
        for (int i = 0; i < 4; ++i) {
          if (128 * i < keys) acc[r][i] = dot4(query, own[i], acc[r][i]);
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void tiled_scores(const ScoreSink<T>& sink, bool wide, ScoreTiles& shared) {
  const AttentionJob& job = sink.job;
  const RowTile& tile = sink.tile;
  const JoinedRows<T> all_keys = joined_rows<T>(job, false, tile.batch, tile.kv_head);
  const int32_t last = min(tile.end, static_cast<int32_t>(job.total_len));
  const int first_row = static_cast<int>(threadIdx.x) / 128 * 4, first_key = static_cast<int>(threadIdx.x) % 128;
  for (int32_t j0 = tile.begin; j0 < tile.end; j0 += kTileKeys) {
    float acc[4][4];
    tiled_products<T>(job, tile, all_keys, j0, min(kTileKeys, last - j0), wide, shared, acc);
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 4; ++i) {
        const int32_t j = j0 + first_key + 128 * i;
        if (first_row + r >= tile.count || j >= tile.end) continue;
        const float s = sink.score(first_row + r, j, acc[r][i]);
        if (sink.rows) sink.rows[(first_row + r) * sink.pitch + (j - tile.begin)] = s;
      }
    }
  }
}

// --- In half types: 16 rows x 8 keys x 16 elements at a time on the matrix units.

constexpr int kUnitKeys = 32;  // of a warp at a time

// Products do not care about the order of the elements, so each of four lanes takes a run of head_size / 4 of them, which it
// can read in wide loads: element x of the product of step s (16 wide) is element quarter(x) * head_size / 4 + 4 s +
// offset(x). Q as the fragments of all steps: (head_size / 16, 32 lanes, 4) words in shared memory.
template <class T>
__device__ __forceinline__ void pack_queries(const AttentionJob& job, const RowTile& tile, uint32_t* fragments) {
  const int size = static_cast<int>(job.params.head_size);
  for (int at = static_cast<int>(threadIdx.x); at < size * kTileRows / 2; at += kTileRowThreads) {
    const int word = at % 4, lane = at / 4 % kWarp, step = at / 4 / kWarp;
    const int r = lane / 4 + word % 2 * 8, x = lane % 4 * (size / 4) + 4 * step + word / 2 * 2;
    T pair[2] = {from_float<T>(0.0f), from_float<T>(0.0f)};
    if (r < tile.count) {
      const T* q = query_row<T>(job, tile, r);
      pair[0] = q[x], pair[1] = q[x + 1];
    }
    memcpy(&fragments[at], pair, sizeof(uint32_t));
  }
}

template <class T>
__device__ __forceinline__ void matrix_scores(const ScoreSink<T>& sink, uint32_t* fragments) {
  const AttentionJob& job = sink.job;
  const RowTile& tile = sink.tile;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int quarter = static_cast<int>(job.params.head_size) / 4;
  const JoinedRows<T> all_keys = joined_rows<T>(job, false, tile.batch, tile.kv_head);
  const int32_t last = static_cast<int32_t>(job.total_len) - 1;
  pack_queries<T>(job, tile, fragments);
  __syncthreads();
  for (int32_t j0 = tile.begin + warp * kUnitKeys; j0 < tile.end; j0 += kTileRows * kUnitKeys) {
    const T* k[4];
    float c[4][4];
    for (int u = 0; u < 4; ++u) {
      k[u] = all_keys.row(min(j0 + 8 * u + lane / 4, last)) + lane % 4 * quarter;
      for (int i = 0; i < 4; ++i) c[u][i] = 0.0f;
    }
    for (int x = 0; x < quarter; x += 8) {
      uint4 own[4];
      for (int u = 0; u < 4; ++u) own[u] = *reinterpret_cast<const uint4*>(k[u] + x);
      for (int half = 0; half < 2; ++half) {
        const uint4 words = *reinterpret_cast<const uint4*>(fragments + ((x / 4 + half) * kWarp + lane) * 4);
        const uint32_t a[4] = {words.x, words.y, words.z, words.w};
        for (int u = 0; u < 4; ++u) {
          const uint32_t b[2] = {half ? own[u].z : own[u].x, half ? own[u].w : own[u].y};
          mma_16816<T>(c[u], a, b);
        }
      }
    }
    for (int u = 0; u < 4; ++u) {
      const int32_t j = j0 + 8 * u + lane % 4 * 2;
      for (int side = 0; side < 2; ++side) {
        const int r = lane / 4 + 8 * side;
        if (r >= tile.count || j >= tile.end) continue;
        const float first = sink.score(r, j, c[u][2 * side] * job.params.scale);
        const float second = sink.score(r, j + 1, c[u][2 * side + 1] * job.params.scale);
        if (sink.rows) {
          *reinterpret_cast<float2*>(sink.rows + r * sink.pitch + (j - tile.begin)) = make_float2(first, second);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace qexport
