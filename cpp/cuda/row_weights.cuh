// The weights of a row in memory: one warp per row, four keys per lane at a time.
#pragma once

#include "rows.cuh"

namespace qexport {
namespace cuda {

constexpr int kStep = 4 * kWarp;  // keys that a warp looks at together

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

struct KeyQuad {
  float v[4];
};
__device__ __forceinline__ KeyQuad load_quad(const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ void store_quad(float* to, const KeyQuad& x) {
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
  __device__ __forceinline__ KeyQuad x(const KeyQuad& own, int i) const {
    KeyQuad out;
    for (int u = 0; u < 4; ++u) out.v[u] = p(own.v[u]);
    if (norm) {
      const KeyQuad lent = load_quad(norm + i);
      for (int u = 0; u < 4; ++u) out.v[u] = weigh(out.v[u], lent.v[u]);
    }
    return out;
  }
  // As x, of keys that may lie behind the last one.
  __device__ __forceinline__ KeyQuad x_or_zero(const KeyQuad& own, int i) const { return i < n ? x(own, i) : KeyQuad{}; }
  __device__ __forceinline__ KeyQuad e_or_zero(int i) const { return i < n ? load_quad(e + i) : KeyQuad{}; }
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
    const KeyQuad s = load_quad(row.e + i);
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
    const KeyQuad s = load_quad(row.e + i);
    KeyQuad e, x;
    for (int u = 0; u < 4; ++u) x.v[u] = e.v[u] = expf(s.v[u] - origin);
    store_quad(row.e + i, e);
    sum.add((e.v[0] + e.v[1]) + (e.v[2] + e.v[3]));
    if (want_entropy) {
      float part = 0.0f;
      for (int u = 0; u < 4; ++u) part += e.v[u] == 0.0f ? 0.0f : e.v[u] * (s.v[u] - origin);
      weighted.add(part);
    }
    if (row.norm) {
      const KeyQuad lent = load_quad(row.norm + i);
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

}  // namespace cuda
}  // namespace qexport
