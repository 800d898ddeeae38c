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

// Of a lane: two rows and two columns of a product, whose elements four and eight lanes hold.
struct Fragments {
  uint32_t a[4], b[2];
};
// Every lane computes its own four elements: of rows lane / 4 and 8 more, times columns 2 * (lane % 4) and the next.
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int self = emulation::block->now->lane;
  float A[2][16], B[2][16];
  const auto* all = emulation::exchange("mma_16816", Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  for (int j = 0; j < 4; ++j) {
    const auto from = emulation::from_slot<Fragments>(all[self / 4 * 4 + j]);
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) A[i % 2][2 * j + e + i / 2 * 8] = half_at<T>(from.a[i], e);
    }
  }
  for (int j = 0; j < 8; ++j) {
    const auto from = emulation::from_slot<Fragments>(all[self % 4 * 8 + j]);
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) B[j / 4][2 * (j % 4) + e + i * 8] = half_at<T>(from.b[i], e);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) c[i] += A[i / 2][k] * B[i % 2][k];
  }
}

inline float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }
// What a unit drops, of its operands and of its sums.
inline void mma_1688(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int self = emulation::block->now->lane;
  double A[2][8], B[2][8];
  const auto* all = emulation::exchange("mma_1688", Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int j = 0; j < 4; ++j) {
    const auto from = emulation::from_slot<Fragments>(all[self / 4 * 4 + j]);
    for (int i = 0; i < 4; ++i) A[i % 2][j + i / 2 * 4] = tf32(from.a[i]);
  }
  for (int j = 0; j < 8; ++j) {
    const auto from = emulation::from_slot<Fragments>(all[self % 4 * 8 + j]);
    for (int i = 0; i < 2; ++i) B[j / 4][j % 4 + i * 4] = tf32(from.b[i]);
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) sum += A[i / 2][k] * B[i % 2][k];
    c[i] = static_cast<float>(sum);
    if (std::fabs(c[i]) > std::fabs(sum)) c[i] = std::nextafter(c[i], 0.0f);
  }
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
