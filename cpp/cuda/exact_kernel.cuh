// The kernels of exact attention: tiles of queries on tensor cores or without; a row per warp for what has no tile. For
// exact_float32.cu, exact_float16.cu and exact_bfloat16.cu, which compile them side by side.
#pragma once

#include "exact_choice.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr const char* kTooMany = "batch * q_heads * q_len is too large for one launch; split the batch";
constexpr int kWideThreads = 128;
constexpr int kWideColumns = 4;  // of V per lane

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// Writes row i of a state, times `unit`, where it is `there`; by all lanes of a warp.
template <class T, class State>
__device__ __forceinline__ void put(State& state, int i, float unit, bool there, T* to, int columns) {
  if constexpr (State::kWholeUnits) {
    put_row(state, i, unit, there, to, columns);
  } else if (there) {
    const bool aligned = columns % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
      const int column = State::column(n);
      if (column >= columns) continue;
      const Pair<T> pair{from_float<T>(state.pair(i, n)[0] * unit), from_float<T>(state.pair(i, n)[1] * unit)};
      if (aligned) {
        *reinterpret_cast<Pair<T>*>(to + column) = pair;
      } else {
        to[column] = pair.low;
        if (column + 1 < columns) to[column + 1] = pair.high;
      }
    }
  }
}

// Queries of one ExactTile per block of threads: to y, or a part of its keys to part_outputs and part_stats.
template <class Tile, template <class> class State>
__global__ __launch_bounds__(Tile::kThreads,
                             Tile::kBlocksPerProcessor) void exact_kernel(const __grid_constant__ ExactLaunch launch) {
#ifdef __CUDA_ARCH__
  if (!State<Tile>::runs_on(__CUDA_ARCH__)) return;  // spares the compiler what is never started
#endif
  using T = typename Tile::T;
  char* const shared = dynamic_shared<char>();
  if (launch.cut) let_next_begin();
  ExactTileOf<Tile> tile;
  if (!tile.open(launch, shared + Tile::kSharedBytes)) return;
  State<Tile> state;
  state.clear();
  if constexpr (Tile::kPipeline) state.give_up([&](int row) { return !tile.ours(row); });
  if (!attend(state, shared, tile.count, tile)) return;
  state.join_sums();
#pragma unroll
  for (int i = 0; i < State<Tile>::kRows; ++i) {
    const int row = state.row(i);
    const bool ours = tile.ours(row), keyless = state.sum[i] == 0.0f;
    if (tile.slot >= 0) {
      const int64_t at = tile.slot + row * launch.parts;
      if (ours && state.column(0) == 0) {
        launch.part_stats[2 * at] = state.most[i], launch.part_stats[2 * at + 1] = state.sum[i];
      }
      // join_parts_kernel does not read a part without keys.
      put(state, i, 1.0f, ours && !keyless, launch.part_outputs + at * tile.v_head_size, tile.v_head_size);
    } else {
      const float unit = keyless ? 0.0f : fast_reciprocal(state.sum[i]);  // a row without keys is 0
      put(state, i, unit, ours, tile.output(row), tile.v_head_size);
    }
  }
}

// Row `index` of those that were cut: calls join(T* to, float* stats, float* outputs) with where it goes and what its parts
// left, unless it lies beyond its tile or is not wanted.
template <class T, class Join>
__device__ __forceinline__ void for_cut_row(const ExactLaunch& launch, int index, const Join& join) {
  const QuantumAttentionParams& p = launch.job.params;
  const int among_cut = index / launch.tile_rows, row = index - among_cut * launch.tile_rows;
  if (among_cut >= launch.cut) return;
  const TilePlace tile = launch.tile_at(launch.whole + among_cut, launch.tile_rows);
  if (tile.first_row + row >= launch.pack * p.q_len) return;
  const QueryPlace place = launch.query_at(tile, row);
  if (launch.only && !launch.only[tile.batch * p.q_heads + place.head]) return;
  const int64_t at = int64_t{index} * launch.parts;
  join(output_row<T>(launch.job, tile.batch, place.head, place.query), launch.part_stats + 2 * at,
       launch.part_outputs + at * p.v_head_size);
}

// A row of the tiles that were cut by each team of `warps`.
template <class T>
__global__ __launch_bounds__(kJoinThreads) void join_parts_kernel(const __grid_constant__ ExactLaunch launch, int warps) {
  wait_for_kernel_before();
  const int threads = warps * kWarp, thread = static_cast<int>(threadIdx.x);
  const int index = static_cast<int>(blockIdx.x) * (kJoinThreads / threads) + thread / threads;
  const Team team{thread % threads, warps};
  const int size = static_cast<int>(launch.job.params.v_head_size);
  for_cut_row<T>(launch, index, [&](T* to, const float* stats, const float* outputs) {
    join_parts({stats, outputs, launch.parts}, size, team, [&](int column, float x) { to[column] = from_float<T>(x); });
  });
}

// The same by a warp for each row, of tiles with roles: their rows lie on 16 bytes and have up to 128 columns and kWarpParts
// parts.
template <class T>
__global__ __launch_bounds__(kJoinThreads) void join_few_parts_kernel(const __grid_constant__ ExactLaunch launch) {
  wait_for_kernel_before();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = 4 * lane, parts = launch.parts,
            size = static_cast<int>(launch.job.params.v_head_size);
  const int index = static_cast<int>(blockIdx.x) * kJoinWarps + static_cast<int>(threadIdx.x) / kWarp;
  for_cut_row<T>(launch, index, [&](T* to, const float* stats, const float* outputs) {
    float most = -kInf, sum = 0.0f;
    if (lane < parts) most = stats[2 * lane], sum = stats[2 * lane + 1];
    if (sum == 0.0f) most = -kInf;  // a part without keys, whose output is not there
    const float base = warp_max(most), mine = sum == 0.0f ? 0.0f : fast_exp2(most - base), all = warp_sum(mine * sum);
    const float weight = all == 0.0f ? 0.0f : mine / all;
    float x[4] = {};
#pragma unroll 4
    for (int i = 0; i < parts; ++i) {
      const float part_weight = __shfl_sync(kFullWarp, weight, i);
      if (column < size && part_weight != 0.0f) {
        const float4 part = *reinterpret_cast<const float4*>(outputs + i * size + column);
        x[0] = fmaf(part_weight, part.x, x[0]), x[1] = fmaf(part_weight, part.y, x[1]);
        x[2] = fmaf(part_weight, part.z, x[2]), x[3] = fmaf(part_weight, part.w, x[3]);
      }
    }
    if (column < size) {
      *reinterpret_cast<uint2*>(to + column) = uint2{pack_pair(x[0], x[1], T{}), pack_pair(x[2], x[3], T{})};
    }
  });
}

// One row and kWarp * kWideColumns columns per warp, key by key: head sizes without a tile.
template <class T>
__global__ __launch_bounds__(kWideThreads) void wide_kernel(const __grid_constant__ ExactLaunch launch) {
  const AttentionJob& job = launch.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t chunks = ceil_div<int64_t>(p.v_head_size, kWarp * kWideColumns);
  const int64_t item = int64_t{blockIdx.x} * (kWideThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t row = item / chunks, query = row % p.q_len, head = row / p.q_len % p.q_heads, b = row / p.q_len / p.q_heads;
  if (row >= launch.rows() || (launch.only && !launch.only[b * p.q_heads + head])) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t kv_head = head / job.group, first = item % chunks * kWarp * kWideColumns + lane;
  const KeyRange range = key_range(job, b, query);
  const T* const q = row_of<T>(job.tensors.q, b, head, query);
  const float scale = p.scale * kLog2E;
  float o[kWideColumns] = {}, most = -kInf, sum = 0.0f;
  for (int64_t j = range.lo; j < range.hi; ++j) {
    const T* const k = key_row<T>(job, false, b, kv_head, j);
    float x = 0.0f;
    for (int64_t c = lane; c < p.head_size; c += kWarp) x = fmaf(to_float(q[c]), to_float(k[c]), x);
    x = warp_sum(x) * scale;
    if (p.softcap > 0.0f) x = capped_score(x, p.softcap, 2.0f / p.softcap);
    if (job.tensors.mask.data) {
      const float bias = base2_bias(mask_bias(job.tensors.mask, b, head, query, j));
      if (bias == -kInf) continue;
      x += bias;
    }
    const float before = most;
    most = fmaxf(most, x);
    const float base = most == -kInf ? 0.0f : most, fade = fast_exp2(before - base), weight = fast_exp2(x - base);
    sum = fmaf(sum, fade, weight);
    const T* const v = key_row<T>(job, true, b, kv_head, j);
#pragma unroll
    for (int e = 0; e < kWideColumns; ++e) {
      const int64_t c = first + e * kWarp;
      if (c < p.v_head_size) o[e] = fmaf(weight, to_float(v[c]), o[e] * fade);
    }
  }
  T* const y = output_row<T>(job, b, head, query);
  for (int e = 0; e < kWideColumns; ++e) {
    const int64_t c = first + e * kWarp;
    if (c < p.v_head_size) y[c] = from_float<T>(sum == 0.0f ? 0.0f : o[e] / sum);
  }
}

template <class Tile, template <class> class State>
void start(Status& status, ExactLaunch exact, const Device& device, void* scratch, void* stream, Choice<Tile, State>) {
  const AttentionJob& job = exact.job;
  using T = typename Tile::T;
  const TileCut cut = cut_of<Tile>(job, device);
  if (std::max(exact.rows(), cut.blocks()) > INT32_MAX) return status.fail(kTooMany);
  exact.whole = static_cast<int>(cut.whole), exact.cut = static_cast<int>(cut.cut);
  exact.pack = pack_of<Tile>(job), exact.parts = cut.parts, exact.tile_rows = cut.tile_rows;
  exact.by_parts = Divisor(exact.parts), exact.by_tiles = Divisor(tiles_of<Tile>(job));
  exact.by_packs = Divisor(job.params.q_heads / exact.pack), exact.by_group = Divisor(job.group);
  exact.by_queries = Divisor(job.params.q_len);
  const int64_t keys = job.tensors.mask.data ? std::min(job.total_len, job.tensors.mask.len) : job.total_len;
  const auto near = [](int64_t x) { return static_cast<int>(std::min<int64_t>(x, kFar)); };
  exact.past = near(job.params.past_len), exact.keys = near(keys);
  exact.left = near(job.params.left_window), exact.right = job.params.is_causal ? 0 : near(job.params.right_window);
  exact.two_over_cap = 2.0f / job.params.softcap;
  exact.query_stride = static_cast<unsigned>(exact.pack > 1 ? job.tensors.q.head_stride : job.tensors.q.row_stride);
  exact.part_stats = static_cast<float*>(scratch);
  exact.part_outputs = exact.part_stats + cut.stats();
  launch(status, exact_kernel<Tile, State>, dim3(static_cast<unsigned>(cut.blocks())), dim3(Tile::kThreads),
         Choice<Tile, State>::shared_bytes(job), stream, exact);
  const int warps = exact.parts > kWarpParts ? kJoinWarps : 1;
  const dim3 joins(static_cast<unsigned>(ceil_div(exact.cut * exact.tile_rows, kJoinWarps / warps)));
  if constexpr (Tile::kPipeline) {
    launch_overlapping(status, device, join_few_parts_kernel<T>, joins, dim3(kJoinThreads), 0, stream, exact);
  } else {
    launch_overlapping(status, device, join_parts_kernel<T>, joins, dim3(kJoinThreads), 0, stream, exact, warps);
  }
}
template <class T>
void start(Status& status, const ExactLaunch& exact, const Device&, void*, void* stream, Wide<T>) {
  const int64_t chunks = ceil_div<int64_t>(exact.job.params.v_head_size, kWarp * kWideColumns);
  const int64_t blocks = ceil_div<int64_t>(exact.rows() * chunks, kWideThreads / kWarp);
  if (blocks > INT32_MAX) return status.fail(kTooMany);
  launch(status, wide_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kWideThreads), 0, stream, exact);
}

}  // namespace

template <class T>
void start_exact(Status& status, const ExactLaunch& exact, const Device& device, void* scratch, void* stream) {
  choose_of<T>(exact.job, device, [&](auto choice) { start(status, exact, device, scratch, stream, choice); });
}

}  // namespace cuda
}  // namespace qexport
