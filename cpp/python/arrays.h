// Arrays and tensors of Python as the kernels take them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "qexport/cuda_kernels.h"
#include "qexport/parallel.h"
#include "qexport/tensor_view.h"

namespace qexport {

namespace py = pybind11;

// What the checks see of a tensor, and its strides in elements.
struct ArrayView : TensorView {
  int64_t stride[5];
};

// `object` becomes an array that stays alive as long as the caller's variable: contiguous, or with `keep_rows` of
// contiguous rows. `name` is that of the argument of the op `op_name`, for messages. It has at most `most` dimensions.
ArrayView view(py::object& object, const char* op_name, const char* name, bool keep_rows = false, int most = 4);

py::array empty(const Shape& shape, const py::object& dtype);

// A new tensor, and where its elements lie.
struct NewTensor {
  py::object tensor;
  void* data;
};

// Where the tensors of a call lie, and who makes new ones: numpy for the CPU's kernels, or a framework with memory on a
// device. The latter is an object with
//   kernels               what load_cuda returned
//   stream                address of the cudaStream_t, 0: the default one
//   describe(tensor)      (address, name of the type, shape, strides in elements)
//   contiguous(tensor)    the same tensor, or a copy without gaps
//   empty(shape, dtype)   a new tensor; dtype is that of another tensor, or the name of a type
class Memory {
 public:
  explicit Memory(py::object device);  // None: numpy

  const CudaKernels* cuda() const { return cuda_; }  // null: the CPU's kernels
  ArrayView view(py::object& object, const char* op_name, const char* name, bool keep_rows = false) const;
  NewTensor empty(const Shape& shape, const py::object& dtype) const;

  // The seed of a call on a device, int64 (); null: none is given.
  const int64_t* seed(py::object& object, const char* op_name) const;

  // Runs function(arguments..., CudaCall) of the kernels. Throws std::runtime_error with what it says.
  template <class Function, class... Arguments>
  void run(const char* op_name, const int64_t* seed, size_t scratch_bytes, Function function,
           const Arguments&... arguments) const {
    constexpr size_t kAlignment = 256;
    const NewTensor scratch = empty({1, {static_cast<int64_t>(scratch_bytes + kAlignment)}}, py::str("uint8"));
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(scratch.data) + kAlignment - 1) / kAlignment * kAlignment;
    const CudaCall call{seed, reinterpret_cast<void*>(begin), stream_};
    const char* error;
    {
      const py::gil_scoped_release release;
      error = function(arguments..., call);
    }
    if (error) throw std::runtime_error("[" + std::string(op_name) + "] CUDA: " + error);
  }

 private:
  py::object device_;
  const CudaKernels* cuda_;
  void* stream_;
};

// The seed of a call on the CPU.
int64_t seed_value(const py::object& seed, const char* op_name);

// Threads of its own; `threads` must outlive it. Fails where there is less than one.
ParallelFor own_threads(int& threads);
// The same, or where `pool` is not 0 the parallel_for at that address: torch's torch_parallel_for.
ParallelFor own_threads_or_pool(int& threads, uintptr_t pool);

void define_cuda(py::module_& m);
void define_mps(py::module_& m);          // MPSEncode, MPSDecode
void define_mps_product(py::module_& m);  // MPSAttention, MPOLinear
void define_quantum_attention(py::module_& m);
void define_quantum_noise(py::module_& m);  // and QuantumMeasure
void define_quantum_overlap(py::module_& m);
void define_trellis(py::module_& m);

}  // namespace qexport
