// Which clusters a tile reads, and which it samples.
#pragma once

#include "qexport/philox.h"
#include "query_rows.h"

namespace qexport {
namespace QEXPORT_ISA {

// Sets chosen[c] for the k largest of g[0 .. n), all >= 0 and padded to whole vectors; ties: the lower index. k <= n.
static void choose_largest(const float* g, int64_t n, int64_t k, uint8_t* chosen) {
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(g);
  const int64_t whole = n / kLanes * kLanes;
  // The largest threshold that at least k values reach; non-negative floats are ordered as their bits are.
  uint32_t low = 0, high = 0x7FFFFFFFu;
  int64_t reach = n;
  while (low < high && reach != k) {
    const uint32_t middle = low + (high - low + 1) / 2;
    vi counts{};
    for (int64_t i = 0; i < whole; i += kLanes) counts -= load<vu>(bits + i) >= vu{} + middle;
    int64_t count = 0;
    for (int l = 0; l < kLanes; ++l) count += counts[l];
    for (int64_t i = whole; i < n; ++i) count += bits[i] >= middle;
    if (count >= k) {
      low = middle, reach = count;
    } else {
      high = middle - 1;
    }
  }
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += bits[i] > low;
  int64_t equal = reach == k ? n : k - above;
  for (int64_t i = 0; i < n; ++i) {
    const bool tie = bits[i] == low && equal > 0;
    equal -= tie;
    chosen[i] = bits[i] > low || tie;
  }
}

// The systematic pi-ps sample of docs/math.md ("stratified") of size `size` from x[0 .. n), x >= 0, where chosen[c] == 0.
// Fills `list` with the sampled places and `weight` with 1 / pi; returns how many. At most `size` + 1.
static int64_t sample_clusters(const float* x, const uint8_t* chosen, int64_t n, int64_t size, uint32_t random,
                               int32_t* list, float* weight) {
  constexpr float kOne = 16777216.0f;  // 2^24
  float sum = 0.0f;
  for (int64_t c = 0; c < n; ++c) sum += chosen[c] ? 0.0f : x[c];
  float scale = static_cast<float>(size) / sum;
  if (!(sum > 0.0f) || scale == kInf) return 0;
  for (int64_t certain = 0;;) {  // c of the definition
    int64_t sure = 0;
    float rest = 0.0f;
    for (int64_t c = 0; c < n; ++c) {
      if (chosen[c] || !(x[c] > 0.0f)) continue;
      if (scale * x[c] >= 1.0f) {
        ++sure;
      } else {
        rest += x[c];
      }
    }
    if (sure == certain || sure >= size || !(rest > 0.0f)) break;
    const float next = static_cast<float>(size - sure) / rest;
    if (!(next > scale)) break;
    certain = sure, scale = next;
  }
  const uint32_t offset = random >> 8;
  uint32_t total = 0, before = (16777215u - offset) >> 24;
  int64_t count = 0;
  for (int64_t c = 0; c < n && count <= size; ++c) {
    if (chosen[c] || !(x[c] > 0.0f)) continue;
    const float share = scale * x[c];
    const uint32_t f = share >= 1.0f ? 16777216u : lesser(16777216u, static_cast<uint32_t>(share * kOne) + 1u);
    total += f;
    const uint32_t after = (total + 16777215u - offset) >> 24;
    if (after != before) list[count] = static_cast<int32_t>(c), weight[count++] = kOne / static_cast<float>(f);
    before = after;
  }
  return count;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
