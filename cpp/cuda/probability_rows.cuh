// What the kernels on rows of probabilities share: their elements, in float or double, and the check of a row.
#pragma once

#include "common.cuh"
#include "qexport/probability_rows.h"

namespace qexport {
namespace cuda {

constexpr double kInfinity = __builtin_huge_val();

__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ float to_real(__half x) { return to_float(x); }
__device__ __forceinline__ float to_real(__nv_bfloat16 x) { return to_float(x); }
__device__ __forceinline__ double to_real(double x) { return x; }

template <class T>
__device__ __forceinline__ T from_real(float x) {
  return from_float<T>(x);
}
template <class T>
__device__ __forceinline__ T from_real(double x) {
  return x;
}

template <class Real>
__device__ __forceinline__ Real not_a_number() {
  return static_cast<Real>(__builtin_nanf(""));
}

// x as it counts in the sum of its row: what is no probability makes that NaN.
__device__ __forceinline__ double summand(double x) { return x < 0.0 ? not_a_number<double>() : x; }

// Of the sum of such numbers: one, or zero.
__device__ __forceinline__ bool is_distribution(double sum, double tolerance) {
  const double off = sum - 1.0;
  return (off <= tolerance && -off <= tolerance) || sum == 0.0;
}

// What a block may have as dynamic shared memory, beside up to 8 KB that kernels declare.
inline size_t most_shared_bytes(const Device& device) {
  return device.shared_bytes > kSharedDeclared ? static_cast<size_t>(device.shared_bytes - kSharedDeclared) : 0;
}

}  // namespace cuda
}  // namespace qexport
