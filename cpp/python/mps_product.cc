#include <memory>
#include <vector>

#include "arrays.h"
#include "qexport/mps_check.h"
#include "qexport/quantum_attention.h"

namespace qexport {
namespace {

using Ints = std::vector<int64_t>;

py::object mps_attention(py::object cores, py::object V, int64_t rows, int64_t cols, const Ints& row_factors,
                         const Ints& col_factors, const Ints& bonds, const std::string& method, int threads, uintptr_t pool,
                         py::object device) {
  constexpr const char* op = "MPSAttention";
  const Memory memory(std::move(device));
  if (const char* error = isa_error()) throw std::invalid_argument(error);
  const MpsProductAttributes attributes{{rows, cols, row_factors, col_factors, bonds}, method};
  check_attributes(op, attributes);
  const ArrayView trains = memory.view(cores, op, "cores"), values = memory.view(V, op, "V");
  const MpsAttentionCall call = resolve_attention(attributes, trains, values);
  const NewTensor Y = memory.empty(call.Y, V.attr("dtype"));
  const MpsAttentionTensors tensors{trains.data, values.data, Y.data};
  if (const CudaKernels* cuda = memory.cuda()) {
    memory.run(op, nullptr, cuda->mps_attention_scratch_bytes(call.params), cuda->mps_attention, call.params, tensors);
    return Y.tensor;
  }
  const ParallelFor parallel = own_threads_or_pool(threads, pool);
  {
    const py::gil_scoped_release release;
    const std::unique_ptr<char[]> scratch(new char[mps_attention_cpu_scratch_bytes(call.params, parallel)]);
    mps_attention_cpu(call.params, tensors, scratch.get(), parallel);
  }
  return Y.tensor;
}

py::object mpo_linear(py::object x, py::object cores, py::object bias, int64_t rows, int64_t cols, const Ints& row_factors,
                      const Ints& col_factors, const Ints& bonds, const std::string& method, int threads,
                      py::object device) {
  constexpr const char* op = "MPOLinear";
  const Memory memory(std::move(device));
  if (const char* error = isa_error()) throw std::invalid_argument(error);
  const MpsProductAttributes attributes{{rows, cols, row_factors, col_factors, bonds}, method};
  check_attributes(op, attributes);
  const ArrayView inputs = memory.view(x, op, "x"), train = memory.view(cores, op, "cores"),
                  added = memory.view(bias, op, "bias");
  const MpoLinearCall call = resolve_linear(attributes, inputs, train, added, false);
  const NewTensor y = memory.empty(call.y, x.attr("dtype"));
  if (const CudaKernels* cuda = memory.cuda()) {
    const MpoLinearTensors tensors{inputs.data, train.data, added.data, y.data};
    memory.run(op, nullptr, cuda->mpo_linear_scratch_bytes(call.params), cuda->mpo_linear, call.params, tensors);
    return y.tensor;
  }
  const ParallelFor parallel = own_threads(threads);
  {
    const py::gil_scoped_release release;
    MpoLinearWeights weights(call.params, train.data, parallel);
    const std::unique_ptr<char[]> scratch(new char[mpo_linear_cpu_scratch_bytes(call.params, parallel)]);
    mpo_linear_cpu(call.params, {inputs.data, weights.data(), added.data, y.data}, scratch.get(), parallel);
  }
  return y.tensor;
}

py::tuple as_tuple(const MpsPlan& plan) { return py::make_tuple(plan.ends, plan.nanoseconds); }

py::tuple mps_attention_plan(int64_t rows, int64_t cols, const Ints& row_factors, const Ints& col_factors, const Ints& bonds,
                             int64_t items, int64_t features, const std::string& method) {
  const MpsProductAttributes attributes{{rows, cols, row_factors, col_factors, bonds}, method};
  check_attributes("MPSAttention", attributes);
  return as_tuple(plan_attention(mps_layout(attributes.train), items, features, mps_method(attributes)));
}

py::tuple mpo_linear_plan(int64_t rows, int64_t cols, const Ints& row_factors, const Ints& col_factors, const Ints& bonds,
                          int64_t tokens, bool constant, const std::string& method) {
  const MpsProductAttributes attributes{{rows, cols, row_factors, col_factors, bonds}, method};
  check_attributes("MPOLinear", attributes);
  return as_tuple(plan_linear(mps_layout(attributes.train), tokens, constant, mps_method(attributes)));
}

}  // namespace

void define_mps_product(py::module_& m) {
  using namespace pybind11::literals;
  m.def("mps_attention", mps_attention, "cores"_a, "V"_a, py::kw_only(), "rows"_a, "cols"_a, "row_factors"_a,
        "col_factors"_a, "bonds"_a, "method"_a, "threads"_a = 1, "pool"_a = 0, "device"_a = py::none(),
        "Y of MPSAttention. float32, float16, ml_dtypes.bfloat16 or float64; attributes as in "
        "qexport.ops.mps_attention.SPEC, `pool` and `device` as in quantum_attention. Raises ValueError.");
  m.def("mpo_linear", mpo_linear, "x"_a, "cores"_a, "bias"_a = py::none(), py::kw_only(), "rows"_a, "cols"_a,
        "row_factors"_a, "col_factors"_a, "bonds"_a, "method"_a, "threads"_a = 1, "device"_a = py::none(),
        "y of MPOLinear. Types as in mps_attention; attributes as in qexport.ops.mpo_linear.SPEC, `device` as in "
        "quantum_attention. Raises ValueError.");
  m.def("mps_attention_plan", mps_attention_plan, "rows"_a, "cols"_a, "row_factors"_a, "col_factors"_a, "bonds"_a, "items"_a,
        "features"_a, "method"_a,
        "(ends of the groups of sites, estimated nanoseconds) of mps_attention: what qexport.mps.cost estimates.");
  m.def("mpo_linear_plan", mpo_linear_plan, "rows"_a, "cols"_a, "row_factors"_a, "col_factors"_a, "bonds"_a, "tokens"_a,
        "constant"_a, "method"_a, "The same of mpo_linear; `constant`: merged cores are kept from run to run.");
}

}  // namespace qexport
