// The twins of mma.cuh, matrix units and asynchronous copies, and of barriers.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "emulation_builtins.h"

namespace qexport {
namespace cuda {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulation::shared);
}
inline uint32_t join_halves(uint16_t low, uint16_t high) { return uint32_t{high} << 16 | low; }
// What __half2float makes of all bits: computed for each operand it would take longer than the products.
inline const std::vector<float> float_of_half = [] {
  std::vector<float> all(1 << 16);
  for (size_t bits = 0; bits < all.size(); ++bits) {
    __half_raw raw;
    raw.x = static_cast<uint16_t>(bits);
    all[bits] = __half2float(raw);
  }
  return all;
}();
template <class T>
__forceinline__ float half_at(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  if constexpr (std::is_same<T, __half>::value) return float_of_half[bits];
  return __uint_as_float(uint32_t{bits} << 16);
}

// Products of a warp (emulation_mma.cc): one lane makes them for all, in the accumulators that each gives.
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto product = std::is_same<T, __half>::value ? emulation::multiply_half : emulation::multiply_bfloat16;
  emulation::multiply("mma_16816", {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, c}, product);
}
inline void mma_1688(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply("mma_1688", {{a[0], a[1], a[2], a[3]}, {b0, b1}, c}, emulation::multiply_tf32);
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
  const auto* slots = emulation::exchange("ldmatrix", row);
  const int self = emulation::block->now->lane;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r_index = transposed ? 2 * (self % 4) + e : self / 4, c_index = transposed ? self / 4 : 2 * (self % 4) + e;
      const char* base = emulation::from_slot<const char*>(slots[m * 8 + r_index]);
      if (reinterpret_cast<uintptr_t>(base) % 16) emulation::die("ldmatrix: a row is not aligned to 16 bytes");
      std::memcpy(&pair[e], base + 2 * c_index, 2);
    }
    r[m] = join_halves(pair[0], pair[1]);
  }
  emulation::warp_meet("ldmatrix", emulation::Order::kMemory);  // nobody writes the rows before all have read them
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, true); }
// Copies arrive when they are waited for, as late as they may.
inline void cp_async_16(void* dst, const void* src, bool valid) {
  if (reinterpret_cast<uintptr_t>(dst) % 16 || reinterpret_cast<uintptr_t>(src) % 16)
    emulation::die("cp_async: not aligned");
  emulation::start_copy(dst, valid ? src : nullptr);
}
inline void cp_async_commit() { emulation::close_copies(); }
template <int kPending>
void cp_async_wait() {
  emulation::finish_copies(kPending);
}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline void phase_init(uint64_t* barrier, int arrivals) { emulation::phase_init(barrier, arrivals); }
inline void phase_arrive(uint64_t* barrier) { emulation::phase_arrive(barrier); }
inline void phase_arrive_after_copies(uint64_t* barrier) {
  emulation::close_copies();
  emulation::finish_copies(0);
  emulation::phase_arrive(barrier);
}
inline void phase_wait(uint64_t* barrier, int parity) { emulation::phase_wait(barrier, parity); }
inline void numbered_wait(int id, int threads) { emulation::meet(emulation::numbered(id, threads)); }
inline void numbered_arrive(int id, int threads) { emulation::arrive(emulation::numbered(id, threads)); }

}  // namespace cuda
}  // namespace qexport
