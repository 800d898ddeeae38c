#include "mpo_linear.h"

#include <list>
#include <mutex>

#include "mps_attributes.h"
#include "ort_cuda.h"
#include "ort_op.h"
#include "qexport/quantum_attention.h"
#include "shape_inference.h"

namespace qexport {
namespace {

// What is made of constant cores, at the first run that needs it: once for each way of grouping them, of which numbers of
// tokens have a few.
class KeptWeights {
 public:
  const void* get(const MpoLinearCall& call, const void* cores, const ParallelFor& parallel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Entry& entry : entries_) {
      if (entry.ends == call.plan.ends) return entry.weights.data();
    }
    entries_.push_back({call.plan.ends, MpoLinearWeights(call.params, cores, parallel)});
    return entries_.back().weights.data();
  }

 private:
  struct Entry {
    std::vector<int64_t> ends;
    MpoLinearWeights weights;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;
};

template <Device kDevice>
struct Kernel : OpOn<kDevice> {
  static constexpr const char* kName = "MPOLinear";
  static constexpr size_t kInputCount = 3, kOutputCount = 1, kRequiredInputs = 2, kRequiredOutputs = 1;
  static OrtElementType input_type(OrtElementType type, size_t) { return type; }
  static OrtElementType output_type(OrtElementType type, size_t) { return type; }

  MpsProductAttributes attributes;
  bool constant = false;  // cores, which are then prepared once: kernels of the CPU alone prepare them
  mutable KeptWeights kept;

  explicit Kernel(const OrtKernelInfo* info) : attributes(product_attributes(info, kName)) {
    if (const char* error = isa_error()) throw std::invalid_argument(error);
    if (kDevice != Device::cpu) return;
    int is_constant = 0;
    const OrtValue* value = nullptr;
    ort_check(ort->KernelInfoGetConstantInput_tensor(info, 1, &is_constant, &value));
    constant = is_constant != 0;
  }

  void compute(OrtKernelContext* context) const {
    const TensorView x = ort_input(context, 0, kName, "x"), cores = ort_input(context, 1, kName, "cores"),
                     bias = ort_input(context, 2, kName, "bias");
    const MpoLinearCall call = resolve_linear(attributes, x, cores, bias, constant);
    if constexpr (kDevice == Device::cuda) {
      const MpoLinearTensors tensors{x.data, cores.data, bias.data, ort_output(context, 0, call.y)};
      const CudaKernels& cuda = *cuda_plugin().kernels;
      ort_cuda(context, kName, cuda.mpo_linear, cuda.mpo_linear_scratch_bytes(call.params), call.params, tensors);
    } else {
      const ParallelFor parallel = ort_parallel(context);
      if (constant) return run(context, call, x, kept.get(call, cores.data, parallel), bias, parallel);
      const MpoLinearWeights weights(call.params, cores.data, parallel);
      run(context, call, x, weights.data(), bias, parallel);
    }
  }

  static void run(OrtKernelContext* context, const MpoLinearCall& call, const TensorView& x, const void* weights,
                  const TensorView& bias, const ParallelFor& parallel) {
    const OrtScratch scratch(context, Device::cpu, mpo_linear_cpu_scratch_bytes(call.params, parallel));
    mpo_linear_cpu(call.params, {x.data, weights, bias.data, ort_output(context, 0, call.y)}, scratch.data(), parallel);
  }
};

}  // namespace

const OrtCustomOp* mpo_linear_op(DType type, Device device, bool shape_inference) {
  return op_for<Kernel, infer_mpo_linear_shapes>(type, device, shape_inference);
}

}  // namespace qexport
