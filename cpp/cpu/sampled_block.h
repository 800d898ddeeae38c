// Sampled attention of a block of rows: scores, probabilities, selection, and the weighted sum of the chosen values.
#pragma once

#include "value_clusters.h"

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

// Prefix sums of f_j = floor(2^30 x_j / sum) + 1 where x_j > 0, in place of x.
static void prefix_sums(float* x, int64_t ld, int64_t n, vf sum) {
  vu total{};  // of weights that are no numbers it may overflow
  for (int64_t j = 0; j < n; ++j) {
    const vf xj = load<vf>(x + j * ld);
    total += (vu)(xj > 0.0f ? to_int(xj * 1073741824.0f / sum) + 1 : vi{});
    store(x + j * ld, total);
  }
}

// Scores of a block become p_j = e_j / Z, in place; allowed[r] = keys that row r attends to.
static void probabilities(const AttentionJob& job, const RowBlock& block, const Rows& rows, float* p, int32_t* allowed) {
  const int64_t ld = rows.vecs * kLanes, n = rows.end - rows.begin;
  for (int v = 0; v < rows.vecs; ++v) {
    if (job.probabilities) {  // entropy_block has done it
      for (int64_t r = v * kLanes; r < lesser<int64_t>(rows.count, (v + 1) * kLanes); ++r) {
        allowed[r] = job.allowed[(block.batch * job.params.q_heads + rows.head[r]) * job.params.q_len + rows.query[r]];
      }
      continue;
    }
    const ColumnSums sums = exponentiate<false>(p + v * kLanes, ld, n);
    normalize(p + v * kLanes, ld, n, sums.sum);
    store(allowed + v * kLanes, sums.allowed);
  }
}

// One column of lanes, rows v * kLanes .. : p[n][ld] holds their probabilities, allowed[lane] how many keys they attend to.
static void sample_column(const AttentionJob& job, const RowBlock& block, const Rows& rows, const RowScratch& scratch,
                          const int32_t* allowed, int v) {
  const QuantumAttentionParams& params = job.params;
  const int64_t ld = rows.vecs * kLanes, n = rows.end - rows.begin, size = params.v_head_size;
  const int64_t ld_o = packed_row(size);
  const int64_t kv = block.batch * params.kv_heads + block.kv_head;
  const bool clustered = clusters_values(params);
  const int64_t live = lesser<int64_t>(kLanes, rows.count - v * kLanes);
  float* p = scratch.p + v * kLanes;
  float* x = scratch.x + v * kLanes;
  float* o = scratch.o + v * kLanes * ld_o;
  for (int64_t i = 0; i < live * ld_o; ++i) o[i] = 0.0f;

  vf budget = splat(1.0f);
  vi take_all{}, taken{};
  for (int lane = 0; lane < live; ++lane) {
    const int64_t head = rows.head[v * kLanes + lane], samples = samples_of_head(params, head);
    double own = static_cast<double>(samples);
    if (params.strategy == Strategy::adaptive) {
      own = job.budget[(block.batch * params.q_heads + head) * params.q_len + rows.query[v * kLanes + lane]];
    }
    take_all[lane] = params.strategy != Strategy::naive && own >= allowed[lane] ? -1 : 0;
    const int64_t certain = clustered ? samples : samples / 2;
    taken[lane] = params.strategy == Strategy::hybrid && !take_all[lane] ? static_cast<int32_t>(certain) : 0;
    budget[lane] = static_cast<float>(own);
  }

  // x_j, with their sum and maximum in rows that are sampled.
  const float* norm = job.value_norm ? job.value_norm + kv * job.total_len + rows.begin : nullptr;
  vf largest{};
  vf rest = sum_in_parts(n, [&](int64_t j) QEXPORT_INLINE_LAMBDA {
    const vf pj = load<vf>(p + j * ld);
    // A key that is not attended to must not lend its norm, which may be NaN.
    const vf xj = norm ? (pj > 0.0f ? pj * norm[j] : vf{}) : pj;
    largest = max(xj, largest);
    store(x + j * ld, (take_all & (pj > 0.0f)) ? splat(kInf) : xj);
    return xj;
  });
  rest = take_all ? vf{} : rest;

  const auto counter = [&](int lane) {
    const int64_t r = v * kLanes + lane;
    return PhiloxBlock{{params.layer, static_cast<uint32_t>(block.batch * params.q_heads + rows.head[r]),
                        static_cast<uint32_t>(rows.query[r]), 0u}};
  };
  vf weight_sum{};
  if (params.strategy == Strategy::naive) {
    prefix_sums(x, ld, n, rest);
    for (int lane = 0; lane < live; ++lane) {
      if (!(rest[lane] > 0.0f)) continue;
      weight_sum[lane] =
          multinomial(job, block, scratch, rows.begin, n, ld, p + lane, reinterpret_cast<const uint32_t*>(x) + lane,
                      samples_of_head(params, rows.head[v * kLanes + lane]), counter(lane), o + lane * ld_o);
    }
  } else if (clustered) {
    if (lane_bits(taken > 0)) take_largest(x, ld, n, taken, &largest);
    const vf tail = add_centres(job, block, scratch, rows.begin, n, ld, live, p, x, o, ld_o);
    // Nothing is left to chance: every x_j is +inf or 0.
    weight_sum = tail + systematic(job, block, scratch, rows.begin, n, ld, p, x, splat(1.0f), vu{}, o, ld_o);
  } else {
    vu offset{};
    const uint64_t seed = static_cast<uint64_t>(params.seed);
    for (int lane = 0; lane < live; ++lane) {
      offset[lane] = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter(lane)).word[0] >> 8;
    }
    if (lane_bits(taken > 0)) rest = take_largest(x, ld, n, taken, &largest);
    const vf c = inclusion_factor(x, ld, n, budget, taken, rest, largest);
    weight_sum = systematic(job, block, scratch, rows.begin, n, ld, p, x, c, offset, o, ld_o);
  }

  const vf any = n > 0 ? load<vf>(p) : vf{};  // one score that is NaN makes all p_j of its row so
  const float* mean = job.value_mean ? job.value_mean + kv * size : nullptr;
  for (int lane = 0; lane < live; ++lane) {
    float* row = o + lane * ld_o;
    const bool empty = allowed[lane] == 0;
    const bool nan = any[lane] != any[lane];
    const float w = weight_sum[lane];
    // w_j v_j has been summed; around a mean the row is mean + sum w_j (v_j - mean), else it is normalised.
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
  const bool wanted = returns_probabilities(job);
  if (is_exact(job, rows))
    return wanted ? exact_with_probabilities_block(job, block, memory) : exact_block(job, block, memory);
  Arena arena{memory, 0};
  RowScratch scratch = row_scratch(job, arena);
  if (job.probabilities) {
    scratch.p = kept_probabilities(job, block);
  } else {
    pack_queries(job, block, rows, job.params.scale, scratch.q_t, rows.vecs * kLanes);
    row_scores(job, block, rows, scratch, Stage::masked, rows.begin, rows.end, scratch.p);
  }
  alignas(64) int32_t allowed[kSampledRows];
  probabilities(job, block, rows, scratch.p, allowed);
  if (wanted) write_score_rows(job, block, rows, scratch.p, rows.begin, rows.end);
  for (int v = 0; v < rows.vecs; ++v) sample_column(job, block, rows, scratch, allowed + v * kLanes, v);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
