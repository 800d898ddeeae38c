// Strategy `tree`: when it is used, its memory, its kernels.
#include <algorithm>
#include <type_traits>

#include "row_chunk.cuh"
#include "tree_attend.cuh"
#include "tree_residual.cuh"
#include "tree_scores.cuh"

namespace qexport {
namespace cuda {
namespace {

#ifdef QEXPORT_CUDA_EMULATION
constexpr int64_t kFewestQueries = 32, kFewestKeys = 256;  // so that tests see the tree at work
constexpr double kKeysOfOrder = 0.0;
#else
constexpr int64_t kFewestQueries = 1024, kFewestKeys = 12288;  // fewer were faster exactly on an H200
constexpr double kKeysOfOrder = 11500.0;
#endif
// On an H200 `tree` of half types, with as many queries as keys, took 1.55 times as long for each key that it read as exact
// attention, and 11500 / n of its time for the order and the summaries of n keys: the two are even where it reads a fifth of
// 16384 keys (ViT; MiniLM 0.3), and half of 65536.
constexpr double kTimeOfKey = 1.55;
constexpr int64_t kQueriesForTolerance = 1024;  // as on the CPU
constexpr double kKeysTimesTolerance = 200.0;
constexpr double kMostDensity = 0.5;  // of the keys that are read
constexpr int64_t kMostHead = 128;    // elements
constexpr int kMostAuditParts = 32;

// Visits the tiles of both kernels for the size of the heads and the device.
template <class T, class Visit>
void visit_tiles_of(const QuantumAttentionParams& p, const Device& device, const Visit& visit) {
  const int64_t size = std::max(p.head_size, p.v_head_size);
  constexpr SquaresIn kShared = SquaresIn::shared;
  if constexpr (sizeof(T) == 4) {
    constexpr SquaresIn kQueries = SquaresIn::queries;
    if (size <= 32) return visit(ScoreTile<T, 32, 1, 8, 32, 2, kQueries>{}, FlashTile<T, 32, 2, 4, 32, 2>{});
    if (size <= 64) return visit(ScoreTile<T, 64, 2, 4, 32, 2, kQueries>{}, FlashTile<T, 64, 2, 4, 32, 2>{});
    return visit(ScoreTile<T, 128, 1, 8, 32, 1, kQueries>{}, FlashTile<T, 128, 1, 8, 32, 1>{});
  } else {
    if (size <= 32) return visit(ScoreTile<T, 32, 2, 4, 64, 2, kShared>{}, FlashTile<T, 32, 2, 4, 64, 2>{});
    if (device.capability == 90) {
      if (size <= 64) {
        return visit(ScoreTile<T, 64, 1, 8, 64, 2, kShared, true>{}, FlashTile<T, 64, 1, 8, 64, 2, true>{});
      }
      return visit(ScoreTile<T, 128, 1, 8, 64, 1, kShared, true>{}, FlashTile<T, 128, 1, 8, 64, 1, true>{});
    }
    constexpr SquaresIn kRegisters = SquaresIn::registers;
    if (size <= 64) return visit(ScoreTile<T, 64, 2, 4, 32, 2, kRegisters>{}, FlashTile<T, 64, 2, 4, 64, 2>{});
    visit(ScoreTile<T, 128, 1, 8, 32, 1, kRegisters>{}, FlashTile<T, 128, 1, 8, 64, 1>{});
  }
}
template <class Visit>
void visit_tiles(const QuantumAttentionParams& p, const Device& device, const Visit& visit) {
  visit_type(p.type, [&](auto element) { visit_tiles_of<decltype(element)>(p, device, visit); });
}
int64_t element_bytes(const QuantumAttentionParams& p) { return p.type == DType::f32 ? 4 : 2; }

BalancedTree clusters_of(const AttentionJob& job) {
  return {false, true, kCluster,
          job.params.is_causal ? int64_t{kTreeChunk} : ceil_div(job.total_len, int64_t{kCluster}) * kCluster};
}

bool audits(const AttentionJob& job) { return job.tensors.error_estimate || job.params.error_tolerance > 0.0f; }

// Sizes of a call; the pointers point into `memory`. Returns its bytes.
size_t lay_out(TreeLaunch& tree, const Device& device, char** balanced_scratch, char* memory) {
  const QuantumAttentionParams& p = tree.job.params;
  const BalancedTree clusters = clusters_of(tree.job);
  tree.chunks = tree_chunks(tree.job, clusters);
  tree.clusters = tree_places(tree.job, clusters) / kCluster;
  tree.tiles = ceil_div(p.q_len, int64_t{kTreeRows});
  tree.parts = p.is_causal ? tree.chunks : int64_t{kSlopeParts};
  const int64_t heads = p.batch * p.kv_heads, places = p.batch * p.q_heads, all = heads * tree.clusters;
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t bytes) {
    pointer = memory ? reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used) : nullptr;
    used += static_cast<size_t>(ceil_div(bytes, int64_t{256}) * 256);
  };
  take(tree.order, all * kCluster * 4);
  take(tree.count, heads * tree.chunks * 4);
  take(tree.keys, heads * tree.stored() * kCluster * p.head_size * element_bytes(p));
  take(tree.values, heads * tree.stored() * kCluster * p.v_head_size * element_bytes(p));
  visit_tiles(p, device, [&](auto scores, auto) {
    using Flash = typename decltype(scores)::Flash;
    tree.summary_rows = Flash::kKeys, tree.row_bytes = Flash::kRowBytes, tree.panel_rows = Flash::kKeyPanel;
    tree.summary_blocks = ceil_div(tree.clusters, int64_t{Flash::kKeys});
  });
  take(tree.summaries, tree.summary_bytes());
  take(tree.spread, all * 4);
  take(tree.slope_parts, heads * tree.parts * p.head_size * p.v_head_size * 4);
  take(tree.slopes, heads * (p.is_causal ? tree.chunks : 1) * p.head_size * p.v_head_size * element_bytes(p));
  const int64_t tile_bytes = kTreeRows * p.v_head_size * 4;
  take(tree.threshold, tree.shares ? places * 4 : 0);
  take(tree.probe_norm, tree.shares ? places * kProbes * 4 : 0);
  if (p.error_tolerance > 0.0f) {
    tree.trials = 2;  // the first budget, and all clusters
    for (int64_t budget = 4; budget <= tree.clusters; budget *= 2) ++tree.trials;
    take(tree.trial_output, places * kTrials * tree.trials * tile_bytes);
    take(tree.budget, places * 4);
    take(tree.again, places * 4);
  }
  const int64_t samples = *std::max_element(p.num_samples, p.num_samples + p.num_samples_count);
  const int64_t bought = std::min(ceil_div(samples, int64_t{kCluster}), tree.clusters);
  tree.most_chosen = tree.shares ? std::min<int64_t>(most_shared(static_cast<int>(bought)), tree.clusters) : bought;
  if (p.error_tolerance > 0.0f) tree.most_chosen = tree.clusters;  // budgets grow
  const int64_t tiles = places * std::max(tree.tiles, int64_t{kTrials} * tree.trials);
  tree.draws = p.residual == Residual::unbiased || p.residual == Residual::james_stein;
  const int64_t scored = std::max(tree.draws ? tiles : 0, tree.shares ? places * kProbes : 0);
  take(tree.score, scored * tree.clusters * 4);
  take(tree.halves, tree.draws ? tiles * 2 * int64_t{sizeof(HalfSample)} : 0);
  take(tree.chosen, tiles * (1 + tree.most_chosen) * 4);
  take(tree.centroid_weight, tiles * kTreeRows * 4);
  if (audits(tree.job)) {
    // Enough parts that the rows of all heads fill the card.
    const int64_t fill = ceil_div(int64_t{2} * device.multiprocessors, places > 0 ? places : 1);
    tree.audit_parts = static_cast<int>(std::min<int64_t>(fill, kMostAuditParts));
    take(tree.audit_output, places * tree.audit_parts * tile_bytes);
  }
  take(tree.stats, std::max(tree.draws ? tiles : 0, places * tree.audit_parts) * kTreeRows * 8);
  take(*balanced_scratch, static_cast<int64_t>(balanced_tree_scratch_bytes(tree.job, clusters)));
  return used;
}

template <class Scores, class Attend>
void run(Status& status, const TreeLaunch& tree, void* stream) {
  const auto score = [&](int64_t blocks, TreeStep step) {
    launch(status, tree_scores_kernel<Scores>, dim3(static_cast<unsigned>(blocks)), Scores::Flash::kThreads,
           Scores::shared_bytes(tree.clusters), stream, tree, step);
  };
  const auto attend = [&](int64_t blocks, TreeStep step) {
    launch(status, tree_attend_kernel<Attend>, dim3(static_cast<unsigned>(blocks)), Attend::kThreads,
           kAttendSharedBytes<Attend>, stream, tree, step);
    if (tree.draws && (step == TreeStep::trials || step == TreeStep::tiles))
      correct_tiles(status, tree, step, blocks, stream);
  };
  const int64_t places = tree.places();
  if (tree.shares) {
    score(places * kProbes, TreeStep::probes);
    settle_thresholds(status, tree, stream);
  }
  if (tree.trials) {
    score(places * kTrials * tree.trials, TreeStep::trials);
    attend(places * kTrials * tree.trials, TreeStep::trials);
    settle_budgets(status, tree, stream);
  }
  score(places * tree.tiles, TreeStep::tiles);
  attend(places * tree.tiles, TreeStep::tiles);
  if (!tree.audit_parts) return;
  attend(places * tree.audit_parts, TreeStep::audits);
  settle_errors(status, tree, stream);
  if (tree.trials) attend(places * tree.tiles, TreeStep::again);
}

// Whether what a tile knows of all clusters fits beside it.
bool fits(const AttentionJob& job, const Device& device) {
  size_t bytes = 0;
  visit_tiles(job.params, device, [&](auto scores, auto attend) {
    bytes =
        std::max(scores.shared_bytes(tree_places(job, clusters_of(job)) / kCluster), kAttendSharedBytes<decltype(attend)>);
  });
  return bytes <= static_cast<size_t>(device.shared_bytes);
}

}  // namespace

bool tree_applies(const AttentionJob& job, const int64_t* num_samples, int64_t num_samples_count) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  Status status;
  const Device device = current_device(status);
  if (!status.ok() || device.capability < 80) return false;
  if (p.head_size % 8 || p.v_head_size % 8 || std::max(p.head_size, p.v_head_size) > kMostHead) return false;
  if (!fits(job, device)) return false;
  if (!starts_on_16_bytes(t.q, element_bytes(p))) return false;  // rows are copied 16 bytes at a time
  // What a mask holds is not known here: one that is the same for all queries and heads drops keys from the tree.
  const bool drops_keys = t.mask.type == DType::boolean && t.mask.head_stride == 0 && t.mask.query_stride == 0;
  if (t.mask.data && (!drops_keys || p.is_causal)) return false;
  const auto keys = static_cast<double>(job.total_len), tolerance = static_cast<double>(p.error_tolerance);
  if (tolerance > 0.0 && (p.q_len < kQueriesForTolerance || keys * tolerance < kKeysTimesTolerance)) return false;
  const int64_t least = *std::min_element(num_samples, num_samples + num_samples_count);
  // Keys in reach of a query and keys read for it, in the mean; half of its own chunk is read whatever the budget.
  const double reach = keys - (p.is_causal ? 0.5 * static_cast<double>(p.q_len) : 0.0);
  const double read = static_cast<double>(least) + (p.is_causal ? 0.5 * kTreeChunk : 0.0);
  const double even = p.type == DType::f32 ? kMostDensity : (1.0 - kKeysOfOrder / keys) / kTimeOfKey;
  return p.q_len >= kFewestQueries && job.total_len >= kFewestKeys && p.softcap == 0.0f && p.left_window < 0 &&
         p.right_window < 0 && read <= std::min(even, kMostDensity) * reach;
}

void tree_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream) {
  const QuantumAttentionParams& p = job.params;
  TreeLaunch tree{};
  tree.job = job, tree.samples = samples;
  // Not under a causal mask: what a query reads would depend on later ones.
  tree.shares = !p.is_causal && samples.count == 1 && p.error_tolerance == 0.0f;
  char* balanced_scratch;
  const Device device = current_device(status);
  lay_out(tree, device, &balanced_scratch, static_cast<char*>(scratch));
  balanced_tree(status, job, clusters_of(job), tree.order, tree.count, balanced_scratch, stream);
  summarise_clusters(status, tree, stream);
  visit_tiles(p, device, [&](auto scores, auto attend) { run<decltype(scores), decltype(attend)>(status, tree, stream); });
}

size_t tree_attention_scratch_bytes(const AttentionJob& job) {
  TreeLaunch tree{};
  tree.job = job, tree.shares = true;
  Status status;
  char* balanced_scratch;
  return lay_out(tree, current_device(status), &balanced_scratch, nullptr);
}

}  // namespace cuda
}  // namespace qexport
