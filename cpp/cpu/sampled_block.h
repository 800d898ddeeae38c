// Sampled attention of a block of rows: scores, probabilities, selection, and the weighted sum of the chosen values.
#pragma once

#include "selection.h"

namespace qexport {
namespace QEXPORT_ISA {

static QEXPORT_INLINE int64_t samples_of_head(const QuantumAttentionParams& p, int64_t head) {
  return p.num_samples[p.num_samples_count == 1 ? 0 : head];
}

// Every row of the block has at most as many keys in reach as it may sample.
static bool is_exact(const AttentionJob& job, const Rows& rows) {
  if (job.params.strategy == Strategy::naive || job.params.strategy == Strategy::adaptive) return false;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (rows.hi[r] - rows.lo[r] > samples_of_head(job.params, rows.head[r])) return false;
  }
  return true;
}

// Prefix sums of f_j = floor(2^30 x_j / sum x) + 1 where x_j > 0, in place of x. Returns the lanes with any x_j > 0.
static vi prefix_sums(float* x, int64_t ld, int64_t n) {
  vf sum{};
  for (int64_t j = 0; j < n; ++j) sum += load<vf>(x + j * ld);
  vi total{};
  for (int64_t j = 0; j < n; ++j) {
    const vf xj = load<vf>(x + j * ld);
    total += xj > 0.0f ? to_int(xj * 1073741824.0f / sum) + 1 : vi{};
    store(x + j * ld, total);
  }
  return sum > 0.0f;
}

// One column of lanes, rows v * kLanes .. : p[n][ld] holds the scores on entry.
static void sample_column(const AttentionJob& job, const RowBlock& block, const Rows& rows, const RowScratch& scratch,
                          int v) {
  const QuantumAttentionParams& params = job.params;
  const int64_t ld = rows.vecs * kLanes, n = rows.end - rows.begin, size = params.v_head_size;
  const int64_t ld_o = packed_row(size);
  const int64_t kv = block.batch * params.kv_heads + block.kv_head;
  const int64_t live = lesser<int64_t>(kLanes, rows.count - v * kLanes);
  float* p = scratch.p + v * kLanes;
  float* x = scratch.x + v * kLanes;
  float* o = scratch.o + v * kLanes * ld_o;
  const ColumnSums sums = exponentiate(p, ld, n);
  const vf z = sums.sum == 0.0f ? splat(1.0f) : sums.sum;
  const float* norm = params.control_variate ? job.value_norm + kv * job.total_len + rows.begin : nullptr;
  for (int64_t j = 0; j < n; ++j) {
    const vf pj = load<vf>(p + j * ld) / z;
    store(p + j * ld, pj);
    // A key that is not attended to must not lend its norm, which may be NaN.
    store(x + j * ld, norm ? (pj > 0.0f ? pj * norm[j] : vf{}) : pj);
  }

  const uint64_t seed = static_cast<uint64_t>(params.seed);
  const auto counter = [&](int lane) {
    const int64_t r = v * kLanes + lane;
    return PhiloxBlock{{params.layer, static_cast<uint32_t>(block.batch * params.q_heads + rows.head[r]),
                        static_cast<uint32_t>(rows.query[r]), 0u}};
  };
  for (int64_t i = 0; i < live * ld_o; ++i) o[i] = 0.0f;

  vf weight_sum{};
  vi take_all{};
  if (params.strategy == Strategy::naive) {
    const vi some = prefix_sums(x, ld, n);
    for (int lane = 0; lane < live; ++lane) {
      if (!some[lane]) continue;
      weight_sum[lane] =
          multinomial(job, block, scratch, rows.begin, n, ld, p + lane, reinterpret_cast<const uint32_t*>(x) + lane,
                      samples_of_head(params, rows.head[v * kLanes + lane]), counter(lane), o + lane * ld_o);
    }
  } else {
    vf budget = splat(1.0f);
    vi largest{};
    vu offset{};
    for (int lane = 0; lane < live; ++lane) {
      const int64_t head = rows.head[v * kLanes + lane];
      const int64_t samples = samples_of_head(params, head);
      offset[lane] = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter(lane)).word[0] >> 8;
      if (params.strategy == Strategy::adaptive) {
        const double own = job.budget[(block.batch * params.q_heads + head) * params.q_len + rows.query[v * kLanes + lane]];
        take_all[lane] = own >= sums.allowed[lane] ? -1 : 0;
        budget[lane] = static_cast<float>(own);
        continue;
      }
      take_all[lane] = samples >= sums.allowed[lane] ? -1 : 0;
      largest[lane] = params.strategy == Strategy::hybrid && !take_all[lane] ? static_cast<int32_t>(samples / 2) : 0;
      budget[lane] = static_cast<float>(samples - largest[lane]);
    }
    if (lane_bits(largest > 0)) mark_largest(p, x, ld, n, largest);
    const vf c = inclusion_factor(x, ld, n, budget);
    weight_sum = systematic(job, block, scratch, rows.begin, n, ld, p, x, c, take_all, offset, o, ld_o);
  }

  const float* mean = params.control_variate ? job.value_mean + kv * size : nullptr;
  for (int lane = 0; lane < live; ++lane) {
    float* row = o + lane * ld_o;
    const bool empty = sums.allowed[lane] == 0;
    const bool nan = sums.sum[lane] != sums.sum[lane];
    const float w = weight_sum[lane];
    // w_j v_j has been summed; with control variate the row is mean + sum w_j (v_j - mean), else it is normalised.
    const bool shifted = mean && !take_all[lane];
    const float factor = shifted || params.strategy == Strategy::naive ? 1.0f : w == 0.0f ? 0.0f : 1.0f / w;
    for (int64_t i = 0; i < size; ++i) {
      const float y = shifted ? mean[i] * (1.0f - w) + row[i] : row[i] * factor;
      row[i] = empty ? 0.0f : nan ? __builtin_nanf("") : y;
    }
    const int64_t r = v * kLanes + lane;
    write_row(params.type, row, size, output_row(job, block.batch, rows.head[r], rows.query[r]));
  }
}

static void sampled_block(const AttentionJob& job, RowBlock block, char* memory) {
  Rows rows;
  set_rows(job, block, rows);
  if (is_exact(job, rows)) return exact_block(job, block, memory);
  Arena arena{memory, 0};
  const RowScratch scratch = row_scratch(job, arena);
  const int64_t ld = rows.vecs * kLanes;
  pack_queries(job, block, rows, scratch.q_t, ld);
  row_scores(job, block, rows, scratch, Stage::masked, rows.begin, rows.end, scratch.p);
  for (int v = 0; v < rows.vecs; ++v) sample_column(job, block, rows, scratch, v);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
