// The tree over the keys: halves along the principal direction until 16 keys are left.
#pragma once

#include "arena.h"
#include "rows.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int kPowerSteps = 3;
constexpr int64_t kDirectionPoints = 256;  // of a larger node, so many evenly spaced ones say where it is long

// Rows of float32, `stride` apart, a whole number of vectors each.
struct Points {
  const float* data;
  int64_t stride;
  const float* row(int32_t i) const { return data + i * stride; }
};

struct ClusterScratch {
  float *mean, *square, *direction, *next;  // (stride)
  float* t;                                 // (points) projections
  int32_t* side;                            // (points)
  int32_t* some;                            // (kDirectionPoints)
};

static ClusterScratch cluster_scratch(Arena& arena, int64_t points, int64_t stride) {
  ClusterScratch s;
  s.mean = arena.take<float>(stride);
  s.square = arena.take<float>(stride);
  s.direction = arena.take<float>(stride);
  s.next = arena.take<float>(stride);
  s.t = arena.take<float>(points + kLanes);
  s.side = arena.take<int32_t>(points + kLanes);
  s.some = arena.take<int32_t>(kDirectionPoints);
  return s;
}

template <int S, int... L>
static QEXPORT_INLINE vf rotate(vf x, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, x, ((L + S) % kLanes)...);
}

// The sum of all lanes, in every lane.
static QEXPORT_INLINE vf sum_lanes(vf x) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  x += rotate<1>(x, Lanes{});
  x += rotate<2>(x, Lanes{});
  if constexpr (kLanes > 4) x += rotate<4>(x, Lanes{});
  if constexpr (kLanes > 8) x += rotate<8>(x, Lanes{});
  return x;
}

// mean and square: sums over the points of x and x^2, a few vectors of them at a time.
static void moments(Points points, const int32_t* list, int64_t count, const ClusterScratch& s) {
  for (int64_t x = 0; x < points.stride; x += kLanes) {
    vf sum[2] = {}, square[2] = {};
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      const vf a = load<vf>(points.row(list[i]) + x), b = load<vf>(points.row(list[i + 1]) + x);
      sum[0] += a, sum[1] += b;
      square[0] += a * a, square[1] += b * b;
    }
    if (i < count) {
      const vf a = load<vf>(points.row(list[i]) + x);
      sum[0] += a, square[0] += a * a;
    }
    const vf mean = (sum[0] + sum[1]) * (1.0f / static_cast<float>(count));
    store(s.mean + x, mean);
    store(s.square + x, square[0] + square[1] - mean * mean * static_cast<float>(count));
  }
}

// t[i] = x_i . direction - shift. kVecs vectors of a row at most, or any number where it is 0.
template <int kVecs>
static QEXPORT_INLINE vf project(const float* row, const float* direction, int64_t stride) {
  vf dot{};
  if constexpr (kVecs > 0) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) dot += load<vf>(row + v * kLanes) * load<vf>(direction + v * kLanes);
  } else {
    for (int64_t x = 0; x < stride; x += kLanes) dot += load<vf>(row + x) * load<vf>(direction + x);
  }
  return sum_lanes(dot);
}

template <int kVecs>
static void project_all(Points points, const int32_t* list, int64_t count, const ClusterScratch& s) {
  const vf shift = project<kVecs>(s.mean, s.direction, points.stride);
  for (int64_t i = 0; i < count; ++i) {
    s.t[i] = (project<kVecs>(points.row(list[i]), s.direction, points.stride) - shift)[0];
  }
}

// next = sum t_i (x_i - mean), with t_i = (x_i - mean) . direction unless it is in s.t.
template <int kVecs>
static void power_step(Points points, const int32_t* list, int64_t count, const ClusterScratch& s, bool projected) {
  const int64_t stride = points.stride;
  vf total{};
  const vf shift = projected ? vf{} : project<kVecs>(s.mean, s.direction, stride);
  if constexpr (kVecs > 0) {
    vf next[kVecs] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* row = points.row(list[i]);
      const vf t = projected ? splat(s.t[i]) : project<kVecs>(row, s.direction, stride) - shift;
      total += t;
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) next[v] += t * load<vf>(row + v * kLanes);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) store(s.next + v * kLanes, next[v] - total * load<vf>(s.mean + v * kLanes));
  } else {
    for (int64_t x = 0; x < stride; x += kLanes) store(s.next + x, vf{});
    for (int64_t i = 0; i < count; ++i) {
      const float* row = points.row(list[i]);
      const vf t = projected ? splat(s.t[i]) : project<kVecs>(row, s.direction, stride) - shift;
      total += t;
      for (int64_t x = 0; x < stride; x += kLanes) store(s.next + x, load<vf>(s.next + x) + t * load<vf>(row + x));
    }
    for (int64_t x = 0; x < stride; x += kLanes) {
      store(s.next + x, load<vf>(s.next + x) - total * load<vf>(s.mean + x));
    }
  }
}

// direction = next / |next|, unless that is 0 or not finite.
static void normalise(const ClusterScratch& s, int64_t stride) {
  vf largest{};
  for (int64_t x = 0; x < stride; x += kLanes) {
    const vf a = load<vf>(s.next + x);
    largest = max(max(a, -a), largest);
  }
  float most = 0.0f;
  for (int l = 0; l < kLanes; ++l) most = greater(most, largest[l]);
  if (!(most > 0.0f) || most == kInf) return;
  const float inverse = 1.0f / most;  // first, so that no square runs out of float32
  vf square{};
  for (int64_t x = 0; x < stride; x += kLanes) {
    const vf a = load<vf>(s.next + x) * inverse;
    square += a * a;
  }
  const float norm = inverse / __builtin_sqrtf(sum_lanes(square)[0]);
  for (int64_t x = 0; x < stride; x += kLanes) store(s.direction + x, load<vf>(s.next + x) * norm);
}

// The bits of a float as an integer that grows with it.
static QEXPORT_INLINE vu ordered_bits(vf x) {
  const vu u = bits_of(x);
  return (vu)((vi)u < 0 ? ~u : u | 0x80000000u);
}

// The first `left` places of list[0 .. count) are those with the smallest t, each side in its old order; ties: the earlier.
static void partition(int32_t* list, int64_t count, int64_t left, const ClusterScratch& s) {
  uint32_t* key = reinterpret_cast<uint32_t*>(s.t);
  const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = count; i < whole; ++i) s.t[i] = 0.0f;
  vu least = ~vu{}, most{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vu k = ordered_bits(load<vf>(s.t + i));
    store(key + i, k);
    if (i + kLanes <= count) least = k < least ? k : least, most = k > most ? k : most;
  }
  for (int64_t i = count; i < whole; ++i) key[i] = 0xFFFFFFFFu;  // never below a threshold
  uint32_t low = 0xFFFFFFFFu, high = 0;
  for (int l = 0; l < kLanes; ++l) low = lesser(low, least[l]), high = greater(high, most[l]);
  for (int64_t i = count / kLanes * kLanes; i < count; ++i) low = lesser(low, key[i]), high = greater(high, key[i]);
  // The largest threshold with at most `left` keys below it, or any with just as many.
  int64_t below = 0;
  while (low < high) {
    const uint32_t middle = low + (high - low + 1) / 2;
    vi counts{};
    for (int64_t i = 0; i < whole; i += kLanes) counts -= load<vu>(key + i) < vu{} + middle;
    int64_t n = 0;
    for (int l = 0; l < kLanes; ++l) n += counts[l];
    if (n <= left) {
      low = middle, below = n;
      if (n == left) break;
    } else {
      high = middle - 1;
    }
  }
  int64_t equal = left - below, a = 0, b = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool first = key[i] < low || (key[i] == low && equal > 0);
    equal -= first && key[i] == low;
    s.side[b] = list[i], list[a] = list[i];
    a += first, b += !first;
  }
  __builtin_memcpy(list + left, s.side, static_cast<size_t>(count - left) * sizeof(int32_t));
}

template <int kVecs>
static void split(Points points, int32_t* list, int64_t count, int64_t left, const ClusterScratch& s) {
  const int32_t* some = list;
  const int64_t n = lesser(count, kDirectionPoints);
  if (n < count) {
    for (int64_t i = 0; i < n; ++i) s.some[i] = list[i * count / n];
    some = s.some;
  }
  moments(points, some, n, s);
  int64_t axis = 0;
  for (int64_t x = 1; x < points.stride; ++x) axis = s.square[x] > s.square[axis] ? x : axis;
  for (int64_t x = 0; x < points.stride; ++x) s.direction[x] = x == axis ? 1.0f : 0.0f;
  for (int64_t i = 0; i < n; ++i) s.t[i] = points.row(some[i])[axis] - s.mean[axis];
  for (int step = 0; step < kPowerSteps; ++step) {
    power_step<kVecs>(points, some, n, s, step == 0);
    normalise(s, points.stride);
  }
  project_all<kVecs>(points, list, count, s);
  partition(list, count, left, s);
}

// list[0 .. count): indices of points. Afterwards every run of 16 of them is a cluster; all but the last are full.
static void cluster(Points points, int32_t* list, int64_t count, const ClusterScratch& s) {
  struct Node {
    int64_t first, count;
  } stack[64];
  int depth = 0;
  stack[depth++] = {0, count};
  while (depth > 0) {
    const Node node = stack[--depth];
    if (node.count <= kBlockKeys) continue;
    const int64_t leaves = (node.count + kBlockKeys - 1) / kBlockKeys, left = (leaves + 1) / 2 * kBlockKeys;
    switch (points.stride / kLanes) {
      case 1:
        split<1>(points, list + node.first, node.count, left, s);
        break;
      case 2:
        split<2>(points, list + node.first, node.count, left, s);
        break;
      case 4:
        split<4>(points, list + node.first, node.count, left, s);
        break;
      case 8:
        split<8>(points, list + node.first, node.count, left, s);
        break;
      default:
        split<0>(points, list + node.first, node.count, left, s);
    }
    stack[depth++] = {node.first + left, node.count - left};
    stack[depth++] = {node.first, left};
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
