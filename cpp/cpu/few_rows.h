// Exact attention of a handful of rows, as in decoding: the keys lie along the lanes, so that K and V are each read once, in
// order, from where they lie and in the type that they have, at the speed of the memory. The layout of microkernel.h would
// leave most lanes empty.
#pragma once

#include "scores.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int kFewRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // measured: where the other layout catches up
constexpr int kFewChunk = kLanes == 16 ? 6 : 3;  // rows whose sums stay in registers beside a block of keys
constexpr int64_t kFewTile = kPartKeys;          // keys: long runs through K, then V, measured 15 % faster than runs of 64
constexpr int64_t kFewStep = 64;                 // keys: so many rows of V stay in the cache while they serve all rows

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

// s[lane] = q . k_lane for the kLanes rows of k from row j on, of which `n` exist. Rows are read one after the other: the
// hardware prefetcher follows no other order.
template <DType kType>
static void score_row(const float* q, const KeyRun& k, int64_t j, int64_t n, int64_t size, float* s) {
  vf m[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const char* row = k.data + (j + (i < n ? i : 0)) * k.step;
    vf sum{};
    int64_t x = 0;
    for (; x + kLanes <= size; x += kLanes) {
      sum += load<vf>(q + x) * load_part(kType, row + x * bytes_of(kType), kLanes);
    }
    if (x < size) sum += load<vf>(q + x) * load_part(kType, row + x * bytes_of(kType), size - x);
    m[i] = sum;
  }
  transpose(m);
  vf total = m[0];
  for (int i = 1; i < kLanes; ++i) total += m[i];
  store(s, total);
}

// The same for kRows rows of q and float32 rows of k in the cache, packed_row(size) floats apart: a block of kLanes x kLanes
// elements of K is turned once, in the registers, and serves all rows.
template <int kRows>
static void score_rows(const float* q, const float* k, int64_t size, float* s) {
  constexpr int kChains = kRows <= 3 ? 2 : 1;  // sums under way at once: an addition takes four cycles
  const int64_t stride = packed_row(size);
  vf sum[kRows][kChains] = {};
  for (int64_t x = 0; x < size; x += kLanes) {
    vf m[kLanes];
    for (int i = 0; i < kLanes; ++i) m[i] = load<vf>(k + i * stride + x);
    transpose(m);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r][i % kChains] += m[i] * q[r * stride + x + i];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    vf total = sum[r][0];
    for (int c = 1; c < kChains; ++c) total += sum[r][c];
    store(s + r * kFewTile, total);
  }
}

// o[r][x] = o[r][x] * rescale[r] + sum over the keys of p[r][j] v_j[x], for kRows rows and kVecs vectors of x.
template <DType kType, int kRows, int kVecs>
static QEXPORT_INLINE void value_rows(const float* p, const KeyRun& v, int64_t x, int64_t part, const float* rescale,
                                      float* o, int64_t o_stride) {
  vf acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int u = 0; u < kVecs; ++u) acc[r][u] = load<vf>(o + r * o_stride + x + u * kLanes) * rescale[r];
  }
  const char* row = v.data + x * bytes_of(kType);
  for (int64_t j = 0; j < v.count; ++j, row += v.step) {
    vf value[kVecs];
    for (int u = 0; u < kVecs; ++u) value[u] = load_part(kType, row + u * kLanes * bytes_of(kType), part);
    for (int r = 0; r < kRows; ++r) {
      for (int u = 0; u < kVecs; ++u) acc[r][u] += value[u] * p[r * kFewTile + j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int u = 0; u < kVecs; ++u) store(o + r * o_stride + x + u * kLanes, acc[r][u]);
  }
}

template <DType kType, int kRows>
static void all_value_rows(const float* p, const KeyRun& v, int64_t size, const float* rescale, float* o, int64_t o_stride) {
  constexpr int kVecs = 4;
  int64_t x = 0;
  for (; x + kVecs * kLanes <= size; x += kVecs * kLanes) {
    value_rows<kType, kRows, kVecs>(p, v, x, kLanes, rescale, o, o_stride);
  }
  for (; x + kLanes <= size; x += kLanes) value_rows<kType, kRows, 1>(p, v, x, kLanes, rescale, o, o_stride);
  if (x < size) value_rows<kType, kRows, 1>(p, v, x, size - x, rescale, o, o_stride);
}

// The products for a type and a number of rows up to kFewChunk.
struct FewProducts {
  void (*score)(const float* q, const KeyRun& k, int64_t j, int64_t n, int64_t size, float* s);
  void (*scores)(const float* q, const float* k, int64_t size, float* s);
  void (*values)(const float* p, const KeyRun& v, int64_t size, const float* rescale, float* o, int64_t o_stride);
};

template <DType kType, int... kRows>
static QEXPORT_INLINE FewProducts few_products(int64_t rows, std::integer_sequence<int, kRows...>) {
  static const FewProducts table[] = {{score_row<kType>, score_rows<kRows + 1>, all_value_rows<kType, kRows + 1>}...};
  return table[rows - 1];
}

static FewProducts few_products(DType type, int64_t rows) {
  constexpr auto counts = std::make_integer_sequence<int, kFewChunk>{};
  if (type == DType::f16) return few_products<DType::f16>(rows, counts);
  if (type == DType::bf16) return few_products<DType::bf16>(rows, counts);
  return few_products<DType::f32>(rows, counts);
}

// s[r] = scores of all rows against the keys of the run, up to a whole vector of them.
static void few_scores(const KeyRun& k, const FewScratch& scratch, int64_t rows, int64_t size) {
  const int64_t stride = packed_row(size);
  for (int64_t j = 0; j < k.count; j += kLanes) {
    const int64_t n = lesser<int64_t>(kLanes, k.count - j);
    prefetch_run(k, j, n, size);
    if (rows == 1) {
      few_products(k.type, 1).score(scratch.q, k, j, n, size, scratch.s + j);
      continue;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      read_row(k.type, k.data + (j + (i < n ? i : 0)) * k.step, size, scratch.keys + i * stride);
    }
    for (int64_t r = 0, some; r < rows; r += some) {
      some = lesser<int64_t>(kFewChunk, rows - r);
      few_products(k.type, some).scores(scratch.q + r * stride, scratch.keys, size, scratch.s + r * kFewTile + j);
    }
  }
}

// o[r] = o[r] * alpha[r] + the values of the run weighted with s[r].
static void few_values(const KeyRun& v, const FewScratch& scratch, int64_t rows, int64_t size, float* alpha) {
  const int64_t stride = packed_row(size);
  for (int64_t j = 0; j < v.count; j += kFewStep) {
    const KeyRun step{v.data + j * v.step, v.step, lesser(kFewStep, v.count - j), v.type};
    prefetch_run(step, 0, step.count, size);
    for (int64_t r = 0, some; r < rows; r += some) {
      some = lesser<int64_t>(kFewChunk, rows - r);
      few_products(v.type, some)
          .values(scratch.s + r * kFewTile + j, step, size, alpha + r, scratch.state.o + r * stride, stride);
    }
    for (int64_t r = 0; r < rows; ++r) alpha[r] = 1.0f;
  }
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
  float most = -kInf;
  for (int i = 0; i < kLanes; ++i) most = highest[i] > most ? highest[i] : most;
  return most;
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

// The state of all rows after the keys of the block.
static void few_rows_range(const AttentionJob& job, const RowBlock& block, const Rows& rows, const FewScratch& scratch) {
  const QuantumAttentionParams& p = job.params;
  const FewState& state = scratch.state;
  for (int64_t r = 0; r < rows.count; ++r) state.m[r] = -kInf, state.l[r] = 0.0f;
  for (int64_t i = 0; i < rows.count * packed_row(p.v_head_size); ++i) state.o[i] = 0.0f;
  float alpha[kFewRows];
  for (int64_t j = rows.begin, count; j < rows.end; j += count) {
    const KeyRun k = key_run(job, false, block.batch, block.kv_head, j, lesser(kFewTile, rows.end - j));
    const KeyRun v = key_run(job, true, block.batch, block.kv_head, j, k.count);
    count = k.count;
    few_scores(k, scratch, rows.count, p.head_size);
    for (int64_t r = 0; r < rows.count; ++r) {
      float* s = scratch.s + r * kFewTile;
      alpha[r] = few_softmax(s, count, finish_scores(job, rows, r, j, count, s), state.m[r], state.l[r]);
    }
    few_values(v, scratch, rows.count, p.v_head_size, alpha);
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
  few_rows_range(job, block, rows, scratch);
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
  for (int64_t r = 0; r < rows; ++r) into.m[r] = -kInf, into.l[r] = 0.0f;
  for (int64_t i = 0; i < rows * o_stride; ++i) into.o[i] = 0.0f;
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
  few_rows_range(job, block, rows, scratch);
  if (__atomic_sub_fetch(job.parts_left + head, 1, __ATOMIC_ACQ_REL) > 0) return;
  join_parts(job, rows.count, states, joined);
  few_outputs(job, block, rows, joined);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
