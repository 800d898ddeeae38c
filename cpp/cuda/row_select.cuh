// Which keys a row samples, and with which weight (docs/math.md, "Strategies").
#pragma once

#include "row_weights.cuh"

namespace qexport {
namespace cuda {

constexpr int32_t kOne = 1 << 24;   // T: probability 1 in fixed point
constexpr int kCandidates = kStep;  // keys among which the k-th largest is looked for in registers

// Marks the k > 0 largest x_i (ties: lowest index; never x_i = 0) as taken, and leaves `rest` and `largest` of the others.
// The k-th largest is found by bisection of the bit patterns, which order as the floats do since x >= 0: over the row until
// few keys are left between the bounds, then in registers. `candidates`: kCandidates words of the warp's own.
__device__ __forceinline__ void take_largest(Row& row, int k, int32_t* candidates) {
  // One rounding apart from the x_i that it bounds.
  const int32_t most = __float_as_int(row.largest) + 2;
  int32_t threshold = 0;  // the largest found t with #{x >= t} >= k
  // Keys that reach the threshold, and those beyond the candidates [threshold, threshold + 2^bit).
  int reach = row.n, beyond = 0, bit = 31;
  while (bit > 0 && reach != k && reach - beyond > kCandidates) {
    const int32_t trial = threshold | (1 << --bit);
    if (trial > most) continue;
    int count = 0;
    for (int i = 4 * lane_id(); i < row.n; i += kStep) {
      const KeyQuad x = row.x(load_quad(row.e + i), i);
      for (int u = 0; u < 4; ++u) count += __float_as_int(x.v[u]) >= trial;
    }
    count = warp_sum(count);
    if (count >= k) {
      threshold = trial, reach = count;
    } else {
      beyond = count;
    }
  }
  if (reach != k && bit > 0) {
    const uint32_t width = 1u << bit;  // 2^31 at most: all there are
    int found = 0;
    for (int first = 0; first < row.n; first += kStep) {
      const int i = first + 4 * lane_id();
      const KeyQuad x = row.x_or_zero(row.e_or_zero(i), i);
      for (int u = 0; u < 4; ++u) {
        const int32_t bits = __float_as_int(x.v[u]);
        const bool within = i < row.n && bits >= threshold && static_cast<uint32_t>(bits - threshold) < width;
        const unsigned all = __ballot_sync(kFullWarp, within);
        if (within) candidates[found + __popc(all & lanes_below())] = bits;
        found += __popc(all);
      }
    }
    __syncwarp();
    int32_t own[4];
    for (int u = 0; u < 4; ++u) own[u] = lane_id() + u * kWarp < found ? candidates[lane_id() + u * kWarp] : -1;
    __syncwarp();
    while (bit > 0 && reach != k) {
      const int32_t trial = threshold | (1 << --bit);
      int count = 0;
      for (int u = 0; u < 4; ++u) count += own[u] >= trial;
      count = beyond + warp_sum(count);
      if (count >= k) threshold = trial, reach = count;
    }
  }
  int ties = reach == k ? k : k - beyond;  // how many keys equal to the threshold still fit, in index order
  PartSum rest;
  float largest = 0.0f;
  for (int first = 0; first < row.n; first += kStep) {
    const int i = first + 4 * lane_id();
    KeyQuad e = row.e_or_zero(i);
    const KeyQuad x = row.x_or_zero(e, i);
    int equal = 0, before = 0;  // keys at the threshold: of this lane, and in front of them
    for (int u = 0; u < 4; ++u) equal += __float_as_int(x.v[u]) == threshold;
    if (__any_sync(kFullWarp, equal)) {
      const int reached = static_cast<int>(inclusive_scan(static_cast<uint32_t>(equal)));
      before = reached - equal;
      equal = __shfl_sync(kFullWarp, reached, kWarp - 1);
    }
    float left = 0.0f;
    bool changed = false;
    for (int u = 0; u < 4; ++u) {
      const int32_t bits = __float_as_int(x.v[u]);
      const bool tie = bits == threshold && before++ < ties;
      if (bits > 0 && (bits > threshold || tie)) {
        e.v[u] = -e.v[u], changed = true;
      } else {
        left += x.v[u];
        largest = x.v[u] > largest ? x.v[u] : largest;
      }
    }
    ties -= equal;
    if (changed) store_quad(row.e + i, e);
    rest.add(left);
  }
  row.rest = rest.warp();
  row.largest = warp_max(largest);
  __syncwarp();
}

// c with sum_i min(1, c x_i) = budget - taken over the keys not taken beforehand. 1 where there are no such keys.
__device__ __forceinline__ float inclusion_factor(const Row& row, float budget, int taken) {
  float rest = row.rest;
  if (!(rest > 0.0f)) return 1.0f;
  float c = (budget - static_cast<float>(taken)) / rest;
  int certain = taken;
  bool active = c * row.largest >= 1.0f;
  while (active) {
    int count = 0;
    PartSum others;
    for (int i = 4 * lane_id(); i < row.n; i += kStep) {
      const KeyQuad e = load_quad(row.e + i), x = row.x(e, i);
      float left = 0.0f;
      for (int u = 0; u < 4; ++u) {
        const bool sure = e.v[u] < 0.0f || c * x.v[u] >= 1.0f;
        count += sure;
        left += sure ? 0.0f : x.v[u];
      }
      others.add(left);
    }
    rest = others.warp();
    count = warp_sum(count);
    const float next = (budget - static_cast<float>(count)) / rest;
    active = count > certain && rest > 0.0f && next > c;
    if (active) c = next;
    certain = count;
  }
  return c;
}

// Which keys `systematic` looks at beside those that are taken for certain.
enum class Others { sampled, all, none };

// The systematic choice: take(i, w_i) is called by the whole warp, a key per lane, with w_i = 0 on the lanes whose key was
// not chosen. Keys that are taken for certain have f_i = T.
template <class Take>
__device__ __forceinline__ void systematic(const Row& row, Others others, float c, uint32_t offset, const Take& take) {
  const float one = static_cast<float>(kOne), scaled = c * one;
  uint32_t cumulative = static_cast<uint32_t>(kOne - 1) - offset;
  for (int first = 0; first < row.n; first += kStep) {
    const int i = first + 4 * lane_id();
    const KeyQuad e = row.e_or_zero(i), x = row.x_or_zero(e, i);
    int32_t f[4];
    uint32_t own = 0;
    for (int u = 0; u < 4; ++u) {
      // f_i = min(T, floor(c x_i T) + 1) where x_i > 0
      f[u] = min(static_cast<int32_t>(min(__fmul_rn(x.v[u], scaled), one)) + 1, kOne);
      if (!(x.v[u] > 0.0f) || others == Others::none) f[u] = 0;
      if (e.v[u] < 0.0f || (others == Others::all && e.v[u] > 0.0f)) f[u] = kOne;
      own += static_cast<uint32_t>(f[u]);
    }
    const uint32_t end = cumulative + inclusive_scan(own);
    uint32_t sum = end - own;
    if (__any_sync(kFullWarp, sum >> 24 != end >> 24)) {
      for (int u = 0; u < 4; ++u) {
        const uint32_t before = sum >> 24;
        sum += static_cast<uint32_t>(f[u]);
        take(i + u, sum >> 24 != before ? row.p(e.v[u]) * one / static_cast<float>(f[u]) : 0.0f);
      }
    }
    cumulative = __shfl_sync(kFullWarp, end, kWarp - 1);
  }
}

// `samples` draws with replacement in proportion to x_i, whose sum is positive: take(i, weight), a draw per lane.
// `prefix`: a word per kWarp keys, which is overwritten.
template <class Take>
__device__ __forceinline__ void multinomial(const Row& row, int samples, bool weighted, uint64_t seed, PhiloxBlock counter,
                                            uint32_t* prefix, const Take& take) {
  // f_i = floor(2^30 x_i / sum) + 1 where x_i > 0
  const auto f_of = [&](float x) { return x > 0.0f ? static_cast<uint32_t>(x * 1073741824.0f / row.rest) + 1u : 0u; };
  uint32_t total = 0;
  for (int first = 0; first < row.n; first += kStep) {
    const int i = first + 4 * lane_id();
    const KeyQuad x = row.x_or_zero(row.e_or_zero(i), i);
    const uint32_t end = total + inclusive_scan(f_of(x.v[0]) + f_of(x.v[1]) + f_of(x.v[2]) + f_of(x.v[3]));
    if (lane_id() % 8 == 7) prefix[i / kWarp] = end;
    total = __shfl_sync(kFullWarp, end, kWarp - 1);
  }
  __syncwarp();
  // Every x_i may be below float32 where their sum, of numbers that were not divided yet, is not.
  if (total == 0) return;
  // A lane per draw: its part by bisection, its key within the part one after the other.
  const auto draw_one = [&](int draw, float* weight) {
    counter.word[3] = static_cast<uint32_t>(draw / 4);
    const PhiloxBlock random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter);
    const uint32_t early = draw % 2 ? random.word[1] : random.word[0], late = draw % 2 ? random.word[3] : random.word[2];
    const uint32_t target = __umulhi(draw % 4 < 2 ? early : late, total);
    int low = 0, high = ceil_div(row.n, kWarp) - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (prefix[middle] > target) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    int i = low * kWarp;
    uint32_t reached = low ? prefix[low - 1] : 0u, own = f_of(row.x_at(i));
    while (reached + own <= target) reached += own, own = f_of(row.x_at(++i));
    *weight = weighted
                  ? row.p(row.e[i]) * static_cast<float>(total) / (static_cast<float>(samples) * static_cast<float>(own))
                  : 1.0f / static_cast<float>(samples);
    return i;
  };
  for (int64_t first = 0; first < samples; first += kWarp) {
    const int64_t draw = first + lane_id();
    float weight = 0.0f;
    const int i = draw < samples ? draw_one(static_cast<int>(draw), &weight) : 0;
    take(i, weight);
  }
}

}  // namespace cuda
}  // namespace qexport
