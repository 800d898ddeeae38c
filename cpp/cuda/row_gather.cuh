// The weighted sum of the rows that were chosen, one warp per query row.
#pragma once

#include "row_select.cuh"

namespace qexport {
namespace cuda {

constexpr int kWaiting = 2 * kWarp;  // rows that wait to be added up
static_assert(kCandidates <= 2 * kWaiting, "candidates lie where the rows wait later");

// out[x] += sum of the waiting rows times their weights, by one warp. Many loads are under way at a time.
template <class T>
__device__ __noinline__ void add_rows(const JoinedRows<T> rows, const int32_t* key, const float* weight, int count,
                                      float* out, int size) {
  __syncwarp();
  for (int x = lane_id(); x < size; x += kWarp) {
    float total = out[x];
    int i = 0;
    for (; i + 8 <= count; i += 8) {
      float v[8];
      for (int u = 0; u < 8; ++u) v[u] = to_float(rows.row(key[i + u])[x]);
      for (int u = 0; u < 8; ++u) total = fmaf(weight[i + u], v[u], total);
    }
    for (; i < count; ++i) total = fmaf(weight[i], to_float(rows.row(key[i])[x]), total);
    out[x] = total;
  }
  __syncwarp();
}

// Chosen rows wait in shared memory until there are enough of them.
struct Gather {
  int32_t* key;   // (kWaiting)
  float* weight;  // (kWaiting), right behind key
  float* out;     // (size), the sum
  int size, waiting;
  float sum;  // of the weights, of this lane

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
    add_rows(rows, key, weight, waiting, out, size);
    waiting = 0;
  }
};

}  // namespace cuda
}  // namespace qexport
