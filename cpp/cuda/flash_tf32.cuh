// Products of float32 on matrix units, which take TF32: 11 significant bits. Each number is the sum of two of those, a high
// part and a low one, but for 2^-23 of it, and of the four products of parts that of both low ones alone is left out: the
// error of a product is below 2^-21 |x x'|. Sums are of float32, but what units cut off where they add is always towards
// zero (Fasi et al., PeerJ Comput. Sci. 7:e330, 2021): the products with a low part are summed by themselves or first, and
// few others into one sum.
#pragma once

#include "flash_tile.cuh"

namespace qexport {
namespace cuda {

// Operands in two parts. The unit drops the low 13 bits, so that half of what they count for, added before, makes `high` the
// nearest; what it drops of `low` is one bit at most. An infinite x has no such parts and becomes NaN, as NaN does.
template <int kCount>
struct Tf32Pair {
  uint32_t high[kCount], low[kCount];
  __device__ __forceinline__ void set(int i, uint32_t x) {
    high[i] = x + 0x1000u;
    low[i] = __float_as_uint(__uint_as_float(x) - __uint_as_float(high[i] & 0xffffe000u));
  }
};

// s = Q K' of the warp's rows, as flash_products.
template <class Tile, class Load>
__device__ __forceinline__ void flash_products_tf32(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], const Load& load,
                                                    const char* keys) {
  constexpr int kRowTiles = Tile::kRowTiles;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const FlashLane<Tile::kRowBytes, Tile::kKeyPanel> place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  float rest[kRowTiles][Tile::kKeys / 8][4] = {};  // the products with a low part
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.0f;
  }
#pragma unroll 4
  for (int k = 0; k < Tile::kHead / 8; ++k) {
    uint32_t raw[kRowTiles][4];
    Tf32Pair<4> a[kRowTiles];
    load(raw, k);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[i].set(e, raw[i][e]);
    }
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 16; ++n) {
      uint32_t keys_raw[4];
      Tf32Pair<4> b;  // two of each of two groups of eight keys
      ldmatrix_x4(keys_raw, keys + place.at(n, k));
#pragma unroll
      for (int e = 0; e < 4; ++e) b.set(e, keys_raw[e]);
      const auto add = [&](auto& sums, auto left, auto right) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int t = 0; t < 2; ++t) mma_1688(sums[i][2 * n + t], a[i].*left, (b.*right)[2 * t], (b.*right)[2 * t + 1]);
        }
      };
      using Parts = Tf32Pair<4>;
      add(rest, &Parts::low, &Parts::high);  // products that wait for the same sum come apart
      add(s, &Parts::high, &Parts::high);
      add(rest, &Parts::high, &Parts::low);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][n][e] += rest[i][n][e];
    }
  }
}

// o += P V. A left operand has keys 0..3 and 4..7 of eight where an accumulator has the even and the odd ones, so keys are
// counted in this order: P stays where it is. Lanes that share a column then read rows of V that lie two apart, and all
// banks.
template <class Tile>
__device__ __forceinline__ void flash_values_tf32(FlashState<Tile>& state,
                                                  const float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                                  const char* values) {
  constexpr int kRowTiles = Tile::kRowTiles, kSteps = Tile::kKeys / 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  using Place = FlashLane<Tile::kRowBytes, Tile::kKeyPanel>;
  const Place places[2] = {Place(2 * (lane % 4), lane / 16), Place(2 * (lane % 4) + 1, lane / 16)};
  values += lane / 4 % 4 * 4;
  Tf32Pair<4> p[kSteps][kRowTiles];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) p[k][i].set(e, __float_as_uint(s[i][k][e % 2 * 2 + e / 2]));
    }
  }
  constexpr int kTogether = 2;  // groups of eight columns, so that sums do not wait for each other
#pragma unroll
  for (int n = 0; n < Tile::kHead / 8; n += kTogether) {
    float sum[kRowTiles][kTogether][4] = {};
    Tf32Pair<2> v[kSteps][kTogether];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = places[e].at(k / 2, n + t) + k % 2 * 8 * Tile::kRowBytes;
          v[k][t].set(e, *reinterpret_cast<const uint32_t*>(values + at));
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int t = 0; t < kTogether; ++t) mma_1688(sum[i][t], p[k][i].high, v[k][t].low[0], v[k][t].low[1]);
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int t = 0; t < kTogether; ++t) mma_1688(sum[i][t], p[k][i].low, v[k][t].high[0], v[k][t].high[1]);
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int t = 0; t < kTogether; ++t) mma_1688(sum[i][t], p[k][i].high, v[k][t].high[0], v[k][t].high[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state.o[i][n + t][e] += sum[i][t][e];
      }
    }
  }
}

}  // namespace cuda
}  // namespace qexport
