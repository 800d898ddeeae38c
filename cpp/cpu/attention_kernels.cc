// Compiled once per instruction set, with QEXPORT_ISA naming the namespace; dispatch.cc picks one copy at run time.
#include "sampled_block.h"
#include "tree_block.h"
#include "tree_decode.h"

// The copy whose other kernels this one uses: its own, unless the build says that they are another's, instruction by
// instruction.
#if !defined(QEXPORT_REST_OF)
#define QEXPORT_REST_OF QEXPORT_ISA
#endif

namespace qexport {

namespace QEXPORT_REST_OF {
extern const DensityKernels<float> density_f32;  // of density_kernels.cc
extern const DensityKernels<double> density_f64;
extern const MpsKernels mps_kernels;                 // of mps_kernels.cc
extern const MpsProductKernels mps_product_kernels;  // of product_kernels.cc
extern const TrellisKernels trellis_kernels;         // of trellis_kernels.cc
}  // namespace QEXPORT_REST_OF

namespace QEXPORT_ISA {

static size_t scratch_bytes(const AttentionJob& job) {
  Arena exact{nullptr, 0}, few{nullptr, 0}, rowwise{nullptr, 0}, blocked{nullptr, 0}, decode{nullptr, 0}, tree{nullptr, 0},
      build{nullptr, 0}, values{nullptr, 0};
  exact_scratch(job, exact);
  few_scratch(job, few);
  row_scratch(job, rowwise);
  if (clusters_values(job.params)) value_scratch(job, values);
  if (job.tree_decode) decode_scratch(job, decode);
  if (job.blocks.count > 0) blocked_scratch(job, blocked);
  if (job.params.strategy == Strategy::tree) {
    tree_scratch(job, tree);
    build_scratch(job, build);
  }
  const bool only_exact =
      (job.params.strategy == Strategy::exact || job.params.strategy == Strategy::tree) && !job.tensors.qk_matmul_output;
  const size_t blocks = greater(greater(blocked.used, decode.used), greater(tree.used, build.used));
  const size_t sampled = greater(values.used, only_exact ? size_t{0} : rowwise.used);
  return greater(greater(exact.used, blocks), greater(few.used, sampled));
}

#define QEXPORT_STRING_(x) #x
#define QEXPORT_STRING(x) QEXPORT_STRING_(x)

#if defined(QEXPORT_LOW_PRECISION)
constexpr bool kLowPrecision = true;
#else
constexpr bool kLowPrecision = false;
#endif

extern const Kernels kernels;
const Kernels kernels = {QEXPORT_STRING(QEXPORT_ISA),
                         kMaxRows,
                         kFewRows,
                         kSampledRows,
                         kLowPrecision,
                         kTiles,
                         scratch_bytes,
                         part_bytes,
                         exact_block,
                         exact_part,
                         tree_decode,
                         summary_bytes,
                         update_summary,
                         blocked_exact_block,
                         sampled_block,
                         entropy_block,
                         qk_matmul_output_block,
                         exact_with_probabilities_block,
                         pack,
                         key_mean,
                         pack_blocks,
                         mask_drops_keys,
                         build_tree,
                         tree_block,
                         tree_probe,
                         tree_trial,
                         tree_audit,
                         value_stats,
                         cluster_values,
                         &QEXPORT_REST_OF::density_f32,
                         &QEXPORT_REST_OF::density_f64,
                         &QEXPORT_REST_OF::mps_kernels,
                         &QEXPORT_REST_OF::mps_product_kernels,
                         &QEXPORT_REST_OF::trellis_kernels};

}  // namespace QEXPORT_ISA
}  // namespace qexport
