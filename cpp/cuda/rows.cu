// Attention that knows all scores of a row: `naive`, `stratified`, `adaptive`, `hybrid`, and qk_matmul_output.
#include "row_plan.cuh"

namespace qexport {
namespace cuda {
namespace {

// y = sum w_j v_j has been summed; around a mean the row is mean + sum w_j (v_j - mean), else it is normalised.
template <class T>
__device__ __forceinline__ void write_output(const Row& row, T* y, const float* mean, bool normalise, const Gather& gather) {
  const bool nan = row.sum != row.sum;
  const float w = warp_sum(gather.sum), factor = !normalise ? 1.0f : w == 0.0f ? 0.0f : 1.0f / w;
  for (int x = lane_id(); x < gather.size; x += kWarp) {
    const float own = mean ? mean[x] * (1.0f - w) + gather.out[x] : gather.out[x] * factor;
    y[x] = from_float<T>(row.allowed == 0 ? 0.0f : nan ? __int_as_float(0x7fc00000) : own);
  }
}

// Every key that is not taken enters by its cluster's mean.
__device__ __forceinline__ void add_centres(const RowWork& work, const RowTile& tile, const Row& row, int32_t start,
                                            Gather& gather) {
  const AttentionJob& job = work.job;
  const int64_t kv = tile.batch * job.params.kv_heads + tile.kv_head, valid = valid_keys(job, tile.batch);
  const float* first_centre = work.value_centre + kv * value_clusters(job) * gather.size;
  const JoinedRows<float> centres{nullptr, first_centre, 0, gather.size, 0};
  const int32_t* order = work.value_order + kv * value_clusters(job) * kValueCluster;
  for (int64_t first = 0; first * kValueCluster < valid; first += kWarp) {
    const int64_t c = first + lane_id();
    float share = 0.0f;
    for (int64_t at = c * kValueCluster; at < min((c + 1) * kValueCluster, valid); ++at) {
      const int64_t i = order[at] - start;
      const float e = i >= 0 && i < row.n ? row.e[i] : 0.0f;
      if (e > 0.0f) share += row.p(e);
    }
    gather.push(centres, static_cast<int32_t>(c), share);
  }
  gather.flush(centres);
}

// From the scores of a row of the tile, one warp: its output, and its probabilities where they are wanted.
template <class T>
__device__ __forceinline__ void finish_row(const RowWork& work, const RowTile& tile, const TileRow& own, float* scores,
                                           Gather& gather) {
  const AttentionJob& job = work.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t kv = tile.batch * p.kv_heads + tile.kv_head, head = tile.batch * p.q_heads + own.head;
  const int64_t at = head * p.q_len + own.query;
  const int32_t start = max(own.lo / 4 * 4, tile.begin);  // the key of e[0]
  Row row{};
  row.e = scores + (start - tile.begin);
  row.n = own.hi > own.lo ? (own.hi + 3) / 4 * 4 - start : 0;
  row.norm = work.value_norm && work.pass == RowPass::output ? work.value_norm + kv * norm_pitch(job) + start : nullptr;
  const float entropy = exponentiate(row, work.pass == RowPass::sums);
  if (work.pass == RowPass::sums) {
    if (lane_id() == 0) work.entropy[at] = entropy, work.allowed[at] = row.allowed;
    return;
  }
  if (job.tensors.qk_matmul_output && p.qk_matmul_output_mode == 3) {
    T* out = static_cast<T*>(job.tensors.qk_matmul_output) + at * job.total_len;
    for (int32_t j = lane_id(); j < job.total_len; j += kWarp) {
      out[j] = from_float<T>(j >= own.lo && j < own.hi ? row.p(row.e[j - start]) : 0.0f);
    }
    __syncwarp();  // before take_largest changes what other lanes read
  }
  if (work.pass == RowPass::scores) return;

  const int samples = work.samples.of(own.head);
  const double budget = p.strategy == Strategy::adaptive ? work.budget[at] : static_cast<double>(samples);
  const bool naive = p.strategy == Strategy::naive, all = !naive && budget >= row.allowed;
  const JoinedRows<T> values = joined_rows<T>(job, true, tile.batch, tile.kv_head);
  const auto take = [&](int i, float w) { gather.push(values, start + i, w); };
  gather.start();
  if (row.sum > 0.0f) {  // not where nothing is allowed, nor where a score is no number
    const PhiloxBlock counter{{p.layer, static_cast<uint32_t>(head), static_cast<uint32_t>(own.query), 0u}};
    const uint64_t seed = seed_of(job);
    if (naive) {
      uint32_t* prefix = reinterpret_cast<uint32_t*>(scores + scores_pitch(job));
      if (row.rest > 0.0f) multinomial(row, samples, p.control_variate, seed, counter, prefix, take);
    } else {
      const bool clustered = clusters_values(p) && !all;
      const int taken = p.strategy == Strategy::hybrid && !all ? (clustered ? samples : samples / 2) : 0;
      if (taken > 0) take_largest(row, taken, gather.key);
      const uint32_t word = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter).word[0];
      const float c = all || clustered ? 1.0f : inclusion_factor(row, static_cast<float>(budget), taken);
      systematic(row, all ? Others::all : clustered ? Others::none : Others::sampled, c, word >> 8, take);
      if (clustered) gather.flush(values), add_centres(work, tile, row, start, gather);
    }
  }
  gather.flush(values);
  const float* mean = work.value_mean && !all ? work.value_mean + kv * p.v_head_size : nullptr;
  write_output(row, output_row<T>(job, tile.batch, own.head, own.query), mean, !naive, gather);
}

// Tile number t of the call. All threads of the block.
__device__ __forceinline__ void set_tile(const RowWork& work, int64_t t, bool all_keys, RowTile& tile) {
  const AttentionJob& job = work.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t rows = job.group * p.q_len, of_head = ceil_div<int64_t>(rows, work.tile_rows), kv = t / of_head;
  const int64_t first = t % of_head * work.tile_rows;
  const int count = static_cast<int>(min(static_cast<int64_t>(work.tile_rows), rows - first));
  const int r = static_cast<int>(threadIdx.x);
  if (r < count) {
    const int64_t kv_head = kv % p.kv_heads, head = kv_head * job.group + (first + r) / p.q_len,
                  query = (first + r) % p.q_len;
    const KeyRange range = key_range(job, kv / p.kv_heads, query);
    tile.rows[r] = {static_cast<int32_t>(head), static_cast<int32_t>(query), static_cast<int32_t>(range.lo),
                    static_cast<int32_t>(range.hi)};
  }
  __syncthreads();
  if (r == 0) {
    const int32_t all = static_cast<int32_t>(job.total_len);
    int32_t begin = all_keys ? 0 : all, end = all_keys ? all : 0;
    for (int i = 0; i < count; ++i) {
      const TileRow& row = tile.rows[i];
      if (row.hi > row.lo) begin = min(begin, row.lo), end = max(end, row.hi);
    }
    tile.batch = static_cast<int32_t>(kv / p.kv_heads), tile.kv_head = static_cast<int32_t>(kv % p.kv_heads);
    tile.count = count, tile.begin = begin / 4 * 4, tile.end = (end + 3) / 4 * 4;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kTileRowThreads) rows_kernel(const RowWork work) {
  const AttentionJob& job = work.job;
  const QuantumAttentionParams& p = job.params;
  RowTile& tile = *dynamic_shared<RowTile>();
  float* phase = dynamic_shared<float>(whole_lines(sizeof(RowTile)));
  float* rows = work.rows ? work.rows + static_cast<int64_t>(blockIdx.x) * work.tile_rows * work.row_pitch
                          : phase + phase_bytes(job, work.matrix_units) / sizeof(float);
  const bool write = job.tensors.qk_matmul_output && work.pass != RowPass::sums && p.qk_matmul_output_mode < 3;
  const bool scores_alone = write && work.pass == RowPass::scores;
  for (int64_t t = blockIdx.x; t < work.tiles; t += gridDim.x) {
    __syncthreads();  // all warps are done with the last tile
    set_tile(work, t, write, tile);
    const ScoreSink<T> sink{job, tile, scores_alone ? nullptr : rows, work.row_pitch,
                            write ? static_cast<int>(p.qk_matmul_output_mode) : -1};
    if constexpr (sizeof(T) == 2) {
      if (work.matrix_units) matrix_scores<T>(sink, reinterpret_cast<uint32_t*>(phase));
    }
    if (sizeof(T) == 4 || !work.matrix_units) tiled_scores<T>(sink, work.wide_keys, *reinterpret_cast<ScoreTiles*>(phase));
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    if (scores_alone || warp >= tile.count) continue;
    Gather gather{};
    gather.size = static_cast<int>(p.v_head_size);
    gather.pairs = work.wide_values;
    gather.key = reinterpret_cast<int32_t*>(phase + warp * (2 * kWaiting + gather.size));
    gather.weight = reinterpret_cast<float*>(gather.key) + kWaiting;
    gather.out = gather.weight + kWaiting;
    finish_row<T>(work, tile, tile.rows[warp], rows + warp * work.row_pitch, gather);
  }
}

template <class T>
void run_rows(Status& status, const RowPlan& plan, const RowWork& work, void* stream) {
  launch(status, rows_kernel<T>, dim3(static_cast<unsigned>(plan.blocks)), dim3(kTileRowThreads), plan.shared_bytes, stream,
         work);
}

void run_rows(Status& status, const RowPlan& plan, RowWork work, RowPass pass, void* stream) {
  work.pass = pass;
  if (plan.sweeps) return sweep_rows(status, work, stream);
  visit_type(work.job.params.type, [&](auto element) { run_rows<decltype(element)>(status, plan, work, stream); });
}

}  // namespace

size_t row_attention_scratch_bytes(const AttentionJob& job) { return plan_rows(job).total; }

void row_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream) {
  const RowPlan plan = plan_rows(job);
  if (plan.tiles > INT32_MAX) {
    return status.fail("batch * kv_heads * queries are too many for one launch; split the batch");
  }
  if (!plan.fits) {
    return status.fail("v_head_size is too large for the shared memory of this GPU; use strategy exact");
  }
  char* base = static_cast<char*>(scratch);
  const auto floats = [&](size_t at) { return reinterpret_cast<float*>(base + at); };
  RowWork work{};
  work.job = job;
  work.samples = samples;
  work.row_pitch = static_cast<int32_t>(row_pitch(job));
  work.tile_rows = static_cast<int32_t>(plan.tile_rows);
  work.wide_keys = plan.wide_keys;
  work.matrix_units = plan.matrix_units;
  work.wide_values = job.params.v_head_size % 2 == 0 && joined_on_16_bytes(job, job.tensors.v, job.tensors.past_value);
  work.tiles = plan.tiles;
  if (!plan.shared_rows) work.rows = floats(plan.rows);
  if (!samples_rows(job)) return run_rows(status, plan, work, RowPass::scores, stream);
  if (clusters_values(job.params)) {
    int32_t* order = reinterpret_cast<int32_t*>(base + plan.order);
    const ValueClusters clusters{order, reinterpret_cast<int32_t*>(base + plan.count), floats(plan.centre),
                                 floats(plan.norm), base + plan.tree};
    cluster_values(status, job, clusters, stream);
    work.value_order = order;
    work.value_centre = clusters.centre;
    work.value_norm = clusters.norm;
  } else if (job.params.control_variate) {
    value_stats(status, job, floats(plan.partial), floats(plan.mean), floats(plan.norm), stream);
    work.value_mean = floats(plan.mean);
    work.value_norm = floats(plan.norm);
  }
  const bool adaptive = job.params.strategy == Strategy::adaptive;
  if (adaptive || plan.sweeps) {
    work.allowed = reinterpret_cast<int32_t*>(base + plan.allowed);
    if (adaptive) work.entropy = floats(plan.entropy);
    if (plan.sweeps) work.sums = reinterpret_cast<float4*>(base + plan.sums);
    run_rows(status, plan, work, RowPass::sums, stream);
  }
  if (adaptive) {
    double* budget = reinterpret_cast<double*>(base + plan.budget);
    share_budget(status, work, budget, stream);
    work.budget = budget;
  }
  run_rows(status, plan, work, RowPass::output, stream);
}

}  // namespace cuda
}  // namespace qexport
