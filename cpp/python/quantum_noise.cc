#include <vector>

#include "arrays.h"
#include "qexport/quantum_noise_check.h"

namespace qexport {
namespace {

// A parameter of a channel, as numbers of double precision.
TensorView parameter(py::object& object, const char* name, int most = 4) {
  if (object.is_none()) return {};
  object = py::module_::import("numpy").attr("asarray")(object, py::str("float64"));
  return view(object, "QuantumNoise", name, false, most);
}

// Matrices, in single precision where they come in it: they are held to what their type can say.
TensorView matrices(py::object& object, const char* name, int most) {
  if (object.is_none()) return {};
  object = py::module_::import("numpy").attr("asarray")(object);
  if (py::isinstance<py::array_t<float>>(object)) return view(object, "QuantumNoise", name, false, most);
  return parameter(object, name, most);
}

py::tuple quantum_noise(py::object probabilities, py::object level, py::object T1, py::object T2,
                        py::object excited_population, py::object kraus, py::object unitary, const std::string& channel,
                        const std::string& scope, const std::string& convention, const std::string& basis, int64_t inverse,
                        int64_t renormalize, int threads) {
  const QuantumNoiseAttributes attributes{{channel, scope, convention}, basis, inverse, renormalize};
  check_attributes(attributes);
  const QuantumNoiseInputs in{view(probabilities, "QuantumNoise", "probabilities"),
                              {parameter(level, "level"), parameter(T1, "T1"), parameter(T2, "T2"),
                               parameter(excited_population, "excited_population"), matrices(kraus, "kraus", 5)},
                              matrices(unitary, "unitary", 4)};
  const QuantumNoiseCall call = resolve_call(attributes, in);
  py::array noisy = empty(call.noisy, probabilities.attr("dtype"));
  py::array leak = empty(call.leak, py::str(call.params.type == DType::f64 ? "float64" : "float32"));
  const QuantumNoiseTensors tensors{in.probabilities.data, noisy.mutable_data(), leak.mutable_data()};
  const ParallelFor parallel = own_threads(threads);
  int64_t bad_row;
  {
    const py::gil_scoped_release release;
    std::vector<char> scratch(quantum_noise_cpu_scratch_bytes(call.params, parallel));
    bad_row = quantum_noise_cpu(call.params, tensors, scratch.data(), parallel);
  }
  if (bad_row >= 0) fail_row("QuantumNoise", call.rows, bad_row);
  return py::make_tuple(noisy, leak);
}

py::array quantum_measure(py::object probabilities, int64_t seed, int64_t shots, int64_t layer, int threads) {
  const QuantumMeasureAttributes attributes{shots, layer};
  check_attributes(attributes);
  const TensorView rows = view(probabilities, "QuantumMeasure", "probabilities");
  const QuantumMeasureCall call = resolve_call(attributes, rows, seed);
  py::array frequencies = empty(call.frequencies, probabilities.attr("dtype"));
  const QuantumMeasureTensors tensors{rows.data, frequencies.mutable_data()};
  const ParallelFor parallel = own_threads(threads);
  int64_t bad_row;
  {
    const py::gil_scoped_release release;
    std::vector<char> scratch(quantum_measure_cpu_scratch_bytes(call.params, parallel));
    bad_row = quantum_measure_cpu(call.params, tensors, scratch.data(), parallel);
  }
  if (bad_row >= 0) fail_row("QuantumMeasure", call.rows, bad_row);
  return frequencies;
}

}  // namespace

void define_quantum_noise(py::module_& m) {
  using namespace pybind11::literals;
  m.def("quantum_noise", quantum_noise, "probabilities"_a, "level"_a, "T1"_a = py::none(), "T2"_a = py::none(),
        "excited_population"_a = py::none(), "kraus"_a = py::none(), "unitary"_a = py::none(), py::kw_only(), "channel"_a,
        "scope"_a, "convention"_a, "basis"_a, "inverse"_a, "renormalize"_a, "threads"_a = 1,
        "(noisy, leak) of QuantumNoise. Probabilities are float32, float16, ml_dtypes.bfloat16 or float64; attributes as in "
        "qexport.ops.quantum_noise.SPEC. Raises ValueError.");
  m.def("quantum_measure", quantum_measure, "probabilities"_a, "seed"_a = 0, py::kw_only(), "shots"_a, "layer"_a,
        "threads"_a = 1,
        "frequencies of QuantumMeasure. Probabilities are float32, float16, ml_dtypes.bfloat16 or float64; attributes as in "
        "qexport.ops.quantum_measure.SPEC. Raises ValueError.");
}

}  // namespace qexport
