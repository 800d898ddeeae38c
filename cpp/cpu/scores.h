// Scores of a block of rows against a run of keys: the product, softcap, and the mask.
#pragma once

#include "microkernel.h"
#include "rows.h"

namespace qexport {
namespace QEXPORT_ISA {

static QEXPORT_INLINE float mask_value(const AttentionMask& mask, const char* row, int64_t j) {
  switch (mask.type) {
    case DType::boolean:
      return row[j] ? 0.0f : -kInf;
    case DType::f32: {
      float x;
      __builtin_memcpy(&x, row + j * 4, 4);
      return x;
    }
    default: {
      uint16_t half;
      __builtin_memcpy(&half, row + j * 2, 2);
      const vh x = half - vh{};
      return mask.type == DType::f16 ? from_f16(x)[0] : from_bf16(x)[0];
    }
  }
}

// bias[j][lane] for keys j0 .. j0 + count (one column of kLanes equal lanes when the rows share their mask). Keys from
// mask.len on are outside every row's range and get -inf. False: no row attends to any of these keys.
static bool mask_bias(const AttentionMask& mask, const Rows& rows, int64_t j0, int64_t count, float* bias, int64_t ld) {
  bool any = false;
  const int64_t known = lesser(count, mask.len - j0);
  const int64_t n_rows = rows.shared_mask ? 1 : rows.count;
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t j = 0; j < known; ++j) {
      const float x = mask_value(mask, rows.mask[r], j0 + j);
      bias[j * ld + r] = x;
      any = any || x != -kInf;
    }
    for (int64_t j = greater<int64_t>(known, 0); j < count; ++j) bias[j * ld + r] = -kInf;
  }
  if (rows.shared_mask) {
    for (int64_t j = 0; j < count; ++j) store(bias + j * ld, splat(bias[j * ld]));
  } else {
    for (int64_t r = n_rows; r < rows.vecs * kLanes; ++r) {
      for (int64_t j = 0; j < count; ++j) bias[j * ld + r] = -kInf;
    }
  }
  return any;
}

static void apply_softcap(float* s, int64_t n, float softcap) {
  const float inverse = 1.0f / softcap;
  for (int64_t i = 0; i < n; i += kLanes) store(s + i, tanh(load<vf>(s + i) * inverse) * softcap);
}

// Adds the bias and puts -inf where a row does not attend; selects, so that a NaN under the mask does not leak.
static void apply_mask(const Rows& rows, int64_t j0, int64_t count, const float* bias, float* s, int64_t ld) {
  const bool ranged = j0 < rows.common_begin || j0 + count > rows.common_end;
  for (int v = 0; v < rows.vecs; ++v) {
    const vi lo = load<vi>(rows.lo + v * kLanes), hi = load<vi>(rows.hi + v * kLanes);
    const float* b = bias ? bias + (rows.shared_mask ? 0 : v * kLanes) : nullptr;
    for (int64_t j = 0; j < count; ++j) {
      vf x = load<vf>(s + j * ld + v * kLanes);
      vi allowed = vi{} == 0;
      if (b) {
        const vf add = load<vf>(b + j * ld);
        allowed &= add != -kInf;
        x += add;
      }
      if (ranged) {
        const vi key = splat(static_cast<int32_t>(j0 + j));
        allowed &= (key >= lo) & (key < hi);
      }
      store(s + j * ld + v * kLanes, allowed ? x : splat(-kInf));
    }
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
