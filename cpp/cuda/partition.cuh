// The smallest of a block's keys, and a list divided by them; all threads of a block work on one list.
#pragma once

#include "common.cuh"

namespace qexport {
namespace cuda {

// The bits of a float as an integer that grows with it.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr int kDigits = 256;
struct PartitionShared {
  uint32_t histogram[kDigits];
  uint32_t warp[kWarp];
  uint32_t bin, before;
};

// The smallest k of some keys are those below `key` and the first `equal` of those that equal it.
struct Cut {
  uint32_t key;
  int32_t equal;
};

__device__ __forceinline__ bool first_by(Cut cut, uint32_t key, int32_t equals_before) {
  return key < cut.key || (key == cut.key && equals_before < cut.equal);
}

// Radix selection over eight bits at a time, beginning with those in which the keys differ at all. 0 <= k <= count.
__device__ inline Cut find_cut(const uint32_t* key, int32_t count, int32_t k, PartitionShared& s) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (k == 0) return {0, 0};
  uint32_t low = 0xffffffffu, high = 0;
  for (int32_t i = thread; i < count; i += threads) low = min(low, key[i]), high = max(high, key[i]);
  high = block_max(high, s.warp);
  low = ~block_max(~low, s.warp);
  __syncthreads();      // what comes next may write s.warp at once: there are no digits where all keys are alike
  uint32_t prefix = 0;  // of the key sought, less `low`
  for (int bits = high > low ? 32 - __clz(static_cast<int>(high - low)) : 0; bits > 0;) {
    const int step = min(bits, 8);
    const int whole = bits;
    bits -= step;
    for (int i = thread; i < kDigits; i += threads) s.histogram[i] = 0;
    __syncthreads();
    for (int32_t i = thread; i < count; i += threads) {
      const uint64_t offset = key[i] - low;
      if (offset >> whole == prefix) atomicAdd(&s.histogram[(offset >> bits) & ((1u << step) - 1)], 1u);
    }
    __syncthreads();
    if (thread < kWarp) {  // the bin that holds number k
      constexpr int kEach = kDigits / kWarp;
      uint32_t mine = 0;
      for (int i = 0; i < kEach; ++i) mine += s.histogram[thread * kEach + i];
      uint32_t end = mine;
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const uint32_t other = __shfl_up_sync(kFullWarp, end, delta);
        if (thread >= delta) end += other;
      }
      uint32_t before = end - mine;
      if (before < static_cast<uint32_t>(k) && static_cast<uint32_t>(k) <= end) {
        int bin = thread * kEach;
        while (before + s.histogram[bin] < static_cast<uint32_t>(k)) before += s.histogram[bin++];
        s.bin = static_cast<uint32_t>(bin), s.before = before;
      }
    }
    __syncthreads();
    prefix = prefix << step | s.bin;
    k -= static_cast<int32_t>(s.before);
  }
  return {low + prefix, k};
}

// How many threads of the block before this one are in each of two sets, and how many threads are.
struct Ranks {
  int32_t before[2], all[2];
};
// A barrier must follow before the next call.
__device__ inline Ranks rank_in_block(bool first, bool second, uint32_t* warp_counts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned firsts = __ballot_sync(kFullWarp, first), seconds = __ballot_sync(kFullWarp, second);
  if (lane == 0) warp_counts[warp] = static_cast<uint32_t>(__popc(firsts)) | static_cast<uint32_t>(__popc(seconds)) << 16;
  __syncthreads();
  uint32_t before = 0, all = 0;  // at most 1024 in each half
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; ++i) {
    if (i == warp) before = all;
    all += warp_counts[i];
  }
  const unsigned lower = (1u << lane) - 1;
  return {{static_cast<int32_t>(before & 0xffffu) + __popc(firsts & lower),
           static_cast<int32_t>(before >> 16) + __popc(seconds & lower)},
          {static_cast<int32_t>(all & 0xffffu), static_cast<int32_t>(all >> 16)}};
}

// The first `left` places of list[0 .. count) become those with the smallest key, each side in its old order; ties: the
// earlier. `side` has room for the others. 1 <= left <= count.
__device__ inline void partition(int32_t* list, const uint32_t* key, int32_t* side, int32_t count, int32_t left,
                                 PartitionShared& s) {
  const Cut cut = find_cut(key, count, left, s);
  int32_t below = 0, equal = 0;  // so far
  for (int32_t base = 0; base < count; base += static_cast<int32_t>(blockDim.x)) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    const uint32_t mine = i < count ? key[i] : 0;
    const int32_t entry = i < count ? list[i] : 0;
    const Ranks ranks = rank_in_block(i < count && mine < cut.key, i < count && mine == cut.key, s.warp);
    const int32_t equals_before = equal + ranks.before[1];
    const int32_t firsts_before = below + ranks.before[0] + min(equals_before, cut.equal);
    if (i < count) {
      // A place of the list that a later thread has yet to read is never written to.
      if (first_by(cut, mine, equals_before)) {
        list[firsts_before] = entry;
      } else {
        side[i - firsts_before] = entry;
      }
    }
    below += ranks.all[0], equal += ranks.all[1];
    __syncthreads();
  }
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count - left; i += static_cast<int32_t>(blockDim.x)) {
    list[left + i] = side[i];
  }
}

}  // namespace cuda
}  // namespace qexport
