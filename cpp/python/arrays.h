// numpy arrays as the kernels take them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "qexport/parallel.h"
#include "qexport/tensor_view.h"

namespace qexport {

namespace py = pybind11;

// `object` becomes an array that stays alive as long as the caller's variable: contiguous, or with `keep_rows` of
// contiguous rows. `name` is that of the argument of the op `op_name`, for messages. It has at most `most` dimensions.
TensorView view(py::object& object, const char* op_name, const char* name, bool keep_rows = false, int most = 4);

py::array empty(const Shape& shape, const py::object& dtype);

// Threads of its own; `threads` must outlive it. Fails where there is less than one.
ParallelFor own_threads(int& threads);
// The same, or where `pool` is not 0 the parallel_for at that address: torch's torch_parallel_for.
ParallelFor own_threads_or_pool(int& threads, uintptr_t pool);

void define_mps(py::module_& m);          // MPSEncode, MPSDecode
void define_mps_product(py::module_& m);  // MPSAttention, MPOLinear
void define_quantum_attention(py::module_& m);
void define_quantum_noise(py::module_& m);  // and QuantumMeasure
void define_quantum_overlap(py::module_& m);

}  // namespace qexport
