// RegisterQexportOps: adds the domain com.qexport to a session.
#include <cstdio>

#include "mpo_linear.h"
#include "mps_attention.h"
#include "mps_decode.h"
#include "mps_encode.h"
#include "qexport/cuda_plugin.h"
#include "qexport_ops.h"
#include "quantum_attention.h"
#include "quantum_measure.h"
#include "quantum_noise.h"
#include "quantum_overlap.h"

namespace qexport {
namespace {

// With a shape function, onnxruntime up to 1.26 dies on a node that leaves an optional input in the middle empty; tried with
// 1.24.4, 1.25.1 and 1.26.0, which die, and 1.28.0, 1.30.0, 1.31.1 and 1.32.0, which do not. Without one the shapes of the
// outputs are unknown until they are computed.
bool can_infer_shapes(const char* version) {
  int major = 0, minor = 0;
  return std::sscanf(version, "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 28);
}

// One domain for the life of the process; every session refers to it. Ops with CUDA kernels are in it once for each device,
// and onnxruntime takes the one of the provider that it gives a node to; a runtime without that provider passes over them.
OrtCustomOpDomain* make_domain(const OrtApiBase* base) {
  ort = base->GetApi(kOrtApiVersion);
  const bool infer = can_infer_shapes(base->GetVersionString());
  OrtCustomOpDomain* domain = nullptr;
  ort_check(ort->CreateCustomOpDomain("com.qexport", &domain));
  const auto add = [&](const OrtCustomOp* op) { ort_check(ort->CustomOpDomain_Add(domain, op)); };
  std::vector<Device> devices{Device::cpu};
  if (cuda_plugin().kernels && base->GetApi(kOrtCudaApiVersion)) devices.push_back(Device::cuda);
  for (const Device device : devices) {
    for (const DType type : {DType::f32, DType::f16, DType::bf16}) add(quantum_attention_op(type, device, infer));
    for (const DType type : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
      add(quantum_noise_op(type, device, infer));
      add(quantum_measure_op(type, device, infer));
      add(mps_attention_op(type, device, infer));
      add(mpo_linear_op(type, device, infer));
    }
    for (const DType type : {DType::f32, DType::f64}) add(mps_decode_op(type, device, infer));
  }
  for (const DType type : {DType::f32, DType::f16, DType::bf16, DType::f64}) add(quantum_overlap_op(type, infer));
  for (const DType type : {DType::f32, DType::f64}) add(mps_encode_op(type, infer));
  return domain;
}

}  // namespace
}  // namespace qexport

OrtStatus* ORT_API_CALL RegisterQexportOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace qexport;
  if (!base->GetApi(kOrtApiVersion)) {
    const std::string message =
        std::string("libqexport_ops needs onnxruntime 1.17 or newer, this is ") + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
  }
  return ort_guard([&] {
    static OrtCustomOpDomain* const domain = make_domain(base);
    ort_check(ort->AddCustomOpDomain(options, domain));
  });
}
