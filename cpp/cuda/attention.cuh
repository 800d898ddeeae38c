// One call of QuantumAttention as its CUDA kernels see it: where rows lie, and which keys a query attends to.
#pragma once

#include "common.cuh"

namespace qexport {
namespace cuda {

constexpr float kInf = __builtin_huge_valf();
constexpr float kLog2E = 1.44269504088896340736f;  // scores are often kept as logarithms to base 2
constexpr float kToleranceMargin = 0.8f;           // of error_tolerance: what an estimate must keep to

// num_samples per query head travels with the launch, since it lies in host memory; more heads than this must share one
// number.
constexpr int kMaxHeadsWithSamples = 512;
struct HeadSamples {
  int32_t count;  // 1, or the number of query heads
  int32_t samples[kMaxHeadsWithSamples];
  __device__ __forceinline__ int32_t of(int64_t q_head) const { return samples[count == 1 ? 0 : q_head]; }
};

// Passed to kernels by value. `params.num_samples` and `params.seed` mean nothing on the device.
struct AttentionJob {
  QuantumAttentionParams params;
  QuantumAttentionTensors tensors;
  const int64_t* seed;  // null: 0
  int64_t total_len;    // past_len + kv_len
  int64_t group;        // query heads per kv head
  bool decodes;         // from key_summary
};

inline AttentionJob make_job(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors,
                             const CudaCall& call) {
  return {params, tensors, call.seed, params.past_len + params.kv_len, params.q_heads / params.kv_heads, false};
}

// Calls visit with a value of the type: __half, __nv_bfloat16 or float.
template <class Visit>
void visit_type(DType type, const Visit& visit) {
  switch (type) {
    case DType::f16:
      return visit(__half{});
    case DType::bf16:
      return visit(__nv_bfloat16{});
    default:
      visit(float{});
  }
}

__device__ __forceinline__ uint64_t seed_of(const AttentionJob& job) {
  return job.seed ? static_cast<uint64_t>(*job.seed) : 0;
}

template <class T>
__device__ __forceinline__ const T* row_of(const HeadRows& rows, int64_t b, int64_t h, int64_t i) {
  return static_cast<const T*>(rows.data) + b * rows.batch_stride + h * rows.head_stride + i * rows.row_stride;
}

// Row j of K or V, from the past or the new ones.
template <class T>
__device__ __forceinline__ const T* key_row(const AttentionJob& job, bool values, int64_t b, int64_t kv_head, int64_t j) {
  const QuantumAttentionTensors& t = job.tensors;
  const int64_t past = job.params.past_len;
  if (j < past) return row_of<T>(values ? t.past_value : t.past_key, b, kv_head, j);
  return row_of<T>(values ? t.v : t.k, b, kv_head, j - past);
}

template <class T>
__device__ __forceinline__ T* output_row(const AttentionJob& job, int64_t b, int64_t q_head, int64_t i) {
  const QuantumAttentionTensors& t = job.tensors;
  return static_cast<T*>(t.y) + b * t.y_batch_stride + q_head * t.y_head_stride + i * t.y_row_stride;
}

// nonpad_kv_seqlen of a batch item, which may be any number, as one that positions and windows can be counted from.
__device__ __forceinline__ int64_t given_len(const AttentionJob& job, int64_t b) {
  return min(max(job.tensors.nonpad_kv_seqlen[b], int64_t{0}), int64_t{1} << 40);
}

// The keys [lo, hi) that causality, windows, padding and the length of the mask leave to a query; lo = hi = 0: none.
struct KeyRange {
  int64_t lo, hi;
};
__device__ __forceinline__ KeyRange key_range(const AttentionJob& job, int64_t b, int64_t query) {
  const QuantumAttentionParams& p = job.params;
  int64_t lo = 0, hi = job.total_len, offset = p.past_len;
  if (job.tensors.nonpad_kv_seqlen) {
    const int64_t there = given_len(job, b);
    hi = min(there, hi), offset = there - p.q_len;
  }
  const int64_t position = query + offset;
  if (p.is_causal) hi = min(hi, position + 1);
  if (p.right_window >= 0) hi = min(hi, position + p.right_window + 1);
  if (p.left_window >= 0) lo = max(lo, position - p.left_window);
  if (job.tensors.mask.data) hi = min(hi, job.tensors.mask.len);
  if (hi <= lo) return {0, 0};
  return {lo, hi};
}

// What the mask adds to the score of key j < mask.len: -inf shuts it out. 0 without a mask.
__device__ __forceinline__ float mask_bias(const AttentionMask& mask, int64_t b, int64_t q_head, int64_t query, int64_t j) {
  if (!mask.data) return 0.0f;
  const int64_t at = b * mask.batch_stride + q_head * mask.head_stride + query * mask.query_stride + j;
  switch (mask.type) {
    case DType::boolean:
      return static_cast<const uint8_t*>(mask.data)[at] ? 0.0f : -kInf;
    case DType::f16:
      return to_float(static_cast<const __half*>(mask.data)[at]);
    case DType::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(mask.data)[at]);
    default:
      return static_cast<const float*>(mask.data)[at];
  }
}

// Exact attention of every query, and nothing else of the op; exact.cu. Where `only` is not null, of those query heads alone
// whose only[b * q_heads + head] is not 0, read on the device.
void exact_attention(Status& status, const AttentionJob& job, const int32_t* only, void* scratch, void* stream);
size_t exact_attention_scratch_bytes(const AttentionJob& job);

// The strategies that know all scores of a row: naive, stratified, adaptive, hybrid; also qk_matmul_output of any
// strategy where the output is asked for; rows.cu.
void row_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream);
size_t row_attention_scratch_bytes(const AttentionJob& job);

// `tree`; tree.cu. Where it does not apply (docs/math.md, "When the call is exact") the caller takes exact_attention.
bool tree_applies(const AttentionJob& job, const int64_t* num_samples, int64_t num_samples_count);
void tree_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream);
size_t tree_attention_scratch_bytes(const AttentionJob& job);

}  // namespace cuda
}  // namespace qexport
