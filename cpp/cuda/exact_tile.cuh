// The queries that one block of threads answers exactly, and the keys that they see: the `Blocks` of flash.cuh and
// simt.cuh for a contiguous range of keys.
#pragma once

#include <cfloat>

#include "attention.cuh"
#include "flash.cuh"

namespace qexport {
namespace cuda {

// What the threads of exact attention are started with. The rows of a head, or of the `pack` heads that share a kv head,
// are one sequence, cut into `tiles`; each tile's keys are cut into `parts`, joined by join_parts_kernel.
struct ExactLaunch {
  AttentionJob job;
  const int32_t* only;
  int pack, parts;
  int64_t tiles;
  float* part_outputs;  // (parts, rows of all heads, v_head_size), not divided by the sum
  float* part_stats;    // (parts, rows of all heads, 2): maximum of the scores, and sum
  __host__ __device__ int64_t rows() const { return job.params.batch * job.params.q_heads * job.params.q_len; }
};

struct QueryPlace {
  int64_t head, query;
};

// What a score of base 2 becomes under softcap: cap * tanh(x / cap). Its error is that of rounding a score of the size of
// the cap.
__device__ __forceinline__ float capped_score(float x, float cap, float two_over_cap) {
  const float t = fast_exp2(fabsf(x) * -two_over_cap);
  return copysignf(cap * kLog2E * __fdividef(1.0f - t, 1.0f + t), x);
}

// mask_bias in base 2. A finite bias that is beyond float32 there does not shut its key out: it may be that of all keys.
__device__ __forceinline__ float mask_bias2(const AttentionMask& mask, int64_t b, int64_t q_head, int64_t query, int64_t j) {
  const float x = mask_bias(mask, b, q_head, query, j);
  return x > -kInf ? fmaxf(x * kLog2E, -FLT_MAX) : -kInf;
}

template <class T_, int kQueries, int kKeys>
class ExactTile {
 public:
  using T = T_;
  static constexpr int kBiasRow = kKeys + 8;  // floats: rows that lie 8 banks apart are read without conflict

  static size_t shared_bytes(const AttentionJob& job) {
    return (2 * kQueries + 4) * sizeof(int) + (job.tensors.mask.data ? kQueries * kBiasRow * sizeof(float) : 0);
  }

  // Called by all threads. False: there is nothing to write.
  __device__ __forceinline__ bool open(const ExactLaunch& exact, char* shared) {
    launch = &exact;
    const AttentionJob& job = exact.job;
    ranges = reinterpret_cast<int*>(shared);
    int* const extremes = ranges + 2 * kQueries;
    bias = reinterpret_cast<float*>(extremes + 4);
    int64_t index = blockIdx.x;
    part = static_cast<int>(index % exact.parts), index /= exact.parts;
    // Later queries see more keys under a causal mask: the longest work first.
    first_row = (exact.tiles - 1 - index % exact.tiles) * kQueries, index /= exact.tiles;
    const int64_t packs = job.params.q_heads / exact.pack;
    first_head = index % packs * exact.pack, batch = index / packs;
    head_size = static_cast<int>(job.params.head_size), v_head_size = static_cast<int>(job.params.v_head_size);
    scale = job.params.scale * kLog2E;
    if (threadIdx.x == 0) extremes[0] = extremes[2] = -INT32_MAX, extremes[1] = extremes[3] = -INT32_MAX;
    __syncthreads();
    for (int row = static_cast<int>(threadIdx.x); row < kQueries; row += static_cast<int>(blockDim.x)) {
      int lo = 0, hi = -1;  // not ours
      if (first_row + row < exact.pack * job.params.q_len) {
        const QueryPlace at = place(row);
        if (!exact.only || exact.only[batch * job.params.q_heads + at.head]) {
          const KeyRange range = key_range(job, batch, at.query);
          lo = static_cast<int>(range.lo), hi = static_cast<int>(range.hi);
        }
      }
      ranges[2 * row] = lo, ranges[2 * row + 1] = hi;
      if (hi > lo) atomicMax(&extremes[0], -lo), atomicMax(&extremes[1], hi);
      if (hi >= 0) atomicMax(&extremes[2], lo), atomicMax(&extremes[3], -hi);
    }
    __syncthreads();
    if (extremes[3] == -INT32_MAX) return false;
    all_from = extremes[2], all_to = -extremes[3];
    end = 0, first = 0, count = 0;
    if (extremes[1] > 0) {
      const int from = -extremes[0], blocks = ceil_div(extremes[1] - from, kKeys);
      const int begin = static_cast<int>(int64_t{blocks} * part / exact.parts);
      end = extremes[1], first = from + begin * kKeys;
      count = static_cast<int>(int64_t{blocks} * (part + 1) / exact.parts) - begin;
    }
    const int64_t kv_head = first_head / job.group, past = job.params.past_len;
    // Where row 0 of all keys would lie in each of the two buffers; arithmetic on addresses, as it may lie before the
    // buffer.
    const auto base = [&](const HeadRows& rows, int64_t back) {
      return reinterpret_cast<uintptr_t>(rows.data) +
             sizeof(T) *
                 static_cast<uintptr_t>(batch * rows.batch_stride + kv_head * rows.head_stride - back * rows.row_stride);
    };
    key_past = base(job.tensors.past_key, 0), key_new = base(job.tensors.k, past);
    value_past = base(job.tensors.past_value, 0), value_new = base(job.tensors.v, past);
    return true;
  }

  __device__ __forceinline__ QueryPlace place(int row) const {
    const int64_t r = first_row + row;
    if (launch->pack == 1) return {first_head, r};
    const uint32_t q_len = static_cast<uint32_t>(launch->job.params.q_len), at = static_cast<uint32_t>(r);
    return {first_head + at / q_len, at % q_len};
  }
  __device__ __forceinline__ bool ours(int row) const { return ranges[2 * row + 1] >= 0; }

  __device__ __forceinline__ const T* query(int row) const {
    if (!ours(row)) return nullptr;
    const QueryPlace at = place(row);
    return row_of<T>(launch->job.tensors.q, batch, at.head, at.query);
  }
  __device__ __forceinline__ const T* key(int block, int row) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return key_or_value(block, row, key_past, key_new, t.past_key.row_stride, t.k.row_stride);
  }
  __device__ __forceinline__ const T* value(int block, int row) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return key_or_value(block, row, value_past, value_new, t.past_value.row_stride, t.v.row_stride);
  }

  __device__ __forceinline__ bool plain(int block) const {
    const int from = first + block * kKeys;
    return from >= all_from && from + kKeys <= all_to && !launch->job.tensors.mask.data &&
           launch->job.params.softcap == 0.0f;
  }

  // Lays the mask of the tile into shared memory, as logarithms of base 2. Where all rows have the same, row 0 serves them.
  __device__ __forceinline__ void prepare(int block) {
    const AttentionMask& mask = launch->job.tensors.mask;
    two_over_cap = 2.0f / launch->job.params.softcap;
    if (!mask.data) return;
    bias_step = mask.query_stride == 0 && (launch->pack == 1 || mask.head_stride == 0) ? 0 : kBiasRow;
    const int rows = bias_step ? kQueries : 1, from = first + block * kKeys;
    for (int i = static_cast<int>(threadIdx.x); i < rows * kKeys; i += static_cast<int>(blockDim.x)) {
      const int row = i / kKeys, key = i % kKeys;
      float x = 0.0f;
      if (from + key < end && (!bias_step || ours(row))) {
        const QueryPlace at = place(row);
        x = mask_bias2(mask, batch, at.head, at.query, from + key);
      }
      bias[row * kBiasRow + key] = x;
    }
    __syncthreads();
  }

  template <int kCount, class At, class Key>
  __device__ __forceinline__ void adjust(int block, int row, const At& at, const Key& key) const {
    const AttentionJob& job = launch->job;
    if (job.params.softcap > 0.0f) {
#pragma unroll
      for (int m = 0; m < kCount; ++m) at(m) = capped_score(at(m), job.params.softcap, two_over_cap);
    }
    // Everything is selected, so that a NaN behind the mask does not leak.
    if (job.tensors.mask.data) {
      const float* const row_bias = bias + row * bias_step;
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        const float b = row_bias[key(m)];
        at(m) = b > -kInf ? at(m) + b : -kInf;
      }
    }
    const int from = first + block * kKeys, lo = ranges[2 * row] - from, hi = ranges[2 * row + 1] - from;
#pragma unroll
    for (int m = 0; m < kCount; ++m) at(m) = key(m) >= lo && key(m) < hi ? at(m) : -kInf;
  }

  // The row's place among the rows of all heads, for parts.
  __device__ __forceinline__ int64_t part_row(int row) const {
    const QueryPlace at = place(row);
    const QuantumAttentionParams& p = launch->job.params;
    return part * launch->rows() + (batch * p.q_heads + at.head) * p.q_len + at.query;
  }
  __device__ __forceinline__ T* output(int row) const {
    const QueryPlace at = place(row);
    return output_row<T>(launch->job, batch, at.head, at.query);
  }

  int count;  // of blocks of keys
  int head_size, v_head_size;
  float scale;

 private:
  __device__ __forceinline__ const T* key_or_value(int block, int row, uintptr_t past, uintptr_t fresh, int64_t past_stride,
                                                   int64_t stride) const {
    const int j = first + block * kKeys + row;
    if (j >= end) return nullptr;
    return reinterpret_cast<const T*>(j < launch->job.params.past_len
                                          ? past + sizeof(T) * static_cast<uintptr_t>(j * past_stride)
                                          : fresh + sizeof(T) * static_cast<uintptr_t>(j * stride));
  }

  const ExactLaunch* launch;
  int part;
  int64_t batch, first_head, first_row;
  int first, end;        // of the keys
  int all_from, all_to;  // the keys that every row sees
  int* ranges;           // (kQueries, 2); -1 as the end of a row that is not ours
  float* bias;           // (kQueries, kBiasRow)
  int bias_step = 0;
  float two_over_cap = 0.0f;
  uintptr_t key_past, key_new, value_past, value_new;
};

}  // namespace cuda
}  // namespace qexport
