// The weighted sum of the rows that were chosen, one warp per query row.
#pragma once

#include "row_select.cuh"

namespace qexport {
namespace cuda {

constexpr int kWaiting = 2 * kWarp;  // rows that wait to be added up
static_assert(kCandidates <= 2 * kWaiting, "candidates lie where the rows wait later");

// Elements x .. x + kWide of a row, which lie on a multiple of their size.
template <int kWide, class T>
__device__ __forceinline__ void load_elements(float (&to)[kWide], const T* from) {
  if constexpr (kWide == 1) {
    to[0] = to_float(*from);
  } else {
    struct __align__(kWide * sizeof(T)) Elements {
      T element[kWide];
    };
    const Elements found = *reinterpret_cast<const Elements*>(from);
    for (int e = 0; e < kWide; ++e) to[e] = to_float(found.element[e]);
  }
}

template <int kWide, class T>
__device__ __forceinline__ void add_columns(const JoinedRows<T>& rows, const int32_t* key, const float* weight, int count,
                                            float* out, int size) {
  constexpr int kAtOnce = 8;  // loads under way
  for (int x = kWide * lane_id(); x < size; x += kWide * kWarp) {
    float total[kWide], v[kAtOnce][kWide];
    for (int e = 0; e < kWide; ++e) total[e] = out[x + e];
    int i = 0;
    for (; i + kAtOnce <= count; i += kAtOnce) {
      for (int u = 0; u < kAtOnce; ++u) load_elements(v[u], rows.row(key[i + u]) + x);
      for (int u = 0; u < kAtOnce; ++u) {
        for (int e = 0; e < kWide; ++e) total[e] = fmaf(weight[i + u], v[u][e], total[e]);
      }
    }
    for (; i < count; ++i) {
      load_elements(v[0], rows.row(key[i]) + x);
      for (int e = 0; e < kWide; ++e) total[e] = fmaf(weight[i], v[0][e], total[e]);
    }
    for (int e = 0; e < kWide; ++e) out[x + e] = total[e];
  }
}

// out[x] += sum of the waiting rows times their weights, by one warp. `pairs`: their elements may be read in pairs.
template <class T>
__device__ __noinline__ void add_rows(const JoinedRows<T> rows, const int32_t* key, const float* weight, int count,
                                      float* out, int size, bool pairs) {
  __syncwarp();
  if (pairs) {
    add_columns<2>(rows, key, weight, count, out, size);
  } else {
    add_columns<1>(rows, key, weight, count, out, size);
  }
  __syncwarp();
}

// Chosen rows wait in shared memory until there are enough of them.
struct Gather {
  int32_t* key;   // (kWaiting)
  float* weight;  // (kWaiting), right behind key
  float* out;     // (size), the sum
  int size, waiting;
  float sum;   // of the weights, of this lane
  bool pairs;  // elements of rows may be read in pairs

  __device__ __forceinline__ void start() {
    for (int x = lane_id(); x < size; x += kWarp) out[x] = 0.0f;
    waiting = 0, sum = 0.0f;
  }
  // All lanes: key j with weight w, unless that is 0.
  template <class T>
  __device__ __forceinline__ void push(const JoinedRows<T>& rows, int32_t j, float w) {
    const unsigned chosen = __ballot_sync(kFullWarp, w != 0.0f);
    if (w != 0.0f) {
      const int at = waiting + __popc(chosen & lanes_below());
      key[at] = j;
      weight[at] = w;
      sum += w;
    }
    waiting += __popc(chosen);
    if (waiting > kWaiting - kWarp) flush(rows);
  }
  template <class T>
  __device__ __forceinline__ void flush(const JoinedRows<T>& rows) {
    add_rows(rows, key, weight, waiting, out, size, pairs);
    waiting = 0;
  }
};

}  // namespace cuda
}  // namespace qexport
