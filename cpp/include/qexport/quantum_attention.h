// QuantumAttention: attention whose weighted sum over the keys is estimated from `num_samples` keys per query.
// The estimators are defined in docs/math.md. Plain pointers and sizes; knows no framework, allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qexport/dtype.h"
#include "qexport/parallel.h"

namespace qexport {

enum class Strategy : int32_t { exact, naive, stratified, adaptive, hybrid, tree };
// The lowest precision that products may use; a permission, float32 is used where the processor lacks the instructions.
enum class Precision : int32_t { fp32, bf16, int8, automatic };
// What `tree` does with the sampled residual of the keys that it does not read.
enum class Residual : int32_t { none, verify_only, unbiased, james_stein };

struct QuantumAttentionParams {
  Strategy strategy;
  const int64_t* num_samples;  // (1,) or (q_heads,)
  int64_t num_samples_count;
  bool control_variate;
  Precision precision;
  float error_tolerance;  // 0 is off
  Residual residual;
  bool is_causal;
  uint32_t layer;
  int64_t seed;
  float scale;
  float softcap;                      // 0 is off
  int64_t left_window, right_window;  // -1 is off
  int64_t qk_matmul_output_mode;
  DType type;  // of Q, K, V, the past and the outputs
  int64_t batch, q_heads, kv_heads, q_len, past_len, kv_len, head_size, v_head_size;
};

// Rows of `head_size` contiguous elements at data + batch * batch_stride + head * head_stride + i * row_stride (elements).
struct HeadRows {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// attn_mask at data + b * batch_stride + h * head_stride + i * query_stride; keys from `len` on are not attended.
struct AttentionMask {
  const void* data;  // null: no mask
  DType type;
  int64_t batch_stride, head_stride, query_stride, len;
};

struct QuantumAttentionTensors {
  // Inputs
  HeadRows q, k, v;
  HeadRows past_key, past_value;  // data null where there is no past
  AttentionMask mask;
  const int64_t* nonpad_kv_seqlen;  // (batch,) or null
  const float* key_summary;         // (batch, kv_heads, summary_chunks, summary_row) of key_summary.h, or null
  // Outputs; all but y may be null
  void* y;
  int64_t y_batch_stride, y_head_stride, y_row_stride;
  void* present_key;           // (batch, kv_heads, past_len + kv_len, head_size)
  void* present_value;         // (batch, kv_heads, past_len + kv_len, v_head_size)
  void* qk_matmul_output;      // (batch, q_heads, q_len, past_len + kv_len)
  float* error_estimate;       // (batch, q_heads)
  float* present_key_summary;  // as key_summary, which it may be
};

// Bytes of scratch that the call below needs.
size_t quantum_attention_cpu_scratch_bytes(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors,
                                           const ParallelFor& parallel);

// Runs the op. The caller has checked every shape and value (quantum_attention_check.h).
void quantum_attention_cpu(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors, void* scratch,
                           const ParallelFor& parallel);

// Whether the kernels in use compute products in `precision` where that is asked for; if not, in one of more digits.
bool computes_in(Precision precision);

// The instruction set in use: "generic", "avx2", "avx512", "avx512bf16", "amx" or "neon". The environment variable
// QEXPORT_ISA overrides the choice; `isa_error` is null, or says why the override cannot be honoured.
const char* isa_name();
const char* isa_error();

}  // namespace qexport
