// The register-blocked product that both GEMMs of attention are made of.
//
// Queries lie along the lanes. With that layout K and V are read as they stand, one broadcast element at a time, nothing is
// packed or transposed but Q (once per block), and softmax, masking and sampling are all lane by lane:
//
//     scores  S^T[j][lane] = sum_x K[j][x] Q^T[x][lane]        N = x, broadcast stride = row of K, step = 1
//     values  O^T[x][lane] = sum_j V[j][x] P^T[j][lane]        N = j, broadcast stride = 1, step = row of V
//
// In low precision one 32-bit element holds 2 bfloat16 or 4 int8 that follow one another along N, in both operands; the
// layout is the same otherwise, and pointers to such elements are float pointers too.
#pragma once

#include "row_blocks.h"

namespace qexport {
namespace QEXPORT_ISA {

// What one broadcast element adds to an accumulator.
struct Fp32Math {
  typedef vf Accumulator;
  static QEXPORT_INLINE vf add(vf sum, vf rhs, float x) { return sum + rhs * x; }
};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define QEXPORT_LOW_PRECISION 1

struct Bf16Math {
  typedef vf Accumulator;
  static QEXPORT_INLINE vf add(vf sum, vf rhs, float x) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)rhs, (__m512bh)_mm512_set1_ps(x));
  }
};

struct Int8Math {  // rhs: unsigned bytes, x: signed bytes
  typedef vi Accumulator;
  static QEXPORT_INLINE vi add(vi sum, vf rhs, float x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)rhs, (__m512i)_mm512_set1_ps(x));
  }
};
#endif

// sum[b][v] += sum_{i < n} a[b * stride + i * step] * rhs[i][v * kLanes ...], rows of rhs `ld` floats apart.
template <class Math, int kVecs, int kRows>
static QEXPORT_INLINE void accumulate(typename Math::Accumulator (&sum)[kRows][kVecs], const float* a, int64_t stride,
                                      int64_t step, const float* rhs, int64_t ld, int64_t n) {
  for (int64_t i = 0; i < n; ++i, a += step, rhs += ld) {
    vf r[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) r[v] = load<vf>(rhs + v * kLanes);
#pragma GCC unroll 16
    for (int b = 0; b < kRows; ++b) {
      const float x = a[b * stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[b][v] = Math::add(sum[b][v], r[v], x);
    }
  }
}

template <int kVecs, int kRows>
static QEXPORT_INLINE void load_sums(vf (&sum)[kRows][kVecs], const float* c, int64_t ld, const float* rescale) {
#pragma GCC unroll 16
  for (int b = 0; b < kRows; ++b, c = next_row(c, ld)) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      sum[b][v] = load<vf>(c + v * kLanes);
      if (rescale) sum[b][v] *= load<vf>(rescale + v * kLanes);
    }
  }
}

template <int kVecs, int kRows>
static QEXPORT_INLINE void store_sums(const vf (&sum)[kRows][kVecs], float* c, int64_t ld) {
#pragma GCC unroll 16
  for (int b = 0; b < kRows; ++b, c = next_row(c, ld)) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + v * kLanes, sum[b][v]);
  }
}

// c[b][lanes] = (c[b][lanes] * rescale if kAccumulate) + sum_{i < n} a[b * stride + i * step] * rhs[i][lanes]
// for `rows` values of b and kVecs vectors of lanes. `ld` is the distance in floats between rows of rhs, and of c.
template <int kVecs, bool kAccumulate>
static QEXPORT_INLINE void product_rows(const float* a, int64_t stride, int64_t step, const float* rhs, float* c, int64_t ld,
                                        int64_t n, int64_t rows, const float* rescale) {
  for_row_blocks(rows, [&](int64_t b, auto count) QEXPORT_INLINE_LAMBDA {
    vf sum[decltype(count)::value][kVecs] = {};
    if (kAccumulate) load_sums(sum, c + b * ld, ld, rescale);
    accumulate<Fp32Math>(sum, a + b * stride, stride, step, rhs, ld, n);
    store_sums(sum, c + b * ld, ld);
  });
}

// s[j][lanes] for `keys` rows of k; q_t is (head_size, ld).
static __attribute__((noinline)) void score_product(const float* k, int64_t k_stride, const float* q_t, float* s, int64_t ld,
                                                    int64_t head_size, int64_t keys, int vecs) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2) {
    product_rows<2, false>(k, k_stride, 1, q_t + v * kLanes, s + v * kLanes, ld, head_size, keys, nullptr);
  }
  if (v < vecs) product_rows<1, false>(k, k_stride, 1, q_t + v * kLanes, s + v * kLanes, ld, head_size, keys, nullptr);
}

// o_t[x][lanes] = o_t[x][lanes] * rescale[lanes] + sum over `keys` rows of v; p is (keys, ld), o_t is (v_head_size, ld).
// rescale null: 1.
static __attribute__((noinline)) void value_product(const float* v_rows, int64_t v_stride, const float* p, float* o_t,
                                                    int64_t ld, int64_t v_head_size, int64_t keys, int vecs,
                                                    const float* rescale) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2) {
    product_rows<2, true>(v_rows, 1, v_stride, p + v * kLanes, o_t + v * kLanes, ld, keys, v_head_size,
                          rescale ? rescale + v * kLanes : nullptr);
  }
  if (v < vecs) {
    product_rows<1, true>(v_rows, 1, v_stride, p + v * kLanes, o_t + v * kLanes, ld, keys, v_head_size,
                          rescale ? rescale + v * kLanes : nullptr);
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
