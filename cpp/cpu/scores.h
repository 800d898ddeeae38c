// Scores of a block of rows against a run of keys: the product, softcap, and the mask.
#pragma once

#include "microkernel.h"
#include "query_rows.h"

namespace qexport {
namespace QEXPORT_ISA {

// Elements row[0 .. n) of a mask as numbers to add to the scores, n <= kLanes; the other lanes are 0.
static QEXPORT_INLINE vf load_bias(DType type, const char* row, int64_t n) {
  if (type != DType::boolean) return load_part(type, row, n);
  typedef uint8_t vb __attribute__((vector_size(kLanes)));
  vb x = vb{} + static_cast<uint8_t>(1);
  if (n == kLanes) {
    x = load<vb>(row);
  } else {
    __builtin_memcpy(&x, row, static_cast<size_t>(n));
  }
  return __builtin_convertvector(x, vi) == 0 ? splat(-kInf) : vf{};
}

// What a mask does to a tile of keys: no row attends to any of them, all scores stay as they are, or it must be applied.
enum class MaskEffect { all_masked, none, some };

// The effect of a tile of a boolean mask, by its bytes alone: most tiles of a padding mask are all true or all false.
static MaskEffect boolean_effect(const Rows& rows, int64_t j0, int64_t count) {
  constexpr uint64_t kTrue = 0x0101010101010101u;
  uint64_t any = 0, all = kTrue;
  for (int64_t r = 0; r < (rows.shared_mask ? 1 : rows.count); ++r) {
    for (int64_t j = 0; j < count; j += 8) {
      uint64_t word = 0;
      const int64_t n = lesser<int64_t>(8, count - j);
      if (n == 8) {
        __builtin_memcpy(&word, rows.mask[r] + j0 + j, 8);
        all &= word;
      } else {
        __builtin_memcpy(&word, rows.mask[r] + j0 + j, static_cast<size_t>(n));
        all &= word | ~(kTrue >> (64 - 8 * n));
      }
      any |= word;
    }
    if (any && all != kTrue) return MaskEffect::some;
  }
  return any ? MaskEffect::none : MaskEffect::all_masked;
}

// bias[j][lane] for the keys j0 .. j0 + count, where the effect is `some`. Keys from mask.len on, which no row's range
// holds, get any number.
static MaskEffect mask_bias(const AttentionMask& mask, const Rows& rows, int64_t j0, int64_t count, float* bias,
                            int64_t ld) {
  const int64_t known = mask.len - j0, bytes = element_size(mask.type);
  if (mask.type == DType::boolean && known >= count) {
    const MaskEffect effect = boolean_effect(rows, j0, count);
    if (effect != MaskEffect::some) return effect;
  }
  vf highest = splat(-kInf);
  vu set{};
  const auto part = [&](int64_t r, int64_t j) QEXPORT_INLINE_LAMBDA {
    const int64_t n = lesser<int64_t>(kLanes, lesser(count, known) - j);
    if (n <= 0) return vf{};
    const vf x = load_bias(mask.type, rows.mask[r] + (j0 + j) * bytes, n);
    highest = max(n == kLanes ? x : vf{}, highest);
    set |= bits_of(x);
    return x;
  };
  if (rows.shared_mask) {
    for (int64_t j = 0; j < count; j += kLanes) {
      const vf x = part(0, j);
      for (int64_t i = 0; i < lesser<int64_t>(kLanes, count - j); ++i) {
        for (int64_t r = 0; r < ld; r += kLanes) store(bias + (j + i) * ld + r, splat(x[i]));
      }
    }
  } else {
    for (int64_t r = 0; r < ld; r += kLanes) {
      for (int64_t j = 0; j < count; j += kLanes) {
        vf m[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) m[lane] = part(r + lane < rows.count ? r + lane : 0, j);
        transpose(m);
        for (int64_t i = 0; i < lesser<int64_t>(kLanes, count - j); ++i) store(bias + (j + i) * ld + r, m[i]);
      }
    }
  }
  if (!lane_bits(highest > -kInf)) return MaskEffect::all_masked;
  return lane_bits(set != 0) ? MaskEffect::some : MaskEffect::none;
}

static void apply_softcap(float* s, int64_t n, float softcap) {
  const float inverse = 1.0f / softcap;
  for (int64_t i = 0; i < n; i += kLanes) store(s + i, tanh(load<vf>(s + i) * inverse) * softcap);
}

// Whether some row does not attend to some of the keys j0 .. j0 + count by its range alone.
static bool ranged(const Rows& rows, int64_t j0, int64_t count) {
  return j0 < rows.common_begin || j0 + count > rows.common_end;
}

// Adds the bias, in units of `unit`, and puts -inf where a row does not attend; selects, so that a NaN under the mask does
// not leak. A finite bias that is beyond float32 in that unit stays finite: it may be that of all keys.
static void apply_mask(const Rows& rows, int64_t j0, int64_t count, const float* bias, float* s, int64_t ld,
                       float unit = 1.0f) {
  const bool by_range = ranged(rows, j0, count);
  if (!by_range && !bias) return;
  for (int v = 0; v < rows.vecs; ++v) {
    const vi lo = load<vi>(rows.lo + v * kLanes), hi = load<vi>(rows.hi + v * kLanes);
    const float* b = bias ? bias + v * kLanes : nullptr;
    for (int64_t j = 0; j < count; ++j) {
      vf x = load<vf>(s + j * ld + v * kLanes);
      vi allowed = vi{} == 0;
      if (b) {
        const vf add = load<vf>(b + j * ld);
        allowed &= add != -kInf;
        x += min(max(splat(-kLargest), add * unit), splat(kLargest));
      }
      if (by_range) {
        const vi key = splat(static_cast<int32_t>(j0 + j));
        allowed &= (key >= lo) & (key < hi);
      }
      store(s + j * ld + v * kLanes, allowed ? x : splat(-kInf));
    }
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
