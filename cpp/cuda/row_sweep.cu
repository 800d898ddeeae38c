// `stratified` and `adaptive` in half types on matrix units: one pass over the keys for the sums of all rows, one for every
// step of the inclusion factor where a key is taken for certain, and one that chooses keys.
#include "row_sweep.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kDrawn = 40;  // chosen keys of a row that wait to be added up: at least kPartKeys
constexpr float kOneF = static_cast<float>(kOne);

// What a lane knows of its part of a row.
struct RowSums {
  float most = -kInf;           // largest score
  PartSum sum, rest, weighted;  // of e = 2^(t - most), of e |v - mean|, and of e (t - most)
  float largest = 0.0f;         // e |v - mean|
  int allowed = 0;

  __device__ __forceinline__ void move(float to) {
    const float step = to - most, shrink = most == -kInf ? 0.0f : fast_exp2(-step);
    weighted.scale(shrink), sum.scale(shrink), rest.scale(shrink);
    if (most != -kInf) weighted.total -= step * sum.all();
    largest *= shrink, most = to;
  }
  __device__ __forceinline__ void add(const float (&t)[kLaneKeys], const float (&norms)[kLaneKeys], bool plain,
                                      bool entropy) {
    float high = most;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) high = fmaxf(high, t[i]);
    if (high > most) move(high);
    const float origin = most == -kInf ? 0.0f : most;
    float e[kLaneKeys], x[kLaneKeys];
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      e[i] = fast_exp2(t[i] - origin);
      x[i] = e[i] * norms[i];
    }
    if (plain) {
      allowed += kLaneKeys;
    } else {
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        x[i] = e[i] > 0.0f ? x[i] : 0.0f;
        allowed += t[i] != -kInf;
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) largest = fmaxf(largest, x[i]);
    sum.add(((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7])));
    rest.add(((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])));
    if (entropy) {
      float w = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) w = fmaf(e[i], fmaxf(t[i] - origin, -1e30f), w);
      weighted.add(w);
    }
  }
};

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

// What is kept of the rows from one pass to the next.
template <class T, int kSize>
__global__ void __launch_bounds__(kSweepThreads, kSize == 64 ? 4 : 2) sum_kernel(const RowWork work) {
  const bool entropy = work.entropy;
  const Sweep<T, kSize> sweep(work, blockIdx.x, dynamic_shared<char>());
  bool careful = false, odd;
  do {
    RowSums own[2];
    sweep.run(careful, [&](int32_t, const float (&t)[2][kLaneKeys], const float (&norms)[kLaneKeys], bool plain) {
      own[0].add(t[0], norms, plain, entropy);
      own[1].add(t[1], norms, plain, entropy);
    });
    odd = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own[r].move(quad_max(own[r].most));
      const float most = own[r].most == -kInf ? 0.0f : own[r].most;
      const float4 sums{most, quad_sum(own[r].sum.all()), quad_sum(own[r].rest.all()), quad_max(own[r].largest)};
      const float weighted = quad_sum(own[r].weighted.all());
      SummedRow row;
      row.set(sums, quad_sum(own[r].allowed));
      odd = odd || row.odd();
      if (threadIdx.x % 4 != 0 || !sweep.real(r)) continue;
      const int64_t at = sweep.place_of(r);
      work.sums[at] = sums, work.allowed[at] = row.allowed;
      if (entropy) work.entropy[at] = row.sum > 0.0f ? logf(row.sum) - weighted * row.inverse / kLog2E : 0.0f;
    }
    odd = __syncthreads_or(odd && !careful);
    careful = true;
  } while (odd);
}

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

template <class T, int kSize>
__global__ void __launch_bounds__(kSweepThreads, kSize == 64 ? 4 : 2) draw_kernel(const RowWork work) {
  using S = Sweep<T, kSize>;
  const AttentionJob& job = work.job;
  const QuantumAttentionParams& p = job.params;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int size = static_cast<int>(p.v_head_size);
  char* memory = dynamic_shared<char>();
  int2* lists = reinterpret_cast<int2*>(memory + S::kSharedBytes);
  float* out = reinterpret_cast<float*>(lists + kSweepRows * kDrawn) + warp * kUnitRows * size;
  const S sweep(work, blockIdx.x, memory);

  const uint64_t seed = seed_of(job);
  const auto summed = [&](int r) {
    SummedRow row;
    row.set(work.sums[sweep.place_of(r)], work.allowed[sweep.place_of(r)]);
    return row;
  };
  const auto samples_of = [&](int r) {
    return work.budget ? work.budget[sweep.place_of(r)] : static_cast<double>(work.samples.of(max(sweep.row(r).head, 0)));
  };
  Drawn<T, kSize> drawn{sweep, lists + warp * kUnitRows * kDrawn, out, size, {}, {}};
  {
    SummedRow row[2];
    float budget[2], c[2], origin[2], inverse[2];
    bool careful = false;
    uint32_t offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = summed(r);
      const TileRow own = sweep.row(r);
      const double samples = samples_of(r);
      const bool some = own.head >= 0 && row[r].sum > 0.0f, all = samples >= row[r].allowed;
      careful = careful || row[r].odd() || all || !some;
      budget[r] = all || !some ? 0.0f : static_cast<float>(samples);
      c[r] = all ? kInf : 1.0f, origin[r] = some ? row[r].origin : kInf, inverse[r] = row[r].inverse;
      const uint32_t head = static_cast<uint32_t>(sweep.tile->batch * p.q_heads + own.head);
      const PhiloxBlock counter{{p.layer, head, static_cast<uint32_t>(own.query), 0u}};
      offset[r] = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter).word[0] >> 8;
    }
    careful = __syncthreads_or(careful) != 0;
    inclusion_factors(sweep, careful, row, budget, c);
    for (int x = lane; x < kUnitRows * size; x += kWarp) out[x] = 0.0f;
    __syncwarp();
    choose(sweep, careful, origin, inverse, c, offset, drawn);
  }

  const float* mean =
      work.value_mean ? work.value_mean + (int64_t{sweep.tile->batch} * p.kv_heads + sweep.tile->kv_head) * size : nullptr;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float w = quad_sum(drawn.weight[r]), factor = w == 0.0f ? 0.0f : 1.0f / w;
    const TileRow place = sweep.row(r);
    if (place.head < 0) continue;
    const SummedRow row = summed(r);
    const bool nan = row.sum != row.sum, around = mean && samples_of(r) < row.allowed;
    T* y = output_row<T>(job, sweep.tile->batch, place.head, place.query);
    const float* own = out + own_row(r) * size;
    for (int x = lane % 4; x < size; x += 4) {
      const float value = around ? mean[x] * (1.0f - w) + own[x] : own[x] * factor;
      y[x] = from_float<T>(row.allowed == 0 ? 0.0f : nan ? __int_as_float(0x7fc00000) : value);
    }
  }
}

bool narrow(const QuantumAttentionParams& p) { return p.head_size <= 64 && p.v_head_size <= 64; }

size_t keys_bytes(const QuantumAttentionParams& p) {
  return narrow(p) ? Sweep<__half, 64>::kSharedBytes : Sweep<__half, 128>::kSharedBytes;
}

template <class T>
void run_sweeps(Status& status, const RowWork& work, void* stream) {
  const QuantumAttentionParams& p = work.job.params;
  const dim3 grid(static_cast<unsigned>(work.tiles));
  const auto run = [&](auto kernel, size_t bytes) {
    launch(status, kernel, grid, dim3(kSweepThreads), bytes, stream, work);
  };
  const bool sums = work.pass == RowPass::sums;
  if (narrow(p)) return sums ? run(sum_kernel<T, 64>, keys_bytes(p)) : run(draw_kernel<T, 64>, sweep_shared_bytes(p));
  return sums ? run(sum_kernel<T, 128>, keys_bytes(p)) : run(draw_kernel<T, 128>, sweep_shared_bytes(p));
}

}  // namespace

size_t sweep_shared_bytes(const QuantumAttentionParams& p) {
  return keys_bytes(p) + kSweepRows * (kDrawn * sizeof(int2) + static_cast<size_t>(p.v_head_size) * sizeof(float));
}

void sweep_rows(Status& status, const RowWork& work, void* stream) {
  return work.job.params.type == DType::f16 ? run_sweeps<__half>(status, work, stream)
                                            : run_sweeps<__nv_bfloat16>(status, work, stream);
}

}  // namespace cuda
}  // namespace qexport
