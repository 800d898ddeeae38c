// Online softmax of a tile of scores in base 2, which leaves the probabilities in the form that value_blocks reads.
#pragma once

#include <type_traits>

#include "block_products.h"
#include "query_rows.h"

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
#endif

// The score of a sum of products; int8 has a scale per key and per query.
static QEXPORT_INLINE vf score_of(vf sum, const float*, vf) { return sum; }
static QEXPORT_INLINE vf score_of(vi sum, const float* scale, vf q_scale) { return to_float(sum) * *scale * q_scale; }

// What write_pair wants taken from its arguments.
#if defined(QEXPORT_LOW_PRECISION)
template <class Math>
constexpr float kShift = std::is_same<Math, Fp32Math>::value ? 0.0f : kPairShift;
#else
template <class Math>
constexpr float kShift = 0.0f;
#endif

// The probabilities of keys 2 i and 2 i + 1, from scores less m + kShift, in the form that value_blocks reads; returns
// the next row of p.
template <class Math, int kVecs>
static QEXPORT_INLINE float* write_pair(const vf (&lo)[kVecs], const vf (&hi)[kVecs], vf (&total)[kVecs], float* p,
                                        int64_t ld) {
  for (int v = 0; v < kVecs; ++v) {
#if defined(QEXPORT_LOW_PRECISION)
    if (!std::is_same<Math, Fp32Math>::value) {
      store(p + v * kLanes, exp2_pair(lo[v], hi[v], total[v]));
      continue;
    }
#endif
    const vf e_lo = exp2(lo[v]), e_hi = exp2(hi[v]);
    total[v] += e_lo + e_hi;
    store(p + v * kLanes, e_lo);
    store(p + ld + v * kLanes, e_hi);
  }
  return std::is_same<Math, Fp32Math>::value ? next_row(next_row(p, ld), ld) : next_row(p, ld);
}

// score_blocks and exp2_scores in one, with the m of earlier tiles: scores never leave the registers.
// highest[lanes] = max(s - m), total[lanes] = sum of p.
template <class Math, int kVecs>
static __attribute__((noinline)) void exp2_score_list(const KvBlocks& blocks, const float* keys, const int32_t* list,
                                                      int64_t count, const float* q_t, const float* q_scale, const float* m,
                                                      int64_t ld, float* p, float* highest, float* total) {
  const int64_t steps = query_elements(blocks);
  vf shift[kVecs], scale[kVecs], most[kVecs], sum_p[kVecs] = {};
  for (int v = 0; v < kVecs; ++v) {
    shift[v] = load<vf>(m + v * kLanes) + kShift<Math>;
    scale[v] = load<vf>(q_scale + v * kLanes);
    most[v] = splat(-kInf);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* k = keys + list[i] * blocks.key_block;
    for_row_blocks(kBlockKeys, [&](int64_t j, auto rows) QEXPORT_INLINE_LAMBDA {
      constexpr int kRows = decltype(rows)::value;
      typename Math::Accumulator sum[kRows][kVecs] = {};
      const float* extra = k + kBlockKeys * blocks.key_row + j;  // of int8 keys
      start_scores(sum, extra);
      accumulate<Math>(sum, k + j * blocks.key_row, blocks.key_row, 1, q_t, ld, steps);
#pragma GCC unroll 8
      for (int b = 0; b + 1 < kRows; b += 2) {
        vf lo[kVecs], hi[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          lo[v] = score_of(sum[b][v], extra + b, scale[v]) - shift[v];
          hi[v] = score_of(sum[b + 1][v], extra + b + 1, scale[v]) - shift[v];
          most[v] = max(hi[v], max(lo[v], most[v]));
        }
        p = write_pair<Math>(lo, hi, sum_p, p, ld);
      }
    });
  }
  for (int v = 0; v < kVecs; ++v) {
    store(highest + v * kLanes, most[v] + kShift<Math>);
    store(total + v * kLanes, sum_p[v]);
  }
}

#if defined(QEXPORT_TILES)
// The same on tiles, but highest[lanes] = the exponent of `total`, which is at most 7 more. The products of a block of keys
// are asked for before the softmax of the block before it, which the vectors compute meanwhile.
template <int kVecs>
static __attribute__((noinline)) void exp2_score_tiles(const KvBlocks& blocks, const float* keys, const int32_t* list,
                                                       int64_t count, const float* q_t, const float* m, int64_t ld, float* p,
                                                       float* highest, float* total) {
  constexpr int64_t kLd = kVecs * kLanes;
  alignas(64) float scores[2][kBlockKeys * kLd], start[kLd];
  vf sum_p[kVecs] = {};
  for (int v = 0; v < kVecs; ++v) store(start + v * kLanes, -load<vf>(m + v * kLanes));
  const auto products = [&](int64_t i) QEXPORT_INLINE_LAMBDA {
    score_tiles<kVecs>(blocks, keys + list[i] * blocks.key_block, q_t, ld, start);
    store_tiles<kVecs>(scores[i % 2], kLd);
  };
  products(0);
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) products(i + 1);
    const float* s = scores[i % 2];
#pragma GCC unroll 2
    for (int64_t j = 0; j < kBlockKeys; j += 2, s += 2 * kLd, p += ld) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        store(p + v * kLanes, exp2_pair(load<vf>(s + v * kLanes), load<vf>(s + kLd + v * kLanes), sum_p[v]));
      }
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    store(highest + v * kLanes, (vf)_mm512_maskz_getexp_ps(0xFFFF, (__m512)sum_p[v]));
    store(total + v * kLanes, sum_p[v]);
  }
}
#endif

// The probabilities of blocks that every row attends to, from the m of earlier tiles. Returns false, with nothing but p
// changed, where that m is too small for 2^(s - m), or still -inf: then score_blocks and exp2_scores must do it. Where it
// succeeds, m is raised where it is passed by more than kSlack, l belongs to the new m, and alpha is as in exp2_scores but
// for the next tile: p still belongs to the old m.
static bool exp2_score_blocks(const KvBlocks& blocks, const float* keys, const int32_t* list, int64_t count,
                              const float* q_t, const float* q_scale, int64_t ld, int vecs, float* m, float* l, float* alpha,
                              float* p, bool& moved) {
  alignas(64) float highest[kMaxRows], total[kMaxRows];
  for (int at = 0; at < vecs * kLanes; at += kLanes) {
    if (lane_bits(load<vf>(m + at) == -kInf)) return false;
  }
  for_lanes(vecs, [&](int at, auto n) QEXPORT_INLINE_LAMBDA {
    constexpr int kVecs = decltype(n)::value;
    const auto run = [&](auto math) QEXPORT_INLINE_LAMBDA {
      exp2_score_list<decltype(math), kVecs>(blocks, keys, list, count, q_t + at, q_scale + at, m + at, ld, p + at,
                                             highest + at, total + at);
    };
#if defined(QEXPORT_TILES)
    if (blocks.tiles) {
      return exp2_score_tiles<kVecs>(blocks, keys, list, count, q_t + at, m + at, ld, p + at, highest + at, total + at);
    }
#endif
#if defined(QEXPORT_LOW_PRECISION)
    if (blocks.precision == Precision::bf16) return run(Bf16Math{});
    if (blocks.precision == Precision::int8) return run(Int8Math{});
#endif
    run(Fp32Math{});
  });
  for (int at = 0; at < vecs * kLanes; at += kLanes) {
    if (lane_bits(load<vf>(highest + at) > 2 * kSlack)) return false;
  }
  moved = false;
  for (int at = 0; at < vecs * kLanes; at += kLanes) {
    const vf rise = load<vf>(highest + at);
    const vf step = rise > kSlack ? rise : vf{}, factor = exp2(-step);
    store(m + at, load<vf>(m + at) + step);
    store(l + at, (load<vf>(l + at) + load<vf>(total + at)) * factor);
    store(alpha + at, factor);
    moved |= lane_bits(step != 0.0f) != 0;
  }
  return true;
}

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
