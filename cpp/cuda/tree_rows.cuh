// The rows that a block of threads of the kernels of tiles answers: which they are, what they see, where their output lies.
#pragma once

#include "flash.cuh"
#include "tree.cuh"

namespace qexport {
namespace cuda {

// What a block of threads is to compute in a step.
struct TreeItem {
  int64_t place;
  int tile, part;  // the part of an audit
  int budget;
  bool runs;

  __device__ __forceinline__ TreeItem(const TreeLaunch& tree, TreeStep step) : part(0), runs(true) {
    const bool probe = step == TreeStep::probes, trial = step == TreeStep::trials, audit = step == TreeStep::audits;
    const int64_t each = probe ? kProbes : trial ? kTrials * tree.trials : audit ? tree.audit_parts : tree.tiles;
    place = blockIdx.x / each;
    const int index = static_cast<int>(blockIdx.x % each);
    budget = tree.budget && !trial ? tree.budget[place] : tree.bought(place);
    // Later queries see more keys under a causal mask: the longest work first.
    tile = static_cast<int>(tree.tiles) - 1 - index;
    if (probe) tile = tree.probe_tile(index);
    if (audit) tile = 0, part = index, runs = budget < tree.clusters;
    if (step == TreeStep::again) runs = tree.again[place];
    if (!trial) return;
    tile = tree.probe_tile(kProbes - 1 - index / tree.trials);
    const int doubled = index % tree.trials;
    if (doubled + 1 == tree.trials) {
      budget = static_cast<int>(tree.clusters);
    } else {
      runs = 2 * (int64_t{budget} << doubled) <= tree.clusters;
      budget <<= doubled;
    }
  }
};

template <class T>
struct TreeRows {
  const TreeLaunch& tree;
  int64_t place, b, q_head, head;
  const int32_t* audited;  // rows that are audited; null: those of a tile
  int first_row, rows;     // of the tile
  int candidates;          // clusters that may be chosen: all rows see all of their keys
  int full, rest;          // those before `full` have kCluster keys, the one there `rest`
  int open, offset;        // causal: keys from `open` on are read as they come; position of query 0

  __device__ __forceinline__ TreeRows(const TreeLaunch& tree_, int64_t place_, int tile, const int32_t* audited_ = nullptr)
      : tree(tree_), place(place_), audited(audited_) {
    const QuantumAttentionParams& p = tree.job.params;
    b = place / p.q_heads, q_head = place % p.q_heads, head = b * p.kv_heads + q_head / tree.job.group;
    first_row = tile * kTreeRows;
    rows = static_cast<int>(min(p.q_len - first_row, int64_t{kTreeRows}));
    const int64_t* nonpad = tree.job.tensors.nonpad_kv_seqlen;
    // There may be more queries than keys, and whoever says how many keys there are may be wrong.
    const int64_t most = tree.job.total_len + p.q_len;
    offset = static_cast<int>(nonpad ? min(max(nonpad[b], int64_t{0}), most) - p.q_len : p.past_len);
    if (p.is_causal) {
      open = min(max(position(0), 0), static_cast<int>(tree.job.total_len) - 1) / kTreeChunk * kTreeChunk;
      candidates = full = open / kCluster, rest = 0;
    } else {
      const int keys = tree.count[head];
      open = keys, candidates = ceil_div(keys, kCluster), full = keys / kCluster, rest = keys % kCluster;
    }
  }
  __device__ __forceinline__ int row_index(int row) const { return audited ? audited[row] : first_row + row; }
  // Of the last key that a row may see, but for padding; rows are in order.
  __device__ __forceinline__ int position(int row) const { return offset + row_index(row); }
  __device__ __forceinline__ const T* query(int row) const {
    return row < rows ? row_of<T>(tree.job.tensors.q, b, q_head, row_index(row)) : nullptr;
  }
  __device__ __forceinline__ Run<T> query_run(int part) const {
    const HeadRows& q = tree.job.tensors.q;
    if (audited) return {nullptr, 0, kUneven};
    return {row_of<T>(q, b, q_head, first_row + part * kRun), static_cast<unsigned>(q.row_stride), rows - part * kRun};
  }
};

// Calls each(i, n, row, column) for every pair of elements of the tile that this thread holds as state.pair(i, n).
template <class State, class T, class Each>
__device__ __forceinline__ void for_pairs(const TreeRows<T>& rows, Each each) {
  const int dv = static_cast<int>(rows.tree.job.params.v_head_size);
#pragma unroll
  for (int i = 0; i < State::kRows; ++i) {
    if (State::row(i) >= rows.rows) continue;
#pragma unroll
    for (int n = 0; n < State::kPairs; ++n) {
      if (State::column(n) < dv) each(i, n, State::row(i), State::column(n));
    }
  }
}

// Where the output of a tile lies, first that of its centroids: in y, or, of a tile that is tried, as float32 in scratch.
template <class T>
struct TreeOutput {
  const TreeRows<T>& rows;
  float* trial;  // null: y
  T* y;
  bool whole;  // put_row may write to y

  __device__ __forceinline__ TreeOutput(const TreeRows<T>& rows_, TreeStep step) : rows(rows_), trial(nullptr) {
    const TreeLaunch& tree = rows.tree;
    if (step == TreeStep::trials) trial = tree.trial_output + blockIdx.x * kTreeRows * tree.job.params.v_head_size;
    y = output_row<T>(tree.job, rows.b, rows.q_head, rows.first_row);
    whole = takes_whole_units(y, tree.job.tensors.y_row_stride);
  }
  __device__ __forceinline__ float2* trial_pair(int row, int column) const {
    return reinterpret_cast<float2*>(trial + row * static_cast<int>(rows.tree.job.params.v_head_size) + column);
  }
  __device__ __forceinline__ T* pair(int row, int column) const {
    return y + row * rows.tree.job.tensors.y_row_stride + column;
  }
  template <class State>
  __device__ __forceinline__ void put(State& state) const {
    const int dv = static_cast<int>(rows.tree.job.params.v_head_size);
    const auto put_rows = [&](auto* first, int64_t stride) {
#pragma unroll
      for (int i = 0; i < State::kRows; ++i) {
        const int row = State::row(i);
        put_row(state, i, 1.0f, row < rows.rows, first + row * stride, dv);
      }
    };
    if (trial) {
      put_rows(trial, dv);
    } else if (whole) {
      put_rows(y, rows.tree.job.tensors.y_row_stride);
    } else {
      for_pairs<State>(rows, [&](int i, int n, int row, int column) {
        T* const to = pair(row, column);
        to[0] = from_float<T>(state.pair(i, n)[0]), to[1] = from_float<T>(state.pair(i, n)[1]);
      });
    }
  }
  // Adds what was put before, times `share` of each row.
  template <class State>
  __device__ __forceinline__ void add_to(State& state, const float (&share)[State::kRows]) const {
    const auto add_pairs = [&](auto get_pair) {
      for_pairs<State>(rows, [&](int i, int n, int row, int column) {
        const float2 values = get_pair(row, column);
        float* const to = state.pair(i, n);
        to[0] = fmaf(share[i], values.x, to[0]), to[1] = fmaf(share[i], values.y, to[1]);
      });
    };
    if (trial) {
      add_pairs([&](int row, int column) { return *trial_pair(row, column); });
    } else if (whole) {
      add_pairs([&](int row, int column) {
        T values[2] = {};
        memcpy(values, __builtin_assume_aligned(pair(row, column), 2 * sizeof(T)), sizeof(values));
        return make_float2(to_float(values[0]), to_float(values[1]));
      });
    } else {
      add_pairs([&](int row, int column) {
        const T* const from = pair(row, column);
        return make_float2(to_float(from[0]), to_float(from[1]));
      });
    }
    __syncwarp();  // put_row writes what other lanes have read
  }
};

}  // namespace cuda
}  // namespace qexport
