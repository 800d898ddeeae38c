// The kernel of tiles that reads keys: the chosen clusters of a tile, or all, beside what its centroids gave.
#pragma once

#include "tree_chosen.cuh"

namespace qexport {
namespace cuda {

template <class Tile>
constexpr size_t kAttendSharedBytes = Tile::kSharedBytes + kTreeRows * sizeof(int32_t);

// Divides the state by its sum, joined with that of the centroids, which `output` holds, where there are any.
template <class State, class T>
__device__ __forceinline__ void join_centroids(State& state, const TreeOutput<T>& output, bool centroids) {
  const float* const weights = output.rows.tree.centroid_weight + int64_t{blockIdx.x} * kTreeRows;
  float share[State::kRows];  // of the centroids
#pragma unroll
  for (int i = 0; i < State::kRows; ++i) {
    const float weight = centroids ? weights[State::row(i)] : -kInf, most = fmaxf(state.most[i], weight);
    const float base = most == -kInf ? 0.0f : most, fade = fast_exp2(state.most[i] - base);
    share[i] = fast_exp2(weight - base);
    const float sum = fmaf(fade, state.sum[i], share[i]), unit = sum > 0.0f ? 1.0f / sum : 0.0f;  // a row without keys is 0
    share[i] *= unit;
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) state.pair(i, n)[0] *= fade * unit, state.pair(i, n)[1] *= fade * unit;
  }
  if (centroids) output.add_to(state, share);
}

// Part of the exact output of the rows that are audited.
template <class State, class T>
__device__ __forceinline__ void put_part(State& state, const TreeRows<T>& rows) {
  const int64_t first = int64_t{blockIdx.x} * kTreeRows, dv = rows.tree.job.params.v_head_size;
  for_pairs<State>(rows, [&](int i, int n, int row, int column) {
    *reinterpret_cast<float2*>(rows.tree.audit_output + (first + row) * dv + column) =
        make_float2(state.pair(i, n)[0], state.pair(i, n)[1]);
  });
}

template <class State, class T>
__device__ __forceinline__ void put_stats(const State& state, const TreeRows<T>& rows) {
  float* const stats = rows.tree.stats + 2 * int64_t{blockIdx.x} * kTreeRows;
#pragma unroll
  for (int i = 0; i < State::kRows; ++i) {
    if (State::row(i) >= rows.rows || State::column(0) != 0) continue;
    stats[2 * State::row(i)] = state.most[i], stats[2 * State::row(i) + 1] = state.sum[i];
  }
}

// A tile, or a part of an audit, per block of threads.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerProcessor)
    tree_attend_kernel(const __grid_constant__ TreeLaunch tree, TreeStep step) {
#ifdef __CUDA_ARCH__
  if (!FlashState<Tile>::runs_on(__CUDA_ARCH__)) return;  // spares the compiler what is never started
#endif
  using T = typename Tile::T;
  using State = FlashState<Tile>;
  static_assert(Tile::kQueries == kTreeRows);
  const TreeItem item(tree, step);
  if (!item.runs) return;
  const bool audit = step == TreeStep::audits;
  int32_t* const audited = dynamic_shared<int32_t>(Tile::kSharedBytes);
  if (audit) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < min(tree.job.params.q_len, int64_t{kTreeRows})) audited[thread] = tree.audit_row(item.place, thread);
    __syncthreads();
  }
  const TreeRows<T> rows(tree, item.place, item.tile, audit ? audited : nullptr);
  const int32_t* const choice = tree.chosen + blockIdx.x * (1 + tree.most_chosen);
  const bool all = audit || step == TreeStep::again || *choice == kAllClusters;
  ChosenBlocks<T, Tile::kKeys> blocks(rows, all ? nullptr : choice + 1, all ? rows.candidates : *choice, item.part,
                                      audit ? tree.audit_parts : 1);
  State state;
  state.clear();
  attend(state, dynamic_shared<char>(), blocks.count, blocks);
  state.join_sums();
  if (audit || tree.draws) put_stats(state, rows);
  if (audit) return put_part(state, rows);
  const TreeOutput<T> output(rows, step);
  join_centroids(state, output, !all);
  output.put(state);
}

}  // namespace cuda
}  // namespace qexport
