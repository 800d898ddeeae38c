#include "arrays.h"
#include "qexport/mps_check.h"

namespace qexport {
namespace {

py::tuple mps_encode(py::object matrix, const std::vector<int64_t>& row_factors, const std::vector<int64_t>& col_factors,
                     int64_t bond_dim, double tol, int threads, uintptr_t pool) {
  const MpsEncodeAttributes attributes{row_factors, col_factors, bond_dim, tol};
  check_attributes(attributes);
  const TensorView in = view(matrix, "MPSEncode", "matrix");
  const MpsEncodeCall call = resolve_call(attributes, in);
  py::array cores = empty(call.cores, matrix.attr("dtype")), ranks = empty(call.ranks, py::str("int64"));
  py::array error = empty(call.error, py::str("float64")), bound = empty(call.error, py::str("float64"));
  const MpsEncodeTensors tensors{in.data, cores.mutable_data(), static_cast<int64_t*>(ranks.mutable_data()),
                                 static_cast<double*>(error.mutable_data()), static_cast<double*>(bound.mutable_data())};
  const ParallelFor parallel = own_threads_or_pool(threads, pool);
  MpsStatus status;
  {
    const py::gil_scoped_release release;
    status = mps_encode_cpu(call.params, tensors, parallel);
  }
  check_status("MPSEncode", status);
  return py::make_tuple(cores, ranks, error, bound);
}

py::object mps_decode(py::object cores, int64_t rows, int64_t cols, const std::vector<int64_t>& row_factors,
                      const std::vector<int64_t>& col_factors, const std::vector<int64_t>& bonds, int threads,
                      py::object device) {
  const Memory memory(std::move(device));
  const MpsTrainAttributes attributes{rows, cols, row_factors, col_factors, bonds};
  check_attributes("MPSDecode", attributes);
  const ArrayView in = memory.view(cores, "MPSDecode", "cores");
  const MpsDecodeCall call = resolve_call(attributes, in);
  const NewTensor matrix = memory.empty(call.matrix, cores.attr("dtype"));
  const MpsDecodeTensors tensors{in.data, matrix.data};
  if (const CudaKernels* cuda = memory.cuda()) {
    memory.run("MPSDecode", nullptr, cuda->mps_decode_scratch_bytes(call.params), cuda->mps_decode, call.params, tensors);
    return matrix.tensor;
  }
  const ParallelFor parallel = own_threads(threads);
  {
    const py::gil_scoped_release release;
    const std::unique_ptr<char[]> scratch(new char[mps_decode_cpu_scratch_bytes(call.params, parallel)]);
    mps_decode_cpu(call.params, tensors, scratch.get(), parallel);
  }
  return matrix.tensor;
}

}  // namespace

void define_mps(py::module_& m) {
  using namespace pybind11::literals;
  m.def("mps_encode", mps_encode, "matrix"_a, py::kw_only(), "row_factors"_a, "col_factors"_a, "bond_dim"_a, "tol"_a,
        "threads"_a = 1, "pool"_a = 0,
        "(cores, ranks, error, lower_bound) of MPSEncode. float32 or float64; attributes as in "
        "qexport.ops.mps_encode.SPEC, `pool` as in quantum_attention. Raises ValueError, and RuntimeError where eigenvalues "
        "do not converge.");
  m.def("mps_decode", mps_decode, "cores"_a, py::kw_only(), "rows"_a, "cols"_a, "row_factors"_a, "col_factors"_a, "bonds"_a,
        "threads"_a = 1, "device"_a = py::none(),
        "matrix of MPSDecode. float32 or float64; attributes as in qexport.ops.mps_decode.SPEC, `device` as in "
        "quantum_attention. Raises ValueError.");
}

}  // namespace qexport
