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

// A bias in base 2. A finite one that is beyond float32 there does not shut its key out: it may be that of all keys.
__device__ __forceinline__ float base2_bias(float x) { return x > -kInf ? fmaxf(x * kLog2E, -FLT_MAX) : -kInf; }

// Without kMasked the call has no mask.
template <class T_, int kQueries, int kKeys, bool kMasked>
class ExactTile {
 public:
  using T = T_;
  static constexpr int kBiasRow = kKeys + 8;  // floats: rows that lie 8 banks apart are read without conflict

  static size_t shared_bytes(const AttentionJob& job) {
    return kMasked && job.tensors.mask.data ? kKeys * sizeof(int) + kQueries * kBiasRow * sizeof(float) : 0;
  }

  // Called by all threads. False: there is nothing to write.
  __device__ __forceinline__ bool open(const ExactLaunch& exact, char* shared) {
    launch = &exact;
    const AttentionJob& job = exact.job;
    const QuantumAttentionParams& p = job.params;
    seen = reinterpret_cast<int*>(shared);
    bias = reinterpret_cast<float*>(seen + kKeys);
    // In 32 bits, which a grid has: divisions of 64 bits take as long as the products of a block of keys.
    uint32_t index = blockIdx.x;
    const uint32_t parts = static_cast<uint32_t>(exact.parts), tiles = static_cast<uint32_t>(exact.tiles);
    const uint32_t packs = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(exact.pack);
    part = static_cast<int>(index % parts), index /= parts;
    // Later queries see more keys under a causal mask: the longest work first.
    first_row = int64_t{tiles - 1 - index % tiles} * kQueries, index /= tiles;
    first_head = int64_t{index % packs} * exact.pack, batch = index / packs;
    head_size = static_cast<int>(p.head_size), v_head_size = static_cast<int>(p.v_head_size);
    scale = p.scale * kLog2E;
    bool any = !exact.only;
    for (int i = 0; i < exact.pack; ++i) any = any || exact.only[batch * p.q_heads + first_head + i];
    if (!any) return false;
    const int64_t nonpad = job.tensors.nonpad_kv_seqlen ? job.tensors.nonpad_kv_seqlen[batch] : 0;
    // Keys, queries and rows of a tile are counted in 32 bits; further away than kFar there is no key.
    constexpr int64_t kFar = 1 << 30;
    offset = static_cast<int>(max(-kFar, min(job.tensors.nonpad_kv_seqlen ? nonpad - p.q_len : p.past_len, kFar)));
    left = static_cast<int>(min(p.left_window, kFar));
    right = static_cast<int>(p.is_causal ? 0 : min(p.right_window, kFar));
    int64_t keys = job.tensors.nonpad_kv_seqlen ? min(max(nonpad, int64_t{0}), job.total_len) : job.total_len;
    if (job.tensors.mask.data) keys = min(keys, job.tensors.mask.len);
    key_end = static_cast<int>(keys);
    if (hides()) {
      for (int i = static_cast<int>(threadIdx.x); i < kKeys; i += static_cast<int>(blockDim.x)) seen[i] = 0;
      __syncthreads();
    }
    rows = static_cast<int>(min(exact.pack * p.q_len - first_row, int64_t{kQueries}));
    // The first query of the tile begins and ends to see keys before the others, the last one after them. Those of several
    // heads are taken to be all.
    const int64_t lowest = exact.pack == 1 ? first_row : 0, highest = exact.pack == 1 ? first_row + rows - 1 : p.q_len - 1;
    const Range low = range_of(lowest), high = range_of(highest);
    all_from = high.lo, all_to = low.hi;
    const int blocks = high.hi > low.lo ? ceil_div(high.hi - low.lo, kKeys) : 0;
    const int begin = static_cast<int>(int64_t{blocks} * part / exact.parts);
    end = high.hi, first = low.lo + begin * kKeys;
    count = static_cast<int>(int64_t{blocks} * (part + 1) / exact.parts) - begin;
    const int64_t past = job.params.past_len;
    const int64_t kv_head = static_cast<uint32_t>(first_head) / static_cast<uint32_t>(job.group);
    // Where row 0 of all keys would lie in each of the two buffers; arithmetic on addresses, as it may lie before the
    // buffer.
    const auto base = [&](const HeadRows& all, int64_t back) {
      return reinterpret_cast<uintptr_t>(all.data) +
             sizeof(T) *
                 static_cast<uintptr_t>(batch * all.batch_stride + kv_head * all.head_stride - back * all.row_stride);
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
  __device__ __forceinline__ bool ours(int row) const {
    if (row >= rows) return false;
    return !launch->only || launch->only[batch * launch->job.params.q_heads + place(row).head];
  }

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

  __device__ __forceinline__ KeyRun<T> query_run(int part) const {
    const int64_t r = first_row + part * kRun;
    if (launch->pack > 1 || launch->only || r + kRun > launch->job.params.q_len) return {nullptr, 0};
    return {row_of<T>(launch->job.tensors.q, batch, first_head, r), launch->job.tensors.q.row_stride};
  }
  __device__ __forceinline__ KeyRun<T> key_run(int block, int part) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return run_of(block, part, key_past, key_new, t.past_key.row_stride, t.k.row_stride);
  }
  __device__ __forceinline__ KeyRun<T> value_run(int block, int part) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return run_of(block, part, value_past, value_new, t.past_value.row_stride, t.v.row_stride);
  }

  __device__ __forceinline__ bool plain(int block) const {
    const int from = first + block * kKeys;
    return from >= all_from && from + kKeys <= all_to && !hides() && launch->job.params.softcap == 0.0f;
  }

  // Keys that the mask shuts out for all queries count as hidden once `prepare` was there.
  __device__ __forceinline__ bool hides() const { return kMasked && launch->job.tensors.mask.data != nullptr; }
  __device__ __forceinline__ bool hidden(int block, int row) const { return seen[row] != block + 1; }

  // Lays the mask of the tile into shared memory, as logarithms of base 2. Where all rows have the same, row 0 serves them.
  __device__ __forceinline__ void prepare(int block) {
    two_over_cap = 2.0f / launch->job.params.softcap;
    if (!hides()) return;
    switch (launch->job.tensors.mask.type) {
      case DType::boolean:
        stage_mask<uint8_t>(block, [](uint8_t x) { return x ? 0.0f : -kInf; });
        break;
      case DType::f16:
        stage_mask<__half>(block, [](__half x) { return to_float(x); });
        break;
      case DType::bf16:
        stage_mask<__nv_bfloat16>(block, [](__nv_bfloat16 x) { return to_float(x); });
        break;
      default:
        stage_mask<float>(block, [](float x) { return x; });
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
    if (hides()) {
      const float* const row_bias = bias + row * bias_step;
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        const float b = row_bias[key(m)];
        at(m) = b > -kInf ? at(m) + b : -kInf;
      }
    }
    const Range range = ours(row) ? range_of(place(row).query) : Range{0, 0};
    const int from = first + block * kKeys, lo = range.lo - from, hi = range.hi - from;
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
  // As key_range, of this batch item; where hi <= lo there are none.
  struct Range {
    int lo, hi;
  };
  __device__ __forceinline__ Range range_of(int64_t query) const {
    const int position = static_cast<int>(query) + offset;
    const int hi = right >= 0 ? min(key_end, position + 1 + min(right, key_end)) : key_end;
    const int lo = left >= 0 ? max(0, min(position - left, hi)) : 0;
    return {lo, hi};
  }

  template <class Mask, class Bias>
  __device__ __forceinline__ void stage_mask(int block, const Bias& bias_of) {
    const AttentionMask& mask = launch->job.tensors.mask;
    bias_step = mask.query_stride == 0 && (launch->pack == 1 || mask.head_stride == 0) ? 0 : kBiasRow;
    // A thread stays with one key.
    const int rows = bias_step ? kQueries : 1, key = static_cast<int>(threadIdx.x) % kKeys, j = first + block * kKeys + key;
    const Mask* const start = static_cast<const Mask*>(mask.data) + batch * mask.batch_stride + j;
    bool any = false;
#pragma unroll 4
    for (int row = static_cast<int>(threadIdx.x) / kKeys; row < rows; row += static_cast<int>(blockDim.x) / kKeys) {
      float x = -kInf;
      if (j < end && (!bias_step || ours(row))) {
        const QueryPlace at = place(row);
        x = base2_bias(bias_of(start[at.head * mask.head_stride + at.query * mask.query_stride]));
      }
      any = any || x > -kInf;
      bias[row * kBiasRow + key] = x;
    }
    if (any) seen[key] = block + 1;
  }

  __device__ __forceinline__ const T* key_or_value(int block, int row, uintptr_t past, uintptr_t fresh, int64_t past_stride,
                                                   int64_t stride) const {
    const int from = first + block * kKeys, j = from + row, past_len = static_cast<int>(launch->job.params.past_len);
    if (j >= end) return nullptr;
    // Nearly all blocks lie on one side, which all threads know.
    const bool old = from < past_len && (from + kKeys <= past_len || j < past_len);
    return reinterpret_cast<const T*>((old ? past : fresh) +
                                      sizeof(T) * static_cast<uintptr_t>(j * (old ? past_stride : stride)));
  }

  __device__ __forceinline__ KeyRun<T> run_of(int block, int part, uintptr_t past, uintptr_t fresh, int64_t past_stride,
                                              int64_t stride) const {
    const int from = first + block * kKeys + part * kRun, past_len = static_cast<int>(launch->job.params.past_len);
    const bool old = from < past_len;
    if (from + kRun > end || (old && from + kRun > past_len)) return {nullptr, 0};
    if (old) stride = past_stride;
    return {reinterpret_cast<const T*>((old ? past : fresh) + sizeof(T) * static_cast<uintptr_t>(from * stride)), stride};
  }

  const ExactLaunch* launch;
  int part;
  int64_t batch, first_head, first_row;
  int first, end;        // of the keys
  int all_from, all_to;  // the keys that every row sees
  int rows;              // of the tile
  int key_end, offset;   // of all keys; position of query 0
  int left, right;       // windows; < 0: none
  int* seen;             // (kKeys,) 1 + the last block whose key some query sees, as far as the mask goes
  float* bias;           // (kQueries, kBiasRow)
  int bias_step = 0;
  float two_over_cap = 0.0f;
  uintptr_t key_past, key_new, value_past, value_new;
};

}  // namespace cuda
}  // namespace qexport
