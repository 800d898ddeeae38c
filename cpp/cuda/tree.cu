// Strategy `tree`: when it is used, its memory, its kernels.
#include <algorithm>
#include <type_traits>

#include "row_chunk.cuh"
#include "tree.cuh"
#include "tree_chosen.cuh"
#include "tree_passes.cuh"

namespace qexport {
namespace cuda {
namespace {

#ifdef QEXPORT_CUDA_EMULATION
constexpr int64_t kFewestQueries = 32, kFewestKeys = 256;  // so that tests see the tree at work
#else
constexpr int64_t kFewestQueries = 1024, kFewestKeys = 8192;  // fewer are faster exactly
#endif
constexpr double kMostDensity = 0.5;  // of the keys that are read
constexpr int64_t kMostHead = 128;    // elements
constexpr int kShareThreads = 1024;
constexpr int64_t kMostClusters = 12288;  // whose list fits beside a tile in shared memory

template <class T>
using NarrowTile = TreeTile<T, 64, 2, 4, 2>;
template <class T>
using WideTile = TreeTile<T, 128, 1, 8, 1>;

__device__ int place_budget(const TreeLaunch& tree, int64_t place) {
  const int64_t samples = tree.samples.of(place % tree.job.params.q_heads);
  return static_cast<int>(min(ceil_div(samples, int64_t{kCluster}), tree.clusters));
}

// The clusters that a tile whose scores are known reads.
template <class Tile>
__device__ int tile_budget(const TreeRowBlock<Tile>& block, int budget) {
  if (!block.tree.shares || !(block.tree.threshold[block.place] > 0.0f)) return budget;
  const uint32_t least = score_key(block.tree.threshold[block.place]);
  int reached = 0;
  for (int c = static_cast<int>(threadIdx.x); c < block.candidates; c += Tile::Flash::kThreads) {
    reached += block.key[c] <= least;
  }
  reached = block_sum(reached, reinterpret_cast<int*>(block.words->parts));
  return max(least_shared(budget), min(reached, most_shared(budget)));
}

// probe_norm of the tile: the squared norm of its output.
template <class Tile>
__device__ void put_norm(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state, float* norm) {
  using State = FlashState<typename Tile::Flash>;
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < State::kRows; ++i) {
    if (state.row(i) >= block.rows || !(state.sum[i] > 0.0f)) continue;
    const float unit = 1.0f / state.sum[i];
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
      const float x = state.pair(i, n)[0] * unit, y = state.pair(i, n)[1] * unit;
      square += x * x + y * y;
    }
  }
  square = block_sum(square, block.words->parts);
  if (threadIdx.x == 0) *norm = square;
}

template <class Tile>
__device__ void put_output(const TreeRowBlock<Tile>& block, FlashState<typename Tile::Flash>& state) {
  using State = FlashState<typename Tile::Flash>;
  using T = typename Tile::Flash::T;
  const int dv = static_cast<int>(block.tree.job.params.v_head_size);
#pragma unroll
  for (int i = 0; i < State::kRows; ++i) {
    if (state.row(i) >= block.rows) continue;
    T* const to = output_row<T>(block.tree.job, block.b, block.q_head, block.first_row + state.row(i));
    const bool aligned = reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
    const float unit = state.sum[i] > 0.0f ? 1.0f / state.sum[i] : 0.0f;  // a row without keys is 0
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
      const int column = state.column(n);
      if (column >= dv) continue;
      const float x = state.pair(i, n)[0] * unit, y = state.pair(i, n)[1] * unit;
      if (aligned) {
        *reinterpret_cast<uint32_t*>(to + column) = pack_pair(x, y, T{});
      } else {
        to[column] = from_float<T>(x), to[column + 1] = from_float<T>(y);
      }
    }
  }
}

// One tile per block of threads; with `probe` the scores of one that is looked at, and the norm of what centroids alone
// give.
template <class Tile>
__global__ void __launch_bounds__(Tile::Flash::kThreads, Tile::Flash::kBlocksPerProcessor)
    tree_kernel(const __grid_constant__ TreeLaunch tree, bool probe) {
  const int64_t each = probe ? kProbes : tree.tiles, place = blockIdx.x / each, index = blockIdx.x % each;
  // Later queries see more keys under a causal mask: the longest work first.
  TreeRowBlock<Tile> block(tree, place, probe ? tree.probe_tile(static_cast<int>(index)) : tree.tiles - 1 - index);
  FlashState<typename Tile::Flash> state;
  state.clear();
  float* const scores = probe ? tree.probe_score + blockIdx.x * tree.clusters : nullptr;
  int budget = min(place_budget(tree, place), block.candidates);
  bool all = !probe && budget == block.candidates;
  if (!all) {
    load_queries(block);
    RowWeights<Tile> weights;
    weights.clear();
    // A pass computes the weights again: kept, they would be queries x clusters.
    for (int pass = 0; pass < 3 && !all; ++pass) {
      for_summaries(block, pass == 2, [&](int i, SummaryScores<Tile>& s, SummaryScores<Tile>& s2, const char* values) {
        if (pass == 0) {
          weights.add(s);
        } else if (pass == 1) {
          score_clusters(block, i, s, s2, weights, scores);
        } else {
          attend_centroids(block, i, s, values, state);
        }
      });
      if (pass == 0) weights.finish(block.rows);
      if (pass != 1) continue;
      __syncthreads();
      budget = probe ? 0 : min(tile_budget(block, budget), block.candidates);
      all = !probe && budget == block.candidates;
      if (!all) choose_clusters(block, budget);
    }
    if (!all) add_slope(block, state);
  }
  if (probe) {
    state.join_sums();
    return put_norm(block, state, tree.probe_norm + blockIdx.x);
  }
  __syncthreads();
  ChosenBlocks<Tile> blocks(block, all ? nullptr : reinterpret_cast<const int32_t*>(block.key), budget);
  attend(state, block.queries, blocks.count(), blocks);
  state.join_sums();
  put_output(block, state);
}

// The thresholds of a batch item: a cluster is read where its score, relative to the norm of its head, reaches tau, with tau
// such that the probed tiles read the budget on average.
__global__ void __launch_bounds__(kShareThreads) settle_thresholds(const __grid_constant__ TreeLaunch tree) {
  __shared__ int parts[kWarp];
  const QuantumAttentionParams& p = tree.job.params;
  const int64_t first = blockIdx.x * p.q_heads;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int budget = place_budget(tree, first), candidates = ceil_div(tree.count[blockIdx.x * p.kv_heads], kCluster);
  const auto norm = [&](int64_t place) {
    float sum = 0.0f;
    for (int i = 0; i < kProbes; ++i) sum += tree.probe_norm[place * kProbes + i];
    return sum / kProbes;
  };
  float low = -60.0f, high = 0.0f;  // of the exponent of tau
  for (int step = 0; step < 16; ++step) {
    const float middle = 0.5f * (low + high), tau = exp2f(middle);
    int read = 0;
    for (int64_t i = warp; i < p.q_heads * kProbes; i += kShareThreads / kWarp) {
      const int64_t probe = first * kProbes + i;
      const float least = tau * norm(probe / kProbes);
      int reached = 0;
      for (int c = lane; c < candidates; c += kWarp) reached += tree.probe_score[probe * tree.clusters + c] >= least;
      reached = warp_sum(reached);
      if (lane == 0) read += max(least_shared(budget), min(reached, most_shared(budget)));
    }
    read = block_sum(read, parts);
    (read > p.q_heads * kProbes * budget ? low : high) = middle;
  }
  for (int64_t h = threadIdx.x; h < p.q_heads; h += kShareThreads) tree.threshold[first + h] = exp2f(high) * norm(first + h);
}

BalancedTree clusters_of(const AttentionJob& job) {
  return {false, true, kCluster,
          job.params.is_causal ? int64_t{kTreeChunk} : ceil_div(job.total_len, int64_t{kCluster}) * kCluster};
}

// Sizes of a call; the pointers point into `memory`. Returns its bytes.
size_t lay_out(TreeLaunch& tree, char** balanced_scratch, char* memory) {
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
  take(tree.keys, all * kCluster * p.head_size * 2);
  take(tree.values, all * kCluster * p.v_head_size * 2);
  take(tree.mean_key, all * p.head_size * 2);
  take(tree.mean_value, all * p.v_head_size * 2);
  take(tree.variance, all * p.head_size * 2);
  take(tree.spread, all * 4);
  take(tree.slope_parts, heads * tree.parts * p.head_size * p.v_head_size * 4);
  take(tree.slopes, heads * (p.is_causal ? tree.chunks : 1) * p.head_size * p.v_head_size * 2);
  take(tree.threshold, places * 4);
  take(tree.probe_score, tree.shares ? places * kProbes * tree.clusters * 4 : 0);
  take(tree.probe_norm, places * kProbes * 4);
  take(*balanced_scratch, static_cast<int64_t>(balanced_tree_scratch_bytes(tree.job, clusters)));
  return used;
}

template <class Tile>
void run(Status& status, const TreeLaunch& tree, void* stream) {
  const size_t shared = Tile::shared_bytes(tree.clusters);
  const auto queue = [&](int64_t blocks, bool probe) {
    launch(status, tree_kernel<Tile>, dim3(static_cast<unsigned>(blocks)), Tile::Flash::kThreads, shared, stream, tree,
           probe);
  };
  if (tree.shares) {
    queue(tree.places() * kProbes, true);
    launch(status, settle_thresholds, dim3(static_cast<unsigned>(tree.job.params.batch)), kShareThreads, 0, stream, tree);
  }
  queue(tree.places() * tree.tiles, false);
}

template <class T>
void run_on(Status& status, const TreeLaunch& tree, void* stream) {
  const QuantumAttentionParams& p = tree.job.params;
  if (p.head_size <= 64 && p.v_head_size <= 64) return run<NarrowTile<T>>(status, tree, stream);
  run<WideTile<T>>(status, tree, stream);
}

}  // namespace

bool tree_applies(const AttentionJob& job, const int64_t* num_samples, int64_t num_samples_count) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  Status status;
  if (p.type == DType::f32 || current_device(status).capability < 80 || !status.ok()) return false;
  if (p.head_size % 8 || p.v_head_size % 8 || p.head_size > kMostHead || p.v_head_size > kMostHead) return false;
  // Rows are copied 16 bytes at a time; those of K and V that are not in clusters too.
  const auto aligned = [](const HeadRows& rows) { return !rows.data || starts_on_16_bytes(rows, 2); };
  if (!aligned(t.q)) return false;
  if (p.is_causal && !(aligned(t.k) && aligned(t.v) && aligned(t.past_key) && aligned(t.past_value))) return false;
  // What a mask holds is not known here: one that is the same for all queries and heads drops keys from the tree.
  const bool drops_keys = t.mask.type == DType::boolean && t.mask.head_stride == 0 && t.mask.query_stride == 0;
  if (t.mask.data && (!drops_keys || p.is_causal)) return false;
  if (p.error_tolerance > 0.0f || p.residual == Residual::unbiased || p.residual == Residual::james_stein) return false;
  if (t.error_estimate) return false;
  const auto keys = static_cast<double>(job.total_len);
  const int64_t least = *std::min_element(num_samples, num_samples + num_samples_count);
  // Keys in reach of a query and keys read for it, in the mean; half of its own chunk is read whatever the budget.
  const double reach = keys - (p.is_causal ? 0.5 * static_cast<double>(p.q_len) : 0.0);
  const double read = static_cast<double>(least) + (p.is_causal ? 0.5 * kTreeChunk : 0.0);
  return p.q_len >= kFewestQueries && job.total_len >= kFewestKeys && job.total_len <= kMostClusters * kCluster &&
         p.softcap == 0.0f && p.left_window < 0 && p.right_window < 0 && read <= kMostDensity * reach;
}

void tree_attention(Status& status, const AttentionJob& job, const HeadSamples& samples, void* scratch, void* stream) {
  const QuantumAttentionParams& p = job.params;
  TreeLaunch tree{};
  tree.job = job, tree.samples = samples;
  // Not under a causal mask: what a query reads would depend on later ones.
  tree.shares = !p.is_causal && samples.count == 1 && samples.samples[0] < job.total_len;
  char* balanced_scratch;
  lay_out(tree, &balanced_scratch, static_cast<char*>(scratch));
  balanced_tree(status, job, clusters_of(job), tree.order, tree.count, balanced_scratch, stream);
  summarise_clusters(status, tree, stream);
  if (p.type == DType::f16) return run_on<__half>(status, tree, stream);
  run_on<__nv_bfloat16>(status, tree, stream);
}

size_t tree_attention_scratch_bytes(const AttentionJob& job) {
  TreeLaunch tree{};
  tree.job = job, tree.shares = true;
  char* balanced_scratch;
  return lay_out(tree, &balanced_scratch, nullptr);
}

}  // namespace cuda
}  // namespace qexport
