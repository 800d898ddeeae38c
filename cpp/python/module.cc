// qexport._core: the kernels on numpy arrays, one def per op, no maths.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <thread>
#include <vector>

#include "qexport/philox.h"
#include "qexport/quantum_attention_check.h"

namespace py = pybind11;

namespace qexport {
namespace {

DType type_of(const py::array& array, const char* name) {
  if (py::isinstance<py::array_t<float>>(array)) return DType::f32;
  const std::string type = py::str(array.dtype());
  if (type == "float16") return DType::f16;
  if (type == "bfloat16") return DType::bf16;  // ml_dtypes
  if (type == "bool") return DType::boolean;
  throw std::invalid_argument(std::string("[QuantumAttention] ") + name +
                              " must be float32, float16, bfloat16 or bool, got " + type);
}

// Whether the last axis is contiguous and the others are made of whole elements, so that HeadRows can describe the array.
bool is_rows(const py::array& array) {
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    if (array.strides(axis) < 0 || array.strides(axis) % array.itemsize() != 0) return false;
  }
  return array.ndim() > 2 && array.strides(array.ndim() - 1) == array.itemsize();
}

// `object` becomes an array that stays alive as long as the caller's variable: contiguous, or with `keep_rows` of
// contiguous rows.
TensorView view(py::object& object, const char* name, bool keep_rows = false) {
  TensorView result{};
  if (object.is_none()) return result;
  const py::module_ numpy = py::module_::import("numpy");
  py::array array = numpy.attr("asarray")(object);
  if (array.ndim() == 0 || array.ndim() > 4) {
    throw std::invalid_argument(std::string("[QuantumAttention] ") + name + " must have 1 to 4 dimensions, got " +
                                std::to_string(array.ndim()));
  }
  if (!keep_rows || !is_rows(array)) array = numpy.attr("ascontiguousarray")(array);
  object = array;
  result = {array.data(), true, type_of(array, name), {static_cast<int>(array.ndim()), {}}};
  std::copy_n(array.shape(), array.ndim(), result.shape.dim);
  return result;
}

// The strides of an array of (batch, heads, len, size), or of (batch, len, heads * size).
void set_strides(const py::array& array, HeadRows& rows) {
  const auto stride = [&](py::ssize_t axis) { return array.strides(axis) / array.itemsize(); };
  rows.batch_stride = stride(0);
  rows.row_stride = stride(array.ndim() - 2);
  if (array.ndim() == 4) rows.head_stride = stride(1);
}

py::array empty(const Shape& shape, const py::object& dtype) {
  py::tuple dims(shape.rank);
  for (int i = 0; i < shape.rank; ++i) dims[i] = shape.dim[i];
  return py::module_::import("numpy").attr("empty")(dims, dtype);
}

void run_on_threads(void* pool, void (*body)(void*, size_t), size_t total, void* data) {
  const size_t threads = std::min(total, static_cast<size_t>(*static_cast<int*>(pool)));
  std::vector<std::thread> others;
  for (size_t worker = 1; worker < threads; ++worker) {
    others.emplace_back([=] {
      for (size_t i = worker; i < total; i += threads) body(data, i);
    });
  }
  for (size_t i = 0; i < total; i += threads) body(data, i);
  for (std::thread& thread : others) thread.join();
}

// parallel_for(begin, end, grain, body, data) of another library's pool, as torch's stable C interface has it
// (torch_parallel_for in torch/csrc/stable/c/shim.h). Threads of two pools would take the processors from each other.
using PoolFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

void run_on_pool(void* pool, void (*body)(void*, size_t), size_t total, void* data) {
  struct Call {
    void (*body)(void*, size_t);
    void* data;
  } call{body, data};
  const auto range = [](int64_t begin, int64_t end, void* context) {
    const Call& c = *static_cast<Call*>(context);
    for (int64_t i = begin; i < end; ++i) c.body(c.data, static_cast<size_t>(i));
  };
  reinterpret_cast<PoolFor>(pool)(0, static_cast<int64_t>(total), 1, range, &call);
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
  if (threads < 1) throw std::invalid_argument("threads must be >= 1, got " + std::to_string(threads));
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
  QuantumAttentionInputs in{view(Q, "Q", true),
                            view(K, "K", true),
                            view(V, "V", true),
                            view(attn_mask, "attn_mask"),
                            view(past_key, "past_key"),
                            view(past_value, "past_value"),
                            nullptr,
                            {},
                            seed,
                            view(key_summary, "key_summary")};
  const TensorView* same_type[] = {&in.q, &in.k, &in.v, &in.past_key, &in.past_value};
  for (const TensorView* tensor : same_type) {
    if (tensor->present && (tensor->type != in.q.type || tensor->type == DType::boolean)) {
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
  const ParallelFor parallel = pool ? ParallelFor{run_on_pool, reinterpret_cast<void*>(pool), threads}
                                    : ParallelFor{run_on_threads, &threads, threads};
  {
    const py::gil_scoped_release release;
    std::vector<char> scratch(quantum_attention_cpu_scratch_bytes(call.params, call.tensors, parallel));
    quantum_attention_cpu(call.params, call.tensors, scratch.data(), parallel);
  }
  return py::make_tuple(y, keys, values, qk, errors, summary);
}

// All four words, so that Python sees (word0, word1, word2, word3) as arrays of the broadcast shape of the arguments.
template <int kWord>
uint32_t philox_word(uint32_t key_lo, uint32_t key_hi, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  return philox4x32(key_lo, key_hi, {{c0, c1, c2, c3}}).word[kWord];
}

using Words = py::array_t<uint32_t>;

py::tuple philox(const Words& key_lo, const Words& key_hi, const Words& c0, const Words& c1, const Words& c2,
                 const Words& c3) {
  return py::make_tuple(py::vectorize(philox_word<0>)(key_lo, key_hi, c0, c1, c2, c3),
                        py::vectorize(philox_word<1>)(key_lo, key_hi, c0, c1, c2, c3),
                        py::vectorize(philox_word<2>)(key_lo, key_hi, c0, c1, c2, c3),
                        py::vectorize(philox_word<3>)(key_lo, key_hi, c0, c1, c2, c3));
}

}  // namespace
}  // namespace qexport

PYBIND11_MODULE(_core, m) {
  using namespace pybind11::literals;
  m.doc() = "The CPU kernels on numpy arrays.";
  m.def("quantum_attention", &qexport::quantum_attention, "Q"_a, "K"_a, "V"_a, "attn_mask"_a = py::none(),
        "past_key"_a = py::none(), "past_value"_a = py::none(), "nonpad_kv_seqlen"_a = py::none(), "seed"_a = 0,
        "key_summary"_a = py::none(), py::kw_only(), "strategy"_a, "num_samples"_a, "control_variate"_a, "precision"_a,
        "error_tolerance"_a, "residual"_a, "layer"_a, "is_causal"_a, "scale"_a = py::none(), "softcap"_a,
        "q_num_heads"_a = 0, "kv_num_heads"_a = 0, "qk_matmul_output_mode"_a, "left_window_size"_a, "right_window_size"_a,
        "present"_a = false, "qk_matmul_output"_a = false, "error_estimate"_a = false, "threads"_a = 1, "pool"_a = 0,
        "(Y, present_key, present_value, qk_matmul_output, error_estimate, present_key_summary) of QuantumAttention; all "
        "but Y\n"
        "are None unless asked for by `present`, `qk_matmul_output` and `error_estimate`, or `key_summary` is given. Arrays "
        "of float32, float16 or ml_dtypes.bfloat16. "
        "`num_samples` is a list of one\n"
        "number or one per query head. Attributes as in qexport.ops.quantum_attention.SPEC. `pool` is the address of a "
        "function like "
        "torch_parallel_for, whose threads then work, `threads` of them at most; 0: own threads. Raises ValueError.");
  m.def("philox", &qexport::philox, "key_lo"_a, "key_hi"_a, "c0"_a, "c1"_a, "c2"_a, "c3"_a,
        "The four words of the Philox4x32-10 block of a key and a counter; uint32 arguments that broadcast.");
  m.def("isa", &qexport::isa_name, "The instruction set in use: generic, avx2, avx512, avx512bf16 or neon.");
}
