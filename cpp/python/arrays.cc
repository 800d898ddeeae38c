#include "arrays.h"

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <vector>

namespace qexport {
namespace {

DType type_of(const py::array& array, const std::string& where) {
  if (py::isinstance<py::array_t<float>>(array)) return DType::f32;
  const std::string type = py::str(array.dtype());
  if (type == "float16") return DType::f16;
  if (type == "bfloat16") return DType::bf16;  // ml_dtypes
  if (type == "float64") return DType::f64;
  if (type == "bool") return DType::boolean;
  throw std::invalid_argument(where + "must be float32, float16, bfloat16, float64 or bool, got " + type);
}

void check_rank(int64_t rank, int most, const std::string& where) {
  if (rank <= most) return;
  throw std::invalid_argument(where + "must have at most " + std::to_string(most) + " dimensions, got " +
                              std::to_string(rank));
}

// Whether the last axis is contiguous and the others are made of whole elements, so that HeadRows can describe the array.
bool is_rows(const py::array& array) {
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    if (array.strides(axis) < 0 || array.strides(axis) % array.itemsize() != 0) return false;
  }
  return array.ndim() > 2 && array.strides(array.ndim() - 1) == array.itemsize();
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

}  // namespace

ArrayView view(py::object& object, const char* op_name, const char* name, bool keep_rows, int most) {
  ArrayView result{};
  if (object.is_none()) return result;
  const std::string where = "[" + std::string(op_name) + "] " + name + " ";
  py::array array = py::array::ensure(object);  // calls of microseconds: no attribute of numpy is looked up on the way
  if (!array) throw py::error_already_set();
  check_rank(array.ndim(), most, where);
  if (!(array.flags() & py::array::c_style) && !(keep_rows && is_rows(array))) {
    array = py::array::ensure(array, py::array::c_style);
  }
  object = array;
  static_cast<TensorView&>(result) = {array.data(), true, type_of(array, where), {static_cast<int>(array.ndim()), {}}};
  std::copy_n(array.shape(), array.ndim(), result.shape.dim);
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) result.stride[axis] = array.strides(axis) / array.itemsize();
  return result;
}

py::array empty(const Shape& shape, const py::object& dtype) {
  return py::array(py::dtype::from_args(dtype), std::vector<py::ssize_t>(shape.dim, shape.dim + shape.rank));
}

ParallelFor own_threads(int& threads) {
  if (threads < 1) throw std::invalid_argument("threads must be >= 1, got " + std::to_string(threads));
  return {run_on_threads, &threads, threads};
}

ParallelFor own_threads_or_pool(int& threads, uintptr_t pool) {
  const ParallelFor own = own_threads(threads);
  return pool ? ParallelFor{run_on_pool, reinterpret_cast<void*>(pool), threads} : own;
}

}  // namespace qexport
