// What the centroids of a tile got wrong, from two half-samples of the clusters that it did not read, each read key by key
// (docs/math.md, "Residual"). A kernel of its own behind the others, which know nothing of it but for the scores and the
// weights that they leave.
#include <algorithm>

#include "tree_passes.cuh"
#include "tree_residual.cuh"

namespace qexport {
namespace cuda {
namespace {

// Shared memory: the queries, and two slots of kKeys rows in turn.
template <class T, int kHead>
using ResidualTile = FlashTile<T, kHead, 1, kTreeRows / 16, sizeof(T) == 4 ? 16 : 32, kHead <= 64 ? 2 : 1>;
template <class Tile>
constexpr int kResidualBytes = Tile::kQueryBytes + 2 * Tile::kKeyBytes;
constexpr int kLeastShared = 99 * 1024;  // of a block of threads, from sm_80 on

// The matrices whose rows a half-sample is multiplied with, Tile::kKeys of them at a time, in this order: the summaries of
// its clusters, the slope, and keys and values of its clusters in turn. While one is used the next is on its way.
template <class Tile>
struct ResidualMatrices {
  using T = typename Tile::T;
  static constexpr int kShares = kCluster / Tile::kKeys;
  const TreeRows<T>& rows;
  const HalfSample& half;
  char* slots;
  int head_size, v_head_size, panels;  // of the slope
  int now, count;

  __device__ __forceinline__ ResidualMatrices(const TreeRows<T>& rows_, const HalfSample& half_, char* slots_)
      : rows(rows_), half(half_), slots(slots_), now(0) {
    head_size = static_cast<int>(rows.tree.job.params.head_size);
    v_head_size = static_cast<int>(rows.tree.job.params.v_head_size);
    panels = ceil_div(head_size, Tile::kKeys);
    count = kSummaryMatrices + panels + 2 * kShares * half.count;
  }
  // Element `column` of a row of matrix i, where the row is there and has so many.
  __device__ __forceinline__ const T* at(int i, int row, int column) const {
    const TreeLaunch& tree = rows.tree;
    if (i < kSummaryMatrices) {
      if (row >= half.count) return nullptr;
      return &tree.template summary<T>(rows.head, half.cluster[row], static_cast<Summary>(i), column);
    }
    i -= kSummaryMatrices;
    if (i < panels) {
      const bool causal = tree.job.params.is_causal;
      const int64_t slope = causal ? rows.head * tree.chunks + rows.open / kTreeChunk : rows.head;
      row += i * Tile::kKeys;
      if (row >= head_size || column >= v_head_size) return nullptr;
      return static_cast<const T*>(tree.slopes) + (slope * head_size + row) * v_head_size + column;
    }
    i -= panels;
    const bool values = i % 2;
    const int size = values ? v_head_size : head_size;
    if (column >= size) return nullptr;
    row += half.cluster[i / 2 / kShares] * kCluster + i / 2 % kShares * Tile::kKeys;
    return static_cast<const T*>(values ? tree.values : tree.keys) + (rows.head * tree.stored() * kCluster + row) * size +
           column;
  }
  __device__ __forceinline__ char* slot(int i) const { return slots + i % 2 * Tile::kKeyBytes; }
  __device__ __forceinline__ void start(int i) const {
    constexpr int kChunks = Tile::kRowBytes / kChunkBytes;
#pragma unroll 1
    for (int at_chunk = static_cast<int>(threadIdx.x); at_chunk < Tile::kKeys * kChunks; at_chunk += Tile::kThreads) {
      const int row = at_chunk / kChunks, chunk = at_chunk % kChunks;
      const T* const from = at(i, row, chunk * kChunkElements<T>);
      cp_async_16(slot(i) + flash_offset<Tile::kRowBytes>(row, chunk), from, from != nullptr);
    }
    cp_async_commit();
  }
  // The next one, by all threads.
  __device__ __forceinline__ const char* next() {
    cp_async_wait<0>();
    __syncthreads();  // it is there, and nobody reads the one before any more
    if (now + 1 < count) start(now + 1);
    return slot(now++);
  }
};

template <class Tile>
using RowScores = float[1][Tile::kKeys / 8][4];

// Of element e of n of a thread's scores: the row of a matrix that it is with.
__device__ __forceinline__ int score_column(int n, int e) { return 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e % 2; }

// Sums over the clusters of a half-sample, 1 / pi times each: keys less centroids, in units of 2^most.
template <class Tile>
__device__ __forceinline__ void sum_half(FlashState<Tile>& state, const TreeRows<typename Tile::T>& rows,
                                         const char* queries, ResidualMatrices<Tile>& matrices) {
  using T = typename Tile::T;
  using State = FlashState<Tile>;
  constexpr int kTiles = Tile::kKeys / 8;
  const HalfSample& half = matrices.half;
  const float scale = rows.tree.job.params.scale;
  const auto load = [&](uint32_t (&a)[1][4], int k) { flash_load_queries<Tile>(a, queries, k); };
  const auto load_squares = [&](uint32_t (&a)[1][4], int k) {
    load(a, k);
    square_queries<T>(a, scale * scale);
  };
  RowScores<Tile> s;
  {
    RowScores<Tile> s2;
    flash_products<Tile>(s, load, matrices.next());
    flash_products<FlashTile<Variance<T>, Tile::kHead, 1, kTreeRows / 16, Tile::kKeys, 1>>(s2, load_squares,
                                                                                           matrices.next());
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = score_column(n, e);
        const float doubled = fmaf(s[0][n][e], 2.0f * scale, damped_variance(s2[0][n][e]));
        s[0][n][e] = fmaf(doubled, kHalfLog2E, column < half.count ? half.centroid[column] : -kInf);
      }
    }
  }
  state.clear();
  flash_weights<Tile>(state, s, 1.0f);
  flash_values<Tile>(state, s, matrices.next());
  float weight[State::kRows];
#pragma unroll
  for (int t = 0; t < State::kRows; ++t) {
    weight[t] = state.sum[t] + __shfl_xor_sync(kFullWarp, state.sum[t], 1);
    weight[t] = scale * (weight[t] + __shfl_xor_sync(kFullWarp, weight[t], 2));
  }
#pragma unroll 1
  for (int panel = 0; panel < matrices.panels; ++panel) {
    const char* const slope = matrices.next();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int x = panel * Tile::kKeys + score_column(n, e);
        constexpr int kEach = kChunkElements<T>;
        const char* const chunk = queries + flash_offset<Tile::kRowBytes>(State::row(e / 2), x / kEach);
        s[0][n][e] = weight[e / 2] * to_float(reinterpret_cast<const T*>(chunk)[x % kEach]);
      }
    }
    flash_values<Tile>(state, s, slope);
  }
  negate(state);
#pragma unroll 1
  for (int share = 0; share < half.count * matrices.kShares; ++share) {
    const int cluster = share / matrices.kShares, first = share % matrices.kShares * Tile::kKeys;
    const int keys = (half.cluster[cluster] < rows.full ? kCluster : rows.rest) - first;
    const float factor = half.factor[cluster];
    flash_products<Tile>(s, load, matrices.next());
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[0][n][e] = score_column(n, e) < keys ? fmaf(s[0][n][e], scale * kLog2E, factor) : -kInf;
      }
    }
    flash_weights<Tile>(state, s, 1.0f);
    flash_values<Tile>(state, s, matrices.next());
  }
  state.join_sums();
}

// Turns the sums of a half-sample into what it adds to the output, to first order, and their weight into `more`, both in
// units of all that is known to weigh.
template <class Tile>
__device__ __forceinline__ void compare_half(FlashState<Tile>& state, const TreeOutput<typename Tile::T>& output,
                                             float (&more)[FlashState<Tile>::kRows]) {
  using State = FlashState<Tile>;
  // A key that was drawn may pass all that were read; beyond this they count as nothing, and squares stay in float32.
  constexpr float kMost = 50.0f;
  const int64_t first = int64_t{blockIdx.x} * kTreeRows;
  const float* const centroids = output.rows.tree.centroid_weight + first;
  const float* const stats = output.rows.tree.stats + 2 * first;
  float fade[State::kRows], less[State::kRows];
#pragma unroll
  for (int t = 0; t < State::kRows; ++t) {
    const int row = State::row(t);
    const float base = fmaxf(stats[2 * row], centroids[row]);
    const float known =
        base + log2f(fmaf(fast_exp2(stats[2 * row] - base), stats[2 * row + 1], fast_exp2(centroids[row] - base)));
    fade[t] = fast_exp2(fminf(state.most[t] - known, kMost));
    more[t] = state.sum[t] * fade[t], less[t] = -more[t];
  }
  flash_fade<Tile>(state, fade);
  output.add_to(state, less);
}

// Adds the mean of both half-samples to the output of the tile, or as much of it as james_stein believes.
template <class Tile>
__device__ __forceinline__ void correct_output(FlashState<Tile>& first, FlashState<Tile>& second,
                                               const float (&more)[FlashState<Tile>::kRows],
                                               const TreeOutput<typename Tile::T>& output, float* parts) {
  using State = FlashState<Tile>;
  float product = 0.0f, square = 0.0f;
  for_pairs<State>(output.rows, [&](int t, int n, int, int) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float a = first.pair(t, n)[e], b = second.pair(t, n)[e], mean = 0.5f * (a + b);
      product = fmaf(a, b, product), square = fmaf(mean, mean, square);
    }
  });
  float shrink = 1.0f;
  if (output.rows.tree.job.params.residual == Residual::james_stein) {
    product = block_sum(product, parts), square = block_sum(square, parts);
    shrink = square > 0.0f ? fminf(fmaxf(product / square, 0.0f), 1.0f) : 0.0f;
  }
  float keep[State::kRows];  // of the output
#pragma unroll
  for (int t = 0; t < State::kRows; ++t) {
    const float sum = fmaf(0.5f * shrink, more[t], 1.0f);
    const float inverse = 1.0f / fmaxf(sum, 0.5f), share = 0.5f * shrink * inverse;  // a sum of 0 would have no meaning
    keep[t] = sum * inverse;
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) first.pair(t, n)[e] = share * (first.pair(t, n)[e] + second.pair(t, n)[e]);
    }
  }
  output.add_to(first, keep);
  output.put(first);
}

// A tile per block of threads.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerProcessor)
    tree_residual_kernel(const __grid_constant__ TreeLaunch tree, TreeStep step) {
#ifdef __CUDA_ARCH__
  if (!FlashState<Tile>::runs_on(__CUDA_ARCH__)) return;  // spares the compiler what is never started
#endif
  using T = typename Tile::T;
  static_assert(Tile::kQueries == kTreeRows);
  __shared__ HalfSample halves[2];
  __shared__ float parts[kWarp];
  static_assert(kResidualBytes<Tile> + sizeof(halves) + sizeof(parts) <= kLeastShared);
  const TreeItem item(tree, step);
  if (!item.runs || tree.chosen[blockIdx.x * (1 + tree.most_chosen)] == kAllClusters) return;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 2) halves[thread] = tree.halves[2 * int64_t{blockIdx.x} + thread];
  __syncthreads();
  if (halves[0].count + halves[1].count == 0) return;
  const TreeRows<T> rows(tree, item.place, item.tile);
  char* const queries = dynamic_shared<char>();
  flash_copy_runs<Tile, Tile::kQueries>(
      queries, static_cast<int>(tree.job.params.head_size), [&](int part) { return rows.query_run(part); },
      [&](int row) { return rows.query(row); }, KeepAll{});
  FlashState<Tile> state, other;
  state.clear();
  float more[FlashState<Tile>::kRows], all[FlashState<Tile>::kRows] = {};
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    ResidualMatrices<Tile> matrices(rows, halves[h], queries + Tile::kQueryBytes);
    __syncthreads();  // nobody reads a slot any more
    matrices.start(0);
    other = state;
    sum_half(state, rows, queries, matrices);
    compare_half(state, TreeOutput<T>(rows, step), more);
#pragma unroll
    for (int t = 0; t < FlashState<Tile>::kRows; ++t) all[t] += more[t];
  }
  correct_output(other, state, all, TreeOutput<T>(rows, step), parts);
}

template <class Tile>
void start(Status& status, const TreeLaunch& tree, TreeStep step, int64_t blocks, void* stream) {
  launch(status, tree_residual_kernel<Tile>, dim3(static_cast<unsigned>(blocks)), Tile::kThreads, kResidualBytes<Tile>,
         stream, tree, step);
}

}  // namespace

void correct_tiles(Status& status, const TreeLaunch& tree, TreeStep step, int64_t blocks, void* stream) {
  draw_half_samples(status, tree, step, blocks, stream);
  const int64_t size = std::max(tree.job.params.head_size, tree.job.params.v_head_size);
  visit_type(tree.job.params.type, [&](auto element) {
    using T = decltype(element);
    if (size <= 32) return start<ResidualTile<T, 32>>(status, tree, step, blocks, stream);
    if (size <= 64) return start<ResidualTile<T, 64>>(status, tree, step, blocks, stream);
    start<ResidualTile<T, 128>>(status, tree, step, blocks, stream);
  });
}

}  // namespace cuda
}  // namespace qexport
