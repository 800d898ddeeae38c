#include "qexport/trellis.h"

#include "arrays.h"

namespace qexport {
namespace {

py::array trellis_encode(const py::array_t<float, py::array::c_style>& values,
                         const py::array_t<float, py::array::c_style>& table, int bits, int threads) {
  constexpr int kEntries = 1 << kTrellisWindow;
  if (values.ndim() != 2) throw std::invalid_argument("values must have two axes, got " + std::to_string(values.ndim()));
  if (table.ndim() != 1 || table.size() != kEntries) {
    throw std::invalid_argument("table must hold " + std::to_string(kEntries) + " numbers, got " +
                                std::to_string(table.size()));
  }
  if (bits < 1 || bits > kTrellisMaxBits) {
    throw std::invalid_argument("bits must lie between 1 and " + std::to_string(kTrellisMaxBits) + ", got " +
                                std::to_string(bits));
  }
  const TrellisParams params{values.shape(0), values.shape(1), bits};
  py::array_t<uint16_t> windows({values.shape(0), values.shape(1)});
  const TrellisTensors tensors{values.data(), table.data(), windows.mutable_data()};
  const ParallelFor parallel = own_threads(threads);
  {
    const py::gil_scoped_release release;
    const std::unique_ptr<char[]> scratch(new char[trellis_encode_cpu_scratch_bytes(params, parallel)]);
    trellis_encode_cpu(params, tensors, scratch.get(), parallel);
  }
  return windows;
}

}  // namespace

void define_trellis(py::module_& m) {
  using namespace pybind11::literals;
  m.def("trellis_encode", trellis_encode, "values"_a, py::kw_only(), "table"_a, "bits"_a, "threads"_a = 1,
        "Windows (rows, columns) uint16 of the strings of symbols whose values in `table` are nearest to `values`, row by "
        "row; "
        "NaN is near to anything. Raises ValueError.");
}

}  // namespace qexport
