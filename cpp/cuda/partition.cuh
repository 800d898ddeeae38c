// The smallest of some keys, and a list divided by them; the threads of a team work on one list.
#pragma once

#include "team.cuh"

namespace qexport {
namespace cuda {

// The bits of a float as an integer that grows with it.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// Shared memory of a team.
struct TeamPartition {
  uint32_t* histogram;  // (kDigits), zeros between two uses; begins on 16 bytes
  uint32_t* found;      // (2)
  uint32_t* warp;       // (warps)
};
// Of a block that is one team.
struct PartitionShared {
  alignas(16) uint32_t histogram[kDigits];
  uint32_t found[2], warp[kWarp];
};

// The smallest k of some keys are those below `key` and the first `equal` of those that equal it.
struct Cut {
  uint32_t key;
  int32_t equal;
};

__device__ __forceinline__ bool first_by(Cut cut, uint32_t key, int32_t equals_before) {
  return key < cut.key || (key == cut.key && equals_before < cut.equal);
}

// The digit of number k by a histogram, which becomes zeros, and how many come before that digit; by one warp.
__device__ inline void find_digit(uint32_t* histogram, uint32_t k, uint32_t* found) {
  constexpr int kEach = kDigits / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint4* own = reinterpret_cast<uint4*>(histogram + lane * kEach);
  __align__(16) uint32_t bins[kEach];
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) reinterpret_cast<uint4*>(bins)[i] = own[i], own[i] = uint4{0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) mine += bins[i];
  uint32_t end = mine;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, end, delta);
    if (lane >= delta) end += other;
  }
  uint32_t before = end - mine;
  if (k <= before || k > end) return;
  int digit = lane * kEach;
  bool over = false;
#pragma unroll
  for (int i = 0; i < kEach - 1; ++i) {
    over = over || before + bins[i] >= k;
    if (!over) before += bins[i], ++digit;
  }
  found[0] = static_cast<uint32_t>(digit), found[1] = before;
}

// Radix selection, 1 <= k <= count, or count = 0. A thread has kEach keys on the way at once.
template <int kEach>
__device__ inline Cut find_cut(const Team& team, const uint32_t* key, int32_t count, int32_t k, const TeamPartition& s) {
  uint32_t prefix = 0, known = 0;  // the higher digits of the key sought, and a mask of them
  for (int bits = 32 - kDigitBits; bits >= 0; bits -= kDigitBits) {
    for (int32_t base = team.thread; base < count; base += kEach * team.threads()) {
      uint32_t own[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int32_t i = base + e * team.threads();
        own[e] = i < count ? key[i] : 0;
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const bool matches = base + e * team.threads() < count && ((own[e] ^ prefix) & known) == 0;
        if (matches) atomicAdd(&s.histogram[(own[e] >> bits) & (kDigits - 1)], 1u);
      }
    }
    team.sync();
    if (team.warp() == 0) find_digit(s.histogram, static_cast<uint32_t>(k), s.found);
    team.sync();
    prefix |= s.found[0] << bits, known |= uint32_t{kDigits - 1} << bits;
    k -= static_cast<int32_t>(s.found[1]);
  }
  return {prefix, k};
}

// By all threads of a block. 0 <= k <= count.
__device__ inline Cut find_cut(const uint32_t* key, int32_t count, int32_t k, PartitionShared& s) {
  if (k == 0) return {0, 0};
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += static_cast<int>(blockDim.x)) s.histogram[i] = 0;
  __syncthreads();
  return find_cut<1>(whole_block(), key, count, k, {s.histogram, s.found, s.warp});
}

// Entry e of a thread of a team is number (warp * kEach + e) * 32 + lane of some entries.
template <int kEach>
__device__ __forceinline__ int32_t entry_of(const Team& team, int e) {
  return (team.warp() * kEach + e) * kWarp + team.lane();
}

// How many entries before each of a thread's are in two sets, and how many there are.
template <int kEach>
struct EachRanks {
  int32_t before[2][kEach], all[2];
};
// warp_counts: (warps). A barrier must follow before the next call.
template <int kEach>
__device__ __forceinline__ EachRanks<kEach> rank_in_team(const Team& team, const bool (&first)[kEach],
                                                         const bool (&second)[kEach], uint32_t* warp_counts) {
  EachRanks<kEach> ranks;
  const unsigned lower = (1u << team.lane()) - 1;
  int32_t own[2] = {0, 0};  // of the warp
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const unsigned sets[2] = {__ballot_sync(kFullWarp, first[e]), __ballot_sync(kFullWarp, second[e])};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      ranks.before[which][e] = own[which] + __popc(sets[which] & lower);
      own[which] += __popc(sets[which]);
    }
  }
  if (team.lane() == 0) warp_counts[team.warp()] = static_cast<uint32_t>(own[0]) | static_cast<uint32_t>(own[1]) << 16;
  team.sync();
  const uint32_t counts = team.lane() < team.warps ? warp_counts[team.lane()] : 0;  // of a warp; halves are added as one
  const uint32_t before = warp_sum(team.lane() < team.warp() ? counts : 0u), all = warp_sum(counts);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    ranks.before[0][e] += static_cast<int32_t>(before & 0xffffu), ranks.before[1][e] += static_cast<int32_t>(before >> 16);
  }
  ranks.all[0] = static_cast<int32_t>(all & 0xffffu), ranks.all[1] = static_cast<int32_t>(all >> 16);
  return ranks;
}

// By all threads of a block, one entry each.
struct Ranks {
  int32_t before[2], all[2];
};
__device__ inline Ranks rank_in_block(bool first, bool second, uint32_t* warp_counts) {
  const EachRanks<1> ranks = rank_in_team<1>(whole_block(), {first}, {second}, warp_counts);
  return {{ranks.before[0][0], ranks.before[1][0]}, {ranks.all[0], ranks.all[1]}};
}

// By all threads of a block: take(at, i) for the k smallest of key[0 .. count) (ties: the first), number `at` of them in
// order being key i. 0 <= k <= count. What is taken may lie where the keys before it did.
template <class Take>
__device__ __forceinline__ void take_smallest(const uint32_t* key, int32_t count, int32_t k, PartitionShared& s,
                                              const Take& take) {
  const Cut cut = find_cut(key, count, k, s);
  int32_t below = 0, equal = 0;  // so far
  for (int32_t base = 0; base < count; base += static_cast<int32_t>(blockDim.x)) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    const uint32_t mine = i < count ? key[i] : 0;
    const Ranks ranks = rank_in_block(i < count && mine < cut.key, i < count && mine == cut.key, s.warp);
    const int32_t equals_before = equal + ranks.before[1];
    if (i < count && first_by(cut, mine, equals_before)) {
      take(below + ranks.before[0] + min(equals_before, cut.equal), i);
    }
    below += ranks.all[0], equal += ranks.all[1];
    __syncthreads();
  }
}

// The first `left` places of list[0 .. count) become those with the smallest key, each side in its old order; ties: the
// earlier. `side` has room for the others. 1 <= left <= count, or both are 0. `most`: the largest count of a team.
template <int kEach>
__device__ inline void partition(const Team& team, int32_t* list, const uint32_t* key, int32_t* side, int32_t count,
                                 int32_t left, int32_t most, const TeamPartition& s) {
  static_assert(kEach * 1024 < 1 << 16, "ranks of a step fit 16 bits");
  const Cut cut = find_cut<kEach>(team, key, count, left, s);
  int32_t below = 0, equal = 0;  // so far
  for (int32_t base = 0; base < most; base += kEach * team.threads()) {
    uint32_t own[kEach];
    int32_t entry[kEach];
    bool is_below[kEach], is_equal[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int32_t i = base + entry_of<kEach>(team, e);
      own[e] = i < count ? key[i] : 0, entry[e] = i < count ? list[i] : 0;
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const bool valid = base + entry_of<kEach>(team, e) < count;
      is_below[e] = valid && own[e] < cut.key, is_equal[e] = valid && own[e] == cut.key;
    }
    const EachRanks<kEach> ranks = rank_in_team(team, is_below, is_equal, s.warp);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int32_t i = base + entry_of<kEach>(team, e);
      const int32_t equals_before = equal + ranks.before[1][e];
      const int32_t firsts_before = below + ranks.before[0][e] + min(equals_before, cut.equal);
      if (i >= count) continue;
      // A place of the list that another thread has yet to read is never written to.
      if (first_by(cut, own[e], equals_before)) {
        list[firsts_before] = entry[e];
      } else {
        side[i - firsts_before] = entry[e];
      }
    }
    below += ranks.all[0], equal += ranks.all[1];
    team.sync();
  }
  for (int32_t i = team.thread; i < count - left; i += team.threads()) list[left + i] = side[i];
}

}  // namespace cuda
}  // namespace qexport
