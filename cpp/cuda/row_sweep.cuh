// Scores of a tile of query rows, computed anew in every pass over the keys: on matrix units that costs less than to write
// them down and to read them again, and tiles may be as large as they like.
#pragma once

#include "base2.cuh"
#include "row_chunk.cuh"
#include "row_select.cuh"

namespace qexport {
namespace cuda {

constexpr int kSweepWarps = 4, kSweepThreads = kSweepWarps * kWarp;
constexpr int kUnitRows = 16;   // query rows of a warp
constexpr int kSweepKeys = 64;  // keys in shared memory at a time, twice
constexpr int kPartKeys = 32;   // that a warp takes at a time
constexpr int kLaneKeys = 8;    // keys one behind the other of which a lane has the scores
static_assert(kSweepRows == kSweepWarps * kUnitRows, "a tile is what a block takes");

// A lane has two query rows: row lane / 4 of its warp and the one 8 behind it. Four lanes share a row.
__device__ __forceinline__ int own_row(int r) { return static_cast<int>(threadIdx.x) / 4 % 8 + 8 * r; }

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
__device__ __forceinline__ int quad_sum(int x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// What the mask adds to the scores of keys j .. j + kLaneKeys, those within [lo, hi).
template <class T>
__device__ __forceinline__ void load_biases(float (&bias)[kLaneKeys], const T* from, int32_t j, int32_t lo, int32_t hi) {
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) bias[i] = j + i >= lo && j + i < hi ? to_float(from[j + i]) : -kInf;
}
__device__ __forceinline__ void load_bias(float (&bias)[kLaneKeys], const AttentionMask& mask, int64_t b, const TileRow& row,
                                          int32_t j) {
  const int64_t at = b * mask.batch_stride + row.head * mask.head_stride + row.query * mask.query_stride;
  switch (mask.type) {
    case DType::boolean: {
      const uint8_t* allowed = static_cast<const uint8_t*>(mask.data) + at;
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) bias[i] = j + i >= row.lo && j + i < row.hi && allowed[j + i] ? 0.0f : -kInf;
      return;
    }
    case DType::f16:
      return load_biases(bias, static_cast<const __half*>(mask.data) + at, j, row.lo, row.hi);
    case DType::bf16:
      return load_biases(bias, static_cast<const __nv_bfloat16*>(mask.data) + at, j, row.lo, row.hi);
    default:
      return load_biases(bias, static_cast<const float*>(mask.data) + at, j, row.lo, row.hi);
  }
}

// What registers have no room for, in shared memory.
template <class T>
struct SweepTile {
  const char *past, *fresh;                // row 0 of K as if all lay there; those before `split` are in the past
  const float* norm;                       // of the keys, or null
  int32_t past_bytes, fresh_bytes, split;  // from row to row
  int32_t batch, kv_head;
  int32_t begin, end;  // keys of the tile; `begin` is a multiple of 4
  int32_t parts[kWarp];
  int4 range[kSweepWarps];   // keys [x, y) of a warp, and [z, w) that all of its rows may attend to
  TileRow rows[kSweepRows];  // behind the last one, such without keys, of head -1
};

// A tile of kSweepRows query rows of one kv head, in heads of up to kSize. All threads of the block have one.
template <class T, int kSize>
struct Sweep {
  const AttentionJob& job;
  SweepTile<T>* tile;  // shared
  T* k;                // shared: (2, kSweepKeys, kSize)
  float* lent;         // shared: (2, kSweepKeys), the norms of these keys
  uint32_t q[kSize / 16][4];

  static constexpr size_t kKeyBytes = size_t{2} * kSweepKeys * kSize * sizeof(T);
  static constexpr size_t kLentBytes = 2 * kSweepKeys * sizeof(float);
  static constexpr size_t kSharedBytes = kKeyBytes + kLentBytes + sizeof(SweepTile<T>);

  // Tile number t of the call.
  __device__ __forceinline__ Sweep(const RowWork& work, int64_t t, char* memory)
      : job(work.job),
        tile(reinterpret_cast<SweepTile<T>*>(memory + kKeyBytes + kLentBytes)),
        k(reinterpret_cast<T*>(memory)),
        lent(reinterpret_cast<float*>(memory + kKeyBytes)) {
    const QuantumAttentionParams& p = job.params;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t rows = job.group * p.q_len, of_head = ceil_div<int64_t>(rows, kSweepRows), kv = t / of_head;
    // With `is_causal` the last rows have the most keys; they go first.
    const int64_t number = p.is_causal ? of_head - 1 - t % of_head : t % of_head;
    const int32_t batch = static_cast<int32_t>(kv / p.kv_heads), kv_head = static_cast<int32_t>(kv % p.kv_heads);
    const int32_t all = static_cast<int32_t>(job.total_len);
    int32_t low = all, high = 0, inner_low = 0, inner_high = all;
    const int64_t at = number * kSweepRows + warp * kUnitRows + lane;
    if (lane < kUnitRows) {
      TileRow own{-1, 0, 0, 0};
      if (at < rows) {
        own.head = static_cast<int32_t>(kv_head * job.group + at / p.q_len), own.query = static_cast<int32_t>(at % p.q_len);
        const KeyRange range = key_range(job, batch, own.query);
        inner_low = own.lo = static_cast<int32_t>(range.lo), inner_high = own.hi = static_cast<int32_t>(range.hi);
        if (own.hi > own.lo) low = own.lo, high = own.hi;
      }
      tile->rows[warp * kUnitRows + lane] = own;
    }
    low = -warp_max(-low), high = warp_max(high), inner_low = warp_max(inner_low), inner_high = -warp_max(-inner_high);
    if (lane == 0) tile->range[warp] = {low, high, inner_low, inner_high};
    low = -block_max(-low, tile->parts), high = block_max(high, tile->parts);
    if (threadIdx.x == 0) {
      const JoinedRows<T> keys = joined_rows<T>(job, false, batch, kv_head);
      tile->past = reinterpret_cast<const char*>(keys.past), tile->split = keys.split;
      tile->fresh = reinterpret_cast<const char*>(keys.fresh - keys.split * keys.fresh_stride);
      tile->past_bytes = static_cast<int32_t>(keys.past_stride * sizeof(T));
      tile->fresh_bytes = static_cast<int32_t>(keys.fresh_stride * sizeof(T));
      tile->norm = work.value_norm ? work.value_norm + kv * norm_pitch(job) : nullptr;
      tile->batch = batch, tile->kv_head = kv_head, tile->begin = low / 4 * 4, tile->end = high;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) load_query(r);
  }

  // Row r of the lane.
  __device__ __forceinline__ const TileRow& row(int r) const {
    return tile->rows[static_cast<int>(threadIdx.x) / kWarp * kUnitRows + own_row(r)];
  }
  // Where what is kept of row r of the lane lies, (batch, q_heads, q_len); of one that is not there at the first of all.
  __device__ __forceinline__ int64_t place_of(int r) const {
    const TileRow own = row(r);
    return (int64_t{tile->batch} * job.params.q_heads + max(own.head, 0)) * job.params.q_len + own.query;
  }
  __device__ __forceinline__ bool real(int r) const { return row(r).head >= 0; }

  // The fragments of row r: zeros where there is none, and behind the head size.
  __device__ __forceinline__ void load_query(int r) {
    const TileRow own = row(r);
    const T* from = row_of<T>(job.tensors.q, tile->batch, max(own.head, 0), own.query);
#pragma unroll
    for (int i = 0; i < kSize / 8; ++i) {
      const int x = 8 * i + static_cast<int>(threadIdx.x) % 4 * 2;
      const bool there = own.head >= 0 && x < job.params.head_size;
      q[i / 2][i % 2 * 2 + r] = there ? *reinterpret_cast<const uint32_t*>(from + x) : 0u;
    }
  }

  // Key j0 + 8 a + 2 u + b of kPartKeys (b < 2, u, a < 4) lies in column 2 a + b of product u, so that the columns of lane a
  // are the keys from j0 + 8 a on.
  static __device__ __forceinline__ unsigned slot(unsigned key) {
    return key / kPartKeys * kPartKeys + key / 2 % 4 * 8 + key / kLaneKeys % 4 * 2 + key % 2;
  }
  // Where 8 elements of the key of a slot lie: eight slots, the same elements of each, in different banks.
  static __device__ __forceinline__ unsigned chunk_of(unsigned slot, unsigned chunk) {
    return slot * kSize + ((chunk ^ slot % 8) * 8);
  }

  __device__ __forceinline__ void stage(int32_t j0, int buffer) const {
    constexpr unsigned kChunks = kSize / kChunkRow, kAtOnce = kSweepThreads / kChunks;
    const unsigned thread = threadIdx.x, chunk = thread % kChunks;
    const bool wanted = static_cast<int>(chunk) * kChunkRow < static_cast<int>(job.params.head_size);
    const int32_t end = tile->end, split = tile->split;
    const char* past = tile->past + (wanted ? chunk * 16 : 0);
    const char* fresh = tile->fresh + (wanted ? chunk * 16 : 0);
    T* to = k + buffer * kSweepKeys * kSize;
    // Slots and places are made of the bits of a key and a chunk, each of which goes its own way.
    const unsigned own = chunk_of(slot(thread / kChunks), chunk);
#pragma unroll
    for (unsigned i = 0; i < kSweepKeys / kAtOnce; ++i) {
      const unsigned key = thread / kChunks + i * kAtOnce;
      const int32_t j = min(j0 + static_cast<int32_t>(key), end - 1);
      const char* from = (j < split ? past : fresh) + int64_t{j} * (j < split ? tile->past_bytes : tile->fresh_bytes);
      cp_async_16(to + (own ^ chunk_of(slot(i * kAtOnce), 0)), from, wanted && j0 + static_cast<int32_t>(key) < end);
    }
    const float* norm = tile->norm;
    if (norm && thread < kSweepKeys / 4) {
      const int32_t j = j0 + 4 * static_cast<int32_t>(thread);
      cp_async_16(lent + buffer * kSweepKeys + 4 * thread, norm + (j < end ? j : 0), j < end);
    }
  }

  // t[r][i] = the score of row r and key j + i times log2(e), -inf where r does not attend to it.
  __device__ __forceinline__ void restrict_scores(float (&t)[2][kLaneKeys], int32_t j) const {
    const float cap = job.params.softcap;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow own = row(r);
      if (cap > 0.0f) {
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) t[r][i] = capped_score(t[r][i], cap, 2.0f / cap);
      }
      if (job.tensors.mask.data) {
        float bias[kLaneKeys];
        load_bias(bias, job.tensors.mask, tile->batch, own, j);
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) t[r][i] = bias[i] == -kInf ? -kInf : t[r][i] + base2_bias(bias[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) t[r][i] = j + i >= own.lo && j + i < own.hi ? t[r][i] : -kInf;
      }
    }
  }

  // Calls visit(j, t, norms, plain) for the runs of the lane, in order, all lanes of the warp together. `plain`: every row
  // attends to all of these keys. `careful`: it never is.
  template <class Visit>
  __device__ __forceinline__ void run(bool careful, const Visit& visit) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const float scale = job.params.scale * kLog2E;
    const bool always = careful || job.params.softcap > 0.0f || job.tensors.mask.data;
    const int32_t begin = tile->begin;
    if (begin < tile->end) stage(begin, 0);
    cp_async_commit();
    int buffer = 0;
    for (int32_t j0 = begin; j0 < tile->end; j0 += kSweepKeys, buffer ^= 1) {
      if (j0 + kSweepKeys < tile->end) stage(j0 + kSweepKeys, buffer ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
#pragma unroll 1
      for (int part = 0; part < kSweepKeys; part += kPartKeys) {
        const int32_t from = j0 + part, j = from + lane % 4 * kLaneKeys;
        const int4 range = tile->range[static_cast<int>(threadIdx.x) / kWarp];
        if (from >= range.y || from + kPartKeys <= range.x) continue;
        const T* own = k + (buffer * kSweepKeys + part) * kSize;
        float t[2][kLaneKeys];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          float c[4] = {};
#pragma unroll
          for (int x = 0; x < kSize / 32; ++x) {
            uint32_t b[4];
            ldmatrix_x4(b, own + chunk_of(u * 8 + lane % 8, 4 * x + lane / 8));
            mma_16816<T>(c, q[2 * x], {b[0], b[1]});
            mma_16816<T>(c, q[2 * x + 1], {b[2], b[3]});
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) t[i / 2][2 * u + i % 2] = c[i] * scale;
        }
        const bool plain = !always && from >= range.z && from + kPartKeys <= range.w;
        if (!plain) restrict_scores(t, j);
        float norms[kLaneKeys];
        const float4* lend = reinterpret_cast<const float4*>(lent + buffer * kSweepKeys + part + lane % 4 * kLaneKeys);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 x = tile->norm ? lend[i] : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
          norms[4 * i] = x.x, norms[4 * i + 1] = x.y, norms[4 * i + 2] = x.z, norms[4 * i + 3] = x.w;
        }
        visit(j, t, norms, plain);
      }
      __syncthreads();
    }
    cp_async_wait<0>();
  }
};

}  // namespace cuda
}  // namespace qexport
