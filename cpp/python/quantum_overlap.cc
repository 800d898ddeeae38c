#include <stdexcept>
#include <vector>

#include "channel_inputs.h"
#include "qexport/quantum_attention.h"
#include "qexport/quantum_overlap_check.h"

namespace qexport {
namespace {

constexpr const char* kOverlap = "QuantumOverlap";

py::array quantum_overlap(py::object queries, py::object keys, py::object level, py::object T1, py::object T2,
                          py::object excited_population, py::object kraus, const std::string& channel,
                          const std::string& scope, const std::string& convention, int threads) {
  if (const char* error = isa_error()) throw std::invalid_argument(error);
  const NoiseChannelAttributes attributes{channel, scope, convention};
  check_attributes(kOverlap, attributes, false);
  const QuantumOverlapInputs in{view(queries, kOverlap, "queries"), view(keys, kOverlap, "keys"),
                                channel_inputs(kOverlap, level, T1, T2, excited_population, kraus)};
  const QuantumOverlapCall call = resolve_overlap(attributes, in);
  py::array overlaps = empty(call.overlaps, queries.attr("dtype"));
  const QuantumOverlapTensors tensors{in.queries.data, in.keys.data, overlaps.mutable_data()};
  const ParallelFor parallel = own_threads(threads);
  {
    const py::gil_scoped_release release;
    std::vector<char> scratch(quantum_overlap_cpu_scratch_bytes(call.params, parallel));
    quantum_overlap_cpu(call.params, tensors, scratch.data(), parallel);
  }
  return overlaps;
}

}  // namespace

void define_quantum_overlap(py::module_& m) {
  using namespace pybind11::literals;
  m.def("quantum_overlap", quantum_overlap, "queries"_a, "keys"_a, "level"_a, "T1"_a = py::none(), "T2"_a = py::none(),
        "excited_population"_a = py::none(), "kraus"_a = py::none(), py::kw_only(), "channel"_a, "scope"_a, "convention"_a,
        "threads"_a = 1,
        "overlaps of QuantumOverlap. Queries and keys are float32, float16, ml_dtypes.bfloat16 or float64; attributes as in "
        "qexport.ops.quantum_overlap.SPEC. Raises ValueError.");
}

}  // namespace qexport
