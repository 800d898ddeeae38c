// The C API of onnxruntime, with its statuses turned into exceptions and its objects released.
//
// Version 17 of the API is asked for, and on the CPU nothing newer is called, so that one library loads on every onnxruntime
// from 1.20 on (1.17 in fact). The C++ wrapper of the headers is not used: its shape inference drops symbolic dimensions.
#pragma once

#include <onnxruntime_c_api.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "qexport/parallel.h"
#include "qexport/tensor_view.h"

namespace qexport {

constexpr uint32_t kOrtApiVersion = 17;
constexpr uint32_t kOrtCudaApiVersion = 18;  // what ops on CUDA need of the runtime

// Where an op runs.
enum class Device { cpu, cuda };

// Set by RegisterCustomOps, before any op can be created.
extern const OrtApi* ort;

inline void ort_check(OrtStatus* status) {
  if (!status) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// Runs body and turns what it throws into a status: no exception crosses the C ABI.
template <class Body>
OrtStatus* ort_guard(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return ort->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return ort->CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return ort->CreateStatus(ORT_FAIL, "unknown error");
  }
}

// Attributes of a node. Every attribute with a default in the op table must be on it.
class NodeAttributes {
 public:
  NodeAttributes(const OrtKernelInfo* info, std::string op_name) : info_(info), op_name_(std::move(op_name)) {}

  int64_t integer(const char* name) const {
    int64_t value = 0;
    require(name, ort->KernelInfoGetAttribute_int64(info_, name, &value));
    return value;
  }
  float real(const char* name) const {
    float value = 0;
    require(name, ort->KernelInfoGetAttribute_float(info_, name, &value));
    return value;
  }
  std::string text(const char* name) const {
    size_t size = 0;
    require(name, ort->KernelInfoGetAttribute_string(info_, name, nullptr, &size));
    std::string value(size, '\0');
    require(name, ort->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    while (!value.empty() && value.back() == '\0') value.pop_back();
    return value;
  }
  std::vector<int64_t> integers(const char* name) const {
    size_t size = 0;
    require(name, ort->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size));
    std::vector<int64_t> values(size);
    if (size) require(name, ort->KernelInfoGetAttributeArray_int64(info_, name, values.data(), &size));
    return values;
  }
  // False: the attribute is absent, and `value` is as it was.
  bool optional(const char* name, float* value) const {
    return present(ort->KernelInfoGetAttribute_float(info_, name, value));
  }
  bool optional(const char* name, int64_t* value) const {
    return present(ort->KernelInfoGetAttribute_int64(info_, name, value));
  }

 private:
  static bool present(OrtStatus* status) {
    if (status) ort->ReleaseStatus(status);
    return !status;
  }
  void require(const char* name, OrtStatus* status) const {
    if (present(status)) return;
    throw std::invalid_argument("[" + op_name_ + "] attribute " + name +
                                " is missing; make nodes with qexport.ops.proto.make_node");
  }
  const OrtKernelInfo* info_;
  std::string op_name_;
};

// An input as pointer, type and shape, of at most `most` dimensions; absent where the node leaves it out.
TensorView ort_input(const OrtKernelContext* context, size_t index, const char* op_name, const char* input_name,
                     size_t most = 4);

// The int64 scalar of an input `seed`, where the op runs; null where it is absent.
const int64_t* ort_seed(const TensorView& seed, const char* op_name);

// The data of an output of that shape, or null where the node leaves it out.
void* ort_output(OrtKernelContext* context, size_t index, const Shape& shape);

// Memory of the session's allocator where input 0 lies, given back at the end of the scope. On CUDA the kernel that uses it
// has then only been queued: onnxruntime notes the stream of this run with the memory, and gives it to a run that goes on at
// the same time, on another stream, only behind what is queued here.
class OrtScratch {
 public:
  OrtScratch(const OrtKernelContext* context, Device device, size_t bytes);
  ~OrtScratch();
  OrtScratch(const OrtScratch&) = delete;
  OrtScratch& operator=(const OrtScratch&) = delete;
  void* data() const { return data_; }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

// The intra-op thread pool of the session.
ParallelFor ort_parallel(const OrtKernelContext* context);

}  // namespace qexport
