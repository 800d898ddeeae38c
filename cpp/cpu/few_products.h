// The products of a handful of query rows with K and V, where they lie and in the type that they have.
#pragma once

#include "key_rows.h"
#include "scores.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int kFewRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // measured: where the other layout catches up
constexpr int64_t kFewestKeysOfFew = 64;                           // measured likewise, for more than two rows
constexpr int kFewChunk = kLanes == 16 ? 6 : 3;  // rows whose sums stay in registers beside a block of keys
constexpr int64_t kFewStep = 64;                 // keys: so many rows of V stay in the cache while they serve all rows

// s[lane] = q . k_lane for kLanes rows of K. Rows are read one after the other: the hardware prefetcher follows no other
// order.
template <DType kType>
static void score_row(const float* q, const char* const* rows, int64_t size, float* s) {
  vf m[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    vf sum{};
    int64_t x = 0;
    for (; x + kLanes <= size; x += kLanes) {
      sum += load<vf>(q + x) * load_part(kType, rows[i] + x * bytes_of(kType), kLanes);
    }
    if (x < size) sum += load<vf>(q + x) * load_part(kType, rows[i] + x * bytes_of(kType), size - x);
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
static void score_rows(const float* q, const float* k, int64_t size, float* s, int64_t s_stride) {
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
    store(s + r * s_stride, total);
  }
}

// Rows of V: those of a run, one after the other, or those that a list names.
struct ListedRows {
  KeyRun run;
  const int32_t* list;  // null: all of the run
  const char* operator[](int64_t j) const { return run.data + (list ? list[j] : j) * run.step; }
};

// o[r][x] = o[r][x] * rescale[r] + sum over the keys of p[r][j] v_j[x], for kRows rows and kVecs vectors of x.
template <DType kType, int kRows, int kVecs>
static QEXPORT_INLINE void value_rows(const float* p, int64_t p_stride, const ListedRows& v, int64_t x, int64_t part,
                                      const float* rescale, float* o, int64_t o_stride) {
  vf acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int u = 0; u < kVecs; ++u) acc[r][u] = load<vf>(o + r * o_stride + x + u * kLanes) * rescale[r];
  }
  for (int64_t j = 0; j < v.run.count; ++j) {
    const char* row = v[j] + x * bytes_of(kType);
    vf value[kVecs];
    for (int u = 0; u < kVecs; ++u) value[u] = load_part(kType, row + u * kLanes * bytes_of(kType), part);
    for (int r = 0; r < kRows; ++r) {
      for (int u = 0; u < kVecs; ++u) acc[r][u] += value[u] * p[r * p_stride + j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int u = 0; u < kVecs; ++u) store(o + r * o_stride + x + u * kLanes, acc[r][u]);
  }
}

template <DType kType, int kRows>
static void all_value_rows(const float* p, int64_t p_stride, const ListedRows& v, int64_t size, const float* rescale,
                           float* o, int64_t o_stride) {
  constexpr int kVecs = 4;
  int64_t x = 0;
  for (; x + kVecs * kLanes <= size; x += kVecs * kLanes) {
    value_rows<kType, kRows, kVecs>(p, p_stride, v, x, kLanes, rescale, o, o_stride);
  }
  // What is left in one go: a pass per vector would read a little of every row again and again.
  const int64_t left = (size - x) / kLanes;
  if (left == 3) value_rows<kType, kRows, 3>(p, p_stride, v, x, kLanes, rescale, o, o_stride);
  if (left == 2) value_rows<kType, kRows, 2>(p, p_stride, v, x, kLanes, rescale, o, o_stride);
  if (left == 1) value_rows<kType, kRows, 1>(p, p_stride, v, x, kLanes, rescale, o, o_stride);
  x += left * kLanes;
  if (x < size) value_rows<kType, kRows, 1>(p, p_stride, v, x, size - x, rescale, o, o_stride);
}

// The products for a type and a number of rows up to kFewChunk.
struct FewProducts {
  void (*score)(const float* q, const char* const* rows, int64_t size, float* s);
  void (*scores)(const float* q, const float* k, int64_t size, float* s, int64_t s_stride);
  void (*values)(const float* p, int64_t p_stride, const ListedRows& v, int64_t size, const float* rescale, float* o,
                 int64_t o_stride);
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

// s[r][0 .. k.count) = scores of `rows` rows of q (packed_row(size) apart) against the keys of a run; whole vectors are
// written. `buffer` holds kLanes rows of packed_row(size) floats.
static void few_scores(const KeyRun& k, const float* q, int64_t rows, int64_t size, float* buffer, float* s,
                       int64_t s_stride) {
  const int64_t stride = packed_row(size);
  for (int64_t j = 0; j < k.count; j += kLanes) {
    const int64_t n = lesser<int64_t>(kLanes, k.count - j);
    const char* row[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) row[i] = k.data + (j + (i < n ? i : 0)) * k.step;
    prefetch_run(k, j, n, size);
    if (rows == 1) {
      few_products(k.type, 1).score(q, row, size, s + j);
      continue;
    }
    for (int64_t i = 0; i < kLanes; ++i) read_row(k.type, row[i], size, buffer + i * stride);
    for (int64_t r = 0, some; r < rows; r += some) {
      some = lesser<int64_t>(kFewChunk, rows - r);
      few_products(k.type, some).scores(q + r * stride, buffer, size, s + r * s_stride + j, s_stride);
    }
  }
}

// o[r] = o[r] * alpha[r] + the values of the run weighted with s[r]; alpha becomes 1.
static void few_values(const KeyRun& v, const float* s, int64_t s_stride, int64_t rows, int64_t size, float* alpha,
                       float* o) {
  const int64_t stride = packed_row(size);
  for (int64_t j = 0; j < v.count; j += kFewStep) {
    const ListedRows step{{v.data + j * v.step, v.step, lesser(kFewStep, v.count - j), v.type}, nullptr};
    prefetch_run(step.run, 0, step.run.count, size);
    for (int64_t r = 0, some; r < rows; r += some) {
      some = lesser<int64_t>(kFewChunk, rows - r);
      few_products(v.type, some).values(s + r * s_stride + j, s_stride, step, size, alpha + r, o + r * stride, stride);
    }
    for (int64_t r = 0; r < rows; ++r) alpha[r] = 1.0f;
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
