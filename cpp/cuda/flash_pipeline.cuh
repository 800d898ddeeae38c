// The loop of flash attention with a warpgroup that copies and others that compute (FlashAttention-3: Shah et al., arXiv
// 2407.08608): nobody waits at a barrier of the block, and while one warpgroup computes weights another has the tensor
// cores.
#pragma once

#include "barriers.cuh"
#include "flash_warpgroups.cuh"

namespace qexport {
namespace cuda {

// kConsumers warpgroups of 64 queries each, and one more that holds no rows. kStages blocks of K and of V are under way.
// With kSplits so many warpgroups share their queries and take the blocks in turn: few blocks of threads are done sooner.
template <class T_, int kHead_, int kConsumers_, int kKeys_, int kStages_, bool kTurns_ = true, int kSplits_ = 1>
struct PipelineTile {
  static constexpr bool kWarpgroups = true, kPipeline = true, kTurns = kTurns_ && kSplits_ == 1;
  using T = T_;
  static constexpr int kHead = kHead_, kRowTiles = 1, kKeys = kKeys_, kStages = kStages_, kConsumers = kConsumers_;
  static constexpr int kGroup = 128, kThreads = kGroup * (kConsumers + 1), kCopiers = kGroup, kBlocksPerProcessor = 1;
  static constexpr int kSplits = kSplits_, kRowGroups = kConsumers / kSplits, kQueries = 64 * kRowGroups;
  static_assert(kSplits == 1 || kConsumers == kSplits);
  static_assert(kStages >= 2 && kStages >= 2 * kSplits - 1, "a slot that nobody would free");
  static constexpr int kRowBytes = kHead * 2, kQueryPanel = kQueries, kKeyPanel = kKeys;
  static constexpr int kQueryBytes = kQueries * kRowBytes, kKeyBytes = kKeys * kRowBytes;
  static constexpr int kBarrierBytes = 4 * kStages * 8;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kKeyBytes + kBarrierBytes;
  // Registers of a thread, 65536 in all.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32, kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  // What a block starts with: as many for each thread, in steps of 8.
  static_assert(kGroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536 / kThreads / 8 * 8 * kThreads,
                "who takes registers would wait for ever");
};

// Where a block lies in a ring of kStages slots, and the parity of the slot's phase then.
template <class Tile>
struct FlashCursor {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance(int blocks) {
    slot += blocks;
    if (slot >= Tile::kStages) slot -= Tile::kStages, parity ^= 1;
  }
};

// Blocks of K (kind 0) and of V (kind 1) in shared memory, and who may have which: slots 0..kStages-1 are K's.
template <class Tile>
struct FlashRing {
  using Cursor = FlashCursor<Tile>;
  static constexpr int kSlots = 2 * Tile::kStages;
  char* blocks;
  uint64_t* full;  // then as many that say that a slot is free

  __device__ __forceinline__ explicit FlashRing(char* shared)
      : blocks(shared + Tile::kQueryBytes), full(reinterpret_cast<uint64_t*>(blocks + kSlots * Tile::kKeyBytes)) {}
  // All threads call this; the barriers are ready behind a barrier of the block. Threads tell that a slot is full, warps
  // that it is free.
  __device__ __forceinline__ void open() const {
    if (threadIdx.x > 0) return;
#pragma unroll
    for (int i = 0; i < 2 * kSlots; ++i) phase_init(full + i, i < kSlots ? Tile::kGroup : 4 * Tile::kRowGroups);
  }
  __device__ __forceinline__ static int slot(int kind, const Cursor& at) { return kind * Tile::kStages + at.slot; }
  __device__ __forceinline__ char* block(int slot) const { return blocks + slot * Tile::kKeyBytes; }
  // Only who reads orders the copies before its products: for who copies, that would be a wait for all that is under way.
  __device__ __forceinline__ const char* wait_full(int kind, const Cursor& at) const {
    phase_wait(full + slot(kind, at), at.parity);
#if QEXPORT_WGMMA
    wgmma_shared_fence();
#endif
    return block(slot(kind, at));
  }
  __device__ __forceinline__ void wait_free(int kind, const Cursor& at) const {
    phase_wait(full + kSlots + slot(kind, at), at.parity ^ 1);
  }
  __device__ __forceinline__ void give_back(int kind, const Cursor& at) const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) phase_arrive(full + kSlots + slot(kind, at));
  }
};

// The warpgroup that copies.
template <class Tile, class Blocks>
__device__ __forceinline__ void flash_produce(char* shared, const FlashRing<Tile>& ring, int count, const Blocks& blocks) {
  if (blocks.scale >= 0.0f) flash_copy_queries<Tile>(shared, blocks);
  FlashCursor<Tile> key_at, value_at;
  for (int block = 0; block <= count; ++block) {
    if (block < count) {
      ring.wait_free(0, key_at);
      const int slot = ring.slot(0, key_at);
      flash_copy_keys<Tile>(ring.block(slot), block, blocks);
      phase_arrive_after_copies(ring.full + slot);
      key_at.advance(1);
    }
    if (block > 0) {
      ring.wait_free(1, value_at);
      const int slot = ring.slot(1, value_at);
      flash_copy_values<Tile>(ring.block(slot), block - 1, blocks);
      phase_arrive_after_copies(ring.full + slot);
      value_at.advance(1);
    }
  }
  // No thread ends before its copies have arrived.
  cp_async_commit();
  cp_async_wait<0>();
}

// The warpgroups that compute, of which this one takes the blocks `first`, `first` + kSplits, ...
template <class Tile, class Blocks>
__device__ __forceinline__ void flash_consume(FlashState<Tile>& state, const char* queries, const FlashRing<Tile>& ring,
                                              int first, int count, float factor, Blocks& blocks) {
  // They take turns with the tensor cores: each starts its products when the one before it has.
  const int group = static_cast<int>(threadIdx.x) / Tile::kGroup, next = (group + 1) % Tile::kConsumers;
  const auto pass_turn = [&] {
    if (Tile::kTurns) numbered_arrive(1 + next, 2 * Tile::kGroup);
  };
  float s[1][Tile::kKeys / 8][4], fade[2];
  uint32_t p[Tile::kKeys / 16][1][4];
  FlashCursor<Tile> key_at, value_at;  // of the next K, and of the V that products were started with last
  key_at.advance(first), value_at.advance(first);
  bool moved = false;
  const auto load = [&](uint32_t (&a)[1][4], int k) { flash_load_queries<Tile>(a, queries, k); };
  // Turns products with K into weights.
  const auto weigh = [&](int block, const char* keys) {
    const bool plain = blocks.plain(block);
    float sum[2];
    const Fit fit = block > first && plain ? flash_exp2_as_before(state, s, factor, sum) : Fit::lost;
    moved = fit != Fit::good;
    if (fit == Fit::large) {
      flash_lower<Tile>(state, s, sum, fade);
    } else if (fit == Fit::lost) {
      if (!plain) {
        blocks.prepare(block);
      } else if (block > first) {
        flash_products<Tile>(s, load, keys);  // once more, by each warp for itself
      }
      const float left = flash_scores<Tile>(s, factor, block, blocks);
      moved = flash_move(state, s, left, fade);
      flash_exp2(state, s, left);
    }
    ring.give_back(0, key_at);
    key_at.advance(Tile::kSplits);
  };
  // Takes the weights up once the products with V before them are done.
  const auto settle = [&] {
    flash_finish<0>(state.o[0]);
    if (moved) flash_fade(state, fade);
    flash_pack<Tile>(p, s);
  };
  if (next == 0 && count > 1) pass_turn();
  const char* keys = ring.wait_full(0, key_at);
  flash_start_products<Tile>(s, queries, keys);
  flash_finish<0>(s[0]);
  // Products with K of a block, and with V of the one before, which go on.
  const auto start = [&](int block) {
    // This wait keeps the compiler from waiting for the products with V before it has computed the weights.
    keys = ring.wait_full(0, key_at);
    settle();
    if (block > first + Tile::kSplits) {
      ring.give_back(1, value_at);
      value_at.advance(Tile::kSplits);
    }
    if (Tile::kTurns) numbered_wait(1 + group, 2 * Tile::kGroup);
    flash_start_products<Tile>(s, queries, keys);
    flash_start_values(state, p, ring.wait_full(1, value_at));
    if (next != 0 || block + 1 < count) pass_turn();
    flash_finish<1>(s[0]);
  };
  if constexpr (Tile::kSplits > 1) {
    // Short calls: `weigh` is there once, as nothing of a kernel is in the caches of instructions behind another one.
    for (int block = first;;) {
      weigh(block, keys);
      block += Tile::kSplits;
      if (block >= count) break;
      start(block);
    }
  } else {
    // Long ones: the loop begins with the products, from which the compiler goes on to the weights without a jump.
    weigh(first, keys);
    for (int block = first + 1; block < count; ++block) {
      start(block);
      weigh(block, keys);
    }
  }
  const FlashCursor<Tile> before = value_at;
  if (count > first + Tile::kSplits) value_at.advance(Tile::kSplits);
  const char* const values = ring.wait_full(1, value_at);
  settle();
  // The others may have more blocks to come.
  if (Tile::kSplits > 1 && count > first + Tile::kSplits) ring.give_back(1, before);
  flash_start_values(state, p, values);
  flash_finish<0>(state.o[0]);
}

// Joins the states of the warpgroups that share their queries to that of the first. False: this is another one. `shared` is
// what copies went to.
template <class Tile>
__device__ __forceinline__ bool flash_join_splits(FlashState<Tile>& state, char* shared, int split) {
  constexpr int kRows = FlashState<Tile>::kRows, kPairs = FlashState<Tile>::kPairs, kAll = kRows * (2 * kPairs + 2);
  constexpr int kThreads = Tile::kGroup * Tile::kRowGroups;
  static_assert((Tile::kSplits - 1) * kAll * kThreads * sizeof(float) <= 2 * Tile::kStages * Tile::kKeyBytes);
  float* const parts = reinterpret_cast<float*>(shared) + threadIdx.x % kThreads;
  const auto all_here = [] { numbered_wait(1, Tile::kGroup * Tile::kConsumers); };
  all_here();  // nobody reads copies any more
  if (split > 0) {
    float* to = parts + (split - 1) * kAll * kThreads;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      to[0] = state.most[i], to[kThreads] = state.sum[i], to += 2 * kThreads;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) to[0] = state.pair(i, n)[0], to[kThreads] = state.pair(i, n)[1], to += 2 * kThreads;
    }
  }
  all_here();
  if (split > 0) return false;
  const float* from = parts;
#pragma unroll
  for (int other = 1; other < Tile::kSplits; ++other) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float most = fmaxf(state.most[i], from[0]), base = most == -kInf ? 0.0f : most;
      const float mine = fast_exp2(state.most[i] - base), theirs = fast_exp2(from[0] - base);
      state.most[i] = most, state.sum[i] = fmaf(theirs, from[kThreads], mine * state.sum[i]), from += 2 * kThreads;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& o = state.pair(i, n)[e];
          o = fmaf(theirs, from[e * kThreads], mine * o);
        }
        from += 2 * kThreads;
      }
    }
  }
  return true;
}

// As `attend` of flash.cuh, of blocks that hide nothing. False: this thread holds no rows and is done.
template <class Tile, class Blocks>
__device__ __forceinline__ bool flash_attend_pipeline(FlashState<Tile>& state, char* shared, int count, Blocks& blocks) {
  const FlashRing<Tile> ring(shared);
  ring.open();
  // The maximum is taken of products before scaling, so that the scale must not be negative.
  if (blocks.scale < 0.0f && static_cast<int>(threadIdx.x) < Tile::kCopiers) {
    flash_copy_queries<Tile>(shared, blocks);
    cp_async_commit();
    cp_async_wait<0>();
    flash_negate<Tile>(shared);
#if QEXPORT_WGMMA
    wgmma_shared_fence();
#endif
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= Tile::kGroup * Tile::kConsumers) {
    set_registers<Tile::kProducerRegisters, false>();
    if (count > 0) flash_produce(shared, ring, count, blocks);
    return false;
  }
  set_registers<Tile::kConsumerRegisters, true>();
  const int split = Tile::kSplits > 1 ? static_cast<int>(threadIdx.x / (Tile::kGroup * Tile::kRowGroups)) : 0;
  if (split < count) flash_consume(state, shared, ring, split, count, fabsf(blocks.scale), blocks);
  if constexpr (Tile::kSplits > 1) return flash_join_splits(state, ring.blocks, split);
  return true;
}

}  // namespace cuda
}  // namespace qexport
