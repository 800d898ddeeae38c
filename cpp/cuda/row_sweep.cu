// `stratified` and `adaptive` in half types on matrix units: one pass over the keys for the sums of all rows, one for every
// step of the inclusion factor where a key is taken for certain, and one that chooses keys.
#include "row_draw.cuh"

namespace qexport {
namespace cuda {
namespace {

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
      const bool real = own.head >= 0, some = real && row[r].sum > 0.0f, all = real && samples >= row[r].allowed;
      careful = careful || (real && (row[r].odd() || all || !some));
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
