// From attributes and shapes, as a framework hands them over, to checked params and strides. Shared by the adapters.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "qexport/quantum_attention.h"
#include "qexport/tensor_view.h"

namespace qexport {

// The attributes of a node. Every one with a default in the op table must have been given; there are no defaults here.
struct QuantumAttentionAttributes {
  std::string strategy;
  std::vector<int64_t> num_samples;
  std::string precision, residual;
  float error_tolerance;
  int64_t control_variate, layer, is_causal, qk_matmul_output_mode, left_window_size, right_window_size;
  float softcap;
  bool has_scale;
  float scale;
  int64_t q_num_heads, kv_num_heads;  // 0: absent
};

struct QuantumAttentionInputs {
  TensorView q, k, v, attn_mask, past_key, past_value;
  const int64_t* nonpad_kv_seqlen;  // null: absent
  Shape nonpad_shape;
  int64_t seed;
  TensorView key_summary;
};

struct QuantumAttentionCall {
  QuantumAttentionParams params;
  QuantumAttentionTensors tensors;  // the outputs are left null
  Shape y, present_key, present_value, qk_matmul_output, error_estimate, key_summary;
};

// Errors, all std::invalid_argument with one line: "[QuantumAttention] num_samples must be > 0, got 0".
void check_attributes(const QuantumAttentionAttributes& attributes);
// The strategy must estimate its own error where the output error_estimate is asked for.
void check_error_estimate(Strategy strategy);
// The outputs, once they are set, must not lie in memory that is still to be read: present_key may share that of past_key
// where their rows lie alike, which they do for one kv head of one batch item; so for the values.
void check_outputs(const QuantumAttentionCall& call);
QuantumAttentionCall resolve_call(const QuantumAttentionAttributes& attributes, const QuantumAttentionInputs& inputs);

}  // namespace qexport
