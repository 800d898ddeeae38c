// Where the scores of a call, and what is computed before them, lie in shared memory and in scratch.
#pragma once

#include <algorithm>

#include "row_gather.cuh"
#include "row_scores.cuh"

namespace qexport {
namespace cuda {

// Shared memory: a RowTile, then what the two phases of a tile need one after the other, then the rows of scores if they
// fit.
__host__ __device__ inline size_t whole_lines(size_t bytes) { return (bytes + 127) / 128 * 128; }

// Bytes that the phases need: tiles of scores, or fragments of the queries; then what every warp gathers.
__host__ __device__ inline size_t phase_bytes(const AttentionJob& job, bool matrix_units) {
  const QuantumAttentionParams& p = job.params;
  const size_t scores = matrix_units ? static_cast<size_t>(p.head_size) * kTileRows * 2 : sizeof(ScoreTiles);
  const size_t row = (2 * kWaiting + static_cast<size_t>(p.v_head_size)) * sizeof(float);
  const size_t gather = samples_rows(job) ? kTileRows * row : 0;
  return whole_lines(scores > gather ? scores : gather);
}

// Whether a call needs whole rows of scores: to sample from them, or to make probabilities of them.
inline bool keeps_rows(const AttentionJob& job) { return samples_rows(job) || job.params.qk_matmul_output_mode == 3; }

// Floats of the scores of a row. Eight rows of one key, which are written together, lie in different banks.
__host__ __device__ inline int64_t scores_pitch(const AttentionJob& job) {
  return ceil_div<int64_t>(job.total_len, kWarp) * kWarp + 8;
}
// Behind them are the prefix sums of `naive`.
inline int64_t row_pitch(const AttentionJob& job) {
  const int64_t prefix = job.params.strategy == Strategy::naive ? ceil_div<int64_t>(job.total_len, kStep) * 4 : 0;
  return scores_pitch(job) + ceil_div<int64_t>(prefix, kWarp) * kWarp;
}

// Where everything lies in scratch, and how the kernel is launched.
struct RowPlan {
  size_t norm, mean, partial, order, count, centre, tree, entropy, allowed, budget, sums, rows, total;
  bool wide_keys, matrix_units, sweeps, shared_rows, fits;
  int64_t tile_rows, tiles, blocks;
  size_t shared_bytes;
};

// With fewer rows in a tile than this, keys are read so often that their scores are better in global memory.
constexpr int64_t kFewestRows = 6;

inline bool rows_on_16_bytes(const AttentionJob& job, const HeadRows& rows) {
  return starts_on_16_bytes(rows, job.params.type == DType::f32 ? 4 : 2);
}
inline bool joined_on_16_bytes(const AttentionJob& job, const HeadRows& fresh, const HeadRows& past) {
  return rows_on_16_bytes(job, fresh) && (job.params.past_len == 0 || rows_on_16_bytes(job, past));
}

// Whether row_sweep.cu takes the rows: enough of one kv head to fill half a tile, in heads that it knows, with bytes between
// keys that 32 bits count.
inline bool sweeps_rows(const AttentionJob& job, const Device& device) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  const auto known = [](int64_t size) { return size <= kSweepSize && size % kSweepStep == 0; };
  const bool near = std::max(t.k.row_stride, job.params.past_len > 0 ? t.past_key.row_stride : 0) <= INT32_MAX / 2;
  const bool strategy = p.strategy == Strategy::stratified || p.strategy == Strategy::adaptive;
  return strategy && near && !t.qk_matmul_output && p.type != DType::f32 && device.capability >= 80 && known(p.head_size) &&
         known(p.v_head_size) && rows_on_16_bytes(job, t.q) && joined_on_16_bytes(job, t.k, t.past_key) &&
         joined_on_16_bytes(job, t.v, t.past_value) && job.group * p.q_len >= kSweepRows / 2 &&
         sweep_shared_bytes(p) <= static_cast<size_t>(device.shared_bytes);
}

inline RowPlan plan_rows(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  Status status;
  const Device device = current_device(status);
  RowPlan plan{};
  const QuantumAttentionTensors& t = job.tensors;
  plan.wide_keys = rows_on_16_bytes(job, t.q) && joined_on_16_bytes(job, t.k, t.past_key);
  const size_t limit = static_cast<size_t>(device.shared_bytes);
  const auto fixed_bytes = [&](bool matrix_units) { return whole_lines(sizeof(RowTile)) + phase_bytes(job, matrix_units); };
  plan.matrix_units = device.capability >= 80 && p.type != DType::f32 && plan.wide_keys && p.head_size % 32 == 0 &&
                      fixed_bytes(true) <= limit;
  const size_t fixed = fixed_bytes(plan.matrix_units);
  const int64_t row = keeps_rows(job) ? row_pitch(job) * static_cast<int64_t>(sizeof(float)) : 0;
  const int64_t fit = row == 0 ? kTileRows : fixed < limit ? static_cast<int64_t>(limit - fixed) / row : 0;
  plan.sweeps = sweeps_rows(job, device);
  plan.fits = plan.sweeps || fixed <= limit;
  plan.shared_rows = plan.sweeps || fit >= kFewestRows;
  plan.tile_rows = plan.sweeps ? kSweepRows : plan.shared_rows ? std::min<int64_t>(fit, kTileRows) : kTileRows;
  plan.shared_bytes = fixed + (plan.shared_rows ? static_cast<size_t>(plan.tile_rows * row) : 0);
  plan.tiles = p.batch * p.kv_heads * ceil_div<int64_t>(job.group * p.q_len, plan.tile_rows);
  // Of scores in global memory there are no more than one block per multiprocessor has.
  plan.blocks = plan.shared_rows ? plan.tiles : std::min<int64_t>(plan.tiles, device.multiprocessors);
  const auto take = [&](bool needed, size_t bytes) {
    const size_t at = plan.total;
    plan.total += needed ? (bytes + 255) / 256 * 256 : 0;
    return at;
  };
  const size_t kv = static_cast<size_t>(p.batch * p.kv_heads), all_rows = static_cast<size_t>(p.batch * p.q_heads * p.q_len);
  const size_t norms = kv * static_cast<size_t>(norm_pitch(job)), size = static_cast<size_t>(p.v_head_size);
  const bool centred = samples_rows(job) && p.control_variate, clustered = centred && clusters_values(p);
  const bool adaptive = p.strategy == Strategy::adaptive;
  plan.norm = take(centred, norms * sizeof(float));
  plan.mean = take(centred && !clustered, kv * size * sizeof(float));
  plan.partial = take(centred && !clustered, static_cast<size_t>(value_partial_floats(job)) * sizeof(float));
  plan.order = take(clustered, kv * static_cast<size_t>(value_clusters(job) * kValueCluster) * sizeof(int32_t));
  plan.centre = take(clustered, kv * static_cast<size_t>(value_clusters(job)) * size * sizeof(float));
  plan.count = take(clustered, kv * sizeof(int32_t));
  plan.tree = take(clustered, clustered ? value_tree_scratch_bytes(job) : 0);
  plan.entropy = take(adaptive, all_rows * sizeof(float));
  plan.allowed = take(adaptive || plan.sweeps, all_rows * sizeof(int32_t));
  plan.budget = take(adaptive, all_rows * sizeof(double));
  plan.sums = take(plan.sweeps, all_rows * sizeof(float4));
  plan.rows = take(!plan.shared_rows, static_cast<size_t>(plan.blocks * plan.tile_rows * row));
  return plan;
}

}  // namespace cuda
}  // namespace qexport
