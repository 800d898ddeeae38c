// Exact attention of a handful of rows, as in decoding: the keys lie along the lanes, so that K and V are each read once, in
// order, at the speed of the memory, where the layout of microkernel.h would leave most lanes empty.
#pragma once

#include "scores.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int kFewRows = kLanes == 16 ? 5 : kLanes == 8 ? 2 : 1;  // measured: where the other layout catches up
constexpr int64_t kFewTile = 64;                                  // keys

struct FewScratch {
  float *q, *s, *o, *keys;
};

static FewScratch few_scratch(const AttentionJob& job, Arena& arena) {
  const QuantumAttentionParams& p = job.params;
  FewScratch s;
  s.q = arena.take<float>(kFewRows * packed_row(p.head_size));
  s.s = arena.take<float>(kFewRows * kFewTile);
  s.o = arena.take<float>(kFewRows * packed_row(p.v_head_size));
  s.keys = arena.take<float>(kFewTile * packed_row(greater(p.head_size, p.v_head_size)));
  return s;
}

// Lane i: q . k_i for the kLanes rows of k, of which `n` exist.
static vf dot_products(const float* q, const float* k, int64_t stride, int64_t n, int64_t size) {
  vf m[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    vf sum{};
    const float* row = k + (i < n ? i : 0) * stride;
    int64_t x = 0;
    for (; x + kLanes <= size; x += kLanes) sum += load<vf>(q + x) * load<vf>(row + x);
    if (x < size) {
      sum += load<vf>(q + x) * load_part(DType::f32, reinterpret_cast<const char*>(row + x), size - x);
    }
    m[i] = sum;
  }
  transpose(m);
  vf total = m[0];
  for (int i = 1; i < kLanes; ++i) total += m[i];
  return total;
}

// s[0 .. count) = scores of row r against the tile, -inf where it does not attend; returns their maximum.
static float tile_scores(const AttentionJob& job, const Rows& rows, int64_t r, const KeyRows& k, int64_t j0, const float* q,
                         float* s) {
  const QuantumAttentionParams& p = job.params;
  const AttentionMask& mask = job.tensors.mask;
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vf highest = splat(-kInf);
  for (int64_t j = 0; j < k.count; j += kLanes) {
    vf x = dot_products(q, k.data + j * k.stride, k.stride, k.count - j, p.head_size);
    if (p.softcap > 0.0f) x = tanh(x * (1.0f / p.softcap)) * p.softcap;
    const vi key = lane + static_cast<int32_t>(j0 + j);
    const int64_t end = lesser<int64_t>(rows.hi[r], j0 + k.count);
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
  float most = -kInf;
  for (int i = 0; i < kLanes; ++i) most = highest[i] > most ? highest[i] : most;
  return most;
}

// o[0 .. size) = o * rescale + sum over the keys of p_j v_j, four vectors of o at a time.
static void add_values(const float* p, const KeyRows& v, int64_t size, float rescale, float* o) {
  constexpr int kUnroll = 4;
  int64_t x = 0;
  for (; x + kUnroll * kLanes <= size; x += kUnroll * kLanes) {
    vf acc[kUnroll];
    for (int u = 0; u < kUnroll; ++u) acc[u] = load<vf>(o + x + u * kLanes) * rescale;
    for (int64_t j = 0; j < v.count; ++j) {
      const float* row = v.data + j * v.stride + x;
      for (int u = 0; u < kUnroll; ++u) acc[u] += load<vf>(row + u * kLanes) * p[j];
    }
    for (int u = 0; u < kUnroll; ++u) store(o + x + u * kLanes, acc[u]);
  }
  for (; x < size; x += kLanes) {
    const int64_t n = lesser<int64_t>(kLanes, size - x);
    vf acc = load<vf>(o + x) * rescale;
    for (int64_t j = 0; j < v.count; ++j) {
      acc += load_part(DType::f32, reinterpret_cast<const char*>(v.data + j * v.stride + x), n) * p[j];
    }
    store(o + x, acc);
  }
}

static void few_rows_block(const AttentionJob& job, const RowBlock& block, const Rows& rows, char* memory) {
  const QuantumAttentionParams& p = job.params;
  Arena arena{memory, 0};
  FewScratch scratch = few_scratch(job, arena);
  const int64_t q_stride = packed_row(p.head_size), o_stride = packed_row(p.v_head_size);
  float m[kFewRows], l[kFewRows], alpha[kFewRows];
  for (int64_t r = 0; r < rows.count; ++r) {
    m[r] = -kInf, l[r] = 0.0f;
    float* q = scratch.q + r * q_stride;
    read_row(p.type, row_of(job.tensors.q, p.type, block.batch, rows.head[r], rows.query[r]), p.head_size, q);
    for (int64_t x = 0; x < p.head_size; ++x) q[x] *= p.scale;
  }
  for (int64_t i = 0; i < rows.count * o_stride; ++i) scratch.o[i] = 0.0f;

  for (int64_t j = rows.begin, count; j < rows.end; j += count) {
    const KeyRows k = key_rows(job, false, block.batch, block.kv_head, j, lesser(kFewTile, rows.end - j), scratch.keys);
    count = k.count;
    for (int64_t r = 0; r < rows.count; ++r) {
      float* s = scratch.s + r * kFewTile;
      const float highest = tile_scores(job, rows, r, k, j, scratch.q + r * q_stride, s);
      const float m_new = highest > m[r] ? highest : m[r];
      const float origin = m_new == -kInf ? 0.0f : m_new;
      alpha[r] = exp_nonpositive(splat(m[r] - origin))[0];
      vf sum{};
      for (int64_t i = 0; i < count; i += kLanes) {
        const vf e = exp_nonpositive(load<vf>(s + i) - origin);
        store(s + i, e);
        sum += e;
      }
      float total = 0.0f;
      for (int i = 0; i < kLanes; ++i) total += sum[i];
      m[r] = m_new;
      l[r] = l[r] * alpha[r] + total;
    }
    const KeyRows v = key_rows(job, true, block.batch, block.kv_head, j, count, scratch.keys);
    for (int64_t r = 0; r < rows.count; ++r) {
      add_values(scratch.s + r * kFewTile, v, p.v_head_size, alpha[r], scratch.o + r * o_stride);
    }
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    float* o = scratch.o + r * o_stride;
    const float inverse = l[r] == 0.0f ? 0.0f : 1.0f / l[r];
    for (int64_t x = 0; x < p.v_head_size; ++x) o[x] = l[r] == 0.0f ? 0.0f : o[x] * inverse;
    write_row(p.type, o, p.v_head_size, output_row(job, block.batch, rows.head[r], rows.query[r]));
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
