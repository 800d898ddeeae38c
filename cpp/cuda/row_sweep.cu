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
  __device__ __forceinline__ void add(const float (&t)[kRun], const float (&norms)[kRun], bool plain, bool entropy) {
    float high = most;
#pragma unroll
    for (int i = 0; i < kRun; ++i) high = fmaxf(high, t[i]);
    if (high > most) move(high);
    const float origin = most == -kInf ? 0.0f : most;
    float e[kRun], x[kRun], w[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      e[i] = fast_exp2(t[i] - origin);
      x[i] = plain || e[i] > 0.0f ? e[i] * norms[i] : 0.0f;
      w[i] = e[i] * fmaxf(t[i] - origin, -1e30f);
      largest = fmaxf(largest, x[i]);
      allowed += !plain && t[i] != -kInf;
    }
    if (plain) allowed += kRun;
    sum.add(((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7])));
    rest.add(((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])));
    if (entropy) weighted.add(((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7])));
  }
};

// A row as all four lanes know it: origin of the scores, 1 / sum of e, sum and maximum of x_i = e_i |v_i - mean| / sum.
struct DrawnRow {
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

// The rows of the lane, of which `at` are the places; what `adaptive` wants to know of them before it draws is stored.
// Returns whether care is needed.
template <class S>
__device__ __forceinline__ bool sum_rows(const S& sweep, const RowWork& work, const int64_t (&at)[2], DrawnRow (&row)[2]) {
  const bool entropy = work.pass == RowPass::entropy;
  bool careful = false;
  while (true) {
    RowSums own[2];
    sweep.run(careful, [&](int32_t, const float(&t)[2][kRun], const float(&norms)[kRun], bool plain) {
      own[0].add(t[0], norms, plain, entropy);
      own[1].add(t[1], norms, plain, entropy);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own[r].move(quad_max(own[r].most));
      const float most = own[r].most == -kInf ? 0.0f : own[r].most;
      const float4 sums{most, quad_sum(own[r].sum.all()), quad_sum(own[r].rest.all()), quad_max(own[r].largest)};
      row[r].set(sums, quad_sum(own[r].allowed));
      if (!entropy) continue;
      const float mean = quad_sum(own[r].weighted.all()) * row[r].inverse / kLog2E;
      if (threadIdx.x % 4 != 0 || !sweep.row[r].real) continue;
      work.sums[at[r]] = sums, work.allowed[at[r]] = row[r].allowed;
      work.entropy[at[r]] = row[r].sum > 0.0f ? logf(row[r].sum) - mean : 0.0f;
    }
    if (careful) return true;
    if (!__syncthreads_or(row[0].odd() || row[1].odd())) return false;
    careful = true;
  }
}

// c with sum_i min(1, c x_i) = budget, for both rows of the lane.
template <class S>
__device__ __forceinline__ void inclusion_factors(const S& sweep, bool careful, const DrawnRow (&row)[2],
                                                  const float (&budget)[2], float (&c)[2]) {
  float rest[2];
  int certain[2] = {};
  bool active[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rest[r] = row[r].rest;
    c[r] = rest[r] > 0.0f ? budget[r] / rest[r] : 1.0f;
    active[r] = rest[r] > 0.0f && budget[r] > 0.0f && c[r] * row[r].largest >= 1.0f;
  }
  while (__syncthreads_or(active[0] || active[1])) {
    PartSum others[2];
    int count[2] = {};
    sweep.run(careful, [&](int32_t, const float(&t)[2][kRun], const float(&norms)[kRun], bool plain) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float left = 0.0f;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
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
      rest[r] = quad_sum(others[r].all());
      const float next = (budget[r] - static_cast<float>(sure)) / rest[r];
      active[r] = active[r] && sure > certain[r] && rest[r] > 0.0f && next > c[r];
      if (active[r]) c[r] = next;
      certain[r] = sure;
    }
  }
}

// The chosen keys of the rows of a warp, and what they have been added up to.
template <class T, int kSize>
struct Drawn {
  static constexpr int kLanes = kSize / kChunkRow, kAtOnce = kWarp / kLanes;  // lanes that share a row of V, rows at a time
  JoinedRows<T> values;
  int2* list;  // shared: (kUnitRows, kDrawn) keys and weights
  float* out;  // shared: (kUnitRows, size)
  int size;
  int waiting[2];   // of the rows of the lane
  float weight[2];  // sum of the weights that this lane has given

  // All that wait, of all rows of the warp.
  __device__ __forceinline__ void flush() {
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

// The systematic choice of both rows of the lane. f_i = T where `all`, and none for a row without `some`.
template <class S, class D>
__device__ __forceinline__ void choose(const S& sweep, bool careful, const DrawnRow (&row)[2], const float (&c)[2],
                                       const bool (&some)[2], const bool (&all)[2], const uint32_t (&offset)[2], D& drawn) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, quad = lane % 4;
  uint32_t cumulative[2];
  float factor[2], origin[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    cumulative[r] = static_cast<uint32_t>(kOne - 1) - offset[r];
    factor[r] = row[r].inverse * c[r] * kOneF;
    // Of a row without `some` no key has a weight.
    origin[r] = some[r] ? row[r].origin : kInf;
  }
  sweep.run(careful, [&](int32_t j, const float(&t)[2][kRun], const float(&norms)[kRun], bool plain) {
    float y[2][kRun];
    uint32_t sum[2], end[2], total[2];
    // f_i = min(T, floor(c x_i T) + 1) where x_i > 0
    const auto f_of = [](float x) {
      return static_cast<uint32_t>(fminf(x, kOneF - 1.0f)) + min(__float_as_uint(x), 1u);
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t own = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float e = fast_exp2(t[r][i] - origin[r]);
        y[r][i] = e * factor[r] * norms[i];
        if (!plain) y[r][i] = e > 0.0f ? all[r] ? kOneF : y[r][i] > 0.0f ? y[r][i] : 0.0f : 0.0f;
        own += f_of(y[r][i]);
      }
      uint32_t reached = own, below = __shfl_up_sync(kFullWarp, reached, 1, 4);
      if (quad >= 1) reached += below;
      below = __shfl_up_sync(kFullWarp, reached, 2, 4);
      if (quad >= 2) reached += below;
      end[r] = cumulative[r] + reached, sum[r] = end[r] - own;
      total[r] = __shfl_sync(kFullWarp, end[r], 3, 4);
    }
    int fresh[2];
    bool full = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      fresh[r] = static_cast<int>((total[r] >> 24) - (cumulative[r] >> 24) & 255u);
      full = full || drawn.waiting[r] + fresh[r] > kDrawn;
    }
    if (__any_sync(kFullWarp, full)) drawn.flush();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (sum[r] >> 24 != end[r] >> 24) {
        // The place of a key is the number of those before it.
        int2* to = drawn.list + (lane / 4 + 8 * r) * kDrawn + drawn.waiting[r] - static_cast<int>(cumulative[r] >> 24);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const uint32_t before = sum[r] >> 24, f = f_of(y[r][i]);
          sum[r] += f;
          if (sum[r] >> 24 != before) {
            const float p = fast_exp2(t[r][i] - origin[r]) * row[r].inverse, w = p * kOneF / static_cast<float>(f);
            const int place = static_cast<int>(before >= cumulative[r] >> 24 ? before : before + 256u);
            to[place] = int2{j + i, __float_as_int(w)};
            drawn.weight[r] += w;
          }
        }
      }
      drawn.waiting[r] += fresh[r], cumulative[r] = total[r];
    }
  });
  drawn.flush();
}

template <class T, int kSize>
__global__ void __launch_bounds__(kSweepThreads, kSize == 64 ? 4 : 2) sweep_kernel(const RowWork work) {
  using S = Sweep<T, kSize>;
  const AttentionJob& job = work.job;
  const QuantumAttentionParams& p = job.params;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int size = static_cast<int>(p.v_head_size);
  char* memory = dynamic_shared<char>();
  int2* lists = reinterpret_cast<int2*>(memory + S::kSharedBytes);
  float* out = reinterpret_cast<float*>(lists + kSweepRows * kDrawn) + warp * kUnitRows * size;
  const S sweep(work, blockIdx.x, memory, reinterpret_cast<int32_t*>(lists));
  int64_t at[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) at[r] = (int64_t{sweep.batch} * p.q_heads + sweep.row[r].head) * p.q_len + sweep.row[r].query;

  DrawnRow row[2];
  bool careful = false;
  if (work.sums && work.pass == RowPass::output) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r].set(work.sums[at[r]], work.allowed[at[r]]);
      careful = careful || row[r].odd();
    }
  } else {
    careful = sum_rows(sweep, work, at, row);
    if (work.pass == RowPass::entropy) return;
  }

  const uint64_t seed = seed_of(job);
  float budget[2], c[2];
  bool some[2], all[2];
  uint32_t offset[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const double own = work.budget ? work.budget[at[r]] : static_cast<double>(work.samples.of(sweep.row[r].head));
    some[r] = sweep.row[r].real && row[r].sum > 0.0f;
    all[r] = some[r] && own >= row[r].allowed;
    careful = careful || all[r] || (sweep.row[r].real && !some[r]);
    budget[r] = some[r] && !all[r] ? static_cast<float>(own) : 0.0f;
    const uint32_t head = static_cast<uint32_t>(sweep.batch * p.q_heads + sweep.row[r].head);
    const PhiloxBlock counter{{p.layer, head, static_cast<uint32_t>(sweep.row[r].query), 0u}};
    offset[r] = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter).word[0] >> 8;
  }
  careful = __syncthreads_or(careful) != 0;
  inclusion_factors(sweep, careful, row, budget, c);

  Drawn<T, kSize> drawn{joined_rows<T>(job, true, sweep.batch, sweep.kv_head),
                        lists + warp * kUnitRows * kDrawn, out, size, {}, {}};
  for (int x = lane; x < kUnitRows * size; x += kWarp) out[x] = 0.0f;
  __syncwarp();
  choose(sweep, careful, row, c, some, all, offset, drawn);

  const float* mean = work.value_mean ? work.value_mean + (int64_t{sweep.batch} * p.kv_heads + sweep.kv_head) * size : nullptr;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float w = quad_sum(drawn.weight[r]), factor = w == 0.0f ? 0.0f : 1.0f / w;
    const bool nan = row[r].sum != row[r].sum, around = mean && !all[r];
    if (!sweep.row[r].real) continue;
    T* y = output_row<T>(job, sweep.batch, sweep.row[r].head, sweep.row[r].query);
    const float* own = out + (lane / 4 + 8 * r) * size;
    for (int x = lane % 4; x < size; x += 4) {
      const float value = around ? mean[x] * (1.0f - w) + own[x] : own[x] * factor;
      y[x] = from_float<T>(row[r].allowed == 0 ? 0.0f : nan ? __int_as_float(0x7fc00000) : value);
    }
  }
}

bool narrow(const QuantumAttentionParams& p) { return p.head_size <= 64 && p.v_head_size <= 64; }

template <class T>
void run_sweeps(Status& status, const RowWork& work, void* stream) {
  const QuantumAttentionParams& p = work.job.params;
  const dim3 grid(static_cast<unsigned>(work.tiles));
  const auto run = [&](auto kernel, size_t bytes) {
    launch(status, kernel, grid, dim3(kSweepThreads), bytes, stream, work);
  };
  return narrow(p) ? run(sweep_kernel<T, 64>, sweep_shared_bytes(p)) : run(sweep_kernel<T, 128>, sweep_shared_bytes(p));
}

}  // namespace

size_t sweep_shared_bytes(const QuantumAttentionParams& p) {
  const size_t row = kDrawn * sizeof(int2) + static_cast<size_t>(p.v_head_size) * sizeof(float);
  return (narrow(p) ? Sweep<__half, 64>::kSharedBytes : Sweep<__half, 128>::kSharedBytes) + kSweepRows * row;
}

void sweep_rows(Status& status, const RowWork& work, void* stream) {
  return work.job.params.type == DType::f16 ? run_sweeps<__half>(status, work, stream)
                                            : run_sweeps<__nv_bfloat16>(status, work, stream);
}

}  // namespace cuda
}  // namespace qexport
