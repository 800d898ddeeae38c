// Attention that knows all scores of a row (docs/math.md, "Strategies"): what its kernels share.
//
// A block takes kTileRows query rows of one kv head at a time: all threads compute their scores, then every warp works on a
// row by itself, from the scores to the output. Draws therefore do not depend on the grid.
#pragma once

#include "attention.cuh"
#include "qexport/philox.h"

namespace qexport {
namespace cuda {

constexpr int kTileRows = 16;  // at most: less where the scores of fewer rows fit into shared memory
constexpr int kTileRowThreads = kTileRows * kWarp;

enum class RowPass : int32_t {
  output,  // the strategy's output, and qk_matmul_output if it is wanted
  sums,    // of every row: its entropy, how many keys it attends to, and RowWork::sums
  scores,  // qk_matmul_output alone
};

// Passed to the kernels by value.
struct RowWork {
  AttentionJob job;
  HeadSamples samples;
  RowPass pass;
  const float* value_norm;     // (batch, kv_heads, norm_pitch): |v_j - mean|, the mean that of its cluster if any; or null
  const float* value_mean;     // (batch, kv_heads, v_head_size), or null
  const int32_t* value_order;  // of ValueClusters, or null
  const float* value_centre;   // of ValueClusters, or null
  float* entropy;              // (batch, q_heads, q_len), adaptive only
  int32_t* allowed;            // (batch, q_heads, q_len): keys that a row attends to, from the pass for sums
  float4* sums;                // (batch, q_heads, q_len): what else row_sweep.cu keeps from that pass
  const double* budget;        // (batch, q_heads, q_len): samples of each row, adaptive only
  float* rows;                 // (blocks, tile_rows, row_pitch): scores, or null: they are in shared memory
  int64_t tiles;
  int32_t tile_rows, row_pitch;
  bool wide_keys, wide_values;  // the rows of Q and K, and those of V, may be read in wide loads
  bool matrix_units;            // may be used for the scores
};

// Clusters of values, where `hybrid` reads their means for the keys that it does not read.
constexpr int64_t kValueCluster = 16;
__host__ __device__ inline bool clusters_values(const QuantumAttentionParams& p) {
  return p.strategy == Strategy::hybrid && p.control_variate;
}
__host__ __device__ inline int64_t value_clusters(const AttentionJob& job) { return ceil_div(job.total_len, kValueCluster); }

// Whether a strategy looks at all scores of a row.
__host__ __device__ inline bool samples_rows(const AttentionJob& job) {
  return job.params.strategy != Strategy::exact && job.params.strategy != Strategy::tree;
}

// Keys that are in use of batch item b.
__device__ __forceinline__ int64_t valid_keys(const AttentionJob& job, int64_t b) {
  const int64_t* nonpad = job.tensors.nonpad_kv_seqlen;
  return nonpad ? min(max(nonpad[b], int64_t{0}), job.total_len) : job.total_len;
}

// Floats from the norms of one kv head to those of the next: rows are read four keys at a time.
__host__ __device__ inline int64_t norm_pitch(const AttentionJob& job) { return ceil_div<int64_t>(job.total_len, 4) * 4; }

// One query row of a tile: where it is, and the keys [lo, hi) that it may attend to.
struct TileRow {
  int32_t head, query, lo, hi;
};

// Up to kTileRows query rows of one kv head, in shared memory.
struct RowTile {
  int32_t batch, kv_head, count;
  int32_t begin, end;  // the keys whose scores are computed, multiples of 4: `end` may lie behind the last key
  TileRow rows[kTileRows];
};

// Rows of K or V of one kv head, those before `split` in the past.
template <class T>
struct JoinedRows {
  const T *past, *fresh;  // row 0, and row `split`
  int64_t past_stride, fresh_stride;
  int32_t split;

  __device__ __forceinline__ const T* row(int32_t j) const {
    return j < split ? past + j * past_stride : fresh + (j - split) * fresh_stride;
  }
};

template <class T>
__device__ __forceinline__ JoinedRows<T> joined_rows(const AttentionJob& job, bool values, int64_t b, int64_t kv_head) {
  const QuantumAttentionTensors& t = job.tensors;
  const HeadRows &past = values ? t.past_value : t.past_key, &fresh = values ? t.v : t.k;
  const int32_t split = static_cast<int32_t>(job.params.past_len);
  return {split > 0 ? row_of<T>(past, b, kv_head, 0) : nullptr, row_of<T>(fresh, b, kv_head, 0), past.row_stride,
          fresh.row_stride, split};
}

// value_stats.cu: value_mean and value_norm, by way of the sums in `partial` of value_partial_floats(job).
void value_stats(Status& status, const AttentionJob& job, float* partial, float* mean, float* norm, void* stream);
int64_t value_partial_floats(const AttentionJob& job);

// value_clusters.cu: the same from the mean of the cluster of each key, where clusters_values(params).
struct ValueClusters {
  int32_t* order;  // (batch, kv_heads, value_clusters, kValueCluster): the keys of each cluster, -1 behind the last one
  int32_t* count;  // (batch, kv_heads)
  float* centre;   // (batch, kv_heads, value_clusters, v_head_size)
  float* norm;     // (batch, kv_heads, norm_pitch)
  void* tree;      // of value_tree_scratch_bytes
};
void cluster_values(Status& status, const AttentionJob& job, const ValueClusters& clusters, void* stream);
size_t value_tree_scratch_bytes(const AttentionJob& job);

// row_sweep.cu: a pass of `stratified` or `adaptive` in half types, whose tiles have kSweepRows rows, heads up to
// kSweepSize, a multiple of kSweepStep.
constexpr int kSweepRows = 64, kSweepSize = 128, kSweepStep = 8;
void sweep_rows(Status& status, const RowWork& work, void* stream);
size_t sweep_shared_bytes(const QuantumAttentionParams& p);

// row_budget.cu: the samples of every row of `adaptive`, from entropies and numbers of allowed keys.
void share_budget(Status& status, const RowWork& work, double* budget, void* stream);

}  // namespace cuda
}  // namespace qexport
