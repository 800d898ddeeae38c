#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arrays.h"
#include "qexport/quantum_attention_check.h"

namespace qexport {
namespace {

constexpr const char* kName = "QuantumAttention";

// The strides of an array of (batch, heads, len, size), or of (batch, len, heads * size).
void set_strides(const py::array& array, HeadRows& rows) {
  const auto stride = [&](py::ssize_t axis) { return array.strides(axis) / array.itemsize(); };
  rows.batch_stride = stride(0);
  rows.row_stride = stride(array.ndim() - 2);
  if (array.ndim() == 4) rows.head_stride = stride(1);
}

py::tuple quantum_attention(py::object Q, py::object K, py::object V, py::object attn_mask, py::object past_key,
                            py::object past_value, std::optional<std::vector<int64_t>> nonpad_kv_seqlen, int64_t seed,
                            py::object key_summary, const std::string& strategy, std::vector<int64_t> num_samples,
                            int64_t control_variate, const std::string& precision, float error_tolerance,
                            const std::string& residual, int64_t layer, int64_t is_causal, std::optional<float> scale,
                            float softcap, int64_t q_num_heads, int64_t kv_num_heads, int64_t qk_matmul_output_mode,
                            int64_t left_window_size, int64_t right_window_size, bool present, bool qk_matmul_output,
                            bool error_estimate, int threads, uintptr_t pool) {
  if (const char* error = isa_error()) throw std::invalid_argument(error);
  const ParallelFor parallel = own_threads_or_pool(threads, pool);
  const QuantumAttentionAttributes attributes{strategy,
                                              std::move(num_samples),
                                              precision,
                                              residual,
                                              error_tolerance,
                                              control_variate,
                                              layer,
                                              is_causal,
                                              qk_matmul_output_mode,
                                              left_window_size,
                                              right_window_size,
                                              softcap,
                                              scale.has_value(),
                                              scale.value_or(0.0f),
                                              q_num_heads,
                                              kv_num_heads};
  check_attributes(attributes);
  QuantumAttentionInputs in{view(Q, kName, "Q", true),
                            view(K, kName, "K", true),
                            view(V, kName, "V", true),
                            view(attn_mask, kName, "attn_mask"),
                            view(past_key, kName, "past_key"),
                            view(past_value, kName, "past_value"),
                            nullptr,
                            {},
                            seed,
                            view(key_summary, kName, "key_summary")};
  const TensorView* same_type[] = {&in.q, &in.k, &in.v, &in.past_key, &in.past_value};
  for (const TensorView* tensor : same_type) {
    if (tensor->present && (tensor->type != in.q.type || tensor->type == DType::boolean || tensor->type == DType::f64)) {
      throw std::invalid_argument("[QuantumAttention] Q, K, V and the past must share one float type");
    }
  }
  if (nonpad_kv_seqlen) {
    in.nonpad_kv_seqlen = nonpad_kv_seqlen->data();
    in.nonpad_shape = {1, {static_cast<int64_t>(nonpad_kv_seqlen->size())}};
  }
  QuantumAttentionCall call = resolve_call(attributes, in);
  set_strides(Q, call.tensors.q);
  set_strides(K, call.tensors.k);
  set_strides(V, call.tensors.v);
  const py::object dtype = Q.attr("dtype");
  py::array y = empty(call.y, dtype);
  call.tensors.y = y.mutable_data();
  py::object keys = py::none(), values = py::none(), qk = py::none(), errors = py::none();
  const auto output = [&](const Shape& shape, py::object& object) {
    py::array array = empty(shape, dtype);
    object = array;
    return array.mutable_data();
  };
  if (present) call.tensors.present_key = output(call.present_key, keys);
  if (present) call.tensors.present_value = output(call.present_value, values);
  if (qk_matmul_output) call.tensors.qk_matmul_output = output(call.qk_matmul_output, qk);
  if (error_estimate) {
    check_error_estimate(call.params.strategy);
    py::array array = empty(call.error_estimate, py::str("float32"));
    errors = array;
    call.tensors.error_estimate = static_cast<float*>(array.mutable_data());
  }
  py::object summary = py::none();
  if (in.key_summary.present) {
    py::array array = empty(call.key_summary, py::str("float32"));
    summary = array;
    call.tensors.present_key_summary = static_cast<float*>(array.mutable_data());
  }
  {
    const py::gil_scoped_release release;
    const size_t bytes = quantum_attention_cpu_scratch_bytes(call.params, call.tensors, parallel);
    const std::unique_ptr<char[]> scratch(new char[bytes]);  // megabytes, which a vector would fill with zeros first
    quantum_attention_cpu(call.params, call.tensors, scratch.get(), parallel);
  }
  return py::make_tuple(y, keys, values, qk, errors, summary);
}

}  // namespace

void define_quantum_attention(py::module_& m) {
  using namespace pybind11::literals;
  m.def("quantum_attention", quantum_attention, "Q"_a, "K"_a, "V"_a, "attn_mask"_a = py::none(), "past_key"_a = py::none(),
        "past_value"_a = py::none(), "nonpad_kv_seqlen"_a = py::none(), "seed"_a = 0, "key_summary"_a = py::none(),
        py::kw_only(), "strategy"_a, "num_samples"_a, "control_variate"_a, "precision"_a, "error_tolerance"_a, "residual"_a,
        "layer"_a, "is_causal"_a, "scale"_a = py::none(), "softcap"_a, "q_num_heads"_a = 0, "kv_num_heads"_a = 0,
        "qk_matmul_output_mode"_a, "left_window_size"_a, "right_window_size"_a, "present"_a = false,
        "qk_matmul_output"_a = false, "error_estimate"_a = false, "threads"_a = 1, "pool"_a = 0,
        "(Y, present_key, present_value, qk_matmul_output, error_estimate, present_key_summary) of QuantumAttention; all "
        "but Y\n"
        "are None unless asked for by `present`, `qk_matmul_output` and `error_estimate`, or `key_summary` is given. Arrays "
        "of float32, float16 or ml_dtypes.bfloat16. "
        "`num_samples` is a list of one\n"
        "number or one per query head. Attributes as in qexport.ops.quantum_attention.SPEC. `pool` is the address of a "
        "function like "
        "torch_parallel_for, whose threads then work, `threads` of them at most; 0: own threads. Raises ValueError.");
}

}  // namespace qexport
