#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arrays.h"
#include "qexport/quantum_attention_check.h"

namespace qexport {
namespace {

constexpr const char* kAttention = "QuantumAttention";

// The strides of an array of (batch, heads, len, size), or of (batch, len, heads * size).
void set_strides(const ArrayView& array, HeadRows& rows) {
  rows.batch_stride = array.stride[0];
  rows.row_stride = array.stride[array.shape.rank - 2];
  if (array.shape.rank == 4) rows.head_stride = array.stride[1];
}

// nonpad_kv_seqlen: numbers for the CPU, which `lengths` holds then; a tensor of int64 on a device.
void set_lengths(const Memory& memory, py::object& object, std::vector<int64_t>& lengths, QuantumAttentionInputs& in) {
  if (object.is_none()) return;
  if (memory.cuda()) {
    const ArrayView tensor = memory.view(object, kAttention, "nonpad_kv_seqlen");
    if (tensor.type != DType::i64) throw std::invalid_argument("[QuantumAttention] nonpad_kv_seqlen must be int64");
    in.nonpad_kv_seqlen = static_cast<const int64_t*>(tensor.data), in.nonpad_shape = tensor.shape;
    return;
  }
  try {
    lengths = object.cast<std::vector<int64_t>>();
  } catch (const py::cast_error&) {
    throw py::type_error("[QuantumAttention] nonpad_kv_seqlen must be a list of integers");
  }
  in.nonpad_kv_seqlen = lengths.data(), in.nonpad_shape = {1, {static_cast<int64_t>(lengths.size())}};
}

py::tuple quantum_attention(py::object Q, py::object K, py::object V, py::object attn_mask, py::object past_key,
                            py::object past_value, py::object nonpad_kv_seqlen, py::object seed, py::object key_summary,
                            const std::string& strategy, std::vector<int64_t> num_samples, int64_t control_variate,
                            const std::string& precision, float error_tolerance, const std::string& residual, int64_t layer,
                            int64_t is_causal, std::optional<float> scale, float softcap, int64_t q_num_heads,
                            int64_t kv_num_heads, int64_t qk_matmul_output_mode, int64_t left_window_size,
                            int64_t right_window_size, bool present, bool qk_matmul_output, bool error_estimate, int threads,
                            uintptr_t pool, py::object device) {
  const Memory memory(std::move(device));
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
  const ArrayView queries = memory.view(Q, kAttention, "Q", true), keys = memory.view(K, kAttention, "K", true),
                  values = memory.view(V, kAttention, "V", true);
  QuantumAttentionInputs in{queries,
                            keys,
                            values,
                            memory.view(attn_mask, kAttention, "attn_mask"),
                            memory.view(past_key, kAttention, "past_key"),
                            memory.view(past_value, kAttention, "past_value"),
                            nullptr,
                            {},
                            memory.cuda() ? 0 : seed_value(seed, kAttention),
                            memory.view(key_summary, kAttention, "key_summary")};
  const TensorView* same_type[] = {&in.q, &in.k, &in.v, &in.past_key, &in.past_value};
  for (const TensorView* tensor : same_type) {
    if (tensor->present && (tensor->type != in.q.type || tensor->type == DType::boolean || tensor->type == DType::f64 ||
                            tensor->type == DType::i64)) {
      throw std::invalid_argument("[QuantumAttention] Q, K, V and the past must share one float type");
    }
  }
  std::vector<int64_t> lengths;
  set_lengths(memory, nonpad_kv_seqlen, lengths, in);
  QuantumAttentionCall call = resolve_call(attributes, in);
  set_strides(queries, call.tensors.q);
  set_strides(keys, call.tensors.k);
  set_strides(values, call.tensors.v);
  const py::object dtype = Q.attr("dtype"), single = py::str("float32");
  py::object present_key = py::none(), present_value = py::none(), qk = py::none(), errors = py::none(),
             summary = py::none();
  const auto output = [&](const Shape& shape, const py::object& type, py::object& object) {
    const NewTensor made = memory.empty(shape, type);
    object = made.tensor;
    return made.data;
  };
  const NewTensor y = memory.empty(call.y, dtype);
  call.tensors.y = y.data;
  if (present) call.tensors.present_key = output(call.present_key, dtype, present_key);
  if (present) call.tensors.present_value = output(call.present_value, dtype, present_value);
  if (qk_matmul_output) call.tensors.qk_matmul_output = output(call.qk_matmul_output, dtype, qk);
  if (error_estimate) {
    check_error_estimate(call.params.strategy);
    call.tensors.error_estimate = static_cast<float*>(output(call.error_estimate, single, errors));
  }
  if (in.key_summary.present) {
    call.tensors.present_key_summary = static_cast<float*>(output(call.key_summary, single, summary));
  }
  if (const CudaKernels* cuda = memory.cuda()) {
    memory.run(kAttention, memory.seed(seed, kAttention), cuda->quantum_attention_scratch_bytes(call.params, call.tensors),
               cuda->quantum_attention, call.params, call.tensors);
  } else {
    const py::gil_scoped_release release;
    const size_t bytes = quantum_attention_cpu_scratch_bytes(call.params, call.tensors, parallel);
    const std::unique_ptr<char[]> scratch(new char[bytes]);  // megabytes, which a vector would fill with zeros first
    quantum_attention_cpu(call.params, call.tensors, scratch.get(), parallel);
  }
  return py::make_tuple(y.tensor, present_key, present_value, qk, errors, summary);
}

}  // namespace

void define_quantum_attention(py::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "quantum_attention", quantum_attention, "Q"_a, "K"_a, "V"_a, "attn_mask"_a = py::none(), "past_key"_a = py::none(),
      "past_value"_a = py::none(), "nonpad_kv_seqlen"_a = py::none(), "seed"_a = 0, "key_summary"_a = py::none(),
      py::kw_only(), "strategy"_a, "num_samples"_a, "control_variate"_a, "precision"_a, "error_tolerance"_a, "residual"_a,
      "layer"_a, "is_causal"_a, "scale"_a = py::none(), "softcap"_a, "q_num_heads"_a = 0, "kv_num_heads"_a = 0,
      "qk_matmul_output_mode"_a, "left_window_size"_a, "right_window_size"_a, "present"_a = false,
      "qk_matmul_output"_a = false, "error_estimate"_a = false, "threads"_a = 1, "pool"_a = 0, "device"_a = py::none(),
      "(Y, present_key, present_value, qk_matmul_output, error_estimate, present_key_summary) of QuantumAttention; all "
      "but Y\n"
      "are None unless asked for by `present`, `qk_matmul_output` and `error_estimate`, or `key_summary` is given. Arrays "
      "of float32, float16 or ml_dtypes.bfloat16. "
      "`num_samples` is a list of one\n"
      "number or one per query head. Attributes as in qexport.ops.quantum_attention.SPEC. `pool` is the address of a "
      "function like "
      "torch_parallel_for, whose threads then work, `threads` of them at most; 0: own threads.\n"
      "`device`, in this and the other functions: an object that describes tensors in the memory of a device and makes new "
      "ones\n"
      "(cpp/python/arrays.h, Memory), where the kernels of its plugin then run; `nonpad_kv_seqlen` and `seed` are tensors "
      "of int64\n"
      "there. Raises ValueError, and RuntimeError where a kernel cannot be run.");
}

}  // namespace qexport
