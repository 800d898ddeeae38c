// Scores in base 2, as the unit for exponents takes them: q . k times scale and log2(e).
#pragma once

#include <cfloat>

#include "attention.cuh"
#include "mma.cuh"

namespace qexport {
namespace cuda {

// What a score of base 2 becomes under softcap: cap * tanh(x / cap). Near 0, where 1 - t has lost its digits, x times the
// polynomial of the square of x / cap of least relative error (1.3e-8), as on the CPU: a cap far above all scores leaves
// them as they are.
__device__ __forceinline__ float capped_score(float x, float cap, float two_over_cap) {
  const float y = x * two_over_cap * (0.5f / kLog2E), square = y * y;
  if (square < 0.25f) {
    const float poly = fmaf(fmaf(fmaf(0.01713479f, square, -0.05298595f), square, 0.13324777f), square, -0.33333069f);
    return fmaf(x, square * poly, x);
  }
  const float t = fast_exp2(fabsf(x) * -two_over_cap);
  return copysignf(cap * kLog2E * __fdividef(1.0f - t, 1.0f + t), x);
}

// A bias in base 2. A finite one that is beyond float32 there stays finite: it may be that of all keys.
__device__ __forceinline__ float base2_bias(float x) {
  return x > -kInf ? fminf(fmaxf(x * kLog2E, -FLT_MAX), FLT_MAX) : -kInf;
}

}  // namespace cuda
}  // namespace qexport
