// Attention that knows all scores of a row: `naive`, `stratified`, `adaptive`, `hybrid`, and qk_matmul_output.
#include "row_gather.cuh"
#include "row_scores.cuh"
#include "rows.cuh"

namespace qexport {
namespace cuda {
namespace {

// Shared memory: the rows of scores if they fit, and what the two phases of a tile need one after the other.
struct RowShared {
  KeyRange ranges[kTileRows];
  int64_t begin, end;
};

__host__ __device__ size_t gather_bytes(int64_t v_head_size) {
  return kTileRows * (kWaiting * 8 + static_cast<size_t>(v_head_size) * sizeof(float));
}
__host__ __device__ size_t phase_bytes(int64_t v_head_size) {
  const size_t gather = gather_bytes(v_head_size), tiles = sizeof(ScoreTiles);
  return (gather > tiles ? gather : tiles) + sizeof(RowShared) + 64;
}
// Floats of a row: its scores, and behind them the prefix sums of `naive`.
__host__ __device__ int64_t scores_pitch(int64_t total_len) { return (total_len + 3) / 4 * 4; }
int64_t row_pitch(const AttentionJob& job) {
  const int64_t pitch = scores_pitch(job.total_len);
  return job.params.strategy == Strategy::naive ? pitch + scores_pitch(ceil_div<int64_t>(job.total_len, kWarp)) : pitch;
}

// y = sum w_j v_j has been summed; around a mean the row is mean + sum w_j (v_j - mean), else it is normalised.
template <class T>
__device__ void write_output(const RowWork& work, const RowTile& tile, int r, const Row& row, bool nan, const float* mean,
                             bool normalise, const Gather& gather) {
  const float w = warp_sum(gather.sum), factor = !normalise ? 1.0f : w == 0.0f ? 0.0f : 1.0f / w;
  T* y = output_row<T>(work.job, tile.batch, tile.head(work.job, r), tile.query(work.job, r));
  for (int x = lane_id(); x < gather.size; x += kWarp) {
    const float own = mean ? mean[x] * (1.0f - w) + gather.out[x] : gather.out[x] * factor;
    y[x] = from_float<T>(row.allowed == 0 ? 0.0f : nan ? __int_as_float(0x7fc00000) : own);
  }
}

// `hybrid` with control variate: the largest x_j are read, every other key enters by its cluster's mean.
template <class T>
__device__ void read_largest(const RowWork& work, const RowTile& tile, const Row& row, int64_t lo, int samples, float rest,
                             float largest, const ValueRows<T>& values, Gather& gather) {
  if (rest > 0.0f) take_largest(row, samples, &largest);
  for (int first = 0; first < row.n; first += kWarp) {
    const int i = first + lane_id();
    const float e = i < row.n ? row.e[i] : 0.0f;
    gather.push(values, lo + i, e < 0.0f ? row.p(e) : 0.0f);
  }
  gather.flush(values);
  const int64_t kv = tile.batch * work.job.params.kv_heads + tile.kv_head, clusters = value_clusters(work.job);
  const int64_t valid = valid_keys(work.job, tile.batch);
  const ValueRows<float> centres{nullptr, work.value_centre + kv * clusters * gather.size, 0, 0, gather.size};
  const int32_t* order = work.value_order + kv * work.job.total_len;
  for (int64_t first = 0; first * kValueCluster < valid; first += kWarp) {
    const int64_t c = first + lane_id();
    float share = 0.0f;
    for (int64_t at = c * kValueCluster; at < min((c + 1) * kValueCluster, valid); ++at) {
      const int64_t i = order[at] - lo;
      const float e = i >= 0 && i < row.n ? row.e[i] : 0.0f;
      if (e > 0.0f) share += row.p(e);
    }
    gather.push(centres, c, share);
  }
  gather.flush(centres);
}

// From the scores of row r of the tile, one warp: its output, and its probabilities where they are wanted.
template <class T>
__device__ void finish_row(const RowWork& work, const RowTile& tile, const KeyRange& range, int r, float* scores,
                           Gather gather) {
  const AttentionJob& job = work.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t head = tile.head(job, r), query = tile.query(job, r), kv = tile.batch * p.kv_heads + tile.kv_head;
  const int64_t at = (tile.batch * p.q_heads + head) * p.q_len + query;
  Row row{scores + (range.lo > tile.begin ? range.lo - tile.begin : 0), static_cast<int>(range.hi - range.lo), 0.0f, nullptr,
          0};
  float entropy;
  const float sum = exponentiate(row, work.pass == RowPass::entropy ? &entropy : nullptr);
  if (work.pass == RowPass::entropy) {
    if (lane_id() == 0) work.entropy[at] = entropy, work.allowed[at] = row.allowed;
    return;
  }
  if (job.tensors.qk_matmul_output && p.qk_matmul_output_mode == 3) {
    T* out = static_cast<T*>(job.tensors.qk_matmul_output) + at * job.total_len;
    for (int64_t j = lane_id(); j < job.total_len; j += kWarp) {
      out[j] = from_float<T>(j >= range.lo && j < range.hi ? row.p(row.e[j - range.lo]) : 0.0f);
    }
  }
  if (work.pass == RowPass::scores) return;

  const int samples = work.samples.of(head);
  const double budget = p.strategy == Strategy::adaptive ? work.budget[at] : static_cast<double>(samples);
  const bool all = p.strategy != Strategy::naive && budget >= row.allowed, nan = sum != sum;
  const ValueRows<T> values = value_rows<T>(job, tile.batch, tile.kv_head);
  const float* mean = work.value_mean && !all ? work.value_mean + kv * p.v_head_size : nullptr;
  const auto take = [&](int i, float w) { gather.push(values, range.lo + i, w); };
  if (work.value_norm) row.norm = work.value_norm + kv * job.total_len + range.lo;
  gather.start();
  if (nan || row.allowed == 0) return write_output<T>(work, tile, r, row, nan, nullptr, false, gather);
  if (all) {
    systematic(row, true, 1.0f, 0u, take);
    gather.flush(values);
    return write_output<T>(work, tile, r, row, false, nullptr, true, gather);
  }

  float largest = 0.0f;
  float rest = sum_row(row.n, [&](int i) {
    const float x = row.x(row.p(row.e[i]), i);
    largest = x > largest ? x : largest;
    return x;
  });
  largest = warp_max(largest);
  const PhiloxBlock counter{
      {p.layer, static_cast<uint32_t>(tile.batch * p.q_heads + head), static_cast<uint32_t>(query), 0u}};
  const uint64_t seed = seed_of(job);
  if (p.strategy == Strategy::naive) {
    if (rest > 0.0f) {
      uint32_t* prefix = reinterpret_cast<uint32_t*>(scores + scores_pitch(job.total_len));
      multinomial(row, rest, samples, p.control_variate, seed, counter, prefix, take);
    }
  } else if (clusters_values(p)) {
    read_largest(work, tile, row, range.lo, samples, rest, largest, values, gather);
  } else {
    const uint32_t word = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter).word[0];
    const int taken = p.strategy == Strategy::hybrid ? samples / 2 : 0;
    if (taken > 0) rest = take_largest(row, taken, &largest);
    const float c = inclusion_factor(row, static_cast<float>(budget), taken, rest, largest);
    systematic(row, false, c, word >> 8, take);
  }
  gather.flush(values);
  write_output<T>(work, tile, r, row, false, mean, p.strategy != Strategy::naive, gather);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) rows_kernel(const RowWork work) {
  const AttentionJob& job = work.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t head_rows = job.group * p.q_len, head_tiles = ceil_div<int64_t>(head_rows, kTileRows);
  const int64_t tiles = p.batch * p.kv_heads * head_tiles;
  char* phase = dynamic_shared<char>();
  RowShared& shared = *dynamic_shared<RowShared>();
  float* rows = work.rows ? work.rows + static_cast<int64_t>(blockIdx.x) * kTileRows * work.row_pitch
                          : dynamic_shared<float>((phase_bytes(p.v_head_size) + 15) / 16 * 16);
  const bool write = job.tensors.qk_matmul_output && work.pass != RowPass::entropy;
  const bool all_keys = write && p.qk_matmul_output_mode < 3;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  phase += (sizeof(RowShared) + 15) / 16 * 16;

  Gather gather{};
  gather.size = static_cast<int>(p.v_head_size);
  gather.key = reinterpret_cast<int32_t*>(phase) + warp * kWaiting;
  gather.weight = reinterpret_cast<float*>(phase) + (kTileRows + warp) * kWaiting;
  gather.out = reinterpret_cast<float*>(phase) + 2 * kTileRows * kWaiting + warp * p.v_head_size;

  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    RowTile tile{t / head_tiles / p.kv_heads, t / head_tiles % p.kv_heads, t % head_tiles * kTileRows, 0, 0, 0};
    tile.count = static_cast<int>(min(static_cast<int64_t>(kTileRows), head_rows - tile.first));
    __syncthreads();  // the last tile is done with shared memory
    if (static_cast<int>(threadIdx.x) < tile.count) {
      const int r = static_cast<int>(threadIdx.x);
      shared.ranges[r] = key_range(job, tile.batch, tile.query(job, r));
    }
    __syncthreads();
    if (all_keys) {
      tile.end = job.total_len;
    } else {
      tile.begin = job.total_len;
      for (int r = 0; r < tile.count; ++r) {
        const KeyRange range = shared.ranges[r];
        if (range.hi > range.lo) tile.begin = min(tile.begin, range.lo), tile.end = max(tile.end, range.hi);
      }
    }
    float* kept = all_keys && work.pass == RowPass::scores ? nullptr : rows;
    score_rows<T>(job, tile, shared.ranges, all_keys, kept, work.row_pitch, *reinterpret_cast<ScoreTiles*>(phase));
    if (!kept) continue;
    __syncthreads();
    if (warp < tile.count) {
      finish_row<T>(work, tile, shared.ranges[warp], warp, rows + static_cast<int64_t>(warp) * work.row_pitch, gather);
    }
  }
}

}  // namespace

namespace {

// What one block may have of shared memory, by compute capability.
size_t shared_limit(int capability) {
  const size_t kib = capability == 75                                ? 64
                     : capability == 80 || capability == 87          ? 163
                     : capability / 10 == 9 || capability / 10 == 10 ? 227
                                                                     : 99;
  return kib * 1024;
}

// Where everything lies in scratch, and how the kernel is launched.
struct RowPlan {
  size_t norm, mean, partial, order, centre, tree, entropy, allowed, budget, rows, total;
  bool shared_rows;
  int64_t blocks;
  size_t shared_bytes;
};

RowPlan plan_rows(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  Status status;
  const Device device = current_device(status);
  const size_t limit = shared_limit(device.capability), fixed = (phase_bytes(p.v_head_size) + 15) / 16 * 16;
  const size_t rows = static_cast<size_t>(kTileRows * row_pitch(job)) * sizeof(float);
  const int64_t tiles = p.batch * p.kv_heads * ceil_div<int64_t>(job.group * p.q_len, kTileRows);
  RowPlan plan{};
  plan.shared_rows = fixed + rows <= limit - 1024;
  plan.shared_bytes = plan.shared_rows ? fixed + rows : fixed;
  // Scores in global memory should stay in the second cache: no more of them than one block per multiprocessor has.
  const int64_t per_processor = plan.shared_rows && 2 * (plan.shared_bytes + 1024) <= limit ? 2 : 1;
  plan.blocks = min(tiles, per_processor * device.multiprocessors);
  const auto take = [&](bool needed, size_t bytes) {
    const size_t at = plan.total;
    plan.total += needed ? (bytes + 255) / 256 * 256 : 0;
    return at;
  };
  const size_t kv = static_cast<size_t>(p.batch * p.kv_heads), all_rows = static_cast<size_t>(p.batch * p.q_heads * p.q_len);
  const size_t keys = kv * static_cast<size_t>(job.total_len), size = static_cast<size_t>(p.v_head_size);
  const bool centred = samples_rows(job) && p.control_variate, clustered = centred && clusters_values(p);
  const bool adaptive = p.strategy == Strategy::adaptive;
  plan.norm = take(centred, keys * sizeof(float));
  plan.mean = take(centred && !clustered, kv * size * sizeof(float));
  plan.partial = take(centred && !clustered, static_cast<size_t>(value_partial_floats(job)) * sizeof(float));
  plan.order = take(clustered, keys * sizeof(int32_t));
  plan.centre = take(clustered, kv * static_cast<size_t>(value_clusters(job)) * size * sizeof(float));
  plan.tree = take(clustered, 0);
  plan.entropy = take(adaptive, all_rows * sizeof(float));
  plan.allowed = take(adaptive, all_rows * sizeof(int32_t));
  plan.budget = take(adaptive, all_rows * sizeof(double));
  plan.rows = take(!plan.shared_rows, static_cast<size_t>(plan.blocks) * rows);
  return plan;
}

template <class T>
void run_rows(Status& status, const RowPlan& plan, RowWork work, RowPass pass, void* stream) {
  work.pass = pass;
  launch(status, rows_kernel<T>, dim3(static_cast<unsigned>(plan.blocks)), dim3(kRowThreads), plan.shared_bytes, stream,
         work);
}

void run_rows(Status& status, const RowPlan& plan, const RowWork& work, RowPass pass, void* stream) {
  switch (work.job.params.type) {
    case DType::f16:
      return run_rows<__half>(status, plan, work, pass, stream);
    case DType::bf16:
      return run_rows<__nv_bfloat16>(status, plan, work, pass, stream);
    default:
      return run_rows<float>(status, plan, work, pass, stream);
  }
}

}  // namespace

size_t row_attention_scratch_bytes(const AttentionJob& job) { return plan_rows(job).total; }

void row_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream) {
  const RowPlan plan = plan_rows(job);
  char* base = static_cast<char*>(scratch);
  const auto floats = [&](size_t at) { return reinterpret_cast<float*>(base + at); };
  RowWork work{};
  work.job = job;
  work.samples = samples;
  work.row_pitch = static_cast<int32_t>(row_pitch(job));
  if (!plan.shared_rows) work.rows = floats(plan.rows);
  if (!samples_rows(job)) return run_rows(status, plan, work, RowPass::scores, stream);
  if (job.params.control_variate) {
    work.value_norm = floats(plan.norm);
    work.value_mean = floats(plan.mean);
    value_stats(status, job, floats(plan.partial), floats(plan.mean), floats(plan.norm), stream);
  }
  if (job.params.strategy == Strategy::adaptive) {
    work.entropy = floats(plan.entropy);
    work.allowed = reinterpret_cast<int32_t*>(base + plan.allowed);
    double* budget = reinterpret_cast<double*>(base + plan.budget);
    work.budget = budget;
    run_rows(status, plan, work, RowPass::entropy, stream);
    share_budget(status, work, budget, stream);
  }
  run_rows(status, plan, work, RowPass::output, stream);
}

}  // namespace cuda
}  // namespace qexport
