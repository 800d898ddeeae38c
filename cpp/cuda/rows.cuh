// Attention that knows all scores of a row (docs/math.md, "Strategies"): what its kernels share.
//
// A block takes kTileRows query rows of one kv head at a time: all threads compute their scores, then every warp works on a
// row by itself, from the scores to the output. Draws therefore do not depend on the grid.
#pragma once

#include "attention.cuh"
#include "qexport/philox.h"

namespace qexport {
namespace cuda {

constexpr int kTileRows = 16;
constexpr int kRowThreads = kTileRows * kWarp;
constexpr int kTileKeys = 512;             // keys whose scores are computed at a time, 4 per thread and row
constexpr int kTileDims = 16;              // elements of their rows that are in shared memory at a time
constexpr int kTilePitch = kTileDims + 4;  // floats: eight rows, 16 bytes of each, lie in 32 different banks
constexpr int kWaiting = 2 * kWarp;        // keys of a row that wait for their values to be added up

enum class RowPass : int32_t {
  output,   // the strategy's output, and qk_matmul_output if it is wanted
  entropy,  // of every row, and how many keys it attends to
  scores,   // qk_matmul_output alone
};

// Passed to the kernels by value.
struct RowWork {
  AttentionJob job;
  HeadSamples samples;
  RowPass pass;
  const float* value_norm;     // (batch, kv_heads, total_len): |v_j - mean|, the mean that of its cluster if any; or null
  const float* value_mean;     // (batch, kv_heads, v_head_size), or null
  const int32_t* value_order;  // (batch, kv_heads, total_len): the keys cluster by cluster, or null
  const float* value_centre;   // (batch, kv_heads, value_clusters, v_head_size): means of the clusters, or null
  float* entropy;              // (batch, q_heads, q_len), adaptive only
  int32_t* allowed;            // (batch, q_heads, q_len): keys that a row attends to, adaptive only
  const double* budget;        // (batch, q_heads, q_len): samples of each row, adaptive only
  float* rows;                 // (blocks, kTileRows, row_pitch): scores, or null: they are in shared memory
  int32_t row_pitch;
};

// Clusters of values, where `hybrid` reads their means for the keys that it does not read.
constexpr int64_t kValueCluster = 16;
__host__ __device__ inline bool clusters_values(const QuantumAttentionParams& p) {
  return p.strategy == Strategy::hybrid && p.control_variate;
}
__host__ __device__ inline int64_t value_clusters(const AttentionJob& job) { return ceil_div(job.total_len, kValueCluster); }

// Whether a strategy looks at all scores of a row.
inline bool samples_rows(const AttentionJob& job) {
  return job.params.strategy != Strategy::exact && job.params.strategy != Strategy::tree;
}

// Keys that are in use of batch item b.
__device__ __forceinline__ int64_t valid_keys(const AttentionJob& job, int64_t b) {
  const int64_t* nonpad = job.tensors.nonpad_kv_seqlen;
  return nonpad ? min(max(nonpad[b], int64_t{0}), job.total_len) : job.total_len;
}

// Up to kTileRows query rows of one kv head. Row r is query `query(r)` of query head `head(r)`.
struct RowTile {
  int64_t batch, kv_head, first;
  int count;
  int64_t begin, end;  // the keys whose scores are computed

  __device__ int64_t head(const AttentionJob& job, int r) const {
    return kv_head * job.group + (first + r) / job.params.q_len;
  }
  __device__ int64_t query(const AttentionJob& job, int r) const { return (first + r) % job.params.q_len; }
};

// value_stats.cu: value_mean and value_norm, by way of the sums in `partial` of value_partial_floats(job).
void value_stats(Status& status, const AttentionJob& job, float* partial, float* mean, float* norm, void* stream);
int64_t value_partial_floats(const AttentionJob& job);

// row_budget.cu: the samples of every row of `adaptive`, from entropies and numbers of allowed keys.
void share_budget(Status& status, const RowWork& work, double* budget, void* stream);

}  // namespace cuda
}  // namespace qexport
