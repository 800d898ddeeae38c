// The output of a decoding row from its parts; and what the means of the clusters that it did not read got wrong, from a
// sample of these clusters: how far off the output is, and, if `residual` says so, a correction.
#include "cluster_draw.cuh"
#include "join_parts.cuh"
#include "tree_decode.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kWarps = kJoinThreads / kWarp, kClusterSize = static_cast<int>(kClusterKeys);
constexpr int kMostSampled = kResidualClusters + 1;  // a systematic sample may round up
constexpr float kHopeless = 2.0f;  // of kToleranceMargin: a head whose estimate is above it does not try to read more
// |sum d|^2 / (sum |d|)^2 of what clusters get wrong, at least: how alike their errors are. Measured: docs/math.md.
constexpr float kCoherence = 0.09f;
static_assert(kMostSummarySize <= kJoinThreads, "a column of V for each thread");

struct Sample {
  int count;
  int32_t cluster[kMostSampled];
  float factor[kMostSampled], weight[kMostSampled], more[kMostSampled];  // 1 / pi; of its means; what the keys have beyond
  float key[kMostSampled * kClusterSize];                                // scores, then weights
  float reduced[kWarp];
};
struct RowError {
  float square, norm;  // squared error of the output as estimated, its squared norm
};

// size = sqrt(gain) + a quarter of its mean over the clusters that may be drawn, so that none has a vanishing probability;
// then the sample, by the first warp.
__device__ void draw_sample(const DecodeLaunch& decode, int64_t row, const ReadPlan& plan, uint32_t random, Sample& sample) {
  const int64_t first = row * decode.clusters() + plan.first_cluster();
  const float* const weight = decode.weight + first;
  const uint32_t* const gain = decode.gain_key + first;
  float* const size = decode.size + first;
  const int clusters = plan.clusters(), thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int c = thread; c < clusters; c += kJoinThreads) sum += weight[c] == -kInf ? 0.0f : sqrtf(gain_of(gain[c]));
  sum = block_sum(sum, sample.reduced);
  const float least = clusters > plan.chosen ? 0.25f * sum / static_cast<float>(clusters - plan.chosen) : 0.0f;
  for (int c = thread; c < clusters; c += kJoinThreads) {
    size[c] = weight[c] == -kInf ? 0.0f : sqrtf(gain_of(gain[c])) + least;
  }
  __syncthreads();
  if (thread >= kWarp) return;
  const int count = draw_clusters(size, clusters, static_cast<float>(kResidualClusters), random, kMostSampled,
                                  sample.cluster, sample.factor);
  if (thread == 0) sample.count = count;
}

// Weights of the keys of the sample in units of exp2 of the largest score, that of the means, and the sum of all weights of
// the row with what the sample has beyond its means: one huge key that was drawn cannot pass it by far.
template <class T>
__device__ float weigh_sample(const DecodeLaunch& decode, int64_t row, const ReadPlan& plan, const JoinedSum& joined,
                              Sample& sample) {
  const AttentionJob& job = decode.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t place = row / p.q_len, b = place / p.q_heads, head = decode.head_of(place);
  const HeadSummary summary = decode.head_summary(head);
  const int thread = static_cast<int>(threadIdx.x), keys = sample.count * kClusterSize;
  const T* const q = row_of<T>(job.tensors.q, b, place % p.q_heads, row % p.q_len);
  float most = joined.most;
#pragma unroll 2
  for (int j = thread / kWarp; j < keys; j += kWarps) {
    const int32_t key = cluster_key(summary, plan.first_cluster() + sample.cluster[j / kClusterSize], j % kClusterSize);
    const T* const k = row_of<T>(job.tensors.k, b, head % p.kv_heads, key);
    float product = 0.0f;
    for (int x = lane_id(); x < p.head_size; x += kWarp) product = fmaf(to_float(q[x]) * p.scale, to_float(k[x]), product);
    const float score = decode_score(warp_sum(product), p.softcap);
    if (lane_id() == 0) sample.key[j] = score;
    most = fmaxf(most, score);
  }
  most = block_max(most, sample.reduced);
  for (int j = thread; j < keys; j += kJoinThreads) sample.key[j] = fast_exp2(sample.key[j] - most);
  __syncthreads();
  float more = 0.0f;
  if (thread < sample.count) {
    const int64_t at = row * decode.clusters() + plan.first_cluster() + sample.cluster[thread];
    float sum = 0.0f;
    for (int j = 0; j < kClusterSize; ++j) sum += sample.key[thread * kClusterSize + j];
    const float weight = fast_exp2(decode.weight[at] + static_cast<float>(kLogKeys) - most);
    sample.weight[thread] = weight, sample.more[thread] = sum - weight;
    more = fmaxf(sum - weight, 0.0f);
  }
  return joined.sum * fast_exp2(joined.most - most) + block_sum(more, sample.reduced);
}

// Corrects the normalised output y of a row as `residual` says and estimates what is wrong with it then. `parts`: a row of V
// for each warp.
template <class T>
__device__ RowError settle_residual(const DecodeLaunch& decode, int64_t row, const JoinedSum& joined, float* y, float* parts,
                                    Sample& sample) {
  const AttentionJob& job = decode.job;
  const QuantumAttentionParams& p = job.params;
  const ReadPlan plan = decode.plan[row];
  const int64_t place = row / p.q_len, b = place / p.q_heads, head = decode.head_of(place);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, size = static_cast<int>(p.v_head_size);
  const uint32_t position = static_cast<uint32_t>(given_len(job, b) - p.q_len + row % p.q_len);
  const uint64_t seed = seed_of(job);
  const PhiloxBlock random =
      philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                 {{p.layer, static_cast<uint32_t>(place), position, kDecodeDraw + static_cast<uint32_t>(decode.attempt)}});
  draw_sample(decode, row, plan, random.word[0], sample);
  for (int x = lane_id(); x < size; x += kWarp) parts[warp * size + x] = 0.0f;
  __syncthreads();
  const float known = weigh_sample<T>(decode, row, plan, joined, sample);
  const HeadSummary summary = decode.head_summary(head);
  float squares = 0.0f, length = 0.0f;
  for (int i = warp; i < sample.count; i += kWarps) {
    const int32_t c = plan.first_cluster() + sample.cluster[i];
    const float* const mean = summary.mean_value + int64_t{c} * size;
    const float share = sample.factor[i] / known;
    float square = 0.0f;
    for (int x = lane_id(); x < size; x += kWarp) {
      float v[kClusterSize], sum = -sample.weight[i] * mean[x] - y[x] * sample.more[i];
#pragma unroll
      for (int j = 0; j < kClusterSize; ++j) {
        v[j] = to_float(row_of<T>(job.tensors.v, b, head % p.kv_heads, cluster_key(summary, c, j))[x]);
      }
#pragma unroll
      for (int j = 0; j < kClusterSize; ++j) sum = fmaf(sample.key[i * kClusterSize + j], v[j], sum);
      parts[warp * size + x] += sum * share;
      square += sum * share * (sum * share);
    }
    square = warp_sum(square);
    squares += square, length += sqrtf(square);
  }
  __syncthreads();
  float total = 0.0f;  // of column `thread`
  for (int w = 0; w < kWarps && thread < size; ++w) total += parts[w * size + thread];
  const auto over_warps = [&](float x) { return block_sum(lane_id() == 0 ? x : 0.0f, sample.reduced); };
  squares = over_warps(squares), length = over_warps(length);
  // Of n parts z whose sum is D, sum |z|^2 - |D|^2 / n is (1 - 1 / n) times the variance of D; |D|^2 is that too large.
  const float square = block_sum(total * total, sample.reduced), n = static_cast<float>(max(sample.count, 2));
  const float variance = fmaxf(squares - square / n, 0.0f) * n / (n - 1.0f);
  const float surplus = fmaxf(square - variance, 0.0f);
  const float error = fmaxf(surplus, kCoherence * length * length);
  float shrink = p.residual == Residual::unbiased ? 1.0f : 0.0f;
  if (p.residual == Residual::james_stein && surplus > 0.0f) shrink = surplus / square;
  float corrected = 0.0f;
  if (thread < size) corrected = y[thread] += total * shrink;
  const float norm = block_sum(corrected * corrected, sample.reduced), keep = 1.0f - shrink;
  return {keep * keep * error + shrink * shrink * variance, norm};
}

// One query head per block of threads.
template <class T>
__global__ void __launch_bounds__(kJoinThreads) settle_rows_kernel(const __grid_constant__ DecodeLaunch decode) {
  __shared__ Sample sample;
  const QuantumAttentionParams& p = decode.job.params;
  const int64_t place = blockIdx.x;
  // Another head of the group may say in the meantime that all keys are to be read: all threads hear the same.
  if (__syncthreads_or(decode.settled(place))) return;
  const int size = static_cast<int>(p.v_head_size), thread = static_cast<int>(threadIdx.x);
  float* const y = dynamic_shared<float>();  // (size)
  float* const parts = y + size;             // (kWarps, size)
  double square = 0.0, norm = 0.0;
  for (int64_t query = 0; query < p.q_len; ++query) {
    const int64_t row = place * p.q_len + query;
    const int64_t at = row * decode.parts;
    const RowParts of_row{decode.part_stats + 2 * at, decode.part_outputs + at * size, decode.parts};
    const JoinedSum joined = join_parts(of_row, size, whole_block(), [&](int column, float x) { y[column] = x; });
    __syncthreads();
    if (decode.draws) {
      const RowError error = settle_residual<T>(decode, row, joined, y, parts, sample);
      square += static_cast<double>(error.square), norm += static_cast<double>(error.norm);
    }
    T* const to = output_row<T>(decode.job, place / p.q_heads, place % p.q_heads, query);
    for (int x = thread; x < size; x += kJoinThreads) to[x] = from_float<T>(y[x]);
    __syncthreads();
  }
  if (thread > 0) return;
  const double estimate = square > 0.0 ? sqrt(square / norm) : 0.0;
  if (decode.job.tensors.error_estimate) decode.job.tensors.error_estimate[place] = static_cast<float>(estimate);
  if (p.error_tolerance == 0.0f) return;
  const double limit = static_cast<double>(kToleranceMargin * p.error_tolerance);
  const ReadPlan plan = decode.plan[place * p.q_len];
  if (estimate <= limit) {
    decode.done[place] = 1;
  } else if (!(estimate <= kHopeless * limit) || kMostTried * 2 * plan.chosen > plan.clusters()) {
    const int64_t first = place / decode.job.group * decode.job.group;
    for (int64_t i = first; i < first + decode.job.group; ++i) decode.reads_all(i) = 1;
  }
}

template <class T>
void settle(Status& status, const DecodeLaunch& decode, void* stream) {
  const size_t rows = sizeof(float) * static_cast<size_t>((1 + kWarps) * decode.job.params.v_head_size);
  launch(status, settle_rows_kernel<T>, dim3(static_cast<unsigned>(decode.places())), dim3(kJoinThreads), rows, stream,
         decode);
}

}  // namespace

void settle_rows(Status& status, const DecodeLaunch& decode, void* stream) {
  visit_type(decode.job.params.type, [&](auto element) { settle<decltype(element)>(status, decode, stream); });
}

}  // namespace cuda
}  // namespace qexport
