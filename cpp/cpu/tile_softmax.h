// Online softmax of a tile of scores in base 2, which leaves the probabilities as float32 or as pairs of bfloat16.
#pragma once

#include "kernels.h"
#include "microkernel.h"
#include "tiles.h"

namespace qexport {
namespace QEXPORT_ISA {

// The running maximum only moves when it is passed by this much (in powers of two): until then 2^(s - m) may rise to 2^8,
// which costs no accuracy, and nothing has to be rescaled.
constexpr float kSlack = 8.0f;

static QEXPORT_INLINE vf tile_maximum(const float* s, int64_t ld, int64_t count) {
  vf most[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};  // four chains: one would wait for itself
  int64_t j = 0;
  for (; j + 4 <= count; j += 4, s += 4 * ld) {
    for (int i = 0; i < 4; ++i) most[i] = max(load<vf>(s + i * ld), most[i]);
  }
  for (; j < count; ++j, s += ld) most[0] = max(load<vf>(s), most[0]);
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

#if defined(QEXPORT_LOW_PRECISION)
// exp2_pair: 2^(lo + kPairShift) and 2^(hi + kPairShift) in bfloat16, side by side, for lo, hi <= 120; adds both to `total`:
// the sum of the rounded numbers, so that rounding them changes which mean of V is taken, not its weight.
#if defined(QEXPORT_TILES)
// 2^y in bfloat16, in the upper half of each lane, for y <= 120; 0 below -126, NaN stays NaN. Beside products of tiles
// fused operations go through one port and additions through two, so that few operations count: 2^r is the polynomial below
// on [0, 1), which lies in [1, 2] as well.
static QEXPORT_INLINE vu exp2_bf16(vf y) {
  const vf r = (vf)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf poly = splat(0.07802417f);
  poly = poly * r + 0.22606776f;
  poly = poly * r + 0.69583331f;
  poly = poly * r + (0.99992523f + 0.00390625f);
  return bits_of((vf)_mm512_maskz_scalef_ps(0xFFFF, (__m512)poly, (__m512)y));
}

constexpr float kPairShift = 0.0f;

static QEXPORT_INLINE vf exp2_pair(vf lo, vf hi, vf& total) {
  const vu low = exp2_bf16(lo), high = exp2_bf16(hi);
  total += float_of(low & 0xFFFF0000u) + float_of(high & 0xFFFF0000u);
  // The upper halves of `low` become the lower halves of `high`.
  const __m512i upper = _mm512_set4_epi32(0x0F0E0F0E, 0x0B0A0B0A, 0x07060706, 0x03020302);
  return (vf)_mm512_mask_shuffle_epi8((__m512i)high, 0x3333333333333333u, (__m512i)low, upper);
}
#else
// y = n + r with |r| <= 1/2; y is at least -126, NaN stays NaN.
static QEXPORT_INLINE vf split_exponent(vf y, vf& n) {
  const vf clamped = max(splat(-126.0f), y);
  n = (vf)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return clamped - n;
}

// 2^(r + 1/2) for |r| <= 1/2, plus half a unit of the last place of bfloat16: the upper half is the rounded number. It is
// the degree-3 polynomial of least relative error (7.5e-5), which lies in [1, 2], where half a unit is 2^-8.
static QEXPORT_INLINE vu exp2_fraction(vf r) {
  vf poly = splat(0.07802417f);
  poly = poly * r + 0.34310401f;
  poly = poly * r + 0.98041919f;
  poly = poly * r + (1.41411184f + 0.00390625f);
  return bits_of(poly);
}

constexpr float kPairShift = 0.5f;
static QEXPORT_INLINE vf exp2_pair(vf lo, vf hi, vf& total) {
  vf n_lo, n_hi;
  const vu fraction_lo = exp2_fraction(split_exponent(lo, n_lo)), fraction_hi = exp2_fraction(split_exponent(hi, n_hi));
  const vu fractions = (fraction_lo >> 16) | (fraction_hi & 0xFFFF0000u);
  const vu exponents = (vu)_mm512_cvtps_epi32((__m512)(n_hi * 65536.0f + n_lo)) << 7;  // exact: 23 bits
  const vf pair = float_of(fractions + exponents);
  const vf ones = float_of(vu{} + 0x3F803F80u);
  total = (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)pair, (__m512bh)ones);
  return pair;
}

#endif
#else
constexpr float kPairShift = 0.0f;  // there are no pairs
#endif

// Turns s[count][ld], count even where p is bf16, into p = 2^(s - m), and updates the running maximum m and sum l of
// each lane. alpha is multiplied by 2^(m_old - m); returns whether that must be applied to what has been summed up so far.
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
        const vf e = exp2(load<vf>(s + j * ld + at) - origin);
        total += e;
        store(p + j * ld + at, e);
      }
    } else {
#if defined(QEXPORT_LOW_PRECISION)
      const vf shift = origin + kPairShift;
      for (int64_t j = 0; j < count; j += 2) {
        const vf lo = load<vf>(s + j * ld + at) - shift, hi = load<vf>(s + (j + 1) * ld + at) - shift;
        store(p + j / 2 * ld + at, exp2_pair(lo, hi, total));
      }
#endif
    }
    const vf factor = exp2(m_old - origin);
    const vf rescale = load<vf>(alpha + at) * factor;
    moved |= lane_bits((rescale != 1.0f) & (m_old != -kInf)) != 0;
    store(m + at, m_new);
    store(l + at, load<vf>(l + at) * factor + total);
    store(alpha + at, rescale);
  }
  return moved;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
