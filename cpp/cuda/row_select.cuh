// Which keys a row samples, and with which weight (docs/math.md, "Strategies"): one warp per row.
#pragma once

#include "rows.cuh"

namespace qexport {
namespace cuda {

constexpr int32_t kOne = 1 << 24;  // T: probability 1 in fixed point

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

// The keys that a row may attend to, key i of them at e[i]: first its score, then e_i = exp(score - max), negative once the
// key is taken for certain. Every lane holds the same Row.
struct Row {
  float* e;
  int n;
  float inverse;      // 1 / sum of e_i
  const float* norm;  // what p_i is multiplied by to get x_i, or null
  int allowed;        // keys with a score above -inf

  __device__ __forceinline__ float p(float ei) const { return __fmul_rn(fabsf(ei), inverse); }
  // A key that is not attended to must not lend its norm, which may be NaN.
  __device__ __forceinline__ float x(float pi, int i) const {
    return norm ? (pi > 0.0f ? __fmul_rn(pi, norm[i]) : 0.0f) : pi;
  }
};

// Sum of term(i) over i < n, the same on every lane. In parts: a long float32 sum would round by more than the width of many
// draws, and move keys across the borders of the strata.
template <class Term>
__device__ __forceinline__ float sum_row(int n, const Term& term) {
  float total = 0.0f;
  for (int i = lane_id(); i < n;) {
    float part = 0.0f;
    for (const int end = min(n, i + 32 * kWarp); i < end; i += kWarp) part += term(i);
    total += part;
  }
  return warp_sum(total);
}

// The scores of a row become e_i = exp(s_i - max); returns their sum, and in *entropy, if asked for, that of the row in
// nats.
__device__ __forceinline__ float exponentiate(Row& row, float* entropy) {
  float most = -kInf;
  int allowed = 0;
  for (int i = lane_id(); i < row.n; i += kWarp) {
    const float s = row.e[i];
    most = s > most ? s : most;
    allowed += s != -kInf;
  }
  most = warp_max(most);
  row.allowed = warp_sum(allowed);
  const float origin = most == -kInf ? 0.0f : most;
  float weighted = 0.0f, weighted_part = 0.0f;
  int terms = 0;
  const float sum = sum_row(row.n, [&](int i) {
    const float d = row.e[i] - origin, e = expf(d);
    row.e[i] = e;
    if (entropy && e != 0.0f) weighted_part += e * d;
    if (++terms % 32 == 0) weighted += weighted_part, weighted_part = 0.0f;
    return e;
  });
  row.inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (entropy) {
    weighted = warp_sum(weighted + weighted_part);
    *entropy = sum > 0.0f ? logf(sum) - weighted / sum : 0.0f;
  }
  __syncwarp();
  return sum;
}

// Marks the k > 0 largest x_i (ties: lowest index; never x_i = 0) as taken. Returns the sum, and in *largest the maximum, of
// the others. The k-th largest is found by bisection of the bit patterns, which order as the floats do since x >= 0.
__device__ __forceinline__ float take_largest(const Row& row, int k, float* largest) {
  const auto bits_at = [&](int i) { return __float_as_int(row.x(row.p(row.e[i]), i)); };
  const int32_t most = __float_as_int(*largest);
  int32_t threshold = 0;  // the largest found t with #{x >= t} >= k
  for (int bit = 30; bit >= 0; --bit) {
    const int32_t trial = threshold | (1 << bit);
    if (trial > most) continue;
    int count = 0;
    for (int i = lane_id(); i < row.n; i += kWarp) count += bits_at(i) >= trial;
    count = warp_sum(count);
    if (count >= k) threshold = trial;
    if (count == k) break;
  }
  int above = 0;
  for (int i = lane_id(); i < row.n; i += kWarp) above += bits_at(i) > threshold;
  int ties = k - warp_sum(above);  // how many keys equal to the threshold still fit, in index order
  float next = 0.0f, rest = 0.0f, part = 0.0f;
  for (int first = 0; first < row.n; first += kWarp) {
    const int i = first + lane_id();
    const int32_t bits = i < row.n ? bits_at(i) : 0;
    const unsigned equal = __ballot_sync(kFullWarp, bits == threshold && bits > 0);
    const bool tie = equal >> lane_id() & 1u && __popc(equal & ((1u << lane_id()) - 1u)) < ties;
    ties -= min(ties, __popc(equal));
    if (bits > threshold || tie) {
      row.e[i] = -row.e[i];
    } else {
      const float x = __int_as_float(bits);
      part += x;
      next = x > next ? x : next;
    }
    if (first % (32 * kWarp) == 31 * kWarp) rest += part, part = 0.0f;
  }
  *largest = warp_max(next);
  __syncwarp();
  return warp_sum(rest + part);
}

// c with sum_i min(1, c x_i) = budget - taken over the keys not taken beforehand, which sum to `rest` and have the maximum
// `largest`. 1 where there are no such keys.
__device__ __forceinline__ float inclusion_factor(const Row& row, float budget, int taken, float rest, float largest) {
  if (!(rest > 0.0f)) return 1.0f;
  float c = (budget - static_cast<float>(taken)) / rest;
  int certain = taken;
  bool active = c * largest >= 1.0f;
  while (active) {
    int count = 0;
    rest = sum_row(row.n, [&](int i) {
      const float e = row.e[i], x = row.x(row.p(e), i);
      const bool sure = e < 0.0f || c * x >= 1.0f;
      count += sure;
      return sure ? 0.0f : x;
    });
    count = warp_sum(count);
    const float next = (budget - static_cast<float>(count)) / rest;
    active = count > certain && rest > 0.0f && next > c;
    if (active) c = next;
    certain = count;
  }
  return c;
}

__device__ __forceinline__ uint32_t inclusive_scan(uint32_t x) {
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, x, static_cast<unsigned>(step));
    if (lane_id() >= step) x += before;
  }
  return x;
}

// The systematic choice: take(i, w_i) is called by the whole warp for 32 keys at a time, with w_i = 0 on the lanes whose key
// was not chosen. Keys taken for certain have f_i = T; with `all` these are all keys of p_i > 0.
template <class Take>
__device__ __forceinline__ void systematic(const Row& row, bool all, float c, uint32_t offset, const Take& take) {
  const float one = static_cast<float>(kOne), scaled = c * one;
  uint32_t cumulative = static_cast<uint32_t>(kOne - 1) - offset, stratum_before = 0;
  for (int first = 0; first < row.n; first += kWarp) {
    const int i = first + lane_id();
    const float e = i < row.n ? row.e[i] : 0.0f, p = row.p(e), x = i < row.n ? row.x(p, i) : 0.0f;
    // f_i = min(T, floor(c x_i T) + 1) where x_i > 0
    int32_t f = x > 0.0f ? min(static_cast<int32_t>(min(__fmul_rn(x, scaled), one)) + 1, kOne) : 0;
    if (e < 0.0f || (all && p > 0.0f)) f = kOne;
    const uint32_t sum = cumulative + inclusive_scan(static_cast<uint32_t>(f)), stratum = sum >> 24;
    uint32_t before = __shfl_up_sync(kFullWarp, stratum, 1);
    if (lane_id() == 0) before = stratum_before;
    take(i, stratum != before ? p * one / static_cast<float>(f) : 0.0f);
    cumulative = __shfl_sync(kFullWarp, sum, kWarp - 1);
    stratum_before = cumulative >> 24;
  }
}

// `samples` draws with replacement in proportion to x_i, which sum to `sum` > 0: take(i, weight) for 32 draws at a time.
// `prefix`: ceil(n / 32) words, which are overwritten.
template <class Take>
__device__ __forceinline__ void multinomial(const Row& row, float sum, int samples, bool weighted, uint64_t seed,
                                            PhiloxBlock counter, uint32_t* prefix, const Take& take) {
  // f_i = floor(2^30 x_i / sum) + 1 where x_i > 0
  const auto f_at = [&](int i) {
    const float x = row.x(row.p(row.e[i]), i);
    return x > 0.0f ? static_cast<uint32_t>(x * 1073741824.0f / sum) + 1u : 0u;
  };
  const int parts = ceil_div(row.n, kWarp);
  uint32_t total = 0;
  for (int part = 0; part < parts; ++part) {
    const int i = part * kWarp + lane_id();
    total += warp_sum(i < row.n ? f_at(i) : 0u);
    if (lane_id() == 0) prefix[part] = total;
  }
  __syncwarp();
  // A lane per draw: its part by bisection, its key within the part one after the other.
  const auto draw_one = [&](int draw, float* weight) {
    counter.word[3] = static_cast<uint32_t>(draw / 4);
    const PhiloxBlock random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter);
    const uint32_t low_word = draw % 2 ? random.word[1] : random.word[0],
                   high_word = draw % 2 ? random.word[3] : random.word[2];
    const uint32_t word = draw % 4 < 2 ? low_word : high_word;
    const uint32_t target = static_cast<uint32_t>((uint64_t{word} * total) >> 32);
    int low = 0, high = parts - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (prefix[middle] > target) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    int i = low * kWarp;
    uint32_t reached = low ? prefix[low - 1] : 0u, own = f_at(i);
    while (reached + own <= target) reached += own, own = f_at(++i);
    *weight = weighted
                  ? row.p(row.e[i]) * static_cast<float>(total) / (static_cast<float>(samples) * static_cast<float>(own))
                  : 1.0f / static_cast<float>(samples);
    return i;
  };
  for (int first = 0; first < samples; first += kWarp) {
    const int draw = first + lane_id();
    float weight = 0.0f;
    const int i = draw < samples ? draw_one(draw, &weight) : 0;
    take(i, weight);
  }
}

}  // namespace cuda
}  // namespace qexport
