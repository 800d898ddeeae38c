// Exact attention of a handful of rows, as in decoding: the keys lie along the lanes, so that K and V are each read once, in
// order, from where they lie and in the type that they have, at the speed of the memory. The layout of microkernel.h would
// leave most lanes empty.
#pragma once

#include "arena.h"
#include "few_products.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int64_t kFewTile = kPartKeys;  // keys: long runs through K, then V, measured 15 % faster than runs of 64

// Softmax state of the rows of a block: running maximum, sum, and weighted sum of values (o_stride floats apart).
struct FewState {
  float *m, *l, *o;
};

struct FewScratch {
  float *q, *s, *keys;
  FewState state;
};

static FewState few_state(const AttentionJob& job, Arena& arena) {
  FewState state;
  state.m = arena.take<float>(kFewRows);
  state.l = arena.take<float>(kFewRows);
  state.o = arena.take<float>(kFewRows * packed_row(job.params.v_head_size));
  return state;
}

static FewScratch few_scratch(const AttentionJob& job, Arena& arena) {
  FewScratch s;
  s.q = arena.take<float>(kFewRows * packed_row(job.params.head_size));
  s.s = arena.take<float>(kFewRows * kFewTile);
  s.keys = arena.take<float>(kLanes * packed_row(job.params.head_size));
  s.state = few_state(job, arena);
  return s;
}

// NaN is dropped.
static QEXPORT_INLINE float largest_lane(vf x) {
  float most = -kInf;
  for (int i = 0; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// Scores s[0 .. count) of row r against the keys from j0 on: softcap, mask, -inf where the row does not attend; returns the
// largest.
static float finish_scores(const AttentionJob& job, const Rows& rows, int64_t r, int64_t j0, int64_t count, float* s) {
  const QuantumAttentionParams& p = job.params;
  const AttentionMask& mask = job.tensors.mask;
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vf highest = splat(-kInf);
  const int64_t end = lesser<int64_t>(rows.hi[r], j0 + count);
  for (int64_t j = 0; j < count; j += kLanes) {
    vf x = load<vf>(s + j);
    if (p.softcap > 0.0f) x = tanh(x * (1.0f / p.softcap)) * p.softcap;
    const vi key = lane + static_cast<int32_t>(j0 + j);
    vi allowed = (key >= rows.lo[r]) & (key < static_cast<int32_t>(end));
    const int64_t n = lesser<int64_t>(kLanes, end - (j0 + j));
    if (mask.data && n > 0) {
      const vf add = load_bias(mask.type, rows.mask[r] + (j0 + j) * element_size(mask.type), n);
      allowed &= add != -kInf;
      x += add;
    }
    x = allowed ? x : splat(-kInf);
    store(s + j, x);
    highest = max(x, highest);
  }
  return largest_lane(highest);
}

// s becomes exp(s - maximum), of which the running maximum m and sum l take account; returns what l and o are multiplied by.
static float few_softmax(float* s, int64_t count, float highest, float& m, float& l) {
  const float m_new = highest > m ? highest : m;
  const float origin = m_new == -kInf ? 0.0f : m_new;
  const float alpha = exp_nonpositive(splat(m - origin))[0];
  vf sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf e = exp_nonpositive(load<vf>(s + i) - origin);
    store(s + i, e);
    sum += e;
  }
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  m = m_new;
  l = l * alpha + total;
  return alpha;
}

// q[r] = scale * the row's query, zeros behind it.
static void few_queries(const AttentionJob& job, const RowBlock& block, const Rows& rows, float* q) {
  const QuantumAttentionParams& p = job.params;
  const int64_t stride = packed_row(p.head_size);
  for (int64_t r = 0; r < rows.count; ++r, q += stride) {
    for (int64_t x = p.head_size / kLanes * kLanes; x < stride; x += kLanes) store(q + x, vf{});
    read_row(p.type, row_of(job.tensors.q, p.type, block.batch, rows.head[r], rows.query[r]), p.head_size, q);
    for (int64_t x = 0; x < p.head_size; ++x) q[x] *= p.scale;
  }
}

static void few_start(const AttentionJob& job, int64_t rows, const FewState& state) {
  for (int64_t r = 0; r < rows; ++r) state.m[r] = -kInf, state.l[r] = 0.0f;
  for (int64_t i = 0; i < rows * packed_row(job.params.v_head_size); ++i) state.o[i] = 0.0f;
}

// Adds the keys [begin, end) to the state of all rows.
static void few_keys(const AttentionJob& job, const RowBlock& block, const Rows& rows, const FewScratch& scratch,
                     int64_t begin, int64_t end) {
  const QuantumAttentionParams& p = job.params;
  const FewState& state = scratch.state;
  float alpha[kFewRows];
  for (int64_t j = begin, count; j < end; j += count) {
    const KeyRun k = key_run(job, false, block.batch, block.kv_head, j, lesser(kFewTile, end - j));
    const KeyRun v = key_run(job, true, block.batch, block.kv_head, j, k.count);
    count = k.count;
    few_scores(k, scratch.q, rows.count, p.head_size, scratch.keys, scratch.s, kFewTile);
    for (int64_t r = 0; r < rows.count; ++r) {
      float* s = scratch.s + r * kFewTile;
      alpha[r] = few_softmax(s, count, finish_scores(job, rows, r, j, count, s), state.m[r], state.l[r]);
    }
    few_values(v, scratch.s, kFewTile, rows.count, p.v_head_size, alpha, state.o);
  }
}

// Y of the rows from their final state.
static void few_outputs(const AttentionJob& job, const RowBlock& block, const Rows& rows, const FewState& state) {
  const QuantumAttentionParams& p = job.params;
  for (int64_t r = 0; r < rows.count; ++r) {
    float* o = state.o + r * packed_row(p.v_head_size);
    const float inverse = state.l[r] == 0.0f ? 0.0f : 1.0f / state.l[r];
    for (int64_t x = 0; x < p.v_head_size; ++x) o[x] = state.l[r] == 0.0f ? 0.0f : o[x] * inverse;
    write_row(p.type, o, p.v_head_size, output_row(job, block.batch, rows.head[r], rows.query[r]));
  }
}

static void few_rows_block(const AttentionJob& job, const RowBlock& block, const Rows& rows, char* memory) {
  Arena arena{memory, 0};
  const FewScratch scratch = few_scratch(job, arena);
  few_queries(job, block, rows, scratch.q);
  few_start(job, rows.count, scratch.state);
  few_keys(job, block, rows, scratch, rows.begin, rows.end);
  few_outputs(job, block, rows, scratch.state);
}

static size_t part_bytes(const AttentionJob& job) {
  Arena arena{nullptr, 0};
  few_state(job, arena);
  return arena.used;
}

// into = the states of all parts joined, in the order of the keys: the sum does not depend on who computed them.
static void join_parts(const AttentionJob& job, int64_t rows, char* states, const FewState& into) {
  const size_t bytes = part_bytes(job);
  const int64_t o_stride = packed_row(job.params.v_head_size);
  few_start(job, rows, into);
  for (int64_t part = 0; part < job.parts; ++part) {
    Arena arena{states + static_cast<size_t>(part) * bytes, 0};
    const FewState from = few_state(job, arena);
    for (int64_t r = 0; r < rows; ++r) {
      if (from.l[r] == 0.0f) continue;  // no key of the part is allowed
      const float m = greater(into.m[r], from.m[r]);
      const float old = exp_nonpositive(splat(into.m[r] - m))[0], add = exp_nonpositive(splat(from.m[r] - m))[0];
      into.m[r] = m;
      into.l[r] = into.l[r] * old + from.l[r] * add;
      for (int64_t x = 0; x < o_stride; x += kLanes) {
        float* o = into.o + r * o_stride + x;
        store(o, load<vf>(o) * old + load<vf>(from.o + r * o_stride + x) * add);
      }
    }
  }
}

static void exact_part(const AttentionJob& job, RowBlock block, char* memory) {
  const int64_t head = block.batch * job.params.kv_heads + block.kv_head, part = block.key_begin / kPartKeys;
  if (__atomic_load_n(job.parts_left + head, __ATOMIC_RELAXED) == 0) return;  // tree_decode has done it
  const size_t bytes = part_bytes(job);
  char* states = job.part_state + static_cast<size_t>(head * job.parts) * bytes;
  Arena arena{memory, 0};
  FewScratch scratch = few_scratch(job, arena);
  const FewState joined = scratch.state;
  Arena own{states + static_cast<size_t>(part) * bytes, 0};
  scratch.state = few_state(job, own);
  Rows rows;
  set_rows(job, block, rows);
  few_queries(job, block, rows, scratch.q);
  few_start(job, rows.count, scratch.state);
  few_keys(job, block, rows, scratch, rows.begin, rows.end);
  if (__atomic_sub_fetch(job.parts_left + head, 1, __ATOMIC_ACQ_REL) > 0) return;
  join_parts(job, rows.count, states, joined);
  few_outputs(job, block, rows, joined);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
