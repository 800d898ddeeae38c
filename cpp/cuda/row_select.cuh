// Which keys a row samples, and with which weight (docs/math.md, "Strategies"): one warp per row, four keys per lane at a
// time.
#pragma once

#include "rows.cuh"

namespace qexport {
namespace cuda {

constexpr int32_t kOne = 1 << 24;   // T: probability 1 in fixed point
constexpr int kStep = 4 * kWarp;    // keys that a warp looks at together
constexpr int kCandidates = kStep;  // keys among which the k-th largest is looked for in registers

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

struct Quad {
  float v[4];
};
__device__ __forceinline__ Quad load_quad(const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ void store_quad(float* to, const Quad& x) {
  *reinterpret_cast<float4*>(to) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}

// The keys of a row, key i of them at e[i]: first its score, then e_i = exp(score - max), negative once the key is taken for
// certain. Every lane holds the same Row.
struct Row {
  float* e;           // aligned to 16 bytes
  int n;              // a multiple of 4
  const float* norm;  // what p_i is multiplied by to get x_i, or null; aligned as e
  int allowed;        // keys with a score above -inf
  float sum;          // of e_i
  float inverse;      // 1 / sum
  float rest;         // sum of the x_i that are not taken
  float largest;      // maximum of them

  __device__ __forceinline__ float p(float ei) const { return __fmul_rn(fabsf(ei), inverse); }
  __device__ __forceinline__ float x_at(int i) const { return norm ? weigh(p(e[i]), norm[i]) : p(e[i]); }
  // A key that is not attended to must not lend its norm, which may be NaN.
  static __device__ __forceinline__ float weigh(float pi, float norm_i) { return pi > 0.0f ? __fmul_rn(pi, norm_i) : 0.0f; }
  // x of the keys i .. i + 3, whose e is `own`.
  __device__ __forceinline__ Quad x(const Quad& own, int i) const {
    Quad out;
    for (int u = 0; u < 4; ++u) out.v[u] = p(own.v[u]);
    if (norm) {
      const Quad lent = load_quad(norm + i);
      for (int u = 0; u < 4; ++u) out.v[u] = weigh(out.v[u], lent.v[u]);
    }
    return out;
  }
  // As x, of keys that may lie behind the last one.
  __device__ __forceinline__ Quad x_or_zero(const Quad& own, int i) const { return i < n ? x(own, i) : Quad{}; }
  __device__ __forceinline__ Quad e_or_zero(int i) const { return i < n ? load_quad(e + i) : Quad{}; }
};

__device__ __forceinline__ uint32_t inclusive_scan(uint32_t x) {
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, x, static_cast<unsigned>(step));
    if (lane_id() >= step) x += before;
  }
  return x;
}

// A sum in parts: a long float32 sum would round by more than the width of many draws, and move keys across the borders of
// the strata.
struct PartSum {
  float total = 0.0f, part = 0.0f;
  int terms = 0;
  __device__ __forceinline__ void add(float x) {
    part += x;
    if (++terms % 8 == 0) total += part, part = 0.0f;
  }
  __device__ __forceinline__ void scale(float factor) { total *= factor, part *= factor; }
  __device__ __forceinline__ float all() const { return total + part; }
  __device__ __forceinline__ float warp() const { return warp_sum(all()); }
};

// The scores of a row become e_i, and the other numbers of the Row are filled in. Returns its entropy in nats if asked for.
__device__ __forceinline__ float exponentiate(Row& row, bool want_entropy) {
  float most = -kInf;
  int allowed = 0;
  for (int i = 4 * lane_id(); i < row.n; i += kStep) {
    const Quad s = load_quad(row.e + i);
    for (int u = 0; u < 4; ++u) {
      most = s.v[u] > most ? s.v[u] : most;
      allowed += s.v[u] != -kInf;
    }
  }
  most = warp_max(most);
  row.allowed = warp_sum(allowed);
  const float origin = most == -kInf ? 0.0f : most;
  PartSum sum, rest, weighted;
  float largest = 0.0f;
  for (int i = 4 * lane_id(); i < row.n; i += kStep) {
    const Quad s = load_quad(row.e + i);
    Quad e, x;
    for (int u = 0; u < 4; ++u) x.v[u] = e.v[u] = expf(s.v[u] - origin);
    store_quad(row.e + i, e);
    sum.add((e.v[0] + e.v[1]) + (e.v[2] + e.v[3]));
    if (want_entropy) {
      float part = 0.0f;
      for (int u = 0; u < 4; ++u) part += e.v[u] == 0.0f ? 0.0f : e.v[u] * (s.v[u] - origin);
      weighted.add(part);
    }
    if (row.norm) {
      const Quad lent = load_quad(row.norm + i);
      for (int u = 0; u < 4; ++u) x.v[u] = Row::weigh(e.v[u], lent.v[u]);
      rest.add((x.v[0] + x.v[1]) + (x.v[2] + x.v[3]));
    }
    for (int u = 0; u < 4; ++u) largest = x.v[u] > largest ? x.v[u] : largest;
  }
  row.sum = sum.warp();
  row.inverse = row.sum == 0.0f ? 0.0f : 1.0f / row.sum;
  row.rest = (row.norm ? rest.warp() : row.sum) * row.inverse;
  row.largest = warp_max(largest) * row.inverse;
  __syncwarp();
  if (!want_entropy) return 0.0f;
  const float mean = weighted.warp() * row.inverse;
  return row.sum > 0.0f ? logf(row.sum) - mean : 0.0f;
}

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
      const Quad x = row.x(load_quad(row.e + i), i);
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
      const Quad x = row.x_or_zero(row.e_or_zero(i), i);
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
    Quad e = row.e_or_zero(i);
    const Quad x = row.x_or_zero(e, i);
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
      const Quad e = load_quad(row.e + i), x = row.x(e, i);
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
    const Quad e = row.e_or_zero(i), x = row.x_or_zero(e, i);
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
    const Quad x = row.x_or_zero(row.e_or_zero(i), i);
    const uint32_t end = total + inclusive_scan(f_of(x.v[0]) + f_of(x.v[1]) + f_of(x.v[2]) + f_of(x.v[3]));
    if (lane_id() % 8 == 7) prefix[i / kWarp] = end;
    total = __shfl_sync(kFullWarp, end, kWarp - 1);
  }
  __syncwarp();
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
  for (int first = 0; first < samples; first += kWarp) {
    const int draw = first + lane_id();
    float weight = 0.0f;
    const int i = draw < samples ? draw_one(draw, &weight) : 0;
    take(i, weight);
  }
}

}  // namespace cuda
}  // namespace qexport
