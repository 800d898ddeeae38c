// The twins of wgmma.cuh, products of warpgroups. They are made when they are waited for, as late as they may, of what is in
// shared memory then; accumulators hold what they held until then.
#pragma once

#include "emulation_units.h"

namespace qexport {
namespace cuda {

// Where the bytes lie that a matrix in shared memory ("Matrix descriptor" of the PTX manual) has at a place without swizzle.
inline const char* swizzled(uint64_t matrix, int place) {
  if (matrix >> 62 != 1) emulation::die("a matrix without the swizzle of 128 bytes");
  const int at = static_cast<int>(matrix & 0x3fff) * 16 + place;
  return emulation::shared + (at ^ (at >> 3 & 0x70));
}
// The sixteen numbers of a row that the product sums over.
inline void read_row(uint16_t (&to)[16], uint64_t matrix, int row) {
  const int stride = static_cast<int>(matrix >> 32 & 0x3fff) * 16;
  for (int half = 0; half < 2; ++half) {
    const char* const from = swizzled(matrix, row / 8 * stride + row % 8 * 128 + 16 * half);
    const uint4 chunk = *reinterpret_cast<const uint4*>(from);
    std::memcpy(to + 8 * half, &chunk, 16);
  }
}
// Two neighbours of a row, where the product sums over the rows.
inline uint32_t read_pair(uint64_t matrix, int row, int column) {
  const int panel = static_cast<int>(matrix >> 16 & 0x3fff) * 16, stride = static_cast<int>(matrix >> 32 & 0x3fff) * 16;
  const int place = column / 64 * panel + row / 8 * stride + row % 8 * 128 + column % 64 * 2;
  return *reinterpret_cast<const uint32_t*>(swizzled(matrix, place));
}

// Adds the product of the lane's rows with a matrix of 8 * kCount columns to d.
template <class T, int kCount, bool kKeys>
void add_product(const emulation::Product& product, float* d) {
  const int lane = emulation::block->now->lane, warp = emulation::block->now->warp % 4;
  uint16_t left[2][16], right[16];
  for (int i = 0; i < 2; ++i) {
    if constexpr (kKeys) {
      read_row(left[i], product.a, 16 * warp + lane / 4 + 8 * i);
    } else {
      std::memcpy(left[i], product.rows[i], sizeof(left[i]));
    }
  }
  for (int n = 0; n < kCount; ++n) {
    const int column = 8 * n + lane % 4 * 2;
    uint32_t pair[16];
    for (int k = 0; k < 16 && !kKeys; ++k) pair[k] = read_pair(product.b, k, column);
    for (int e = 0; e < 2; ++e) {
      if constexpr (kKeys) read_row(right, product.b, column + e);
      float sum[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float b = half_at<T>(kKeys ? right[k] : pair[k], kKeys ? 0 : e);
        for (int i = 0; i < 2; ++i) sum[i] += half_at<T>(left[i][k], 0) * b;
      }
      for (int i = 0; i < 2; ++i) d[4 * n + 2 * i + e] = (product.adds ? d[4 * n + 2 * i + e] : 0.0f) + sum[i];
    }
  }
}
template <class T, int kCount, bool kKeys>
void start_product(emulation::Product product) {
  product.run = add_product<T, kCount, kKeys>;
  if (emulation::kRaces) {  // shared memory is read from now on
    float nowhere[4 * kCount] = {};
    product.run(product, nowhere);
  }
  emulation::start_product(product);
}

inline void wgmma_fence() { emulation::warp_meet("wgmma_fence", emulation::Order::kNone); }
inline void wgmma_shared_fence() {}
inline void wgmma_commit() { emulation::close_products(); }
template <int kPending>
void wgmma_wait() {
  emulation::finish_products(kPending);
}
template <int kCount>
void wgmma_hold(float (&)[kCount][4]) {}

template <class T, int kCount>
void wgmma_keys(float (&d)[kCount][4], uint64_t a, uint64_t b, int accumulate, T) {
  emulation::Product product{};
  product.d = d[0], product.a = a, product.b = b, product.adds = accumulate != 0;
  start_product<T, kCount, true>(product);
}
template <class T, int kCount>
void wgmma_values(float (&d)[kCount][4], const uint32_t (&a)[4], uint64_t b, T) {
  struct Fragment {
    uint32_t x[4];
  };
  emulation::Product product{};
  product.d = d[0], product.b = b, product.adds = true;
  product.registers = a;
  std::memcpy(product.kept, a, sizeof(a));
  const int self = emulation::block->now->lane;
  const auto* all = emulation::exchange("wgmma_values", Fragment{{a[0], a[1], a[2], a[3]}});
  for (int j = 0; j < 4; ++j) {
    const Fragment from = emulation::from_slot<Fragment>(all[self / 4 * 4 + j]);
    for (int i = 0; i < 4; ++i) std::memcpy(&product.rows[i % 2][2 * j + i / 2 * 8], &from.x[i], 4);
  }
  start_product<T, kCount, false>(product);
}

}  // namespace cuda
}  // namespace qexport
