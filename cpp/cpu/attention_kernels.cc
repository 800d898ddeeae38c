// Compiled once per instruction set, with QEXPORT_ISA naming the namespace; dispatch.cc picks one copy at run time.
#include "sampled_block.h"

namespace qexport {
namespace QEXPORT_ISA {

static size_t scratch_bytes(const AttentionJob& job) {
  Arena exact{nullptr, 0}, few{nullptr, 0}, rowwise{nullptr, 0};
  exact_scratch(job, exact);
  few_scratch(job, few);
  row_scratch(job, rowwise);
  const bool only_exact = job.params.strategy == Strategy::exact && !job.tensors.qk_matmul_output;
  return greater(greater(exact.used, few.used), only_exact ? size_t{0} : rowwise.used);
}

#define QEXPORT_STRING_(x) #x
#define QEXPORT_STRING(x) QEXPORT_STRING_(x)

extern const Kernels kernels;
const Kernels kernels = {
    QEXPORT_STRING(QEXPORT_ISA), kMaxRows, kSampledRows, scratch_bytes, exact_block, sampled_block, entropy_block,
    qk_matmul_output_block,      pack,     value_stats};

}  // namespace QEXPORT_ISA
}  // namespace qexport
