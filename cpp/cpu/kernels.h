// The part of the CPU kernels that is compiled once per instruction set, as a table of functions.
#pragma once

#include "density.h"
#include "mps.h"
#include "mps_product.h"
#include "qexport/quantum_attention.h"
#include "tree.h"
#include "trellis.h"

namespace qexport {

// One call, with what the earlier phases have computed.
struct AttentionJob {
  QuantumAttentionParams params;
  QuantumAttentionTensors tensors;
  int64_t total_len;    // past_len + kv_len
  int64_t group;        // query heads per kv head
  float* packed_key;    // (batch, kv_heads, total_len, packed_row(head_size)) float32, or null: K is read where it lies
  float* packed_value;  // (batch, kv_heads, total_len, packed_row(v_head_size)), or null
  KvBlocks blocks;      // K and V in blocks of 16 keys; keys null where they are not packed so
  TreeState tree;       // strategy tree only
  float* value_mean;    // (batch, kv_heads, v_head_size), or null
  float* value_norm;    // (batch, kv_heads, total_len): |v_j - mean|, the mean that of its cluster if there are any, or null
  // Where clusters_values(params), else null: the cluster of each key (batch, kv_heads, total_len), and the mean of each
  // cluster (batch, kv_heads, value_clusters, packed_row(v_head_size)).
  int32_t* value_cluster;
  float* value_centre;
  float* entropy;        // (batch, q_heads, q_len), adaptive only
  int32_t* allowed;      // (batch, q_heads, q_len): allowed keys, adaptive only
  double* budget;        // (batch, q_heads, q_len): samples of each row, adaptive only
  float* probabilities;  // (blocks of sampled_rows, total_len, sampled_rows): p_j, kept from one phase to the next; or null
  int64_t parts;         // parts that the keys of each kv head are cut into, each worked on by itself; 1 is whole
  char* part_state;      // (batch, kv_heads, parts) softmax states of part_bytes each, or null
  int32_t* parts_left;   // (batch, kv_heads): parts that are not done yet, or null
  bool tree_decode;      // few rows, strategy tree, from key_summary
};

// Keys of a part: long enough that joining the parts costs nothing, short enough that one head can keep many cores busy.
constexpr int64_t kPartKeys = 2048;

// Floats from one row of packed_key or packed_value to the next: whole vectors of every instruction set.
inline int64_t packed_row(int64_t size) { return (size + 15) / 16 * 16; }

// Whether keys that are not read enter by the mean value of their cluster.
inline bool clusters_values(const QuantumAttentionParams& p) { return p.strategy == Strategy::hybrid && p.control_variate; }
// Whether the probabilities are an output.
inline bool returns_probabilities(const AttentionJob& job) {
  return job.tensors.qk_matmul_output && job.params.qk_matmul_output_mode == 3;
}
inline int64_t value_clusters(const AttentionJob& job) { return (job.total_len + kBlockKeys - 1) / kBlockKeys; }

// `count` query rows of one kv head, from row `first`, and the keys [key_begin, key_end) that they look at. Row r is query
// r % q_len of query head kv_head * group + r / q_len. `number` counts the blocks of a call, where it is cut into such.
struct RowBlock {
  int64_t batch, kv_head, first, count;
  int64_t key_begin, key_end;
  int64_t number = 0;
};

// Attention that reads K and V where they lie, or as float32.
struct RowKernels {
  int64_t exact_rows;                                // rows of a block of `exact` and of Kernels::blocked
  int64_t few_rows;                                  // rows of a block of `exact_part`
  int64_t sampled_rows;                              // rows of a block of the other kernels
  size_t (*scratch_bytes)(const AttentionJob& job);  // of one thread
  size_t (*part_bytes)(const AttentionJob& job);     // of one element of part_state
  void (*exact)(const AttentionJob& job, RowBlock block, char* scratch);
  // All rows of a kv head against one part of its keys. The last part to be done joins all of them.
  void (*exact_part)(const AttentionJob& job, RowBlock block, char* scratch);
  // All rows of a kv head by its key_summary, which is brought up to date first where present_key_summary is asked for. With
  // a tolerance: sets its parts_left to 0 if it is kept, and leaves the head to exact_part if not.
  void (*tree_decode)(const AttentionJob& job, RowBlock block, char* scratch);
  size_t (*summary_bytes)(const AttentionJob& job);  // scratch of update_summary
  void (*update_summary)(const AttentionJob& job, int64_t batch, int64_t kv_head, char* scratch);
  void (*sampled)(const AttentionJob& job, RowBlock block, char* scratch);  // and the probabilities, if they are an output
  void (*entropy)(const AttentionJob& job, RowBlock block, char* scratch);
  void (*qk_matmul_output)(const AttentionJob& job, RowBlock block, char* scratch);
  void (*exact_with_probabilities)(const AttentionJob& job, RowBlock block, char* scratch);
  void (*pack)(const AttentionJob& job, int64_t batch, int64_t kv_head);  // fills packed_key and packed_value
  void (*value_stats)(const AttentionJob& job, int64_t batch, int64_t kv_head, char* scratch);
  void (*cluster_values)(const AttentionJob& job, int64_t batch, int64_t kv_head, char* scratch);
};

struct Kernels {
  const char* name;
  Precision lowest;                                  // of the precisions that blocks may have: it and those before it
  bool tiles;                                        // blocks in bf16 are laid out for tiles
  size_t (*scratch_bytes)(const AttentionJob& job);  // of one thread, for the kernels from here
  void (*blocked)(const AttentionJob& job, RowBlock block, char* scratch);    // exact, from job.blocks
  void (*key_mean)(const AttentionJob& job, int64_t batch, int64_t kv_head);  // fills blocks.key_mean
  // Fills blocks [first, end) of one head.
  void (*pack_blocks)(const AttentionJob& job, int64_t batch, int64_t kv_head, int64_t first, int64_t end);
  bool (*mask_drops_keys)(const AttentionJob& job);  // a float mask lets keys pass unchanged, or shuts them out
  // Fills the order and the summaries of one head.
  void (*build_tree)(const AttentionJob& job, int64_t batch, int64_t kv_head, char* scratch);
  // Rows of one query head from `block.first` on; `tile` is their number among the tiles of the head.
  void (*tree)(const AttentionJob& job, RowBlock block, int64_t tile, char* scratch);
  // tree.probe_score and tree.probe_norm of probe number `probe`.
  void (*tree_probe)(const AttentionJob& job, RowBlock block, int64_t probe, int64_t tile, char* scratch);
  // Adds the squared errors of a tile at the budget doubled 0 .. doublings - 1 times to error[], and the squared norm of its
  // exact output to *norm. Returns whether the largest budget keeps to limit * *norm; the other errors only count if so.
  bool (*tree_trial)(const AttentionJob& job, RowBlock block, int64_t tile, int64_t doublings, double limit, double* error,
                     double* norm, char* scratch);
  // Adds squared error and squared norm of the rows `queries` of the head of `block` to sums[0] and sums[1].
  void (*tree_audit)(const AttentionJob& job, RowBlock block, const int64_t* queries, double* sums, char* scratch);
  const RowKernels* rows;
  const DensityKernels<float>* density_f32;
  const DensityKernels<double>* density_f64;
  const MpsKernels* mps;
  const MpsProductKernels* mps_product;
  const TrellisKernels* trellis;
};

// Defined by the copies of block_kernels.cc that this build holds.
namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {  // avx512 with products of bfloat16 (BF16) and of 8-bit integers (VNNI)
extern const Kernels kernels;
}
namespace amx {  // avx512bf16 with tiles
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

const Kernels& kernels();

}  // namespace qexport
