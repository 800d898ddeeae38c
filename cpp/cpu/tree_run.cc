// Strategy `tree` on the CPU: when it is used, its memory, its phases.
#include "tree_run.h"

#include <cmath>
#include <cstring>

#include "qexport/philox.h"

namespace qexport {
namespace {

constexpr int64_t kFewestQueries = 32, kFewestKeys = 256;
// On tiles exact attention is so fast that a query's share of the tree costs what reading so many keys does.
constexpr double kKeysOfTree = 1100.0;
// With a tolerance, building and trying the tree costs more than it saves below so many queries, and below so many keys for
// a tolerance of 1 (measured on trained activations: docs/math.md).
constexpr int64_t kQueriesForTolerance = 1024;
constexpr double kKeysForTolerance = 200.0, kKeysForToleranceOnTiles = 600.0;
// The same of decoding: at a tolerance of kFreeTolerance or more; below it the square of the tolerance counts.
constexpr double kKeysForDecodeTolerance = 4000.0, kFreeTolerance = 0.1;
constexpr double kMostDensity = 0.5;  // of the keys that are read; more than that costs what exact attention costs
constexpr int64_t kTrials = 2;        // tiles of a head that are tried for a tolerance
constexpr double kToleranceMargin = 0.8;
constexpr uint32_t kAuditDraw = 2;  // the half-samples of a tile are draws 0 and 1
constexpr int64_t kPiece = 16;      // blocks that a thread packs at a time

// Whether all rows of a batch item have the same mask; exporters write that of padding out for every query.
bool same_for_all_rows(const AttentionMask& mask, const QuantumAttentionParams& p) {
  const int64_t size = mask.type == DType::f32 ? 4 : mask.type == DType::boolean ? 1 : 2;
  const int64_t items = mask.batch_stride == 0 ? 1 : p.batch, heads = mask.head_stride == 0 ? 1 : p.q_heads;
  const int64_t queries = mask.query_stride == 0 ? 1 : p.q_len;
  const auto bytes = static_cast<size_t>(mask.len * size);
  const char* first = static_cast<const char*>(mask.data);
  for (int64_t b = 0; b < items; ++b, first += mask.batch_stride * size) {
    for (int64_t h = 0; h < heads; ++h) {
      const char* row = first + h * mask.head_stride * size;
      for (int64_t i = 0; i < queries; ++i, row += mask.query_stride * size) {
        if (std::memcmp(row, first, bytes) != 0) return false;
      }
    }
  }
  return true;
}

// A mask that is the same for every row of a batch item and either lets a key pass unchanged or shuts it out.
bool mask_drops_keys(const AttentionJob& job) {
  const AttentionMask& mask = job.tensors.mask;
  if (!mask.data) return true;
  return same_for_all_rows(mask, job.params) && (mask.type == DType::boolean || kernels().mask_drops_keys(job));
}

// Carves the arrays of job.tree out of memory, or counts their bytes where it is null.
size_t carve(AttentionJob& job, int64_t heads, char* memory) {
  const QuantumAttentionParams& p = job.params;
  TreeState& t = job.tree;
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t n) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = memory && n > 0 ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
  };
  for (KvBlocks* blocks : {&t.centroids, &t.spreads, &t.slopes, &t.natural}) {
    take(blocks->keys, heads * blocks->stored * blocks->key_block);
    take(blocks->values, heads * blocks->stored * blocks->value_block);
  }
  take(t.order, heads * job.blocks.count * kBlockKeys);
  take(t.count, heads * t.clusters);
  take(t.value_spread, heads * t.clusters);
  take(t.mean_value, heads * t.clusters * packed_row(p.v_head_size));
  const int64_t places = p.batch * p.q_heads;
  take(t.budget, places);
  take(t.threshold, places);
  take(t.probe_score, places * kProbes * t.clusters);
  take(t.probe_norm, places * kProbes);
  return used;
}

// Whether the tiles of a batch item share one budget. Not under a causal mask: what a query reads would depend on later
// ones.
bool shares_clusters(const AttentionJob& job) {
  return !job.params.is_causal && job.params.num_samples_count == 1 && job.tree.budget[0] < job.blocks.count;
}

void set_first_head(AttentionJob& job, int64_t head) {
  for (KvBlocks* blocks : {&job.blocks, &job.tree.centroids, &job.tree.spreads, &job.tree.slopes, &job.tree.natural}) {
    blocks->first_head = head;
  }
}

// Rows [first, end) of a query head.
RowBlock head_rows(const AttentionJob& job, int64_t place, int64_t first, int64_t end) {
  const QuantumAttentionParams& p = job.params;
  const int64_t q_head = place % p.q_heads;
  return {place / p.q_heads, q_head / job.group, q_head % job.group * p.q_len + first, end - first, 0, job.total_len};
}

RowBlock tile_rows(const AttentionJob& job, int64_t place, int64_t tile) {
  return head_rows(job, place, tile * kTreeRows, std::min((tile + 1) * kTreeRows, job.params.q_len));
}

int64_t tiles_of(const AttentionJob& job) { return (job.params.q_len + kTreeRows - 1) / kTreeRows; }

// Tiles in the middle of kProbes equal parts of a head, the last part first.
int64_t probe_tile(const AttentionJob& job, int64_t probe) {
  return tiles_of(job) * (2 * (kProbes - probe) - 1) / (2 * kProbes);
}

// The thresholds of batch item b: a cluster is read where its score, relative to the norm of its head, reaches tau, with tau
// such that the probed tiles read the budget on average.
void share_clusters(const AttentionJob& job, int64_t b) {
  const QuantumAttentionParams& p = job.params;
  const TreeState& tree = job.tree;
  const int64_t first = b * p.q_heads, budget = tree.budget[first];
  std::fill_n(tree.threshold + first, p.q_heads, 0.0f);
  const auto norm = [&](int64_t place) {
    float sum = 0.0f;
    for (int64_t i = 0; i < kProbes; ++i) sum += tree.probe_norm[place * kProbes + i];
    return sum / kProbes;
  };
  const auto read = [&](float tau) {
    int64_t sum = 0;
    for (int64_t place = first; place < first + p.q_heads; ++place) {
      const float least = tau * norm(place);
      for (int64_t i = 0; i < kProbes; ++i) {
        const float* score = tree.probe_score + (place * kProbes + i) * tree.clusters;
        int64_t reached = 0;
        for (int64_t c = 0; c < tree.clusters; ++c) reached += score[c] >= least;
        sum += std::clamp(reached, least_shared(budget), most_shared(budget));
      }
    }
    return sum;
  };
  // Bisection over the exponent: tau is between 2^-60 and 1.
  float low = -60.0f, high = 0.0f;
  for (int step = 0; step < 16; ++step) {
    const float middle = 0.5f * (low + high);
    (read(std::exp2(middle)) > p.q_heads * kProbes * budget ? low : high) = middle;
  }
  for (int64_t place = first; place < first + p.q_heads; ++place) tree.threshold[place] = std::exp2(high) * norm(place);
}

// The budget at which the trial tiles of a head keep the tolerance, with a margin for the others; all clusters where there
// is none.
void settle_budget(const AttentionJob& job, int64_t place, char* scratch) {
  const QuantumAttentionParams& p = job.params;
  const TreeState& tree = job.tree;
  const int64_t all = job.blocks.count;
  int64_t doublings = 0;
  while (doublings < kMaxDoublings && static_cast<double>(int64_t{tree.budget[place]} << doublings) <= kMostDensity * all) {
    ++doublings;
  }
  double error[kMaxDoublings] = {}, norm = 0.0;
  const double limit = std::pow(kToleranceMargin * static_cast<double>(p.error_tolerance), 2);
  bool kept = doublings > 0;
  for (int64_t i = 0; i < kTrials && kept; ++i) {
    const int64_t tile = probe_tile(job, i);
    kept = kernels().tree_trial(job, tile_rows(job, place, tile), tile, doublings, limit, error, &norm, scratch);
  }
  int64_t first = 0;  // the fewest doublings that do; the most of them do
  while (kept && !(error[first] <= limit * norm)) ++first;
  tree.budget[place] = static_cast<int32_t>(kept ? int64_t{tree.budget[place]} << first : all);
}

// The relative error of a head's output over kAuditRows of its rows, one at random in each of as many equal parts.
float audit(const AttentionJob& job, int64_t place, char* scratch) {
  const QuantumAttentionParams& p = job.params;
  const uint64_t seed = static_cast<uint64_t>(p.seed);
  const int64_t rows = std::min(kAuditRows, p.q_len);
  double sums[2] = {};
  for (int64_t first = 0; first < rows; first += kTreeRows) {
    int64_t queries[kTreeRows];
    const int64_t count = std::min(kTreeRows, rows - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t part = first + i, begin = part * p.q_len / rows, end = (part + 1) * p.q_len / rows;
      const PhiloxBlock random =
          philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                     {{p.layer, static_cast<uint32_t>(place), static_cast<uint32_t>(part), kAuditDraw}});
      queries[i] = begin + static_cast<int64_t>((uint64_t{random.word[0]} * static_cast<uint64_t>(end - begin)) >> 32);
    }
    kernels().tree_audit(job, head_rows(job, place, 0, count), queries, sums, scratch);
  }
  return static_cast<float>(sums[1] > 0.0 ? std::sqrt(sums[0] / sums[1]) : 0.0);
}

// Heads place, place + 1, ... of the output in any order: tile by tile, or, where all clusters are read, in the larger
// blocks of exact attention. exact_only: the latter alone.
void run_tiles(const AttentionJob& job, int64_t first_place, int64_t places, BlockRunner& runner, bool exact_only) {
  const QuantumAttentionParams& p = job.params;
  // Read in the order of the tree the keys are as many as in their own, but a mask would not know them.
  const bool plain = p.is_causal || !job.tensors.mask.data;
  AttentionJob exact = job;
  if (p.is_causal) exact.blocks = job.tree.natural;
  const int64_t rows = kernels().rows->exact_rows / kTreeRows * kTreeRows, parts = (p.q_len + rows - 1) / rows;
  runner.each(places * parts, [&](int64_t i, char* scratch) {
    // Later rows first: under a causal mask they take longest.
    const int64_t place = first_place + i / parts, first = (parts - 1 - i % parts) * rows;
    const int64_t end = std::min(first + rows, p.q_len);
    const bool all = job.tree.budget[place] >= job.blocks.count;
    if (exact_only && !all) return;
    if (all && plain) return kernels().blocked(exact, head_rows(job, place, first, end), scratch);
    for (int64_t row = first; row < end; row += kTreeRows) {
      kernels().tree(job, head_rows(job, place, row, std::min(row + kTreeRows, end)), row / kTreeRows, scratch);
    }
  });
}

}  // namespace

bool tree_applies(const AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  if (p.batch * p.q_heads == 0) return false;  // no head has a budget
  const auto tolerance = static_cast<double>(p.error_tolerance), keys = static_cast<double>(job.total_len);
  const bool tiles = kernels().tiles && p.precision != Precision::fp32;
  const double fewest = tiles ? kKeysForToleranceOnTiles : kKeysForTolerance;
  if (tolerance > 0.0 && (p.q_len < kQueriesForTolerance || keys * tolerance < fewest)) return false;
  const auto least = static_cast<double>(*std::min_element(p.num_samples, p.num_samples + p.num_samples_count));
  // Keys in reach of a query and what the tree costs it in keys, in the mean; half of its own chunk is read whatever the
  // budget.
  const double reach = keys - (p.is_causal ? 0.5 * static_cast<double>(p.q_len) : 0.0);
  const double read = least + (p.is_causal ? 0.5 * kTreeChunk : 0.0) + (tiles ? kKeysOfTree : 0.0);
  return p.q_len >= kFewestQueries && job.total_len >= kFewestKeys && p.softcap == 0.0f && p.left_window < 0 &&
         p.right_window < 0 && read <= kMostDensity * reach && mask_drops_keys(job);
}

bool decode_applies(const AttentionJob& job) {
  const QuantumAttentionTensors& t = job.tensors;
  if (!t.key_summary || t.mask.data) return false;
  const auto tolerance = static_cast<double>(job.params.error_tolerance);
  if (tolerance == 0.0 || job.params.batch == 0) return true;
  const int64_t longest = *std::max_element(t.nonpad_kv_seqlen, t.nonpad_kv_seqlen + job.params.batch);
  const double keys = static_cast<double>(std::min(longest, job.total_len));
  return keys * std::pow(std::min(tolerance / kFreeTolerance, 1.0), 2) >= kKeysForDecodeTolerance;
}

void layout_tree(AttentionJob& job) {
  const QuantumAttentionParams& p = job.params;
  TreeState& t = job.tree;
  const Precision precision = job.blocks.precision == Precision::fp32 ? Precision::fp32 : Precision::bf16;
  t.clusters = (job.blocks.count + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
  const auto layout = [&](int64_t keys, int64_t head_size, int64_t v_head_size) {
    return block_layout(precision, kernels().tiles, keys, head_size, v_head_size);
  };
  t.centroids = layout(job.blocks.count, p.head_size, p.v_head_size);
  t.spreads = layout(job.blocks.count, p.head_size, 0);
  const int64_t slopes = p.is_causal ? (job.total_len + kTreeChunk - 1) / kTreeChunk : 1;
  t.slopes = layout(slopes * slope_blocks(p.head_size) * kBlockKeys, 0, p.v_head_size);
  if (p.is_causal) t.natural = job.blocks;
}

size_t tree_bytes(const AttentionJob& job, int64_t heads_at_once) {
  AttentionJob copy = job;
  return job.params.strategy == Strategy::tree ? carve(copy, heads_at_once, nullptr) : 0;
}

void place_tree(AttentionJob& job, int64_t heads_at_once, char* memory) {
  carve(job, heads_at_once, memory);
  job.blocks.order = job.tree.order;
  job.tree.natural.key_mean = job.blocks.key_mean;
}

void run_tree(AttentionJob& job, int64_t heads_at_once, BlockRunner& runner) {
  const QuantumAttentionParams& p = job.params;
  const Kernels& k = kernels();
  const int64_t heads = p.batch * p.kv_heads;
  for (int64_t place = 0; place < p.batch * p.q_heads; ++place) {
    const int64_t samples = p.num_samples[p.num_samples_count == 1 ? 0 : place % p.q_heads];
    job.tree.budget[place] = static_cast<int32_t>(std::min((samples + kBlockKeys - 1) / kBlockKeys, job.blocks.count));
    job.tree.threshold[place] = 0.0f;
  }
  const int64_t pieces = (job.blocks.count + kPiece - 1) / kPiece;
  const auto build = [&](int64_t first, int64_t n) {
    set_first_head(job, first);
    AttentionJob natural = job;
    natural.blocks = job.tree.natural;
    runner.each(n, [&](int64_t i, char* scratch) {
      const int64_t batch = (first + i) / p.kv_heads, kv_head = (first + i) % p.kv_heads;
      if (job.blocks.mean_row > 0) k.key_mean(job, batch, kv_head);
      k.build_tree(job, batch, kv_head, scratch);
    });
    runner.each(n * pieces, [&](int64_t i, char*) {
      const int64_t head = first + i / pieces, block = i % pieces * kPiece, end = std::min(block + kPiece, job.blocks.count);
      k.pack_blocks(job, head / p.kv_heads, head % p.kv_heads, block, end);
      if (p.is_causal) k.pack_blocks(natural, head / p.kv_heads, head % p.kv_heads, block, end);
    });
  };
  for (int64_t first = 0; first < heads; first += heads_at_once) {
    const int64_t n = std::min(heads_at_once, heads - first), first_place = first * job.group, places = n * job.group;
    build(first, n);
    if (p.error_tolerance > 0.0f) {
      runner.each(places, [&](int64_t i, char* scratch) { settle_budget(job, first_place + i, scratch); });
    } else if (shares_clusters(job)) {
      runner.each(places * kProbes, [&](int64_t i, char* scratch) {
        const int64_t place = first_place + i / kProbes, tile = probe_tile(job, i % kProbes);
        k.tree_probe(job, tile_rows(job, place, tile), i % kProbes, tile, scratch);
      });
      runner.each(n / p.kv_heads, [&](int64_t i, char*) { share_clusters(job, first / p.kv_heads + i); });
    }
    run_tiles(job, first_place, places, runner, false);
    if (!job.tensors.error_estimate && p.error_tolerance == 0.0f) continue;
    std::atomic<bool> again{false};
    runner.each(places, [&](int64_t i, char* scratch) {
      const int64_t place = first_place + i;
      float error = job.tree.budget[place] < job.blocks.count ? audit(job, place, scratch) : 0.0f;
      if (p.error_tolerance > 0.0f) {
        const bool broken = !(error <= kToleranceMargin * p.error_tolerance);
        // Heads that are exact already need not be computed once more.
        job.tree.budget[place] = broken ? static_cast<int32_t>(job.blocks.count) : 0;
        if (broken) again = true, error = 0.0f;
      }
      if (job.tensors.error_estimate) job.tensors.error_estimate[place] = error;
    });
    if (again) run_tiles(job, first_place, places, runner, true);
  }
}

}  // namespace qexport
