// The loop of flash attention on warpgroups.
#pragma once

#include "flash_steps.cuh"
#include "wgmma.cuh"

namespace qexport {
namespace cuda {

// The loop of attend on warpgroups: the products of a block with V run beside the softmax of the next. Below sm_90a, where a
// warp has its own products, nothing runs beside anything and the result is the same. A block of K comes one turn before the
// same block of V.
template <class Tile>
__device__ __forceinline__ void flash_start_products(float (&s)[1][Tile::kKeys / 8][4], const char* queries,
                                                     const char* keys) {
#if QEXPORT_WGMMA
  // Of the first lane, so that the compiler knows it to be the same for all.
  const int group = Tile::kQueries == 64 ? 0 : __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 128, 0);
  const uint64_t a = wgmma_matrix(queries + group * (64 * 128), 16), b = wgmma_matrix(keys, 16);
  wgmma_hold(s[0]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Tile::kHead / 16; ++k) {
    wgmma_keys(s[0], wgmma_further(a, k / 4 * (Tile::kQueries * 128) + k % 4 * 32),
               wgmma_further(b, k / 4 * (Tile::kKeys * 128) + k % 4 * 32), k > 0, typename Tile::T{});
  }
  wgmma_commit();
#else
  flash_products<Tile>(s, [&](uint32_t (&a)[1][4], int k) { flash_load_queries<Tile>(a, queries, k); }, keys);
#endif
}
template <class Tile>
__device__ __forceinline__ void flash_start_values(FlashState<Tile>& state, const uint32_t (&p)[Tile::kKeys / 16][1][4],
                                                   const char* values) {
#if QEXPORT_WGMMA
  const uint64_t b = wgmma_matrix(values, Tile::kKeys * 128);
  wgmma_hold(state.o[0]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
    wgmma_values(state.o[0], p[k][0], wgmma_further(b, k * (16 * 128)), typename Tile::T{});
  }
  wgmma_commit();
#else
  flash_values<Tile>(state, p, values);
#endif
}
// Waits for what was started, but for the last kPending.
template <int kPending, int kCount>
__device__ __forceinline__ void flash_finish(float (&d)[kCount][4]) {
#if QEXPORT_WGMMA
  wgmma_wait<kPending>();
  wgmma_hold(d);
#else
  (void)d;
#endif
}
// Own copies have come and others may read them.
__device__ __forceinline__ void flash_exchange() {
  cp_async_wait<0>();
#if QEXPORT_WGMMA
  wgmma_shared_fence();
#endif
  __syncthreads();
}

template <class Tile, class Blocks>
__device__ __forceinline__ void flash_attend_warpgroups(FlashState<Tile>& state, const char* queries, char* keys,
                                                        char* values, int count, float factor, Blocks& blocks) {
  static_assert(Tile::kRowTiles == 1 && Tile::kThreads % 128 == 0 && Tile::kHead % 64 == 0);
  const auto copy_key = [&](int block) {
    if (block < count) flash_copy_keys<Tile>(keys + block % 2 * Tile::kKeyBytes, block, blocks);
  };
  const bool hides = blocks.hides();
  const auto copy_value = [&](int block) {
    flash_copy_values<Tile>(values + block % 2 * Tile::kKeyBytes, block, blocks,
                            [&](int row) { return !hides || !blocks.hidden(block, row); });
  };
  float s[1][Tile::kKeys / 8][4], fade[2];
  uint32_t p[Tile::kKeys / 16][1][4];
  flash_exchange();
  copy_key(1);
  if (!blocks.plain(0)) blocks.prepare(0);
  copy_value(0);
  cp_async_commit();
  flash_start_products<Tile>(s, queries, keys);
  flash_finish<0>(s[0]);
  float left = flash_scores<Tile>(s, factor, 0, blocks);
  flash_weights<Tile>(state, s, left);
  flash_pack<Tile>(p, s);
  for (int block = 1; block < count; ++block) {
    flash_exchange();  // K of this block and V of the one before are there, nobody reads those before any more
    copy_key(block + 1);
    if (!blocks.plain(block)) blocks.prepare(block);
    copy_value(block);
    cp_async_commit();
    flash_start_products<Tile>(s, queries, keys + block % 2 * Tile::kKeyBytes);
    flash_start_values(state, p, values + (block - 1) % 2 * Tile::kKeyBytes);
    flash_finish<1>(s[0]);
    left = flash_scores<Tile>(s, factor, block, blocks);
    const bool moved = flash_move(state, s, left, fade);
    flash_exp2(state, s, left);
    flash_finish<0>(state.o[0]);
    if (moved) flash_fade(state, fade);
    flash_pack<Tile>(p, s);
  }
  flash_exchange();
  flash_start_values(state, p, values + (count - 1) % 2 * Tile::kKeyBytes);
  flash_finish<0>(state.o[0]);
}

}  // namespace cuda
}  // namespace qexport
