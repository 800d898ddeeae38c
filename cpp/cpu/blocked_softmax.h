// Scores of blocks and their online softmax in one.
#pragma once

#include <type_traits>

#include "block_products.h"
#include "query_rows.h"
#include "tile_softmax.h"

namespace qexport {
namespace QEXPORT_ISA {

// The score of a sum of products; int8 has a scale per key and per query.
static QEXPORT_INLINE vf score_of(vf sum, const float*, vf) { return sum; }
static QEXPORT_INLINE vf score_of(vi sum, const float* scale, vf q_scale) { return to_float(sum) * *scale * q_scale; }

// What write_pair wants taken from its arguments.
template <class Math>
constexpr float kShift = std::is_same<Math, Fp32Math>::value ? 0.0f : kPairShift;

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
#elif defined(QEXPORT_LOW_PRECISION)
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

}  // namespace QEXPORT_ISA
}  // namespace qexport
