// All scores of a few rows at once, and what is computed from them without sampling: entropies and qk_matmul_output.
#pragma once

#include "exact_block.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int kSampledRows = 32;  // all their scores are in memory at once

// Keys chosen by the rows of one column of lanes, waiting for their values to be added up.
constexpr int64_t kChosen = 1024;
struct Chosen {
  int32_t* place;  // (key - begin) * kLanes + lane
  int32_t* p;      // bits of p_j
  int32_t* f;      // f_j
};

// Scratch of the row-wise kernels. p, x: (total_len, ld).
struct RowScratch {
  float *q_t, *bias, *keys, *row, *p, *x, *o;
  float* share;  // (value_clusters, kLanes), where values are clustered
  Chosen chosen;
};

static RowScratch row_scratch(const AttentionJob& job, Arena& arena) {
  const QuantumAttentionParams& p = job.params;
  const int64_t size = packed_row(greater(p.head_size, p.v_head_size));
  RowScratch s;
  s.q_t = arena.take<float>(p.head_size * kSampledRows);
  s.bias = arena.take<float>(job.tensors.mask.data ? kTile * kSampledRows : 0);
  s.keys = arena.take<float>(kTile * size);
  s.row = arena.take<float>(size);
  s.p = arena.take<float>(job.total_len * kSampledRows);
  s.x = arena.take<float>(p.strategy == Strategy::exact ? 0 : job.total_len * kSampledRows);
  s.o = arena.take<float>(p.strategy == Strategy::exact ? 0 : size * kSampledRows);
  s.share = arena.take<float>(clusters_values(p) ? value_clusters(job) * kLanes : 0);
  s.chosen.place = arena.take<int32_t>(kChosen + kLanes);
  s.chosen.p = arena.take<int32_t>(kChosen + kLanes);
  s.chosen.f = arena.take<int32_t>(kChosen + kLanes);
  return s;
}

enum class Stage { raw, capped, masked };

// out[(j - begin)][lane] = score of key j, up to and including a stage, for keys [begin, end).
static void row_scores(const AttentionJob& job, const RowBlock& block, const Rows& rows, const RowScratch& scratch,
                       Stage stage, int64_t begin, int64_t end, float* out) {
  const QuantumAttentionParams& p = job.params;
  const AttentionMask& mask = job.tensors.mask;
  const int64_t ld = rows.vecs * kLanes;
  for (int64_t j = begin, count; j < end; j += count) {
    const KeyRows k = key_rows(job, false, block.batch, block.kv_head, j, lesser(kTile, end - j), scratch.keys);
    count = k.count;
    float* s = out + (j - begin) * ld;
    MaskEffect effect = MaskEffect::none;
    if (stage == Stage::masked && mask.data) effect = mask_bias(mask, rows, j, count, scratch.bias, ld);
    if (effect == MaskEffect::all_masked) {
      for (int64_t i = 0; i < count * ld; i += kLanes) store(s + i, splat(-kInf));
      continue;
    }
    score_product(k.data, k.stride, scratch.q_t, s, ld, p.head_size, count, rows.vecs);
    if (stage != Stage::raw && p.softcap > 0.0f) apply_softcap(s, count * ld, p.softcap);
    if (stage == Stage::masked) apply_mask(rows, j, count, effect == MaskEffect::some ? scratch.bias : nullptr, s, ld);
  }
}

// Sum of term(j) over j < n, in parts of 64: a long float32 sum would round by more than the width of many draws, and move
// keys across the borders of the strata.
template <class Term>
static QEXPORT_INLINE vf sum_in_parts(int64_t n, const Term& term) {
  vf total{};
  for (int64_t first = 0; first < n; first += 64) {
    const int64_t end = lesser(first + 64, n);
    vf part{};
    for (int64_t j = first; j < end; ++j) part += term(j);
    total += part;
  }
  return total;
}

// What exponentiate() returns of each lane.
struct ColumnSums {
  vf sum;           // Z = sum_j e_j
  vi allowed;       // number of keys with a score above -inf
  vf weighted_sum;  // sum_j e_j (s_j - max), if asked for
};

// One column of lanes of scores s[n][ld] becomes e = exp(s - max).
template <bool kWeighted>
static ColumnSums exponentiate(float* s, int64_t ld, int64_t n) {
  vf m = splat(-kInf);
  vi allowed{};
  for (int64_t j = 0; j < n; ++j) {
    const vf x = load<vf>(s + j * ld);
    m = max(x, m);
    allowed -= x != -kInf;
  }
  const vf origin = m == -kInf ? vf{} : m;
  vf weighted{};
  if (kWeighted) {
    weighted = sum_in_parts(n, [&](int64_t j) QEXPORT_INLINE_LAMBDA {
      const vf d = load<vf>(s + j * ld) - origin, e = exp_nonpositive(d);
      return e == 0.0f ? vf{} : e * d;
    });
  }
  const vf sum = sum_in_parts(n, [&](int64_t j) QEXPORT_INLINE_LAMBDA {
    const vf e = exp_nonpositive(load<vf>(s + j * ld) - origin);
    store(s + j * ld, e);
    return e;
  });
  return {sum, allowed, weighted};
}

// Entropy H = ln Z - (1/Z) sum_j e_j (s_j - max) in nats, and the number of allowed keys, of each row.
static void entropy_block(const AttentionJob& job, RowBlock block, char* memory) {
  Arena arena{memory, 0};
  const RowScratch scratch = row_scratch(job, arena);
  Rows rows;
  set_rows(job, block, rows);
  const int64_t ld = rows.vecs * kLanes;
  pack_queries(job, block, rows, job.params.scale, scratch.q_t, ld);
  row_scores(job, block, rows, scratch, Stage::masked, rows.begin, rows.end, scratch.p);
  for (int v = 0; v < rows.vecs; ++v) {
    const ColumnSums sums = exponentiate<true>(scratch.p + v * kLanes, ld, rows.end - rows.begin);
    for (int lane = 0; lane < kLanes && v * kLanes + lane < rows.count; ++lane) {
      const int64_t r = v * kLanes + lane;
      const int64_t at = (block.batch * job.params.q_heads + rows.head[r]) * job.params.q_len + rows.query[r];
      const float z = sums.sum[lane];
      job.allowed[at] = sums.allowed[lane];
      job.entropy[at] = z > 0.0f ? __builtin_logf(z) - sums.weighted_sum[lane] / z : 0.0f;
    }
  }
}

// qk_matmul_output, modes 0 (scores), 1 (after softcap), 2 (after the mask), 3 (probabilities). Never sampled.
static void qk_matmul_output_block(const AttentionJob& job, RowBlock block, char* memory) {
  const QuantumAttentionParams& p = job.params;
  Arena arena{memory, 0};
  const RowScratch scratch = row_scratch(job, arena);
  Rows rows;
  set_rows(job, block, rows);
  const int64_t ld = rows.vecs * kLanes, n = job.total_len;
  pack_queries(job, block, rows, job.params.scale, scratch.q_t, ld);
  const Stage stage = p.qk_matmul_output_mode == 0   ? Stage::raw
                      : p.qk_matmul_output_mode == 1 ? Stage::capped
                                                     : Stage::masked;
  row_scores(job, block, rows, scratch, stage, 0, n, scratch.p);
  if (p.qk_matmul_output_mode == 3) {
    for (int v = 0; v < rows.vecs; ++v) {
      float* column = scratch.p + v * kLanes;
      const vf z = exponentiate<false>(column, ld, n).sum;
      const vf inverse = z == 0.0f ? vf{} : 1.0f / z;
      for (int64_t j = 0; j < n; ++j) store(column + j * ld, load<vf>(column + j * ld) * inverse);
    }
  }
  char* out = static_cast<char*>(job.tensors.qk_matmul_output);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = (block.batch * p.q_heads + rows.head[r]) * p.q_len + rows.query[r];
    for (int64_t j = 0; j < n; j += kLanes) {
      alignas(64) float part[kLanes];
      const int64_t count = lesser<int64_t>(kLanes, n - j);
      for (int64_t i = 0; i < count; ++i) part[i] = scratch.p[(j + i) * ld + r];
      write_row(p.type, part, count, out + (row * n + j) * element_size(p.type));
    }
  }
}

// value_mean and value_norm of one kv head: the mean of v_j over the valid keys, and |v_j - mean|.
static void value_stats(const AttentionJob& job, int64_t b, int64_t kv_head, char* memory) {
  const QuantumAttentionParams& p = job.params;
  Arena arena{memory, 0};
  const RowScratch scratch = row_scratch(job, arena);
  const int64_t* nonpad = job.tensors.nonpad_kv_seqlen;
  const int64_t valid = nonpad ? lesser(greater<int64_t>(nonpad[b], 0), job.total_len) : job.total_len;
  float* mean = job.value_mean + (b * p.kv_heads + kv_head) * p.v_head_size;
  float* norm = job.value_norm + (b * p.kv_heads + kv_head) * job.total_len;
  for (int64_t x = 0; x < p.v_head_size; ++x) mean[x] = 0.0f;
  for (int64_t j = 0, count; j < valid; j += count) {
    const KeyRows v = key_rows(job, true, b, kv_head, j, lesser(kTile, valid - j), scratch.keys);
    count = v.count;
    for (int64_t x = 0; x < p.v_head_size; ++x) scratch.row[x] = 0.0f;  // a sum per tile keeps the rounding error small
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t x = 0; x < p.v_head_size; ++x) scratch.row[x] += v.data[i * v.stride + x];
    }
    for (int64_t x = 0; x < p.v_head_size; ++x) mean[x] += scratch.row[x];
  }
  for (int64_t x = 0; x < p.v_head_size && valid > 0; ++x) mean[x] /= static_cast<float>(valid);
  for (int64_t j = 0, count; j < job.total_len; j += count) {
    const KeyRows v = key_rows(job, true, b, kv_head, j, lesser(kTile, job.total_len - j), scratch.keys);
    count = v.count;
    for (int64_t i = 0; i < count; ++i) {
      const float* row = v.data + i * v.stride;
      vf sum{};
      int64_t x = 0;
      for (; x + kLanes <= p.v_head_size; x += kLanes) {
        const vf d = load<vf>(row + x) - load<vf>(mean + x);
        sum += d * d;
      }
      float total = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
      for (; x < p.v_head_size; ++x) total += (row[x] - mean[x]) * (row[x] - mean[x]);
      norm[j + i] = __builtin_sqrtf(total);
    }
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
