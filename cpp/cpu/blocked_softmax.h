// Online softmax of a tile of scores in base 2, which leaves the probabilities in the form that value_blocks reads.
#pragma once

#include "block_products.h"

namespace qexport {
namespace QEXPORT_ISA {

// The running maximum only moves when it is passed by this much (in powers of two): until then 2^(s - m) may rise to 2^8,
// which costs no accuracy, and nothing has to be rescaled.
constexpr float kSlack = 8.0f;

static QEXPORT_INLINE vf tile_maximum(const float* s, int64_t ld, int64_t count) {
  vf most[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};  // four chains: one would wait for itself
  for (int64_t j = 0; j < count; j += 4, s += 4 * ld) {
    for (int i = 0; i < 4; ++i) most[i] = max(load<vf>(s + i * ld), most[i]);
  }
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

#if defined(QEXPORT_LOW_PRECISION)
// 2^(y + 1/2) for y <= 8, plus half a unit of the last place of bfloat16: its upper half is the rounded number.
// 2^-126 in place of what is smaller, -inf included. NaN stays NaN.
static QEXPORT_INLINE vu exp2_to_bf16(vf y) {
  const vf clamped = max(splat(-126.0f), y);
  const vf n = (vf)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = clamped - n;
  // The degree-3 polynomial of least relative error (7.5e-5) on [-1/2, 1/2], which lies in [1, 2], where half a unit is
  // 2^-8.
  vf poly = splat(0.07802417f);
  poly = poly * r + 0.34310401f;
  poly = poly * r + 0.98041919f;
  poly = poly * r + (1.41411184f + 0.00390625f);
  return bits_of(poly) + ((vu)_mm512_cvtps_epi32((__m512)n) << 23);
}
#endif

// Turns s[count][ld], count a multiple of kBlockKeys, into p = 2^(s - m), and updates the running maximum m and sum l of
// each lane. alpha = 2^(m_old - m); returns whether it differs from 1 in any lane.
static __attribute__((noinline)) bool exp2_scores(Precision precision, float* s, int64_t ld, int64_t count, int vecs,
                                                  float* m, float* l, float* alpha, float* p) {
  bool moved = false;
  for (int at = 0; at < vecs * kLanes; at += kLanes) {
    const vf highest = tile_maximum(s + at, ld, count), m_old = load<vf>(m + at);
    const vf m_new = highest > m_old + kSlack ? highest : m_old;
    // Where no key has been allowed yet the maximum is -inf; 0 in its place keeps -inf - m from being NaN.
    const vf origin = m_new == -kInf ? vf{} : m_new;
    vf total{};
    if (precision == Precision::fp32) {
      for (int64_t j = 0; j < count; ++j) {
        const vf e = exp2_nonpositive(load<vf>(s + j * ld + at) - origin);
        total += e;
        store(p + j * ld + at, e);
      }
    } else {
#if defined(QEXPORT_LOW_PRECISION)
      const vf shift = origin + 0.5f, ones = float_of(vu{} + 0x3F803F80u);
      for (int64_t j = 0; j < count; j += 2) {
        const vu lo = exp2_to_bf16(load<vf>(s + j * ld + at) - shift);
        const vu hi = exp2_to_bf16(load<vf>(s + (j + 1) * ld + at) - shift);
        const vf pair = float_of((lo >> 16) | (hi & 0xFFFF0000u));
        // The sum is that of the rounded numbers, so that rounding them changes the mean of V, not its weight.
        total = (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)pair, (__m512bh)ones);
        store(p + j / 2 * ld + at, pair);
      }
#endif
    }
    const vf factor = exp2_nonpositive(m_old - origin);
    moved |= lane_bits(m_new != m_old) != 0;
    store(m + at, m_new);
    store(l + at, load<vf>(l + at) * factor + total);
    store(alpha + at, factor);
  }
  return moved;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
