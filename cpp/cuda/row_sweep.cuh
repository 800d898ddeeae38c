// Scores of a tile of query rows, computed anew in every pass over the keys: on matrix units that costs less than to write
// them down and to read them again, and tiles may be as large as they like.
#pragma once

#include "mma.cuh"
#include "row_chunk.cuh"
#include "row_select.cuh"

namespace qexport {
namespace cuda {

constexpr int kSweepWarps = 4, kSweepThreads = kSweepWarps * kWarp;
constexpr int kUnitRows = 16;   // query rows of a warp
constexpr int kSweepKeys = 64;  // keys in shared memory at a time, twice
constexpr int kPartKeys = 32;   // that a warp takes at a time
constexpr int kRun = 8;         // keys one behind the other of which a lane has the scores
static_assert(kSweepRows == kSweepWarps * kUnitRows, "a tile is what a block takes");
constexpr float kLog2E = 1.4426950408889634f;

// Two query rows of a lane: row lane / 4 of its warp and the one 8 behind it. Four lanes share a row.
struct SweepRow {
  int32_t head, query, lo, hi;  // its keys [lo, hi)
  bool real;                    // not behind the last row
};

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

// What the mask adds to the scores of keys j .. j + kRun, those within [lo, hi).
template <class T>
__device__ __forceinline__ void load_run(float (&bias)[kRun], const T* from, int32_t j, int32_t lo, int32_t hi) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) bias[i] = j + i >= lo && j + i < hi ? to_float(from[j + i]) : -kInf;
}
__device__ __forceinline__ void load_bias(float (&bias)[kRun], const AttentionMask& mask, int64_t b, const SweepRow& row,
                                          int32_t j) {
  const int64_t at = b * mask.batch_stride + row.head * mask.head_stride + row.query * mask.query_stride;
  switch (mask.type) {
    case DType::boolean: {
      const uint8_t* allowed = static_cast<const uint8_t*>(mask.data) + at;
#pragma unroll
      for (int i = 0; i < kRun; ++i) bias[i] = j + i >= row.lo && j + i < row.hi && allowed[j + i] ? 0.0f : -kInf;
      return;
    }
    case DType::f16:
      return load_run(bias, static_cast<const __half*>(mask.data) + at, j, row.lo, row.hi);
    case DType::bf16:
      return load_run(bias, static_cast<const __nv_bfloat16*>(mask.data) + at, j, row.lo, row.hi);
    default:
      return load_run(bias, static_cast<const float*>(mask.data) + at, j, row.lo, row.hi);
  }
}

// The lowest number, which masks hold, times log2(e) is none.
__device__ __forceinline__ float finite(float x) {
  constexpr float kLargest = 3.402823466e+38f;
  return x < -kLargest ? -kLargest : x > kLargest ? kLargest : x;
}

// A tile of kSweepRows query rows of one kv head, in heads of up to kSize. All threads of the block have one.
template <class T, int kSize>
struct Sweep {
  const AttentionJob& job;
  JoinedRows<T> keys;
  const float* norm;  // of the keys, or null
  T* k;               // shared: (2, kSweepKeys, kSize)
  float* lent;        // shared: (2, kSweepKeys), the norms of these keys
  int32_t batch, kv_head;
  int32_t begin, end;              // keys of the tile; `begin` is a multiple of 4
  int32_t first, last;             // keys of the warp
  int32_t inner_first, inner_last;  // keys that all rows of the warp may attend to
  float scale;                     // to logarithms of base 2
  SweepRow row[2];
  uint32_t q[kSize / 16][4];

  static constexpr size_t kKeyBytes = size_t{2} * kSweepKeys * kSize * sizeof(T);
  static constexpr size_t kSharedBytes = kKeyBytes + 2 * kSweepKeys * sizeof(float);

  // Tile number t of the call. `parts`: kWarp ints of shared memory.
  __device__ __forceinline__ Sweep(const RowWork& work, int64_t t, char* memory, int32_t* parts)
      : job(work.job), k(reinterpret_cast<T*>(memory)), lent(reinterpret_cast<float*>(memory + kKeyBytes)) {
    const QuantumAttentionParams& p = job.params;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t rows = job.group * p.q_len, of_head = ceil_div<int64_t>(rows, kSweepRows), kv = t / of_head;
    // With `is_causal` the last rows have the most keys; they go first.
    const int64_t tile = p.is_causal ? of_head - 1 - t % of_head : t % of_head;
    batch = static_cast<int32_t>(kv / p.kv_heads), kv_head = static_cast<int32_t>(kv % p.kv_heads);
    keys = joined_rows<T>(job, false, batch, kv_head);
    norm = work.value_norm ? work.value_norm + kv * norm_pitch(job) : nullptr;
    scale = p.scale * kLog2E;
    const int32_t all = static_cast<int32_t>(job.total_len);
    int32_t low = all, high = 0, inner_low = 0, inner_high = all;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = tile * kSweepRows + warp * kUnitRows + lane / 4 + 8 * r;
      row[r].real = at < rows;
      const int64_t own = row[r].real ? at : 0;
      row[r].head = static_cast<int32_t>(kv_head * job.group + own / p.q_len);
      row[r].query = static_cast<int32_t>(own % p.q_len);
      const KeyRange range = key_range(job, batch, row[r].query);
      row[r].lo = static_cast<int32_t>(range.lo), row[r].hi = static_cast<int32_t>(range.hi);
      if (row[r].real && row[r].hi > row[r].lo) low = min(low, row[r].lo), high = max(high, row[r].hi);
      if (row[r].real) inner_low = max(inner_low, row[r].lo), inner_high = min(inner_high, row[r].hi);
      load_query(r);
    }
    first = -warp_max(-low), last = warp_max(high);
    inner_first = warp_max(inner_low), inner_last = -warp_max(-inner_high);
    begin = -block_max(-low, parts) / 4 * 4, end = block_max(high, parts);
  }

  // The fragments of row r: zeros where there is none, and behind the head size.
  __device__ __forceinline__ void load_query(int r) {
    const T* from = row_of<T>(job.tensors.q, batch, row[r].head, row[r].query);
#pragma unroll
    for (int i = 0; i < kSize / 8; ++i) {
      const int x = 8 * i + static_cast<int>(threadIdx.x) % 4 * 2;
      q[i / 2][i % 2 * 2 + r] = row[r].real && x < job.params.head_size ? *reinterpret_cast<const uint32_t*>(from + x) : 0u;
    }
  }

  // Key j0 + 8 a + 2 u + b of kPartKeys (b < 2, u, a < 4) lies in column 2 a + b of product u, so that the columns of lane a
  // are the keys from j0 + 8 a on.
  static __device__ __forceinline__ int slot(int key) {
    const int own = key % kPartKeys;
    return key - own + own % kRun / 2 * 8 + own / kRun * 2 + own % 2;
  }
  // Where 8 elements of the key of a slot lie: eight slots, the same elements of each, in different banks.
  static __device__ __forceinline__ int place(int slot, int chunk) { return slot * kSize + ((chunk ^ slot % 8) * 8); }

  __device__ __forceinline__ void stage(int32_t j0, int buffer) const {
    constexpr int kChunks = kSize / kChunkRow, kAtOnce = kSweepThreads / kChunks;
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunks;
    const bool wanted = chunk * kChunkRow < job.params.head_size;
    T* to = k + buffer * kSweepKeys * kSize;
#pragma unroll
    for (int i = 0; i < kSweepKeys / kAtOnce; ++i) {
      const int key = thread / kChunks + i * kAtOnce;
      const bool valid = wanted && j0 + key < end;
      cp_async_16(to + place(slot(key), chunk), keys.row(valid ? j0 + key : begin) + (valid ? chunk * kChunkRow : 0), valid);
    }
    if (norm && thread < kSweepKeys / 4) {
      const int32_t j = j0 + 4 * thread;
      cp_async_16(lent + buffer * kSweepKeys + 4 * thread, norm + (j < end ? j : 0), j < end);
    }
  }

  // t[r][i] = the score of row r and key j + i times log2(e), -inf where r does not attend to it.
  __device__ __forceinline__ void restrict_scores(float (&t)[2][kRun], int32_t j) const {
    const float cap = job.params.softcap;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (cap > 0.0f) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) t[r][i] = tanhf(t[r][i] / kLog2E / cap) * cap * kLog2E;
      }
      if (job.tensors.mask.data) {
        float bias[kRun];
        load_bias(bias, job.tensors.mask, batch, row[r], j);
#pragma unroll
        for (int i = 0; i < kRun; ++i) t[r][i] = bias[i] == -kInf ? -kInf : t[r][i] + finite(bias[i] * kLog2E);
      } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) t[r][i] = j + i >= row[r].lo && j + i < row[r].hi ? t[r][i] : -kInf;
      }
    }
  }

  // Calls visit(j, t, norms, plain) for the runs of the lane, in order, all lanes of the warp together. `plain`: every row
  // attends to all of these keys. `careful`: it never is.
  template <class Visit>
  __device__ __forceinline__ void run(bool careful, const Visit& visit) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const bool always = careful || job.params.softcap > 0.0f || job.tensors.mask.data;
    if (begin < end) stage(begin, 0);
    cp_async_commit();
    int buffer = 0;
    for (int32_t j0 = begin; j0 < end; j0 += kSweepKeys, buffer ^= 1) {
      if (j0 + kSweepKeys < end) stage(j0 + kSweepKeys, buffer ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
#pragma unroll 1
      for (int part = 0; part < kSweepKeys; part += kPartKeys) {
        const int32_t from = j0 + part, j = from + lane % 4 * kRun;
        if (from >= last || from + kPartKeys <= first) continue;
        const T* own = k + (buffer * kSweepKeys + part) * kSize;
        float t[2][kRun];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          float c[4] = {};
#pragma unroll
          for (int x = 0; x < kSize / 32; ++x) {
            uint32_t b[4];
            ldmatrix_x4(b, own + place(u * 8 + lane % 8, 4 * x + lane / 8));
            mma_16816<T>(c, q[2 * x], {b[0], b[1]});
            mma_16816<T>(c, q[2 * x + 1], {b[2], b[3]});
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) t[i / 2][2 * u + i % 2] = c[i] * scale;
        }
        const bool plain = !always && from >= inner_first && from + kPartKeys <= inner_last;
        if (!plain) restrict_scores(t, j);
        float norms[kRun];
        const float4* lend = reinterpret_cast<const float4*>(lent + buffer * kSweepKeys + part + lane % 4 * kRun);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 x = norm ? lend[i] : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
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
