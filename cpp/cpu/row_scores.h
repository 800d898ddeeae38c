// All scores of a few rows at once, and what is computed from them without sampling: entropies and qk_matmul_output.
#pragma once

#include <cstring>

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
  s.o = arena.take<float>(size * kSampledRows);
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
static QEXPORT_INLINE auto sum_in_parts(int64_t n, const Term& term) {
  decltype(term(0)) total{};
  for (int64_t first = 0; first < n; first += 64) {
    const int64_t end = lesser(first + 64, n);
    decltype(term(0)) part{};
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

struct Sums {
  vf plain, weighted;

  QEXPORT_INLINE void operator+=(const Sums& other) {
    plain += other.plain;
    weighted += other.weighted;
  }
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
  const Sums sums = sum_in_parts(n, [&](int64_t j) QEXPORT_INLINE_LAMBDA {
    const vf d = load<vf>(s + j * ld) - origin, e = exp_nonpositive(d);
    store(s + j * ld, e);
    if (!kWeighted) return Sums{e, vf{}};
    return Sums{e, e == 0.0f ? vf{} : e * d};
  });
  return {sums.plain, allowed, sums.weighted};
}

// One column of lanes e[n][ld], of sum z, becomes p = e / z, or 0 where no key is allowed.
static QEXPORT_INLINE void normalize(float* e, int64_t ld, int64_t n, vf z) {
  const vf inverse = z == 0.0f ? vf{} : 1.0f / z;
  for (int64_t j = 0; j < n; ++j) store(e + j * ld, load<vf>(e + j * ld) * inverse);
}

// Where the p_j of a block are kept.
static QEXPORT_INLINE float* kept_probabilities(const AttentionJob& job, const RowBlock& block) {
  return job.probabilities + block.number * job.total_len * kSampledRows;
}

// Entropy H = ln Z - (1/Z) sum_j e_j (s_j - max) in nats, and the number of allowed keys, of each row. Keeps the
// probabilities, if there is room.
static void entropy_block(const AttentionJob& job, RowBlock block, char* memory) {
  Arena arena{memory, 0};
  RowScratch scratch = row_scratch(job, arena);
  if (job.probabilities) scratch.p = kept_probabilities(job, block);
  Rows rows;
  set_rows(job, block, rows);
  const int64_t ld = rows.vecs * kLanes;
  pack_queries(job, block, rows, job.params.scale, scratch.q_t, ld);
  row_scores(job, block, rows, scratch, Stage::masked, rows.begin, rows.end, scratch.p);
  for (int v = 0; v < rows.vecs; ++v) {
    const ColumnSums sums = exponentiate<true>(scratch.p + v * kLanes, ld, rows.end - rows.begin);
    if (job.probabilities) normalize(scratch.p + v * kLanes, ld, rows.end - rows.begin, sums.sum);
    for (int lane = 0; lane < kLanes && v * kLanes + lane < rows.count; ++lane) {
      const int64_t r = v * kLanes + lane;
      const int64_t at = (block.batch * job.params.q_heads + rows.head[r]) * job.params.q_len + rows.query[r];
      const float z = sums.sum[lane];
      job.allowed[at] = sums.allowed[lane];
      job.entropy[at] = z > 0.0f ? __builtin_logf(z) - sums.weighted_sum[lane] / z : 0.0f;
    }
  }
}

// Writes x[j - begin][lane], j in [begin, end), as rows of qk_matmul_output, with zeros before and behind them.
static void write_score_rows(const AttentionJob& job, const RowBlock& block, const Rows& rows, const float* x, int64_t begin,
                             int64_t end) {
  const QuantumAttentionParams& p = job.params;
  const int64_t ld = rows.vecs * kLanes, n = job.total_len, bytes = element_size(p.type);
  for (int64_t r0 = 0; r0 < rows.count; r0 += kLanes) {
    const int64_t live = lesser<int64_t>(kLanes, rows.count - r0);
    char* dst[kLanes];
    for (int64_t lane = 0; lane < live; ++lane) {
      const int64_t row = (block.batch * p.q_heads + rows.head[r0 + lane]) * p.q_len + rows.query[r0 + lane];
      dst[lane] = static_cast<char*>(job.tensors.qk_matmul_output) + row * n * bytes;
      std::memset(dst[lane], 0, static_cast<size_t>(begin * bytes));
      std::memset(dst[lane] + end * bytes, 0, static_cast<size_t>((n - end) * bytes));
    }
    for (int64_t j = begin; j < end; j += kLanes) {
      const int64_t count = lesser<int64_t>(kLanes, end - j);
      vf m[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) m[i] = i < count ? load<vf>(x + (j - begin + i) * ld + r0) : vf{};
      transpose(m);
      for (int64_t lane = 0; lane < live; ++lane) store_part(p.type, dst[lane] + j * bytes, m[lane], count);
    }
  }
}

// p of all rows of a block into scratch.p, and out. Never sampled.
static void write_probabilities(const AttentionJob& job, const RowBlock& block, const Rows& rows,
                                const RowScratch& scratch) {
  const int64_t ld = rows.vecs * kLanes, n = rows.end - rows.begin;
  row_scores(job, block, rows, scratch, Stage::masked, rows.begin, rows.end, scratch.p);
  for (int v = 0; v < rows.vecs; ++v) {
    float* column = scratch.p + v * kLanes;
    normalize(column, ld, n, exponentiate<false>(column, ld, n).sum);
  }
  write_score_rows(job, block, rows, scratch.p, rows.begin, rows.end);
}

// qk_matmul_output, modes 0 (scores), 1 (after softcap), 2 (after the mask), 3 (probabilities). Never sampled.
static void qk_matmul_output_block(const AttentionJob& job, RowBlock block, char* memory) {
  const int64_t mode = job.params.qk_matmul_output_mode;
  Arena arena{memory, 0};
  const RowScratch scratch = row_scratch(job, arena);
  Rows rows;
  set_rows(job, block, rows);
  pack_queries(job, block, rows, job.params.scale, scratch.q_t, rows.vecs * kLanes);
  if (mode == 3) return write_probabilities(job, block, rows, scratch);
  const Stage stage = mode == 0 ? Stage::raw : mode == 1 ? Stage::capped : Stage::masked;
  row_scores(job, block, rows, scratch, stage, 0, job.total_len, scratch.p);
  write_score_rows(job, block, rows, scratch.p, 0, job.total_len);
}

// Exact attention of rows whose probabilities are wanted too: one product of scores for both.
static void exact_with_probabilities_block(const AttentionJob& job, RowBlock block, char* memory) {
  const int64_t size = job.params.v_head_size;
  Arena arena{memory, 0};
  const RowScratch scratch = row_scratch(job, arena);
  Rows rows;
  set_rows(job, block, rows);
  const int64_t ld = rows.vecs * kLanes;
  pack_queries(job, block, rows, job.params.scale, scratch.q_t, ld);
  write_probabilities(job, block, rows, scratch);
  for (int64_t i = 0; i < size * ld; i += kLanes) store(scratch.o + i, vf{});
  for (int64_t j = rows.begin, count; j < rows.end; j += count) {
    const KeyRows v = key_rows(job, true, block.batch, block.kv_head, j, lesser(kTile, rows.end - j), scratch.keys);
    count = v.count;
    value_product(v.data, v.stride, scratch.p + (j - rows.begin) * ld, scratch.o, ld, size, count, rows.vecs, nullptr);
  }
  alignas(64) float one[kSampledRows];
  for (float& factor : one) factor = 1.0f;
  write_outputs(job, block, rows, scratch.o, ld, one);
}

// value_mean and value_norm of one kv head: the mean of v_j over the valid keys, and |v_j - mean|.
static void value_stats(const AttentionJob& job, int64_t b, int64_t kv_head, char* memory) {
  const QuantumAttentionParams& p = job.params;
  Arena arena{memory, 0};
  const RowScratch scratch = row_scratch(job, arena);
  const int64_t* nonpad = job.tensors.nonpad_kv_seqlen;
  const int64_t valid = nonpad ? lesser(given_len(job, b), job.total_len) : job.total_len;
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
