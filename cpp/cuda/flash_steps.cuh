// What the loop of flash attention does with a block of keys: products, softmax, products.
#pragma once

#include "flash_rows.cuh"
#include "flash_tf32.cuh"

namespace qexport {
namespace cuda {

// Bytes 32 k.. of the warp's rows of Q.
template <class Tile>
__device__ __forceinline__ void flash_load_queries(uint32_t (&a)[Tile::kRowTiles][4], const char* queries, int k) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), first = flash_warp<Tile>() * Tile::kRowTiles * 16;
  const FlashLane<Tile::kRowBytes, Tile::kQueryPanel> place(first + lane % 16, lane / 16);
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) ldmatrix_x4(a[i], queries + place.at(i, k));
}

// s = Q K' of the warp's rows. `load(a, k)` gives bytes 32 k.. of Q.
template <class Tile, class Load>
__device__ __forceinline__ void flash_products(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], const Load& load,
                                               const char* keys) {
  if constexpr (kTf32<Tile>) {
    flash_products_tf32<Tile>(s, load, keys);
  } else {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const FlashLane<Tile::kRowBytes, Tile::kKeyPanel> place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < Tile::kHead / 16; ++k) {
      uint32_t a[Tile::kRowTiles][4];
      load(a, k);
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + place.at(n, k));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) {
          mma_16816<typename Tile::T>(s[i][2 * n], a[i], left);
          mma_16816<typename Tile::T>(s[i][2 * n + 1], a[i], right);
        }
      }
    }
  }
}

// The maximum that weights are relative to may lag behind by this, so that o is rarely multiplied; 2^8 is no matter in fp16.
constexpr float kSlack = 8.0f;

// Moves the maximum of the rows where it has to, to the next whole number, and the sum with it. True: o is to be multiplied
// by `fade`, powers of 2, so that weights are rounded alike wherever the maximum is.
template <class Tile>
__device__ __forceinline__ bool flash_move(FlashState<Tile>& state, const float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                           float factor, float (&fade)[FlashState<Tile>::kRows]) {
  constexpr int kRows = FlashState<Tile>::kRows;
  float most[kRows];
  bool moves = false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    most[i] = s[i / 2][0][i % 2 * 2];
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
      most[i] = fmaxf(most[i], fmaxf(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
    }
    most[i] = fmaxf(most[i], __shfl_xor_sync(kFullWarp, most[i], 1));
    most[i] = fmaxf(most[i], __shfl_xor_sync(kFullWarp, most[i], 2)) * factor;
    moves = moves || most[i] > state.most[i] + kSlack;
  }
  if (!__any_sync(kFullWarp, moves)) return false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    most[i] = ceilf(fmaxf(most[i], state.most[i]));
    fade[i] = most[i] == -kInf ? 1.0f : fast_exp2(state.most[i] - most[i]);
    state.most[i] = most[i];
    state.sum[i] *= fade[i];
  }
  return true;
}
template <class Tile>
__device__ __forceinline__ void flash_fade(FlashState<Tile>& state, const float (&fade)[FlashState<Tile>::kRows]) {
#pragma unroll
  for (int i = 0; i < FlashState<Tile>::kRows; ++i) {
#pragma unroll
    for (int n = 0; n < FlashState<Tile>::kPairs; ++n) state.pair(i, n)[0] *= fade[i], state.pair(i, n)[1] *= fade[i];
  }
}

// Turns scores into 2^(factor * s - most), and adds them to the sum.
template <class Tile>
__device__ __forceinline__ void flash_exp2(FlashState<Tile>& state, float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                           float factor) {
#pragma unroll
  for (int i = 0; i < FlashState<Tile>::kRows; ++i) {
    const float base = state.most[i] == -kInf ? 0.0f : state.most[i];  // -inf - -inf would be NaN
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][n][e] = fast_exp2(fmaf(s[i / 2][n][e], factor, -base));
        sum += s[i / 2][n][e];
      }
    }
    state.sum[i] += sum;
  }
}

// What became of weights that are relative to the maximum of before.
enum class Fit { good, large, lost };

// As flash_move and flash_exp2, relative to the maximum of before, which saves finding that of the block. `sum` is that of
// the weights. Where some may leave fp16 they are `large`, and where they leave float32, or a row has no maximum yet,
// `lost`; then `state` is as it was.
template <class Tile>
__device__ __forceinline__ Fit flash_exp2_as_before(FlashState<Tile>& state, float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                                    float factor, float (&sum)[FlashState<Tile>::kRows]) {
  constexpr int kRows = FlashState<Tile>::kRows;
  constexpr float kMost = 4096.0f;
  bool good = true, finite = true;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sum[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][n][e] = fast_exp2(fmaf(s[i / 2][n][e], factor, -state.most[i]));
        sum[i] += s[i / 2][n][e];
      }
    }
    good = good && sum[i] <= kMost, finite = finite && sum[i] < 0x1p120f;  // false for NaN too
  }
  if (__any_sync(kFullWarp, !good)) return __any_sync(kFullWarp, !finite) ? Fit::lost : Fit::large;
#pragma unroll
  for (int i = 0; i < kRows; ++i) state.sum[i] += sum[i];
  return Fit::good;
}

// Moves the maximum so that large weights, with their sums, get small enough; o is to be multiplied by `fade`.
template <class Tile>
__device__ __forceinline__ void flash_lower(FlashState<Tile>& state, float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                            const float (&sum)[FlashState<Tile>::kRows],
                                            float (&fade)[FlashState<Tile>::kRows]) {
#pragma unroll
  for (int i = 0; i < FlashState<Tile>::kRows; ++i) {
    float most = fmaxf(sum[i], __shfl_xor_sync(kFullWarp, sum[i], 1));
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
    const float shift = most > 1.0f ? ceilf(log2f(most)) : 0.0f;
    fade[i] = fast_exp2(-shift);
    state.most[i] += shift, state.sum[i] = fmaf(state.sum[i], fade[i], sum[i] * fade[i]);
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) s[i / 2][n][e] *= fade[i];
    }
  }
}

// All of that: scores into weights.
template <class Tile>
__device__ __forceinline__ void flash_weights(FlashState<Tile>& state, float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                              float factor) {
  float fade[FlashState<Tile>::kRows];
  if (flash_move(state, s, factor, fade)) flash_fade(state, fade);
  flash_exp2(state, s, factor);
}

// Weights as the left operands of products: their accumulators lie as these do.
template <class Tile>
__device__ __forceinline__ void flash_pack(uint32_t (&p)[Tile::kKeys / 16][Tile::kRowTiles][4],
                                           const float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4]) {
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float (&c)[4] = s[i][2 * k + e / 2];
        p[k][i][e] = pack_pair(c[2 * (e % 2)], c[2 * (e % 2) + 1], typename Tile::T{});
      }
    }
  }
}

// o += P V.
template <class Tile>
__device__ __forceinline__ void flash_values(FlashState<Tile>& state,
                                             const uint32_t (&p)[Tile::kKeys / 16][Tile::kRowTiles][4], const char* values) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const FlashLane<Tile::kRowBytes, Tile::kKeyPanel> place(lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
#pragma unroll
    for (int n = 0; n < Tile::kHead / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + place.at(k, n));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        mma_16816<typename Tile::T>(state.o[i][2 * n], p[k][i], left);
        mma_16816<typename Tile::T>(state.o[i][2 * n + 1], p[k][i], right);
      }
    }
  }
}

template <class Tile>
__device__ __forceinline__ void flash_values(FlashState<Tile>& state, const float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4],
                                             const char* values) {
  if constexpr (kTf32<Tile>) {
    flash_values_tf32<Tile>(state, s, values);
  } else {
    uint32_t p[Tile::kKeys / 16][Tile::kRowTiles][4];
    flash_pack<Tile>(p, s);
    flash_values<Tile>(state, p, values);
  }
}

// Products into scores of a block that is prepared; returns what they are still to be multiplied by.
template <class Tile, class Blocks>
__device__ __forceinline__ float flash_scores(float (&s)[Tile::kRowTiles][Tile::kKeys / 8][4], float factor, int block,
                                              const Blocks& blocks) {
  if (blocks.plain(block)) return factor;
  const int first = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
    const auto at = [&](int m) -> float& { return s[i / 2][m / 2][i % 2 * 2 + m % 2]; };
#pragma unroll
    for (int m = 0; m < Tile::kKeys / 4; ++m) at(m) *= factor;
    blocks.template adjust<Tile::kKeys / 4>(block, FlashState<Tile>::row(i), at,
                                            [&](int m) { return 8 * (m / 2) + first + m % 2; });
  }
  return 1.0f;
}

}  // namespace cuda
}  // namespace qexport
