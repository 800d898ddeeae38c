#include <stdexcept>
#include <vector>

#include "arrays.h"
#include "channel_inputs.h"
#include "qexport/quantum_attention.h"
#include "qexport/quantum_noise_check.h"

namespace qexport {
namespace {

py::tuple quantum_noise(py::object probabilities, py::object level, py::object T1, py::object T2,
                        py::object excited_population, py::object kraus, py::object unitary, const std::string& channel,
                        const std::string& scope, const std::string& convention, const std::string& basis, int64_t inverse,
                        int64_t renormalize, int threads, py::object device) {
  const Memory memory(std::move(device));
  if (const char* error = isa_error()) throw std::invalid_argument(error);
  const QuantumNoiseAttributes attributes{{channel, scope, convention}, basis, inverse, renormalize};
  check_attributes(attributes);
  const QuantumNoiseInputs in{memory.view(probabilities, "QuantumNoise", "probabilities"),
                              channel_inputs("QuantumNoise", level, T1, T2, excited_population, kraus),
                              matrices(unitary, "QuantumNoise", "unitary", 4)};
  const QuantumNoiseCall call = resolve_call(attributes, in);
  const NewTensor noisy = memory.empty(call.noisy, probabilities.attr("dtype"));
  const NewTensor leak = memory.empty(call.leak, py::str(call.params.type == DType::f64 ? "float64" : "float32"));
  const QuantumNoiseTensors tensors{in.probabilities.data, noisy.data, leak.data};
  if (const CudaKernels* cuda = memory.cuda()) {
    memory.run("QuantumNoise", nullptr, cuda->quantum_noise_scratch_bytes(call.params), cuda->quantum_noise, call.params,
               tensors);
    return py::make_tuple(noisy.tensor, leak.tensor);
  }
  const ParallelFor parallel = own_threads(threads);
  int64_t bad_row;
  {
    const py::gil_scoped_release release;
    std::vector<char> scratch(quantum_noise_cpu_scratch_bytes(call.params, parallel));
    bad_row = quantum_noise_cpu(call.params, tensors, scratch.data(), parallel);
  }
  if (bad_row >= 0) fail_row("QuantumNoise", call.rows, bad_row);
  return py::make_tuple(noisy.tensor, leak.tensor);
}

py::object quantum_measure(py::object probabilities, py::object seed, int64_t shots, int64_t layer, int threads,
                           py::object device) {
  const Memory memory(std::move(device));
  const QuantumMeasureAttributes attributes{shots, layer};
  check_attributes(attributes);
  const ArrayView rows = memory.view(probabilities, "QuantumMeasure", "probabilities");
  const int64_t number = memory.cuda() ? 0 : seed_value(seed, "QuantumMeasure");
  const QuantumMeasureCall call = resolve_call(attributes, rows, number);
  const NewTensor frequencies = memory.empty(call.frequencies, probabilities.attr("dtype"));
  const QuantumMeasureTensors tensors{rows.data, frequencies.data};
  if (const CudaKernels* cuda = memory.cuda()) {
    memory.run("QuantumMeasure", memory.seed(seed, "QuantumMeasure"), cuda->quantum_measure_scratch_bytes(call.params),
               cuda->quantum_measure, call.params, tensors);
    return frequencies.tensor;
  }
  const ParallelFor parallel = own_threads(threads);
  int64_t bad_row;
  {
    const py::gil_scoped_release release;
    std::vector<char> scratch(quantum_measure_cpu_scratch_bytes(call.params, parallel));
    bad_row = quantum_measure_cpu(call.params, tensors, scratch.data(), parallel);
  }
  if (bad_row >= 0) fail_row("QuantumMeasure", call.rows, bad_row);
  return frequencies.tensor;
}

}  // namespace

void define_quantum_noise(py::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "quantum_noise", quantum_noise, "probabilities"_a, "level"_a, "T1"_a = py::none(), "T2"_a = py::none(),
      "excited_population"_a = py::none(), "kraus"_a = py::none(), "unitary"_a = py::none(), py::kw_only(), "channel"_a,
      "scope"_a, "convention"_a, "basis"_a, "inverse"_a, "renormalize"_a, "threads"_a = 1, "device"_a = py::none(),
      "(noisy, leak) of QuantumNoise. Probabilities are float32, float16, ml_dtypes.bfloat16 or float64; attributes as in "
      "qexport.ops.quantum_noise.SPEC. `device` as in quantum_attention; parameters of the noise stay arrays, and rows that "
      "are no probabilities become NaN there. Raises ValueError.");
  m.def("quantum_measure", quantum_measure, "probabilities"_a, "seed"_a = 0, py::kw_only(), "shots"_a, "layer"_a,
        "threads"_a = 1, "device"_a = py::none(),
        "frequencies of QuantumMeasure. Probabilities are float32, float16, ml_dtypes.bfloat16 or float64; attributes as in "
        "qexport.ops.quantum_measure.SPEC. `device` as in quantum_noise, with `seed` as in quantum_attention. Raises "
        "ValueError.");
}

}  // namespace qexport
