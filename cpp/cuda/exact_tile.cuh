// The queries that one block of threads answers exactly, and the keys that they see: the `Blocks` of flash.cuh and
// simt.cuh for a contiguous range of keys.
#pragma once

#include "flash.cuh"

namespace qexport {
namespace cuda {

struct QueryPlace {
  int head, query;
};
// The rows of a tile: `first_row` on of a head, or of the heads that it is packed with, one behind the other.
struct TilePlace {
  int batch, first_head, first_row;
};

// What the threads of exact attention are started with. The rows of a head, or of the `pack` heads that share a kv head,
// are one sequence, cut into `tiles`. The keys of the first `whole` tiles are read by a block of threads each, those of the
// `cut` others in `parts`, joined by join_parts_kernel.
struct ExactLaunch {
  AttentionJob job;
  const int32_t* only;
  int pack, whole, cut, parts;
  int tile_rows;                                               // at most
  Divisor by_parts, by_tiles, by_packs, by_group, by_queries;  // the packs of a batch item; the queries of a head
  int past, keys;                                              // keys as far as their number and the mask's go
  int left, right;                                             // windows; < 0: none
  float two_over_cap;
  unsigned query_stride;  // between rows of a tile of one head, or of several with one query each
  float* part_outputs;    // (cut, tile_rows, parts, v_head_size), not divided by the sum
  float* part_stats;      // (cut, tile_rows, parts, 2): maximum of the scores, and sum
  __host__ __device__ int64_t rows() const { return job.params.batch * job.params.q_heads * job.params.q_len; }

  __device__ __forceinline__ TilePlace tile_at(int index, int queries) const {
    int tile, packed;
    TilePlace at;
    at.batch = by_packs.divide(by_tiles.divide(index, &tile), &packed);
    // Later queries see more keys under a causal mask: the longest work first.
    at.first_row = (by_tiles.divisor - 1 - tile) * queries, at.first_head = packed * pack;
    return at;
  }
  __device__ __forceinline__ QueryPlace query_at(const TilePlace& tile, int row) const {
    QueryPlace at;
    at.head = tile.first_head + by_queries.divide(tile.first_row + row, &at.query);
    return at;
  }
};

// Keys and queries are counted in 32 bits; further away than this there is no key.
constexpr int kFar = 1 << 30;

// Without kMasked the call has no mask.
template <class T_, int kQueries, int kKeys, bool kMasked>
class ExactTile {
 public:
  using T = T_;
  static constexpr int kBiasRow = kKeys + 8;  // floats: rows that lie 8 banks apart are read without conflict

  static size_t shared_bytes(const AttentionJob& job) {
    return kMasked && job.tensors.mask.data ? kKeys * sizeof(int) + kQueries * kBiasRow * sizeof(float) : 0;
  }

  // Called by all threads. False: there is nothing to write.
  __device__ __forceinline__ bool open(const ExactLaunch& exact, char* shared) {
    launch = &exact;
    const AttentionJob& job = exact.job;
    const QuantumAttentionParams& p = job.params;
    seen = reinterpret_cast<int*>(shared);
    bias = reinterpret_cast<float*>(seen + kKeys);
    int index = static_cast<int>(blockIdx.x), part = 0;
    slot = -1;
    if (index >= exact.whole) {
      const int among_cut = exact.by_parts.divide(index - exact.whole, &part);
      index = exact.whole + among_cut, slot = among_cut * exact.tile_rows * exact.parts + part;
    }
    tile = exact.tile_at(index, kQueries);
    head_size = static_cast<int>(p.head_size), v_head_size = static_cast<int>(p.v_head_size);
    scale = p.scale * kLog2E;
    if (exact.only && !any_wanted()) return false;
    key_end = exact.keys, offset = exact.past;
    if (job.tensors.nonpad_kv_seqlen) {
      const int64_t there = given_len(job, tile.batch);
      offset = static_cast<int>(max(int64_t{-kFar}, min(there - p.q_len, int64_t{kFar})));
      key_end = static_cast<int>(min(there, int64_t{exact.keys}));
    }
    if (hides()) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < kKeys; i += static_cast<int>(blockDim.x)) seen[i] = 0;
      __syncthreads();
    }
    const int queries = exact.by_queries.divisor;
    rows = min(exact.pack * queries - tile.first_row, kQueries);
    // The first query of the tile begins and ends to see keys before the others, the last one after them. Those of several
    // heads are taken to be all.
    const int lowest = exact.pack == 1 ? tile.first_row : 0,
              highest = exact.pack == 1 ? tile.first_row + rows - 1 : queries - 1;
    const Range low = range_of(lowest), high = range_of(highest);
    all_from = high.lo, all_to = low.hi;
    count = high.hi > low.lo ? ceil_div(high.hi - low.lo, kKeys) : 0, first = low.lo, end = high.hi;
    if (slot >= 0) {
      int longer;  // so many parts have a block more than the others
      count = exact.by_parts.divide(count, &longer), first += (part * count + min(part, longer)) * kKeys;
      if (part < longer) ++count;
    }
    const int kv_head = exact.by_group.divide(tile.first_head);
    // Where row 0 of all keys would lie in each of the two buffers; arithmetic on addresses, as it may lie before the
    // buffer.
    const auto base = [&](const HeadRows& all) {
      return reinterpret_cast<uintptr_t>(all.data) +
             sizeof(T) * static_cast<uintptr_t>(tile.batch * all.batch_stride + kv_head * all.head_stride);
    };
    key_new = key_past = base(job.tensors.k), value_new = value_past = base(job.tensors.v);
    if (exact.past) {
      key_past = base(job.tensors.past_key), value_past = base(job.tensors.past_value);
      key_new -= sizeof(T) * static_cast<uintptr_t>(exact.past * job.tensors.k.row_stride);
      value_new -= sizeof(T) * static_cast<uintptr_t>(exact.past * job.tensors.v.row_stride);
    }
    return true;
  }

  __device__ __forceinline__ bool any_wanted() const {
    const int32_t* const only = launch->only + tile.batch * launch->job.params.q_heads + tile.first_head;
#pragma unroll 1
    for (int i = 0; i < launch->pack; ++i) {
      if (only[i]) return true;
    }
    return false;
  }
  __device__ __forceinline__ QueryPlace place(int row) const { return launch->query_at(tile, row); }
  __device__ __forceinline__ bool ours(int row) const {
    if (row >= rows) return false;
    return !launch->only || launch->only[tile.batch * launch->job.params.q_heads + place(row).head];
  }

  __device__ __forceinline__ const T* query(int row) const {
    if (!ours(row)) return nullptr;
    const QueryPlace at = place(row);
    return row_of<T>(launch->job.tensors.q, tile.batch, at.head, at.query);
  }
  __device__ __forceinline__ const T* key(int block, int row) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return key_or_value(block, row, key_past, key_new, t.past_key.row_stride, t.k.row_stride);
  }
  __device__ __forceinline__ const T* value(int block, int row) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return key_or_value(block, row, value_past, value_new, t.past_value.row_stride, t.v.row_stride);
  }

  __device__ __forceinline__ Run<T> query_run(int part) const {
    const int at = part * kRun;
    if (launch->pack > 1 && (launch->only || launch->by_queries.divisor > 1)) return {nullptr, 0, kUneven};
    return {row_of<T>(launch->job.tensors.q, tile.batch, tile.first_head, 0) +
                static_cast<uint64_t>(tile.first_row + at) * launch->query_stride,
            launch->query_stride, rows - at};
  }
  __device__ __forceinline__ Run<T> key_run(int block, int part) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return run_of(block, part, key_past, key_new, t.past_key.row_stride, t.k.row_stride);
  }
  __device__ __forceinline__ Run<T> value_run(int block, int part) const {
    const QuantumAttentionTensors& t = launch->job.tensors;
    return run_of(block, part, value_past, value_new, t.past_value.row_stride, t.v.row_stride);
  }

  __device__ __forceinline__ bool plain(int block) const {
    const int from = first + block * kKeys;
    return from >= all_from && from + kKeys <= all_to && !hides() && launch->job.params.softcap == 0.0f;
  }

  // Keys that the mask shuts out for all queries count as hidden once `prepare` was there.
  __device__ __forceinline__ bool hides() const { return kMasked && launch->job.tensors.mask.data != nullptr; }
  __device__ __forceinline__ bool hidden(int block, int row) const { return seen[row] != block + 1; }

  // Lays the mask of the tile into shared memory, as logarithms of base 2. Where all rows have the same, row 0 serves them.
  __device__ __forceinline__ void prepare(int block) {
    if (!hides()) return;
    switch (launch->job.tensors.mask.type) {
      case DType::boolean:
        stage_mask<uint8_t>(block, [](uint8_t x) { return x ? 0.0f : -kInf; });
        break;
      case DType::f16:
        stage_mask<__half>(block, [](__half x) { return to_float(x); });
        break;
      case DType::bf16:
        stage_mask<__nv_bfloat16>(block, [](__nv_bfloat16 x) { return to_float(x); });
        break;
      default:
        stage_mask<float>(block, [](float x) { return x; });
    }
    __syncthreads();
  }

  template <int kCount, class At, class Key>
  __device__ __forceinline__ void adjust(int block, int row, const At& at, const Key& key) const {
    const AttentionJob& job = launch->job;
    if (job.params.softcap > 0.0f) {
#pragma unroll
      for (int m = 0; m < kCount; ++m) at(m) = capped_score(at(m), job.params.softcap, launch->two_over_cap);
    }
    // Everything is selected, so that a NaN behind the mask does not leak.
    if (hides()) {
      const float* const row_bias = bias + row * bias_step;
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        const float b = row_bias[key(m)];
        at(m) = b > -kInf ? at(m) + b : -kInf;
      }
    }
    const Range range = ours(row) ? range_of(place(row).query) : Range{0, 0};
    const int from = first + block * kKeys, lo = range.lo - from, hi = range.hi - from;
#pragma unroll
    for (int m = 0; m < kCount; ++m) at(m) = key(m) >= lo && key(m) < hi ? at(m) : -kInf;
  }

  __device__ __forceinline__ T* output(int row) const {
    const QueryPlace at = place(row);
    return output_row<T>(launch->job, tile.batch, at.head, at.query);
  }

  int count;  // of blocks of keys
  int slot;   // of the part of row 0, launch->parts before that of row 1; < 0: the tile's keys are not cut
  int head_size, v_head_size;
  float scale;

 private:
  // As key_range, of this batch item; where hi <= lo there are none.
  struct Range {
    int lo, hi;
  };
  __device__ __forceinline__ Range range_of(int query) const {
    const int position = query + offset;
    const int left = launch->left, right = launch->right;
    const int hi = right >= 0 && right < key_end - position - 1 ? position + 1 + right : key_end;
    const int lo = left >= 0 ? max(0, min(position - left, hi)) : 0;
    return {lo, hi};
  }

  template <class Mask, class Bias>
  __device__ __forceinline__ void stage_mask(int block, const Bias& bias_of) {
    const AttentionMask& mask = launch->job.tensors.mask;
    bias_step = mask.query_stride == 0 && (launch->pack == 1 || mask.head_stride == 0) ? 0 : kBiasRow;
    // A thread stays with one key.
    const int rows = bias_step ? kQueries : 1, key = static_cast<int>(threadIdx.x) % kKeys, j = first + block * kKeys + key;
    const Mask* const start = static_cast<const Mask*>(mask.data) + tile.batch * mask.batch_stride + j;
    bool any = false;
#pragma unroll 4
    for (int row = static_cast<int>(threadIdx.x) / kKeys; row < rows; row += static_cast<int>(blockDim.x) / kKeys) {
      float x = -kInf;
      if (j < end && (!bias_step || ours(row))) {
        const QueryPlace at = place(row);
        x = base2_bias(bias_of(start[at.head * mask.head_stride + at.query * mask.query_stride]));
      }
      any = any || x > -kInf;
      bias[row * kBiasRow + key] = x;
    }
    if (any) static_cast<volatile int*>(seen)[key] = block + 1;  // all threads of the key write the same
  }

  __device__ __forceinline__ const T* key_or_value(int block, int row, uintptr_t past, uintptr_t fresh, int64_t past_stride,
                                                   int64_t stride) const {
    const int from = first + block * kKeys, j = from + row, past_len = launch->past;
    if (j >= end) return nullptr;
    // Nearly all blocks lie on one side, which all threads know.
    const bool old = from < past_len && (from + kKeys <= past_len || j < past_len);
    return reinterpret_cast<const T*>((old ? past : fresh) +
                                      sizeof(T) * static_cast<uintptr_t>(j * (old ? past_stride : stride)));
  }

  __device__ __forceinline__ Run<T> run_of(int block, int part, uintptr_t past, uintptr_t fresh, int64_t past_stride,
                                           int64_t stride) const {
    const int from = first + block * kKeys + part * kRun, past_len = launch->past;
    const bool old = from < past_len;
    if (old && past_len < min(from + min(kRun, kKeys), end)) return {nullptr, 0, kUneven};
    const unsigned step = static_cast<unsigned>(old ? past_stride : stride);  // aligned_rows sees to it
    return {reinterpret_cast<const T*>((old ? past : fresh)) + static_cast<uint64_t>(from) * step, step, end - from};
  }

  const ExactLaunch* launch;
  TilePlace tile;
  int first, end;        // of the keys
  int all_from, all_to;  // the keys that every row sees
  int rows;              // of the tile
  int key_end, offset;   // of all keys; position of query 0
  int* seen;             // (kKeys,) 1 + the last block whose key some query sees, as far as the mask goes
  float* bias;           // (kQueries, kBiasRow)
  int bias_step = 0;
  uintptr_t key_past, key_new, value_past, value_new;
};

}  // namespace cuda
}  // namespace qexport
