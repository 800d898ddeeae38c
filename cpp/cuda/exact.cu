// Exact attention: which tile a call takes; its kernels are in exact_kernel.cuh.
#include "exact_choice.cuh"

namespace qexport {
namespace cuda {

size_t exact_attention_scratch_bytes(const AttentionJob& job) {
  Status status;  // an error shows again when the call is made
  const Device device = current_device(status);
  size_t bytes = 0;
  choose(job, device, [&](auto choice) {
    const TileCut cut = cut_of(job, device, choice);
    bytes = static_cast<size_t>(cut.scratch(job.params.v_head_size)) * sizeof(float);
  });
  return bytes;
}

void exact_attention(Status& status, const AttentionJob& job, const int32_t* only, void* scratch, void* stream) {
  const Device device = current_device(status);
  if (!status.ok()) return;
  ExactLaunch exact{};
  exact.job = job, exact.only = only;
  visit_type(job.params.type, [&](auto element) { start_exact<decltype(element)>(status, exact, device, scratch, stream); });
}

}  // namespace cuda
}  // namespace qexport
