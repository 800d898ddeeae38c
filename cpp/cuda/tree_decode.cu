// Decoding with strategy tree from a key_summary: when it is used, its memory, and the reading of keys and means.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "join_parts.cuh"
#include "node_direction.cuh"
#include "tree_decode.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kReadThreads = 256, kReadWarps = kReadThreads / kWarp;
constexpr int kReadBlocks = 3;  // on a multiprocessor, so that enough bytes are under way
constexpr int kRunEach = 4, kReadRun = kReadThreads / kRowThreads * kRunEach;  // keys or means that a block reads at once
constexpr int kMostReadParts = 512;
constexpr double kKeysForTolerance = 4000.0, kFreeTolerance = 0.1;  // as on the CPU

// What reading few clusters saves is bytes of the cache; what it costs are kernels that wait for each other. On an H200 a
// step that read a sixteenth of 65536 keys of 8 heads of 64 in float16 took 59.5 us, the exact one 54.5 for its 134 MB
// (bench/results/cuda.json), which makes 31 MB of each of the four kernels: one point, from which others are counted.
constexpr int64_t kBytesOfLaunch = 31'000'000;
constexpr int64_t kMoreLaunches = 4;   // than exact attention: scores, and the choice, a block going through them many times
constexpr int64_t kTrialLaunches = 3;  // of another budget, which most heads need not try
#ifdef QEXPORT_CUDA_EMULATION
constexpr bool kAlways = true;  // so that tests see it at work on few keys
#else
constexpr bool kAlways = false;
#endif

// A row of the means, or of the keys, of each of the entries that a thread has a share of: w[i] . row(i), to `sum` of the
// block's columns. What has no weight is not looked at, be it NaN.
template <class E, class RowOf>
__device__ __forceinline__ void add_values(const float (&weight)[kRunEach], const RowOf& row_of_entry, int size, bool wide,
                                           float* partial, int width) {
  const E* row[kRunEach];
#pragma unroll
  for (int i = 0; i < kRunEach; ++i) row[i] = row_of_entry(i);
#pragma unroll 1
  for (int at = first_chunk(); at < width; at += kPass) {
    __align__(16) E chunk[kRunEach][kChunkRow];
    float sum[kChunkRow] = {};
    copy_chunks(chunk, row, at, size, wide);
#pragma unroll
    for (int i = 0; i < kRunEach; ++i) {
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) {
        sum[e] = weight[i] == 0.0f ? sum[e] : fmaf(weight[i], to_float(chunk[i][e]), sum[e]);
      }
    }
    store_partial(whole_block(), sum, partial, width, at);
  }
}

// One part of what a row reads per block of threads: runs of keys, then runs of means, to part_outputs and part_stats.
template <class T>
__global__ void __launch_bounds__(kReadThreads, kReadBlocks) read_parts_kernel(const __grid_constant__ DecodeLaunch decode) {
  __shared__ float reduced[kWarp];
  const AttentionJob& job = decode.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t row = blockIdx.x / decode.parts, place = row / p.q_len, b = place / p.q_heads, query = row % p.q_len;
  if (decode.settled(place)) return;
  const int64_t head = decode.head_of(place), kv_head = head % p.kv_heads;
  const int part = static_cast<int>(blockIdx.x % decode.parts), thread = static_cast<int>(threadIdx.x);
  const int size = static_cast<int>(p.head_size), v_size = static_cast<int>(p.v_head_size);
  const int width = node_width(size), v_width = node_width(v_size);
  const ReadPlan plan = decode.plan[row];
  const HeadSummary summary = decode.head_summary(head);
  const float* const weight = decode.weight + row * decode.clusters() + plan.first_cluster();
  const int32_t* const chosen = decode.chosen + row * decode.most_chosen;
  const T* const keys_of_head = row_of<T>(job.tensors.k, b, kv_head, 0);
  const T* const values_of_head = row_of<T>(job.tensors.v, b, kv_head, 0);
  float* const q = dynamic_shared<float>();  // (width)
  float* const output = q + width;           // (v_width)
  float* const partial = output + v_width;   // (kReadWarps, v_width)
  for (int x = thread; x < width; x += kReadThreads) {
    q[x] = x < size ? to_float(row_of<T>(job.tensors.q, b, place % p.q_heads, query)[x]) * p.scale : 0.0f;
  }
  for (int x = thread; x < v_width; x += kReadThreads) output[x] = 0.0f;
  __syncthreads();

  // Entries of a row: keys before the chunks, of the chosen clusters, behind the chunks.
  const KeyRange range = key_range(job, b, query);
  const int lo = static_cast<int>(range.lo), hi = static_cast<int>(range.hi), clusters = plan.clusters();
  const int before = clusters > 0 ? plan.first_key() - lo : hi - lo;
  const int listed = plan.chosen * static_cast<int>(kClusterKeys);
  const int behind = clusters > 0 ? plan.first_key() + clusters * static_cast<int>(kClusterKeys) : hi;
  const int keys = before + listed + hi - behind;
  const auto key_at = [&](int entry) {
    if (entry < before) return lo + entry;
    if (entry >= before + listed) return behind + entry - before - listed;
    const int place_in = entry - before, members = static_cast<int>(kClusterKeys);
    return static_cast<int>(cluster_key(summary, chosen[place_in / members], place_in % members));
  };
  const int key_runs = ceil_div(keys, kReadRun), runs = key_runs + ceil_div(clusters, kReadRun);
  float most = -kInf, sum = 0.0f;
  for (int run = part; run < runs; run += decode.parts) {
    const bool means = run >= key_runs;
    const int first = (means ? run - key_runs : run) * kReadRun, count = means ? clusters : keys;
    const auto place_of = [&](int i) { return first + thread / kRowThreads + i * (kReadThreads / kRowThreads); };
    int entry[kRunEach];  // of a thread's own rows; a key, or a cluster
#pragma unroll
    for (int i = 0; i < kRunEach; ++i) {
      const int at = min(place_of(i), count - 1);
      entry[i] = means ? at : key_at(at);
    }
    float score[kRunEach] = {};
    if (means) {
#pragma unroll
      for (int i = 0; i < kRunEach; ++i) score[i] = weight[entry[i]] + static_cast<float>(kLogKeys);
    } else {
      const T* key_rows[kRunEach];
#pragma unroll
      for (int i = 0; i < kRunEach; ++i) key_rows[i] = keys_of_head + entry[i] * job.tensors.k.row_stride;
#pragma unroll 1
      for (int at = first_chunk(); at < width; at += kPass) {
        __align__(16) T chunk[kRunEach][kChunkRow];
        __align__(16) float own[kChunkRow];
        copy_chunks(chunk, key_rows, at, size, decode.keys_wide);
        copy_whole_chunk(own, q + at);
#pragma unroll
        for (int i = 0; i < kRunEach; ++i) {
#pragma unroll
          for (int e = 0; e < kChunkRow; ++e) score[i] = fmaf(own[e], to_float(chunk[i][e]), score[i]);
        }
      }
      sum_over_row(score);
#pragma unroll
      for (int i = 0; i < kRunEach; ++i) score[i] = decode_score(score[i], p.softcap);
    }
    float highest = most;
#pragma unroll
    for (int i = 0; i < kRunEach; ++i) highest = place_of(i) < count ? fmaxf(highest, score[i]) : highest;
    highest = block_max(highest, reduced);
    const float base = highest == -kInf ? 0.0f : highest, fade = fast_exp2(most - base);
    float own = 0.0f, each[kRunEach];
#pragma unroll
    for (int i = 0; i < kRunEach; ++i) each[i] = place_of(i) < count ? fast_exp2(score[i] - base) : 0.0f, own += each[i];
    sum = sum * fade + block_sum(first_chunk() == 0 ? own : 0.0f, reduced);
    most = highest;
    if (means) {
      const float* const mean = summary.mean_value + int64_t{plan.first_cluster()} * v_size;
      add_values<float>(
          each, [&](int i) { return mean + int64_t{entry[i]} * v_size; }, v_size, decode.values_wide, partial, v_width);
    } else {
      add_values<T>(
          each, [&](int i) { return values_of_head + entry[i] * job.tensors.v.row_stride; }, v_size, decode.values_wide,
          partial, v_width);
    }
    __syncthreads();
    for (int x = thread; x < v_width; x += kReadThreads) {
      output[x] = output[x] * fade + sum_partial(whole_block(), partial, v_width, x);
    }
    __syncthreads();
  }
  const int64_t at = row * decode.parts + part;
  if (thread == 0) decode.part_stats[2 * at] = most, decode.part_stats[2 * at + 1] = sum;
  for (int x = thread; x < v_size; x += kReadThreads) decode.part_outputs[at * v_size + x] = output[x];
}

// A head that is read as a whole after all has no error.
__global__ void clear_errors_kernel(const __grid_constant__ DecodeLaunch decode) {
  const int64_t place = int64_t{blockIdx.x} * kReadThreads + threadIdx.x;
  if (place < decode.places() && decode.again[place]) decode.job.tensors.error_estimate[place] = 0.0f;
}

int64_t samples_of(const QuantumAttentionParams& p, int64_t q_head) {
  return p.num_samples[p.num_samples_count == 1 ? 0 : q_head];
}
int64_t cache_clusters(const AttentionJob& job) { return summary_chunks(job.total_len) * kChunkClusters; }

// Budgets that a head may have to try.
int attempts_of(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  if (p.error_tolerance == 0.0f) return 1;
  const int64_t samples = *std::min_element(p.num_samples, p.num_samples + p.num_samples_count);
  const int64_t least = std::max<int64_t>(ceil_div(samples, kClusterKeys), kResidualClusters);
  int attempts = 1;
  while (kMostTried * (least << attempts) <= cache_clusters(job)) ++attempts;
  return attempts;
}

bool draws(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  return p.residual == Residual::unbiased || p.residual == Residual::james_stein || p.error_tolerance > 0.0f ||
         job.tensors.error_estimate;
}

// The cache against the summary, what is read of the cache at first, and launches.
bool pays(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  const int64_t heads = p.batch * p.kv_heads, clusters = cache_clusters(job), size = p.head_size + p.v_head_size;
  const int64_t key = size * (p.type == DType::f32 ? 4 : 2);
  int64_t chosen = 0;  // clusters
  for (int64_t h = 0; h < p.q_heads; ++h) {
    chosen += p.batch * p.q_len * std::min(ceil_div(samples_of(p, h), kClusterKeys), clusters);
  }
  const int64_t summary = heads * clusters * (size + 4) * int64_t{sizeof(float)};
  const int64_t read = chosen * kClusterKeys * (key + int64_t{sizeof(float)});
  int64_t launches = kMoreLaunches + draws(job);
  if (p.error_tolerance > 0.0f) launches += kTrialLaunches * attempts_of(job);  // the last one being exact attention
  return heads * job.total_len * key >= summary + read + launches * kBytesOfLaunch;
}

// Sizes of a call; the pointers point into `memory`. Returns its bytes.
size_t lay_out(DecodeLaunch& decode, const Device& device, char* memory, char** exact_scratch) {
  const AttentionJob& job = decode.job;
  const QuantumAttentionParams& p = job.params;
  decode.chunks = summary_chunks(job.total_len);
  decode.draws = draws(job);
  const int64_t rows = decode.rows(), clusters = decode.clusters();
  const int64_t samples = *std::max_element(p.num_samples, p.num_samples + p.num_samples_count);
  // A budget that leaves no more than the clusters that are drawn buys all.
  decode.most_chosen = p.error_tolerance > 0.0f ? clusters / kMostTried
                                                : std::min(ceil_div(samples, kClusterKeys) + kResidualClusters, clusters);
  const int64_t keys = kSinkKeys + kChunkKeys + p.q_len + decode.most_chosen * kClusterKeys;
  const int64_t runs = ceil_div<int64_t>(keys, kReadRun) + ceil_div<int64_t>(clusters, kReadRun);
  const int64_t room = ceil_div<int64_t>(2 * kReadBlocks * device.multiprocessors, std::max<int64_t>(rows, 1));
  decode.parts = static_cast<int>(std::min({runs, room, int64_t{kMostReadParts}}));
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t bytes) {
    pointer = memory ? reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used) : nullptr;
    used += static_cast<size_t>(ceil_div(bytes, int64_t{256}) * 256);
  };
  take(decode.weight, rows * clusters * 4);
  take(decode.gain_key, rows * clusters * 4);
  take(decode.size, decode.draws ? rows * clusters * 4 : 0);
  take(decode.chosen, rows * decode.most_chosen * 4);
  take(decode.plan, rows * static_cast<int64_t>(sizeof(ReadPlan)));
  take(decode.part_stats, decode.parts * rows * 8);
  take(decode.part_outputs, decode.parts * rows * p.v_head_size * 4);
  if (p.error_tolerance > 0.0f) {
    take(decode.done, decode.places() * 4);
    take(decode.again, decode.places() * 4);
    take(*exact_scratch, static_cast<int64_t>(exact_attention_scratch_bytes(job)));
  }
  return used;
}

template <class T>
void run(Status& status, DecodeLaunch& decode, void* stream) {
  const QuantumAttentionParams& p = decode.job.params;
  const QuantumAttentionTensors& t = decode.job.tensors;
  const bool means =
      reinterpret_cast<uintptr_t>(decode.summary) % 16 == 0;  // chunks of a head begin there if the first does
  decode.keys_wide = means && p.head_size % 4 == 0 && starts_on_16_bytes(t.k, sizeof(T));
  decode.values_wide = means && p.v_head_size % 4 == 0 && starts_on_16_bytes(t.v, sizeof(T));
  const size_t shared = sizeof(float) * (node_width(p.head_size) + (1 + kReadWarps) * node_width(p.v_head_size));
  for (const int attempts = attempts_of(decode.job); decode.attempt < attempts; ++decode.attempt) {
    choose_clusters(status, decode, stream);
    launch(status, read_parts_kernel<T>, dim3(static_cast<unsigned>(decode.rows() * decode.parts)), dim3(kReadThreads),
           shared, stream, decode);
    settle_rows(status, decode, stream);
  }
}

}  // namespace

bool decode_applies(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  if (!t.key_summary || t.mask.data || cache_clusters(job) == 0) return false;
  if (job.group * p.q_len > kMostDecodeRows || std::max(p.head_size, p.v_head_size) > kMostSummarySize) return false;
  return kAlways || pays(job);
}

void decode_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream) {
  const QuantumAttentionParams& p = job.params;
  DecodeLaunch decode{};
  decode.job = job, decode.samples = samples;
  // Without a place to write to, what is not summarised yet is read exactly.
  decode.summary =
      job.tensors.present_key_summary ? job.tensors.present_key_summary : const_cast<float*>(job.tensors.key_summary);
  const double share = std::min(static_cast<double>(p.error_tolerance) / kFreeTolerance, 1.0);
  // Of the smallest tolerances it is beyond any number of keys, and of 64 bits.
  if (p.error_tolerance > 0.0f) {
    decode.least_keys = static_cast<int64_t>(std::min(std::ceil(kKeysForTolerance / (share * share)), 1e18));
  }
  char* exact_scratch = nullptr;
  lay_out(decode, current_device(status), static_cast<char*>(scratch), &exact_scratch);
  visit_type(p.type, [&](auto element) { run<decltype(element)>(status, decode, stream); });
  if (p.error_tolerance == 0.0f) return;
  exact_attention(status, job, decode.again, exact_scratch, stream);
  if (!job.tensors.error_estimate) return;
  const int64_t blocks = ceil_div<int64_t>(decode.places(), kReadThreads);
  launch(status, clear_errors_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kReadThreads), 0, stream, decode);
}

size_t decode_attention_scratch_bytes(const AttentionJob& job) {
  DecodeLaunch decode{};
  decode.job = job;
  Status status;  // an error shows again when the call is made
  char* exact_scratch = nullptr;
  return lay_out(decode, current_device(status), nullptr, &exact_scratch);
}

}  // namespace cuda
}  // namespace qexport
