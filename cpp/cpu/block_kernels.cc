// Compiled once per instruction set, as row_kernels.cc: attention from blocks of keys, in float32 and in low precision.
#include "tree_block.h"

// The copy whose other kernels this one uses: its own, unless the build says that they are another's, instruction by
// instruction.
#if !defined(QEXPORT_REST_OF)
#define QEXPORT_REST_OF QEXPORT_ISA
#endif

namespace qexport {

namespace QEXPORT_REST_OF {
extern const RowKernels row_kernels;             // of row_kernels.cc
extern const DensityKernels<float> density_f32;  // of density_kernels.cc
extern const DensityKernels<double> density_f64;
extern const MpsKernels mps_kernels;                 // of mps_kernels.cc
extern const MpsProductKernels mps_product_kernels;  // of product_kernels.cc
extern const TrellisKernels trellis_kernels;         // of trellis_kernels.cc
}  // namespace QEXPORT_REST_OF

namespace QEXPORT_ISA {

static size_t block_scratch_bytes(const AttentionJob& job) {
  Arena blocked{nullptr, 0}, tree{nullptr, 0}, build{nullptr, 0};
  if (job.blocks.count > 0) blocked_scratch(job, blocked);
  if (job.params.strategy == Strategy::tree) {
    tree_scratch(job, tree);
    build_scratch(job, build);
  }
  return greater(blocked.used, greater(tree.used, build.used));
}

#define QEXPORT_STRING_(x) #x
#define QEXPORT_STRING(x) QEXPORT_STRING_(x)

#if defined(QEXPORT_TILES)
constexpr Precision kLowest = Precision::bf16;  // int8 has nothing to gain: softmax takes longer than the products
#elif defined(QEXPORT_LOW_PRECISION)
constexpr Precision kLowest = Precision::int8;
#else
constexpr Precision kLowest = Precision::fp32;
#endif

extern const Kernels kernels;
const Kernels kernels = {QEXPORT_STRING(QEXPORT_ISA),
                         kLowest,
                         kTiles,
                         block_scratch_bytes,
                         blocked_exact_block,
                         key_mean,
                         pack_blocks,
                         mask_drops_keys,
                         build_tree,
                         tree_block,
                         tree_probe,
                         tree_trial,
                         tree_audit,
                         &QEXPORT_REST_OF::row_kernels,
                         &QEXPORT_REST_OF::density_f32,
                         &QEXPORT_REST_OF::density_f64,
                         &QEXPORT_REST_OF::mps_kernels,
                         &QEXPORT_REST_OF::mps_product_kernels,
                         &QEXPORT_REST_OF::trellis_kernels};

}  // namespace QEXPORT_ISA
}  // namespace qexport
