// The register-blocked product that both GEMMs of attention are made of.
//
// Queries lie along the lanes. With that layout K and V are read as they stand, one broadcast element at a time, nothing is
// packed or transposed but Q (once per block), and softmax, masking and sampling are all lane by lane:
//
//     scores  S^T[j][lane] = sum_x K[j][x] Q^T[x][lane]        N = x, broadcast stride = row of K, step = 1
//     values  O^T[x][lane] = sum_j V[j][x] P^T[j][lane]        N = j, broadcast stride = 1, step = row of V
#pragma once

#include "simd.h"

namespace qexport {
namespace QEXPORT_ISA {

// c[b][lanes] = (c[b][lanes] * rescale if kAccumulate) + sum_{i < n} a[b * stride + i * step] * rhs[i][lanes]
// for kRows values of b and kVecs vectors of lanes. `ld` is the distance in floats between rows of rhs, and of c.
template <int kVecs, int kRows, bool kAccumulate>
static QEXPORT_INLINE void product_block(const float* a, int64_t stride, int64_t step, const float* rhs, float* c,
                                         int64_t ld, int64_t n, const float* rescale) {
  vf acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int b = 0; b < kRows; ++b) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      acc[b][v] = kAccumulate ? load<vf>(c + b * ld + v * kLanes) * load<vf>(rescale + v * kLanes) : vf{};
    }
  }
  for (int64_t i = 0; i < n; ++i, a += step, rhs += ld) {
    vf r[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) r[v] = load<vf>(rhs + v * kLanes);
#pragma GCC unroll 16
    for (int b = 0; b < kRows; ++b) {
      const float x = a[b * stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[b][v] += r[v] * x;
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < kRows; ++b) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + b * ld + v * kLanes, acc[b][v]);
  }
}

// All `rows` values of b, in blocks of kBlock, then 4, 2, 1.
template <int kVecs, bool kAccumulate>
static QEXPORT_INLINE void product_rows(const float* a, int64_t stride, int64_t step, const float* rhs, float* c, int64_t ld,
                                        int64_t n, int64_t rows, const float* rescale) {
  int64_t b = 0;
  for (; b + kBlock <= rows; b += kBlock) {
    product_block<kVecs, kBlock, kAccumulate>(a + b * stride, stride, step, rhs, c + b * ld, ld, n, rescale);
  }
  for (; b + 4 <= rows; b += 4) {
    product_block<kVecs, 4, kAccumulate>(a + b * stride, stride, step, rhs, c + b * ld, ld, n, rescale);
  }
  for (; b + 2 <= rows; b += 2) {
    product_block<kVecs, 2, kAccumulate>(a + b * stride, stride, step, rhs, c + b * ld, ld, n, rescale);
  }
  for (; b < rows; ++b) {
    product_block<kVecs, 1, kAccumulate>(a + b * stride, stride, step, rhs, c + b * ld, ld, n, rescale);
  }
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
static __attribute__((noinline)) void value_product(const float* v_rows, int64_t v_stride, const float* p, float* o_t,
                                                    int64_t ld, int64_t v_head_size, int64_t keys, int vecs,
                                                    const float* rescale) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2) {
    product_rows<2, true>(v_rows, 1, v_stride, p + v * kLanes, o_t + v * kLanes, ld, keys, v_head_size,
                          rescale + v * kLanes);
  }
  if (v < vecs) {
    product_rows<1, true>(v_rows, 1, v_stride, p + v * kLanes, o_t + v * kLanes, ld, keys, v_head_size,
                          rescale + v * kLanes);
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
