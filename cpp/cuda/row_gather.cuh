// The weighted sum of the rows that were chosen, one warp per query row.
#pragma once

#include "row_select.cuh"

namespace qexport {
namespace cuda {

// Rows of values, those before `split` in the past.
template <class T>
struct ValueRows {
  const T *past, *fresh;  // of key 0, and of key `split`
  int64_t split, past_stride, fresh_stride;

  __device__ __forceinline__ const T* row(int64_t j) const {
    return j < split ? past + j * past_stride : fresh + (j - split) * fresh_stride;
  }
};

template <class T>
__device__ __forceinline__ ValueRows<T> value_rows(const AttentionJob& job, int64_t b, int64_t kv_head) {
  const QuantumAttentionTensors& t = job.tensors;
  const int64_t past = job.params.past_len;
  return {past > 0 ? row_of<T>(t.past_value, b, kv_head, 0) : nullptr, row_of<T>(t.v, b, kv_head, 0), past,
          t.past_value.row_stride, t.v.row_stride};
}

// Chosen rows wait in shared memory until there are enough of them to be read with many loads under way.
struct Gather {
  int32_t* key;   // (kWaiting)
  float* weight;  // (kWaiting)
  float* out;     // (size), the sum
  int size, waiting;
  float sum;  // of the weights, of this lane

  __device__ __forceinline__ void start() {
    for (int x = lane_id(); x < size; x += kWarp) out[x] = 0.0f;
    waiting = 0, sum = 0.0f;
    __syncwarp();
  }
  // All lanes: key j with weight w, unless that is 0.
  template <class T>
  __device__ __forceinline__ void push(const ValueRows<T>& rows, int64_t j, float w) {
    const unsigned chosen = __ballot_sync(kFullWarp, w != 0.0f);
    if (w != 0.0f) {
      const int at = waiting + __popc(chosen & ((1u << lane_id()) - 1u));
      key[at] = static_cast<int32_t>(j);
      weight[at] = w;
      sum += w;
    }
    waiting += __popc(chosen);
    if (waiting > kWaiting - kWarp) flush(rows);
  }
  template <class T>
  __device__ __forceinline__ void flush(const ValueRows<T>& rows) {
    __syncwarp();
    for (int x = lane_id(); x < size; x += kWarp) {
      float total = out[x];
      int i = 0;
      for (; i + 8 <= waiting; i += 8) {
        float v[8];
        for (int u = 0; u < 8; ++u) v[u] = to_float(rows.row(key[i + u])[x]);
        for (int u = 0; u < 8; ++u) total = fmaf(weight[i + u], v[u], total);
      }
      for (; i < waiting; ++i) total = fmaf(weight[i], to_float(rows.row(key[i])[x]), total);
      out[x] = total;
    }
    waiting = 0;
    __syncwarp();
  }
};

}  // namespace cuda
}  // namespace qexport
