// Compiled once per instruction set, with QEXPORT_ISA naming the namespace: attention that reads K and V where they lie, or
// as float32. dispatch.cc picks one copy at run time.
#include "sampled_block.h"
#include "tree_decode.h"

namespace qexport {
namespace QEXPORT_ISA {

static size_t scratch_bytes(const AttentionJob& job) {
  Arena exact{nullptr, 0}, few{nullptr, 0}, rowwise{nullptr, 0}, decode{nullptr, 0}, values{nullptr, 0};
  exact_scratch(job, exact);
  few_scratch(job, few);
  row_scratch(job, rowwise);
  if (clusters_values(job.params)) value_scratch(job, values);
  if (job.tree_decode) decode_scratch(job, decode);
  const bool only_exact =
      (job.params.strategy == Strategy::exact || job.params.strategy == Strategy::tree) && !job.tensors.qk_matmul_output;
  const size_t sampled = greater(values.used, only_exact ? size_t{0} : rowwise.used);
  return greater(greater(exact.used, decode.used), greater(few.used, sampled));
}

extern const RowKernels row_kernels;
const RowKernels row_kernels = {kMaxRows,
                                kFewRows,
                                kSampledRows,
                                scratch_bytes,
                                part_bytes,
                                exact_block,
                                exact_part,
                                tree_decode,
                                summary_bytes,
                                update_summary,
                                sampled_block,
                                entropy_block,
                                qk_matmul_output_block,
                                exact_with_probabilities_block,
                                pack,
                                value_stats,
                                cluster_values};

}  // namespace QEXPORT_ISA
}  // namespace qexport
