// Tensors in the memory of a device, described by the framework that they belong to.
#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "qexport/cuda_plugin.h"

namespace qexport {
namespace {

constexpr int kMostAxes = 4;

using Dims = std::vector<int64_t>;

struct Description {
  uintptr_t address;
  std::string type;
  Dims shape, strides;
};

Description describe(const py::object& device, const py::object& tensor) {
  auto [address, type, shape, strides] =
      device.attr("describe")(tensor).cast<std::tuple<uintptr_t, std::string, Dims, Dims>>();
  return {address, std::move(type), std::move(shape), std::move(strides)};
}

DType type_of(const std::string& name, const std::string& where) {
  static const std::pair<const char*, DType> known[] = {{"float32", DType::f32},   {"float16", DType::f16},
                                                        {"bfloat16", DType::bf16}, {"float64", DType::f64},
                                                        {"bool", DType::boolean},  {"int64", DType::i64}};
  for (const auto& [type_name, type] : known) {
    if (name == type_name) return type;
  }
  throw std::invalid_argument(where + "must be float32, float16, bfloat16, float64, bool or int64, got " + name);
}

bool is_contiguous(const Description& d) {
  int64_t step = 1;
  for (size_t axis = d.shape.size(); axis-- > 0;) {
    if (d.shape[axis] != 1 && d.strides[axis] != step) return false;
    step *= d.shape[axis];
  }
  return true;
}

bool is_rows(const Description& d) {
  const auto negative = [](int64_t stride) { return stride < 0; };
  return d.shape.size() > 2 && d.strides.back() == 1 && std::none_of(d.strides.begin(), d.strides.end(), negative);
}

ArrayView device_view(const py::object& device, py::object& object, const std::string& where, bool keep_rows) {
  Description d = describe(device, object);
  if (d.shape.size() > kMostAxes) {
    throw std::invalid_argument(where + "must have at most " + std::to_string(kMostAxes) + " dimensions, got " +
                                std::to_string(d.shape.size()));
  }
  if (!is_contiguous(d) && !(keep_rows && is_rows(d))) {
    object = device.attr("contiguous")(object);
    d = describe(device, object);
  }
  ArrayView result{};
  result.data = reinterpret_cast<const void*>(d.address), result.present = true, result.type = type_of(d.type, where);
  result.shape.rank = static_cast<int>(d.shape.size());
  std::copy(d.shape.begin(), d.shape.end(), result.shape.dim);
  std::copy(d.strides.begin(), d.strides.end(), result.stride);
  return result;
}

std::string argument(const char* op_name, const char* name) {
  return "[" + std::string(op_name) + "] " + std::string(name) + " ";
}

const CudaKernels* load_cuda(const std::string& path) {
  const CudaPlugin plugin = load_cuda_plugin(path);
  if (!plugin.kernels) throw std::runtime_error(plugin.reason);
  return plugin.kernels;
}

}  // namespace

Memory::Memory(py::object device) : device_(std::move(device)), cuda_(nullptr), stream_(nullptr) {
  if (device_.is_none()) return;
  cuda_ = device_.attr("kernels").cast<const CudaKernels*>();
  stream_ = reinterpret_cast<void*>(device_.attr("stream").cast<uintptr_t>());
}

ArrayView Memory::view(py::object& object, const char* op_name, const char* name, bool keep_rows) const {
  if (!cuda_) return qexport::view(object, op_name, name, keep_rows);
  if (object.is_none()) return {};
  return device_view(device_, object, argument(op_name, name), keep_rows);
}

NewTensor Memory::empty(const Shape& shape, const py::object& dtype) const {
  if (!cuda_) {
    py::array array = qexport::empty(shape, dtype);
    return {array, array.mutable_data()};
  }
  const py::object tensor = device_.attr("empty")(py::tuple(py::cast(Dims(shape.dim, shape.dim + shape.rank))), dtype);
  return {tensor, reinterpret_cast<void*>(describe(device_, tensor).address)};
}

const int64_t* Memory::seed(py::object& object, const char* op_name) const {
  const ArrayView tensor = view(object, op_name, "seed");
  if (!tensor.present) return nullptr;
  if (tensor.type == DType::i64 && tensor.shape.rank == 0) return static_cast<const int64_t*>(tensor.data);
  throw std::invalid_argument(argument(op_name, "seed") + "must be an int64 scalar, got shape " + to_string(tensor.shape));
}

int64_t seed_value(const py::object& seed, const char* op_name) {
  try {
    if (PyIndex_Check(seed.ptr())) return seed.cast<int64_t>();
  } catch (const py::cast_error&) {  // more bits, or an array of more numbers
  }
  throw py::type_error(argument(op_name, "seed") + "must be an integer of 64 bits, got " + std::string(py::repr(seed)));
}

void define_cuda(py::module_& m) {
  using namespace pybind11::literals;
  py::class_<CudaKernels>(m, "CudaKernels", "The kernels of a CUDA plugin.");
  m.def("load_cuda", load_cuda, "path"_a, py::return_value_policy::reference,
        "The kernels of the plugin libqexport_ops_cuda.so at `path`, for the attribute `kernels` of a `device`. Raises "
        "RuntimeError where it cannot be loaded.");
}

}  // namespace qexport
