// Reading and writing elements of any float type as float32.
#pragma once

#include <cstddef>

#include "qexport/dtype.h"
#include "simd.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int64_t bytes_of(DType type) {
  return type == DType::f64 ? 8 : type == DType::f32 ? 4 : type == DType::boolean ? 1 : 2;
}
static QEXPORT_INLINE int64_t element_size(DType type) { return bytes_of(type); }

// Elements src[0 .. n) as float32, n <= kLanes; the other lanes are 0.
static QEXPORT_INLINE vf load_part(DType type, const char* src, int64_t n) {
  if (type == DType::f32) {
    if (n == kLanes) return load<vf>(src);
    vf x{};
    __builtin_memcpy(&x, src, static_cast<size_t>(n) * 4);
    return x;
  }
  vh x{};
  if (n == kLanes) {
    x = load<vh>(src);
  } else {
    __builtin_memcpy(&x, src, static_cast<size_t>(n) * 2);
  }
  return type == DType::f16 ? from_f16(x) : from_bf16(x);
}

// The first n lanes in the type of `dst`.
static QEXPORT_INLINE void store_part(DType type, char* dst, vf x, int64_t n) {
  if (type == DType::f32) {
    if (n == kLanes) return store(dst, x);
    __builtin_memcpy(dst, &x, static_cast<size_t>(n) * 4);
    return;
  }
  const vh h = type == DType::f16 ? to_f16(x) : to_bf16(x);
  if (n == kLanes) return store(dst, h);
  __builtin_memcpy(dst, &h, static_cast<size_t>(n) * 2);
}

// `n` elements of `src` as float32. `dst` holds n rounded up to kLanes.
static inline void read_row(DType type, const char* src, int64_t n, float* dst) {
  const int64_t step = kLanes * element_size(type);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes, src += step) store(dst + i, load_part(type, src, kLanes));
  if (i < n) store(dst + i, load_part(type, src, n - i));
}

// `n` float32 elements (readable up to n rounded up to kLanes) in the type of `dst`.
static inline void write_row(DType type, const float* src, int64_t n, char* dst) {
  const int64_t step = kLanes * element_size(type);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes, dst += step) store_part(type, dst, load<vf>(src + i), kLanes);
  if (i < n) store_part(type, dst, load<vf>(src + i), n - i);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
