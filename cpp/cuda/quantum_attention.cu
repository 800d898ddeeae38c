// QuantumAttention on the GPU: which kernels a call takes, and the past joined with the new keys and values.
#include <algorithm>

#include "kernels.h"
#include "rows.cuh"
#include "tree_decode.cuh"

namespace qexport {
namespace cuda {
namespace {

// Past rows joined with new ones along the key axis, in units of `unit` bytes; strides in units.
struct Join {
  const char *past, *fresh;
  char* present;
  int64_t kv_heads, past_len, total_len, row;  // `row`: units of a row
  int64_t past_batch, past_head, past_row, fresh_batch, fresh_head, fresh_row;
};

// A block copies a run of units of one (batch, kv head): blockIdx.x = head + heads * run, past rows first.
constexpr int kPresentThreads = 256;
constexpr int64_t kPresentUnits = 4 * kPresentThreads;

template <class Unit>
__global__ void join_kernel(const Join join, int64_t heads) {
  const int64_t head = blockIdx.x % heads, b = head / join.kv_heads, h = head % join.kv_heads;
  const int64_t first = blockIdx.x / heads * kPresentUnits, units = join.total_len * join.row;
  const Unit* past = reinterpret_cast<const Unit*>(join.past) + b * join.past_batch + h * join.past_head;
  const Unit* fresh = reinterpret_cast<const Unit*>(join.fresh) + b * join.fresh_batch + h * join.fresh_head;
  Unit* present = reinterpret_cast<Unit*>(join.present) + head * units;
  for (int64_t at = first + threadIdx.x; at < min(first + kPresentUnits, units); at += kPresentThreads) {
    const int64_t j = at / join.row, x = at % join.row;
    if (j < join.past_len) {
      if (past != present) present[at] = past[j * join.past_row + x];  // the caller gave past and present the same memory
    } else {
      present[at] = fresh[(j - join.past_len) * join.fresh_row + x];
    }
  }
}

void join_rows(Status& status, const AttentionJob& job, bool values, void* stream) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  void* present = values ? t.present_value : t.present_key;
  if (!present) return;
  HeadRows past = values ? t.past_value : t.past_key, fresh = values ? t.v : t.k;
  if (p.past_len == 0) past = {};
  if (p.kv_len == 0) fresh = {};
  const int64_t element = p.type == DType::f32 ? 4 : 2, row = values ? p.v_head_size : p.head_size;
  // The widest unit that every row is made of and aligned to.
  int64_t unit = 16;
  const auto whole = [&](const HeadRows& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % unit == 0 && rows.batch_stride * element % unit == 0 &&
           rows.head_stride * element % unit == 0 && rows.row_stride * element % unit == 0;
  };
  while (unit > element &&
         (row * element % unit || reinterpret_cast<uintptr_t>(present) % unit || !whole(past) || !whole(fresh))) {
    unit /= 2;
  }
  const auto units = [&](int64_t elements) { return elements * element / unit; };
  const Join join{static_cast<const char*>(past.data),
                  static_cast<const char*>(fresh.data),
                  static_cast<char*>(present),
                  p.kv_heads,
                  p.past_len,
                  job.total_len,
                  units(row),
                  units(past.batch_stride),
                  units(past.head_stride),
                  units(past.row_stride),
                  units(fresh.batch_stride),
                  units(fresh.head_stride),
                  units(fresh.row_stride)};
  const int64_t heads = p.batch * p.kv_heads, runs = ceil_div(job.total_len * join.row, kPresentUnits);
  const dim3 grid(static_cast<unsigned>(heads * runs));
  const auto run = [&](auto kernel) { launch(status, kernel, grid, dim3(kPresentThreads), 0, stream, join, heads); };
  switch (unit) {
    case 16:
      return run(join_kernel<uint4>);
    case 8:
      return run(join_kernel<uint2>);
    case 4:
      return run(join_kernel<uint32_t>);
    default:
      return run(join_kernel<uint16_t>);
  }
}

// The strategy that a call really takes (docs/math.md, "When the call is exact"), and what goes with it.
AttentionJob plan_job(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors, const CudaCall& call) {
  AttentionJob job = make_job(params, tensors, call);
  QuantumAttentionParams& p = job.params;
  const int64_t least = *std::min_element(p.num_samples, p.num_samples + p.num_samples_count);
  if (p.strategy != Strategy::naive && least >= job.total_len) p.strategy = Strategy::exact;
  job.decodes = p.strategy == Strategy::tree && decode_applies(job);
  if (p.strategy == Strategy::tree && !tree_applies(job, p.num_samples, p.num_samples_count)) p.strategy = Strategy::exact;
  // Means of values hold later ones, which a causal query must not see.
  if (p.strategy == Strategy::exact || p.is_causal) p.control_variate = false;
  return job;
}

void head_samples(Status& status, const QuantumAttentionParams& p, HeadSamples& samples) {
  const int64_t* first = p.num_samples;
  const bool same = std::all_of(first, first + p.num_samples_count, [&](int64_t n) { return n == *first; });
  samples.count = same ? 1 : static_cast<int32_t>(p.num_samples_count);
  if (!same && p.num_samples_count > kMaxHeadsWithSamples) {
    return status.fail("num_samples of more than 512 heads must be one number for all of them in the CUDA kernels");
  }
  for (int32_t h = 0; h < samples.count; ++h)
    samples.samples[h] = static_cast<int32_t>(std::min<int64_t>(first[h], INT32_MAX));
}

}  // namespace

size_t quantum_attention_scratch_bytes(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors) {
  const AttentionJob job = plan_job(params, tensors, {});
  const bool rows = samples_rows(job);
  const size_t own = rows                                    ? 0
                     : job.decodes                           ? decode_attention_scratch_bytes(job)
                     : job.params.strategy == Strategy::tree ? tree_attention_scratch_bytes(job)
                                                             : exact_attention_scratch_bytes(job);
  return std::max(own, rows || tensors.qk_matmul_output ? row_attention_scratch_bytes(job) : 0);
}

const char* quantum_attention(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors,
                              const CudaCall& call) {
  Status status;
  const AttentionJob job = plan_job(params, tensors, call);
  HeadSamples samples;
  head_samples(status, params, samples);
  join_rows(status, job, false, call.stream);
  join_rows(status, job, true, call.stream);
  if (tensors.error_estimate && job.params.strategy != Strategy::tree && !job.decodes) {
    const size_t heads = static_cast<size_t>(params.batch * params.q_heads);
    if (status.ok()) fill_zero(status, tensors.error_estimate, heads * sizeof(float), call.stream);
  }
  if (tensors.present_key_summary) update_summary(status, job, call.stream);
  if (!status.ok() || params.batch * params.q_heads * params.q_len == 0) return status.text;
  if (job.decodes) {
    decode_attention(status, job, samples, call.scratch, call.stream);
  } else if (job.params.strategy == Strategy::tree) {
    tree_attention(status, job, samples, call.scratch, call.stream);
  } else if (!samples_rows(job)) {
    exact_attention(status, job, nullptr, call.scratch, call.stream);
  }
  if (samples_rows(job) || tensors.qk_matmul_output) row_attention(status, job, samples, call.scratch, call.stream);
  return status.text;
}

}  // namespace cuda
}  // namespace qexport
