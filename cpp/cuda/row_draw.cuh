// Which keys the rows of a sweep draw, and their weighted sum (docs/math.md, "stratified").
#pragma once

#include "row_sweep.cuh"

namespace qexport {
namespace cuda {

constexpr int kDrawn = 36;  // chosen keys of a row that wait to be added up; with more an sm_80 has room for a block less
static_assert(kDrawn >= kPartKeys);
constexpr float kOneF = static_cast<float>(kOne);

// A row as all four lanes know it: origin of the scores, 1 / sum of e, sum and maximum of x_i = e_i |v_i - mean| / sum.
struct SummedRow {
  float origin, sum, inverse, rest, largest;
  int allowed;

  __device__ __forceinline__ void set(const float4& from, int keys) {
    origin = from.x, sum = from.y, allowed = keys;
    inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    rest = from.z * inverse, largest = from.w * inverse;
  }
  // Values that are no numbers must not be lent to keys without weight, which takes more care.
  __device__ __forceinline__ bool odd() const { return !(rest <= 3.402823466e+38f); }
};

// c with sum_i min(1, c x_i) = budget, for the rows of the lane that have one. Others keep what they have.
template <class S>
__device__ __forceinline__ void inclusion_factors(const S& sweep, bool careful, const SummedRow (&row)[2],
                                                  const float (&budget)[2], float (&c)[2]) {
  int certain[2] = {};
  bool active[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    active[r] = budget[r] > 0.0f && row[r].rest > 0.0f;
    if (active[r]) c[r] = budget[r] / row[r].rest;
    active[r] = active[r] && c[r] * row[r].largest >= 1.0f;
  }
  while (__syncthreads_or(active[0] || active[1])) {
    PartSum others[2];
    int count[2] = {};
    sweep.run(careful, [&](int32_t, const float (&t)[2][kLaneKeys], const float (&norms)[kLaneKeys], bool plain) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float left = 0.0f;
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) {
          const float e = fast_exp2(t[r][i] - row[r].origin) * row[r].inverse;
          const float x = plain || e > 0.0f ? e * norms[i] : 0.0f;
          const bool sure = c[r] * x >= 1.0f;
          count[r] += sure;
          left += sure ? 0.0f : x;
        }
        others[r].add(left);
      }
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int sure = quad_sum(count[r]);
      const float rest = quad_sum(others[r].all()), next = (budget[r] - static_cast<float>(sure)) / rest;
      active[r] = active[r] && sure > certain[r] && rest > 0.0f && next > c[r];
      if (active[r]) c[r] = next;
      certain[r] = sure;
    }
  }
}

// The chosen keys of the rows of a warp, and what they have been added up to.
template <class T, int kSize>
struct Drawn {
  static constexpr int kLanes = kSize / kChunkRow, kAtOnce = kWarp / kLanes;  // lanes that share a row of V, rows at a time
  const Sweep<T, kSize>& sweep;
  int2* list;  // shared: (kUnitRows, kDrawn) keys and weights
  float* out;  // shared: (kUnitRows, size)
  int size;
  int waiting[2];   // of the rows of the lane
  float weight[2];  // sum of the weights that this lane has given

  // All that wait, of all rows of the warp.
  __device__ __forceinline__ void flush() {
    const JoinedRows<T> values = joined_rows<T>(sweep.job, true, sweep.tile->batch, sweep.tile->kv_head);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, x = lane % kLanes * kChunkRow;
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < kUnitRows; ++r) {
      const int count = __shfl_sync(kFullWarp, r < 8 ? waiting[0] : waiting[1], r % 8 * 4);
      if (count == 0) continue;
      float sum[kChunkRow] = {};
      constexpr int kAhead = 4;
#pragma unroll 1
      for (int first = lane / kLanes; first < count; first += kAhead * kAtOnce) {
        __align__(16) T v[kAhead][kChunkRow];
        float w[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const int i = first + u * kAtOnce;
          const bool there = i < count && x < size;
          const int2 drawn = there ? list[r * kDrawn + i] : int2{0, 0};
          w[u] = __int_as_float(drawn.y);
          *reinterpret_cast<uint4*>(v[u]) = uint4{0, 0, 0, 0};
          if (there) copy_whole_chunk(v[u], values.row(drawn.x) + x);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
#pragma unroll
          for (int e = 0; e < kChunkRow; ++e) sum[e] = fmaf(w[u], to_float(v[u][e]), sum[e]);
        }
      }
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) {
#pragma unroll
        for (int step = kLanes; step < kWarp; step *= 2) sum[e] += __shfl_xor_sync(kFullWarp, sum[e], step);
      }
      if (lane < kLanes && x < size) {
#pragma unroll
        for (int e = 0; e < kChunkRow; ++e) out[r * size + x + e] += sum[e];
      }
    }
    waiting[0] = waiting[1] = 0;
    __syncwarp();
  }
};

// The systematic choice of both rows of the lane. f_i = T where c is infinite, and 0 where `origin` is.
template <class S, class D>
__device__ __forceinline__ void choose(const S& sweep, bool careful, const float (&origin)[2], const float (&inverse)[2],
                                       const float (&c)[2], const uint32_t (&offset)[2], D& drawn) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  uint32_t cumulative[2];
  float scale[2], factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    cumulative[r] = static_cast<uint32_t>(kOne - 1) - offset[r];
    scale[r] = inverse[r] * kOneF, factor[r] = scale[r] * c[r];
  }
  sweep.run(careful, [&](int32_t j, const float (&t)[2][kLaneKeys], const float (&norms)[kLaneKeys], bool plain) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float e[kLaneKeys], y[kLaneKeys];
      uint32_t f[kLaneKeys], own = 0;
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        e[i] = fast_exp2(t[r][i] - origin[r]);
        y[i] = e[i] * factor[r] * norms[i];  // c x_i T
      }
      if (!plain) {
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) {
          y[i] = !(e[i] > 0.0f) ? 0.0f : factor[r] == kInf ? kOneF : y[i] > 0.0f ? y[i] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        // f_i = min(T, floor(y) + 1) where y > 0
        f[i] = static_cast<uint32_t>(fminf(y[i], kOneF - 1.0f)) + min(__float_as_uint(y[i]), 1u);
        own += f[i];
      }
      uint32_t reached = own, below = __shfl_up_sync(kFullWarp, reached, 1, 4);
      if (quad >= 1) reached += below;
      below = __shfl_up_sync(kFullWarp, reached, 2, 4);
      if (quad >= 2) reached += below;
      const uint32_t end = cumulative[r] + reached, total = __shfl_sync(kFullWarp, end, 3, 4);
      const int fresh = static_cast<int>(((total >> 24) - (cumulative[r] >> 24)) & 255u);
      if (__any_sync(kFullWarp, drawn.waiting[r] + fresh > kDrawn)) drawn.flush();
      uint32_t sum = end - own;
      if (sum >> 24 != end >> 24) {
        // The place of a key is the number of those before it.
        int2* to = drawn.list + own_row(r) * kDrawn + drawn.waiting[r];
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i) {
          const uint32_t before = sum >> 24;
          sum += f[i];
          if (sum >> 24 != before) {
            const float w = __fdividef(e[i] * scale[r], static_cast<float>(f[i]));
            to[(before - (cumulative[r] >> 24)) & 255u] = int2{j + i, __float_as_int(w)};
            drawn.weight[r] += w;
          }
        }
      }
      drawn.waiting[r] += fresh, cumulative[r] = total;
    }
  });
  drawn.flush();
}

}  // namespace cuda
}  // namespace qexport
