// Which keys a row samples, and with which weight: docs/math.md, lane by lane for kLanes rows at a time.
#pragma once

#include "qexport/philox.h"
#include "row_scores.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int32_t kOne = 1 << 24;  // T: probability 1 in fixed point

// c with sum_j min(1, c x_j) = budget, over the keys with x_j > 0 of each lane. Negative x marks keys taken beforehand.
static vf inclusion_factor(const float* x, int64_t ld, int64_t n, vf budget) {
  vf rest{};
  for (int64_t j = 0; j < n; ++j) rest += max(load<vf>(x + j * ld), vf{});
  vf c = rest > 0.0f ? budget / rest : vf{};
  vi certain{};  // C of the last round
  vi active = c > 0.0f;
  while (lane_bits(active)) {
    vi count{};
    rest = vf{};
    for (int64_t j = 0; j < n; ++j) {
      const vf xj = max(load<vf>(x + j * ld), vf{});
      const vi sure = c * xj >= 1.0f;
      count -= sure;
      rest += sure ? vf{} : xj;
    }
    const vf next = (budget - to_float(count)) / rest;
    active &= (count > certain) & (rest > 0.0f) & (next > c);
    c = active ? next : c;
    certain = count;
  }
  return c;
}

// Marks the k largest p of each lane (ties: lowest index) by x = -1. Keys with p = 0 are never marked.
// The k-th largest is found by bisection of the bit patterns, which order as the floats do since p >= 0.
static void mark_largest(const float* p, float* x, int64_t ld, int64_t n, vi k) {
  vi threshold{};  // the largest t with #{p >= t} >= k
  for (int bit = 30; bit >= 0; --bit) {
    const vi trial = threshold | (1 << bit);
    vi count{};
    for (int64_t j = 0; j < n; ++j) count -= load<vi>(p + j * ld) >= trial;
    threshold = count >= k ? trial : threshold;
  }
  vi above{};
  for (int64_t j = 0; j < n; ++j) above -= load<vi>(p + j * ld) > threshold;
  vi ties = k - above;  // how many keys equal to the threshold still fit, in index order
  for (int64_t j = 0; j < n; ++j) {
    const vi bits = load<vi>(p + j * ld);
    const vi tie = (bits == threshold) & (ties > 0);
    ties += tie;
    const vi taken = ((bits > threshold) | tie) & (bits > 0);
    store(x + j * ld, taken ? splat(-1.0f) : load<vf>(x + j * ld));
  }
}

// f_j of the fixed-point inclusion probabilities.
static QEXPORT_INLINE vi inclusion(vf x, vf c, vi take_all) {
  const vf y = c * x;
  vi f = to_int((y < 1.0f ? max(y, vf{}) : vf{}) * static_cast<float>(kOne)) + 1;
  f = (y >= 1.0f) | (f > kOne) ? splat(kOne) : f;
  f = x > 0.0f ? f : vi{};
  return (x < 0.0f) | take_all ? splat(kOne) : f;
}

// o[lane] += weight[lane] * v for the lanes of `bits`; o is (rows, ld_o).
static QEXPORT_INLINE void add_value(uint32_t bits, const vf& weight, const float* v, int64_t size, float* o, int64_t ld_o) {
  alignas(64) float w[kLanes];
  store(w, weight);
  for (; bits; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    float* row = o + lane * ld_o;
    const float wl = w[lane];
    int64_t x = 0;
    for (; x + kLanes <= size; x += kLanes) store(row + x, load<vf>(row + x) + load<vf>(v + x) * wl);
    for (; x < size; ++x) row[x] += v[x] * wl;
  }
}

// Systematic sampling of one column of rows: o[lane] = sum over the chosen keys of w_j v_j; returns sum of w_j.
static vf systematic(const AttentionJob& job, const RowBlock& block, const RowScratch& scratch, int64_t begin, int64_t n,
                     int64_t ld, const float* p, const float* x, vf c, vi take_all, vu offset, float* o, int64_t ld_o) {
  vu cumulative{}, before{};
  vf sum{};
  for (int64_t j = 0; j < n; ++j) {
    const vf pj = load<vf>(p + j * ld);
    const vi f = inclusion(load<vf>(x + j * ld), c, take_all & (pj > 0.0f));
    cumulative += (vu)f;
    const vu stratum = (cumulative + static_cast<uint32_t>(kOne - 1) - offset) >> 24;
    const vi chosen = (vi)(stratum != before);
    before = stratum;
    const uint32_t bits = lane_bits(chosen);
    if (!bits) continue;
    const vf weight = chosen ? pj * static_cast<float>(kOne) / to_float(f) : vf{};
    sum += weight;
    const KeyRows v = key_rows(job, true, block.batch, block.kv_head, begin + j, 1, scratch.keys);
    add_value(bits, weight, v.data, job.params.v_head_size, o, ld_o);
  }
  return sum;
}

// Draws with replacement of one row (lane) from the prefix sums f[n][ld]; o += the weighted values, returns sum of weights.
static float multinomial(const AttentionJob& job, const RowBlock& block, const RowScratch& scratch, int64_t begin, int64_t n,
                         int64_t ld, const float* p, const uint32_t* f, int64_t samples, PhiloxBlock counter, float* o) {
  const QuantumAttentionParams& params = job.params;
  const uint64_t seed = static_cast<uint64_t>(params.seed);
  const uint32_t total = f[(n - 1) * ld];
  PhiloxBlock random{};
  float sum = 0.0f;
  for (int64_t draw = 0; draw < samples; ++draw) {
    if (draw % 4 == 0) {
      counter.word[3] = static_cast<uint32_t>(draw / 4);
      random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter);
    }
    const uint32_t target = static_cast<uint32_t>((uint64_t{random.word[draw % 4]} * total) >> 32);
    int64_t low = 0, high = n - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (f[middle * ld] > target) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const uint32_t own = f[low * ld] - (low ? f[(low - 1) * ld] : 0u);
    const float weight = params.control_variate ? p[low * ld] * static_cast<float>(total) /
                                                      (static_cast<float>(samples) * static_cast<float>(own))
                                                : 1.0f / static_cast<float>(samples);
    const KeyRows v = key_rows(job, true, block.batch, block.kv_head, begin + low, 1, scratch.keys);
    for (int64_t x = 0; x < params.v_head_size; ++x) o[x] += weight * v.data[x];
    sum += weight;
  }
  return sum;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
