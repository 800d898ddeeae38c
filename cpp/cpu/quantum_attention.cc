// QuantumAttention on the CPU: the phases of a call, cut into blocks of query rows that any thread may take.
#include "qexport/quantum_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "block_runner.h"
#include "tree_run.h"

namespace qexport {
namespace {

// More than this is not packed at once but tile by tile, or head by head: the arena of a session never gives memory back.
constexpr size_t kMaxPackedBytes = size_t{64} << 20;

// Probabilities are kept between the two phases of `adaptive` up to this size, else computed twice.
constexpr size_t kMaxKeptBytes = size_t{16} << 20;

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Blocks in low precision where they are allowed, known and pay: packing them costs what about so many rows of fp32
// attention lose, with tiles and without.
constexpr int64_t kTileRows = 24, kBlockedRows = 56;

KvBlocks choose_blocks(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  const bool pays = p.q_len * job.group >= (kernels().tiles ? kTileRows : kBlockedRows) && job.total_len > 0;
  const Precision wanted = p.precision == Precision::automatic ? Precision::bf16 : p.precision;
  const Precision precision = pays ? std::min(wanted, kernels().lowest) : Precision::fp32;
  if (p.strategy != Strategy::tree && (p.strategy != Strategy::exact || precision == Precision::fp32)) return {};
  return block_layout(precision, kernels().tiles, job.total_len, p.head_size, p.v_head_size);
}

// (batch, kv head) pairs whose blocks are in memory at once; whole batch items for `tree`, whose heads share their budget.
int64_t heads_at_once(const AttentionJob& job) {
  const int64_t kv_heads = job.params.kv_heads, heads = job.params.batch * kv_heads;
  if (job.blocks.count == 0) return heads;
  const int64_t fit = std::clamp<int64_t>(static_cast<int64_t>(kMaxPackedBytes / job.blocks.bytes_per_head()), 1, heads);
  return job.params.strategy == Strategy::tree ? std::max(fit / kv_heads, int64_t{1}) * kv_heads : fit;
}

AttentionJob make_job(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors) {
  AttentionJob job{};
  job.params = params;
  job.tensors = tensors;
  job.total_len = params.past_len + params.kv_len;
  job.group = params.q_heads / params.kv_heads;
  const int64_t least = *std::min_element(params.num_samples, params.num_samples + params.num_samples_count);
  if (params.strategy != Strategy::naive && least >= job.total_len) job.params.strategy = Strategy::exact;
  const int64_t rows = job.group * params.q_len;  // of a kv head
  const bool few_rows = rows > 0 && rows <= kernels().rows->few_rows;
  job.tree_decode = job.params.strategy == Strategy::tree && few_rows && decode_applies(job);
  if (job.params.strategy == Strategy::tree && !tree_applies(job)) job.params.strategy = Strategy::exact;
  // Means of values hold later ones, which a causal query must not see.
  if (job.params.strategy == Strategy::exact || params.is_causal) job.params.control_variate = false;
  job.blocks = choose_blocks(job);
  const bool few = job.params.strategy == Strategy::exact && job.blocks.count == 0 && few_rows &&
                   (!job.tree_decode || params.error_tolerance > 0.0f);  // then heads may turn out to need all keys
  job.parts = few ? std::max<int64_t>(1, (job.total_len + kPartKeys - 1) / kPartKeys) : 1;
  if (job.params.strategy == Strategy::tree) layout_tree(job);
  return job;
}

// Packing pays where rows must be converted or brought together, and more than one block reads them.
bool needs_packing(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  const bool as_is = p.type == DType::f32 && t.k.row_stride == p.head_size && t.v.row_stride == p.v_head_size;
  const size_t bytes = static_cast<size_t>(p.batch * p.kv_heads * job.total_len) * sizeof(float) *
                       static_cast<size_t>(packed_row(p.head_size) + packed_row(p.v_head_size));
  return job.blocks.count == 0 && !as_is && job.group * p.q_len > kernels().rows->exact_rows && bytes <= kMaxPackedBytes;
}

size_t kept_bytes(const AttentionJob& job) {
  const int64_t rows = kernels().rows->sampled_rows;
  return static_cast<size_t>(BlockRunner::count(job, rows) * rows * job.total_len) * sizeof(float);
}

bool keeps_probabilities(const AttentionJob& job) {
  return job.params.strategy == Strategy::adaptive && kept_bytes(job) <= kMaxKeptBytes;
}

struct Layout {
  size_t packed_key, packed_value, block_keys, block_values, key_mean, tree, mean, norm, cluster, centre, entropy, allowed,
      budget, probabilities, part_state, parts_left, workers, per_worker, total;
};

Layout make_layout(const AttentionJob& job, const ParallelFor& parallel) {
  const QuantumAttentionParams& p = job.params;
  const size_t kv = static_cast<size_t>(p.batch * p.kv_heads);
  const size_t rows = static_cast<size_t>(p.batch * p.q_heads * p.q_len);
  const bool adaptive = p.strategy == Strategy::adaptive;
  Layout layout{};
  size_t used = 64;  // the caller's pointer need not be aligned
  const auto take = [&](bool needed, size_t bytes) {
    const size_t at = used;
    used += needed ? padded(bytes) : 0;
    return at;
  };
  const bool packed = needs_packing(job);
  const size_t keys = kv * static_cast<size_t>(job.total_len) * sizeof(float);
  layout.packed_key = take(packed, keys * static_cast<size_t>(packed_row(p.head_size)));
  layout.packed_value = take(packed, keys * static_cast<size_t>(packed_row(p.v_head_size)));
  const KvBlocks& blocks = job.blocks;
  const size_t at_once = static_cast<size_t>(heads_at_once(job)) * sizeof(float);
  layout.block_keys = take(blocks.count > 0, at_once * static_cast<size_t>(blocks.stored * blocks.key_block));
  layout.block_values = take(blocks.count > 0, at_once * static_cast<size_t>(blocks.stored * blocks.value_block));
  layout.key_mean = take(blocks.count > 0, at_once * static_cast<size_t>(blocks.mean_row));
  layout.tree = take(true, tree_bytes(job, heads_at_once(job)));
  const bool clustered = clusters_values(p);
  layout.mean = take(p.control_variate && !clustered, kv * static_cast<size_t>(p.v_head_size) * sizeof(float));
  layout.norm = take(p.control_variate, kv * static_cast<size_t>(job.total_len) * sizeof(float));
  layout.cluster = take(clustered, kv * static_cast<size_t>(job.total_len) * sizeof(int32_t));
  layout.centre = take(clustered, kv * static_cast<size_t>(value_clusters(job) * packed_row(p.v_head_size)) * sizeof(float));
  layout.entropy = take(adaptive, rows * sizeof(float));
  layout.allowed = take(adaptive, rows * sizeof(int32_t));
  layout.budget = take(adaptive, rows * sizeof(double));
  layout.probabilities = take(keeps_probabilities(job), kept_bytes(job));
  const size_t parts = kv * static_cast<size_t>(job.parts);
  layout.part_state = take(job.parts > 1, job.parts > 1 ? parts * kernels().rows->part_bytes(job) : 0);
  layout.parts_left = take(job.parts > 1, kv * sizeof(int32_t));
  const size_t summary = job.tensors.present_key_summary ? kernels().rows->summary_bytes(job) : 0;
  layout.per_worker = padded(std::max({summary, kernels().scratch_bytes(job), kernels().rows->scratch_bytes(job)})) + 64;
  layout.workers = used;
  layout.total = used + layout.per_worker * static_cast<size_t>(parallel.max_threads);
  return layout;
}

// present = past joined with new along the key axis, for one (batch, kv head).
void join(const AttentionJob& job, bool values, int64_t b, int64_t h) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  const HeadRows& past = values ? t.past_value : t.past_key;
  const HeadRows& fresh = values ? t.v : t.k;
  const int64_t bytes = p.type == DType::f32 ? 4 : 2;
  const int64_t row = (values ? p.v_head_size : p.head_size) * bytes;
  char* out = static_cast<char*>(values ? t.present_value : t.present_key) + (b * p.kv_heads + h) * job.total_len * row;
  const auto copy = [&](const HeadRows& rows, int64_t count) {
    const char* src = static_cast<const char*>(rows.data) + (b * rows.batch_stride + h * rows.head_stride) * bytes;
    if (src == out) {  // the caller gave past and present the same memory
    } else if (rows.row_stride * bytes == row) {
      std::memcpy(out, src, static_cast<size_t>(count * row));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(out + i * row, src + i * rows.row_stride * bytes, static_cast<size_t>(row));
      }
    }
    out += count * row;
  };
  if (p.past_len > 0) copy(past, p.past_len);
  if (p.kv_len > 0) copy(fresh, p.kv_len);
}

// Exact attention in low precision. K and V are packed once per call; a block of rows then reads nothing else.
void run_blocked(AttentionJob& job, BlockRunner& runner) {
  const Kernels& k = kernels();
  const int64_t kv_heads = job.params.kv_heads, heads = job.params.batch * kv_heads, at_once = heads_at_once(job);
  constexpr int64_t kPiece = 16;  // blocks that a thread packs at a time
  const int64_t pieces = (job.blocks.count + kPiece - 1) / kPiece;
  for (int64_t first = 0; first < heads; first += at_once) {
    const int64_t n = std::min(at_once, heads - first);
    job.blocks.first_head = first;
    if (job.blocks.mean_row > 0) {
      runner.each(n, [&](int64_t i, char*) { k.key_mean(job, (first + i) / kv_heads, (first + i) % kv_heads); });
    }
    runner.each(n * pieces, [&](int64_t i, char*) {
      const int64_t head = first + i / pieces, block = i % pieces * kPiece;
      k.pack_blocks(job, head / kv_heads, head % kv_heads, block, std::min(block + kPiece, job.blocks.count));
    });
    runner.blocks(k.rows->exact_rows, first, n, [&](RowBlock block, char* s) { k.blocked(job, block, s); });
  }
}

// The budget of batch item b: S_r = min(n_r, max(1, c g_r)), g_r = S_h sqrt(exp H_r), with c such that sum S_r = sum
// min(S_h, n_r).
void share_budget(const AttentionJob& job, int64_t b) {
  const QuantumAttentionParams& p = job.params;
  const int64_t rows = p.q_heads * p.q_len, first = b * rows;
  double* g = job.budget + first;
  const int32_t* allowed = job.allowed + first;
  double target = 0.0, high = 0.0, low = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t samples = p.num_samples[p.num_samples_count == 1 ? 0 : r / p.q_len];
    g[r] = static_cast<double>(samples) * std::exp(0.5 * static_cast<double>(job.entropy[first + r]));
    if (allowed[r] == 0) continue;
    target += static_cast<double>(std::min<int64_t>(samples, allowed[r]));
    high = std::max(high, allowed[r] / g[r]);
  }
  const auto share = [&](double c, int64_t r) { return std::min<double>(allowed[r], std::max(1.0, c * g[r])); };
  for (int step = 0; step < 64 && low < high; ++step) {
    const double c = low + (high - low) / 2;
    double parts[4] = {};  // one sum alone would be a chain of additions that wait for each other
    for (int64_t r = 0; r < rows / 4 * 4; r += 4) {
      for (int64_t i = 0; i < 4; ++i) parts[i] += share(c, r + i);
    }
    for (int64_t r = rows / 4 * 4; r < rows; ++r) parts[0] += share(c, r);
    (parts[0] + parts[1] + parts[2] + parts[3] < target ? low : high) = c;
  }
  for (int64_t r = 0; r < rows; ++r) g[r] = share(high, r);
}

}  // namespace

bool computes_in(Precision precision) { return precision <= kernels().lowest; }

size_t quantum_attention_cpu_scratch_bytes(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors,
                                           const ParallelFor& parallel) {
  return make_layout(make_job(params, tensors), parallel).total;
}

void quantum_attention_cpu(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors, void* scratch,
                           const ParallelFor& parallel) {
  AttentionJob job = make_job(params, tensors);
  const Layout layout = make_layout(job, parallel);
  char* base = static_cast<char*>(scratch);
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
  const QuantumAttentionParams& p = job.params;
  if (needs_packing(job)) {
    job.packed_key = reinterpret_cast<float*>(base + layout.packed_key);
    job.packed_value = reinterpret_cast<float*>(base + layout.packed_value);
  }
  if (job.blocks.count > 0) {
    job.blocks.keys = reinterpret_cast<float*>(base + layout.block_keys);
    job.blocks.values = reinterpret_cast<float*>(base + layout.block_values);
    job.blocks.key_mean = reinterpret_cast<float*>(base + layout.key_mean);
  }
  if (p.strategy == Strategy::tree) place_tree(job, heads_at_once(job), base + layout.tree);
  if (p.control_variate) {
    job.value_norm = reinterpret_cast<float*>(base + layout.norm);
    if (clusters_values(p)) {
      job.value_cluster = reinterpret_cast<int32_t*>(base + layout.cluster);
      job.value_centre = reinterpret_cast<float*>(base + layout.centre);
    } else {
      job.value_mean = reinterpret_cast<float*>(base + layout.mean);
    }
  }
  if (p.strategy == Strategy::adaptive) {
    job.entropy = reinterpret_cast<float*>(base + layout.entropy);
    job.allowed = reinterpret_cast<int32_t*>(base + layout.allowed);
    job.budget = reinterpret_cast<double*>(base + layout.budget);
    if (keeps_probabilities(job)) job.probabilities = reinterpret_cast<float*>(base + layout.probabilities);
  }
  if (job.parts > 1) {
    job.part_state = base + layout.part_state;
    job.parts_left = reinterpret_cast<int32_t*>(base + layout.parts_left);
    std::fill_n(job.parts_left, p.batch * p.kv_heads, static_cast<int32_t>(job.parts));
  }
  const RowKernels& k = *kernels().rows;
  BlockRunner runner(job, base + layout.workers, layout.per_worker, parallel);
  const int64_t kv = p.batch * p.kv_heads;
  const double work = static_cast<double>(p.batch * p.q_heads * p.q_len) * static_cast<double>(job.total_len) *
                      static_cast<double>(p.head_size + p.v_head_size + 16);
  runner.set_serial(work < 4e6);

  if (job.tensors.present_key || job.tensors.present_value) {
    runner.each(kv, [&](int64_t i, char*) {
      if (job.tensors.present_key) join(job, false, i / p.kv_heads, i % p.kv_heads);
      if (job.tensors.present_value) join(job, true, i / p.kv_heads, i % p.kv_heads);
    });
  }
  if (job.packed_key) {
    runner.each(kv, [&](int64_t i, char*) { k.pack(job, i / p.kv_heads, i % p.kv_heads); });
  }
  if (p.control_variate) {
    const auto stats = clusters_values(p) ? k.cluster_values : k.value_stats;
    runner.each(kv, [&](int64_t i, char* s) { stats(job, i / p.kv_heads, i % p.kv_heads, s); });
  }
  if (p.strategy == Strategy::adaptive) {
    runner.blocks(k.sampled_rows, [&](RowBlock block, char* s) { k.entropy(job, block, s); });
    runner.each(p.batch, [&](int64_t b, char*) { share_budget(job, b); });
  }
  if (job.tensors.present_key_summary && !job.tree_decode) {
    runner.each(kv, [&](int64_t i, char* s) { k.update_summary(job, i / p.kv_heads, i % p.kv_heads, s); });
  }
  if (job.tensors.error_estimate) std::fill_n(job.tensors.error_estimate, p.batch * p.q_heads, 0.0f);
  const auto exact_parts = [&] {
    runner.each(kv * job.parts, [&](int64_t i, char* s) {
      const int64_t head = i / job.parts, first = i % job.parts * kPartKeys;
      k.exact_part(job, {head / p.kv_heads, head % p.kv_heads, 0, job.group * p.q_len, first, first + kPartKeys}, s);
    });
  };
  bool scores_left = job.tensors.qk_matmul_output;
  if (p.strategy == Strategy::tree) {
    run_tree(job, heads_at_once(job), runner);
  } else if (job.tree_decode) {
    runner.each(kv, [&](int64_t head, char* s) {
      k.tree_decode(job, {head / p.kv_heads, head % p.kv_heads, 0, job.group * p.q_len, 0, job.total_len}, s);
    });
    if (job.parts > 1 && std::any_of(job.parts_left, job.parts_left + kv, [](int32_t left) { return left > 0; })) {
      exact_parts();
    }
  } else if (job.blocks.count > 0) {
    run_blocked(job, runner);
  } else if (job.parts > 1) {
    exact_parts();
  } else if (p.strategy != Strategy::exact) {
    runner.blocks(k.sampled_rows, [&](RowBlock block, char* s) { k.sampled(job, block, s); });
    scores_left = scores_left && !returns_probabilities(job);
  } else if (returns_probabilities(job)) {
    runner.blocks(k.sampled_rows, [&](RowBlock block, char* s) { k.exact_with_probabilities(job, block, s); });
    scores_left = false;
  } else {
    runner.blocks(k.exact_rows, [&](RowBlock block, char* s) { k.exact(job, block, s); });
  }
  if (scores_left) {
    runner.blocks(k.sampled_rows, [&](RowBlock block, char* s) { k.qk_matmul_output(job, block, s); });
  }
}

}  // namespace qexport
